"""Decoder blocks that read other tokens by cross attention, and the two shortcuts of masked decoders.

Shortcuts, exact up to rounding: mask tokens differ by their position alone, so that what the first block projects of them is
computed once a grid and looked up (`first_block`); nobody reads visible rows after the last block, so that its queries, MLP
and output are computed from row `start` on (`CrossBlock`).

Shapes: B samples, T query tokens, S memory tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention of queries (B, T, D) on memory (B, S, D): (B, T, D); both projections with bias.

    Tensors `q` (D, D), `kv` (2 D, D) laid out (k or v, head, channel), `proj` (D, D) as in Hi-End-MAE's networks/vit.py.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """x += self attention(norm0 x); x += cross attention(norm1 x, memory); x += MLP(norm2 x). The memory is not normalised."""

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0, eps: float = 1e-6):
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=eps)
        self.norm0, self.norm1, self.norm2 = norm(dim), norm(dim), norm(dim)
        self.self_attn = Attention(dim, num_heads=heads, qkv_bias=True)
        self.cross_attn = CrossAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor, start: int = 0) -> Tensor:
        """Rows `start`... of the result, (B, T - start, D); all rows are attended to."""
        x = x[:, start:] + self_attention(self.self_attn, self.norm0(x), start)
        x = x + self.cross_attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


def self_attention(attn: nn.Module, x: Tensor, start: int = 0) -> Tensor:
    """timm's `Attention` on normalised tokens (B, T, D), for the rows from `start` on."""
    if not start:
        return attn(x)
    dim = x.shape[-1]
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(x[:, start:], weight[:dim], bias[:dim]).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    kv = F.linear(x, weight[dim:], bias[dim:]).unflatten(-1, (2, attn.num_heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def first_block(block: nn.Module, visible: Tensor, table: Tensor, masked: Tensor) -> Tensor:
    """timm's `Block` on visible tokens (B, S, D) followed by the rows `masked` (B, M) of `table` (N, D), which is the mask
    token at every position: (B, S + M, D)."""
    attn = block.attn
    hidden = F.embedding(masked, attn.qkv(block.norm1(table)))  # its gradient is one dense sum
    qkv = torch.cat([attn.qkv(block.norm1(visible)), hidden], dim=1)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    x = torch.cat([visible, F.embedding(masked, table)], dim=1)
    x = x + attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))
