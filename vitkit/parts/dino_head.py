"""The projection head of DINO, iBOT and DINOv2: an MLP, unit length, and a weight-normalised layer of prototypes.

Source: DINOv2, layers/dino_head.py. Names of its tensors are the official ones (`mlp.0.weight`, `last_layer.weight_g`,
...), so that released heads load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import WeightsError

# What newer versions of torch call the two parts of a weight-normalised layer.
_PARAMETRIZED = {"original0": "weight_g", "original1": "weight_v"}


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: row k of its weight is weight_g[k] * weight_v[k] / |weight_v[k]|."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # nn.Linear's own, as in the official code

    @property
    def scale(self) -> Tensor:
        """(K,): weight_g / |weight_v|, so that the weight is scale[k] * weight_v[k]; with gradients to both."""
        return self.weight_g.squeeze(1) / self.weight_v.norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K) without ever writing the scaled weight down."""
        return F.linear(x, self.weight_v) * self.scale


class DINOHead(nn.Module):
    """Tokens (n, in_dim) to logits (n, prototypes): `layers` linear layers with GELU between them, unit length, prototypes.

    Losses take `bottleneck(x)` and the last layer's parameters apart, so that logits of all rows never exist at once.
    """

    def __init__(
        self, in_dim: int, prototypes: int, *, hidden_dim: int = 2048, bottleneck_dim: int = 256, layers: int = 3
    ):
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        between = [module for linear in linears for module in (linear, nn.GELU())][:-1]
        self.mlp = linears[0] if layers == 1 else nn.Sequential(*between)
        self.last_layer = Prototypes(bottleneck_dim, prototypes)

    @property
    def prototypes(self) -> int:
        return self.last_layer.weight_g.shape[0]

    def bottleneck(self, x: Tensor) -> Tensor:
        """Unit rows (n, bottleneck_dim)."""
        x = self.mlp(x)
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(x))


def head_from(tensors: Mapping[str, Tensor], what: str = "the head") -> DINOHead:
    """A head with the tensors of a file (`dino_head.safetensors` of RAD-DINO, or a part of a training dump), its sizes
    read off them. Raises WeightsError when they are not those of such a head."""
    named = {_official(name): value for name, value in tensors.items()}
    try:
        count, bottleneck = named["last_layer.weight_v"].shape
        layers = (
            1 if "mlp.weight" in named else 1 + max(int(n.split(".")[1]) for n in named if n.startswith("mlp.")) // 2
        )
        first = named["mlp.weight" if layers == 1 else "mlp.0.weight"]
        head = DINOHead(first.shape[1], count, hidden_dim=first.shape[0], bottleneck_dim=bottleneck, layers=layers)
        head.load_state_dict(named)
    except (KeyError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{what} is not a DINO head: {error}",
            fix="tensors called mlp.0.weight ... and last_layer.weight_g, last_layer.weight_v",
        ) from error
    return head


def _official(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"last_layer.{_PARAMETRIZED[last]}" if last in _PARAMETRIZED and "last_layer" in stem else name
