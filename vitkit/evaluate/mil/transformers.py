"""Heads that let tiles look at each other: TransMIL (Shao et al. 2021, arXiv 2106.00908) and HIPT's slide-level head
(Chen et al. 2022, arXiv 2206.02647), as configured by owkin/HistoSSLscaling (73f1d191).

TransMIL's original ignores the padding mask, so its answer for a slide depends on the longest slide of the batch, and
with Nystrom attention on all of them. Here every bag is run at its own length by default (`per_bag`); `per_bag=False`
is the original.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import ConfigError

from .heads import GatedAttention, Head


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention (B, n, D) -> (B, n, D)."""

    def __init__(self, dim: int, heads: int, *, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _split(self.qkv(x), self.heads)
        return self.proj(_join(F.scaled_dot_product_attention(q, k, v)))


class NystromAttention(nn.Module):
    """Attention through `landmarks` means of consecutive queries and keys (Xiong et al. 2021, arXiv 2102.03902), with a
    depthwise convolution of the values along the sequence beside it. Zeros in front make the length a multiple."""

    def __init__(
        self, dim: int, heads: int, *, landmarks: int = 256, kernel: int = 33, iterations: int = 6, bias: bool = False
    ):
        super().__init__()
        if kernel % 2 == 0:
            raise ConfigError(f"the residual convolution's kernel is {kernel}", fix="an odd number, e.g. 33")
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.res_conv = nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = F.pad(x, (0, 0, -n % self.landmarks, 0))
        q, k, v = _split(self.to_qkv(x), self.heads)  # (B, h, n', d)
        q = q * q.shape[-1] ** -0.5
        groups = (self.landmarks, x.shape[1] // self.landmarks)
        ql, kl = q.unflatten(2, groups).mean(3), k.unflatten(2, groups).mean(3)  # (B, h, m, d)
        left, right = (q @ kl.mT).softmax(-1), (ql @ k.mT).softmax(-1)
        middle = pinv((ql @ kl.mT).softmax(-1), self.iterations)
        out = left @ middle @ (right @ v) + self.res_conv(v)
        return self.to_out(_join(out))[:, -n:]


def pinv(a: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse of (..., m, m) by iteration; the start is scaled by one maximum over the whole batch."""
    z = a.mT / (a.abs().sum(-1).max() * a.abs().sum(-2).max())
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n, 3 D) -> q, k, v (B, heads, n, d)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _join(x: Tensor) -> Tensor:
    """(B, heads, n, d) -> (B, n, D)."""
    return x.transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """x + attention(norm(x)); no MLP."""

    def __init__(self, dim: int, attn: nn.Module):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), attn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class PPEG(nn.Module):
    """Positions from convolutions over the tiles laid out as a square, row by row: x + 3x3 + 5x5 + 7x7 (full ones)."""

    def __init__(self, dim: int):
        super().__init__()
        for index, size in enumerate((3, 5, 7), start=1):
            setattr(self, f"group_conv{index}", nn.Conv2d(dim, dim, size, padding=size // 2))

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        square = x.transpose(1, 2).unflatten(2, (side, side))
        out = square + self.group_conv1(square) + self.group_conv2(square) + self.group_conv3(square)
        return out.flatten(2).transpose(1, 2)


class TransMIL(Head):
    """Two attention blocks over class token and tiles with convolutional positions between; the head reads the token.

    nystrom: keyword arguments of `NystromAttention` (landmarks, kernel, iterations), or None for softmax attention.
    """

    stackable = False  # each bag has its own length

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        dim: int | None = 512,
        heads: int = 8,
        qkv_bias: bool = False,
        nystrom: dict[str, int] | None = None,
        per_bag: bool = True,
        metadata_cols: int = 0,
    ):
        super().__init__(metadata_cols)
        self.per_bag = per_bag
        self.proj = nn.Identity() if dim is None else nn.Sequential(nn.Linear(in_features, dim))
        dim = dim or in_features
        if dim % heads:
            raise ConfigError(f"{heads} heads do not divide dim {dim}", fix=f"e.g. heads={math.gcd(dim, 8)}")
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))

        def block() -> Residual:
            if nystrom is None:
                return Residual(dim, SoftmaxAttention(dim, heads, bias=qkv_bias))
            return Residual(dim, NystromAttention(dim, heads, bias=qkv_bias, **nystrom))

        self.cor, self.agg = block(), block()
        self.pos_enc, self.norm, self.head = PPEG(dim), nn.LayerNorm(dim), nn.Linear(dim, out_features)

    def bag(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        (x,) = parts
        if mask is None or not self.per_bag:
            return self.whole(x)
        real = ~mask.reshape(mask.shape[:2])
        return torch.cat([self.whole(bag[keep].unsqueeze(0)) for bag, keep in zip(x, real, strict=True)])

    def flat(self, x: Tensor, places: Tensor) -> Tensor:
        pad = places < 0  # zeros, as the original's padding: it counts where the mask is ignored
        x = x.index_select(0, places.clamp_min(0).flatten()).unflatten(0, places.shape)
        return self(x.masked_fill(pad.unsqueeze(-1), 0.0), pad)

    def whole(self, x: Tensor) -> Tensor:
        """Logits of bags (B, T, D) without padding."""
        x = self.proj(x)
        side = math.ceil(math.sqrt(x.shape[1]))
        x = torch.cat([x, x[:, : side * side - x.shape[1]]], dim=1)  # the first tiles again, up to a square
        x = self.cor(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))
        x = torch.cat([x[:, :1], self.pos_enc(x[:, 1:])], dim=1)
        return self.head(self.norm(self.agg(x)[:, 0]))


class HIPT(Head):
    """HIPT's slide-level head: linear, a small Transformer encoder over the tiles, gated attention, linear, logits."""

    stackable = False  # dropout

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        dim: int = 192,
        depth: int = 2,
        heads: int = 3,
        dropout: float = 0.25,
        metadata_cols: int = 0,
    ):
        super().__init__(metadata_cols)
        self.phi = nn.Sequential(nn.Linear(in_features, dim), nn.ReLU(), nn.Dropout(dropout))
        layer = nn.TransformerEncoderLayer(dim, heads, dim, dropout, activation="relu", batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.attention = GatedAttention(dim)
        self.rho = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(dim, out_features)

    def tile(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.phi(self.features(x)),)

    def pool(self, parts: tuple[Tensor, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> slide vectors (B, dim), attention (B, T, 1)."""
        flat = None if mask is None else mask.reshape(mask.shape[:2])
        h = self.transformer(parts[0], src_key_padding_mask=flat)
        a = self.attention(h, mask)
        return (a.transpose(1, 2) @ h).squeeze(1), a

    def bag(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        return self.classifier(self.rho(self.pool(parts, mask)[0]))

    def tile_weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.pool(self.tile(x), mask)[1].squeeze(-1)
