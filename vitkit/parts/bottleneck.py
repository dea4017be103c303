"""DVPT's gated bottleneck, beside MLPs (vitkit.adapt.dvpt) and decoder layers (vitkit.dense.dvpt_segformer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}


class Bottleneck(nn.Module):
    """gate * U(mix(act(Dn(x)))): D -> r -> `out` (D). Parameter names are the official ones."""

    def __init__(
        self, dim: int, rank: int, *, out: int | None = None, gate_init: float = 0.0, activation: str = "quick_gelu"
    ):
        super().__init__()
        self.prompt_gate = nn.Parameter(torch.full((1,), float(gate_init)))
        self.prompt_key_proj_d = nn.Linear(dim, rank)
        self.prompt_key_proj_u = nn.Linear(rank, out or dim)
        self.activation = activation

    def down(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, r)."""
        return ACTIVATIONS[self.activation](self.prompt_key_proj_d(x))

    def up(self, z: Tensor) -> Tensor:
        """(B, T, r) -> (B, T, out), gated."""
        return self.prompt_gate * self.prompt_key_proj_u(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))
