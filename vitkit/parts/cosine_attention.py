"""Cosine attention of VideoMAE V2 and Swin V2 as a timm attention layer: `attn_layer=CosineAttention`.

Queries and keys are scaled to length 1 in every head, and their products, cosines, are multiplied by
exp(min(scale, ln 100)) with one learned `scale` a head (init ln 10). Both happen in timm's own `q_norm` and `k_norm`, so
everything that takes attention apart (`vitkit.parts.attention`, prompts, LoRA) computes it without knowing. A bias of
keys would change cosines, which it does not in plain attention; the authors have none, so there is none here.

Source: OpenGVLab/VideoMAEv2, models/modeling_finetune.py, class CosAttention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

LARGEST = math.log(100.0)  # of `scale`
START = math.log(10.0)


class UnitKeys(nn.Module):
    """(..., d) to length 1."""

    def forward(self, k: Tensor) -> Tensor:
        return F.normalize(k, dim=-1)


class CosineQueries(nn.Module):
    """(B, heads, n, d) to length exp(min(scale, ln 100)) sqrt(d): attention divides by sqrt(d) again.

    `scale` is kept as (heads,), so that weight decay leaves it alone; the authors keep (heads, 1, 1).
    """

    def __init__(self, num_heads: int, head_dim: int, **where: Any):
        super().__init__()
        self.scale = nn.Parameter(torch.full((num_heads,), START, **where))
        self.root = head_dim**0.5

    def forward(self, q: Tensor) -> Tensor:
        factor = self.scale.clamp(max=LARGEST).exp() * self.root
        return F.normalize(q, dim=-1) * factor.view(-1, 1, 1).to(q.dtype)


class QVLinear(nn.Linear):
    """Queries, keys and values (..., 3 D) in one layer with biases for queries and values only."""

    def __init__(self, dim: int, attn_dim: int, **kwargs: Any):
        super().__init__(dim, 3 * attn_dim, bias=False, **kwargs)
        self.q_bias = nn.Parameter(self.weight.new_zeros(attn_dim))
        self.v_bias = nn.Parameter(self.weight.new_zeros(attn_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class CosineAttention(Attention):
    """timm's attention with cosines in place of dot products. Takes timm's arguments; `qk_norm` has no meaning here."""

    def __init__(self, dim: int, num_heads: int = 8, *, qkv_bias: bool = False, qk_norm: bool = False, **kwargs: Any):
        super().__init__(dim, num_heads, qkv_bias=False, **kwargs)
        where = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        if qkv_bias:
            self.qkv = QVLinear(dim, self.attn_dim, **where)
        self.q_norm = CosineQueries(num_heads, self.head_dim, **where)
        self.k_norm = UnitKeys()
