"""The multi-resolution hash grid of 2-D coordinates, as tiny-cuda-nn computes it ("HashGrid", linear, float32), in PyTorch.

Level l has scale s_l = 2^(l log2 b) base - 1 with b = (max / base)^(1 / (L - 1)), resolution r_l = ceil(s_l) + 1 and
min(r_l^2 rounded up to a multiple of 8, 2^log2_size) entries of F features. A coordinate x in [0, 1] lies at s_l x + 1/2;
the four entries around it are mixed bilinearly. A corner beyond the last column wraps into the next row and past the table
to its start; only levels with more cells than entries are really hashed.

Source: NVlabs/tiny-cuda-nn (commit 6ee3546), grid.h and common_device.h; Müller et al., arXiv 2201.05989.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.errors import ConfigError

_PRIME = 2654435761  # of the second axis; the first one has 1
INITIAL = 1e-4  # new entries are uniform in +- this


@dataclass(frozen=True)
class Level:
    """One grid: `entries` rows of the table from `offset` on."""

    scale: float
    resolution: int
    entries: int
    offset: int

    @property
    def hashed(self) -> bool:
        return self.resolution**2 > self.entries


def grid_levels(base: int, largest: int, count: int, log2_size: int) -> tuple[Level, ...]:
    """`count` levels from resolution `base` to about `largest`. The arithmetic is float32, as it decides resolutions."""
    if base < 2 or largest < base or count < 1 or not 1 <= log2_size <= 30:
        raise ConfigError(
            f"a hash grid of {count} levels from {base} to {largest} with 2^{log2_size} entries",
            fix="levels >= 1, 2 <= base_resolution <= max_resolution, 1 <= log2_table <= 30",
        )
    growth = np.float32(math.exp((math.log(largest) - math.log(base)) / (count - 1))) if count > 1 else np.float32(1)
    log2 = np.log2(growth, dtype=np.float32)
    levels, offset = [], 0
    for index in range(count):
        scale = np.exp2(np.float32(index) * log2, dtype=np.float32) * np.float32(base) - np.float32(1)
        resolution = math.ceil(scale) + 1
        entries = min(-(-(resolution**2) // 8) * 8, 2**log2_size)
        levels.append(Level(float(scale), resolution, entries, offset))
        offset += entries
    return tuple(levels)


def total_entries(levels: tuple[Level, ...]) -> int:
    """Rows of the table of all levels."""
    return levels[-1].offset + levels[-1].entries


class Corners:
    """Looks up which entries a coordinate reads: call it with coordinates (..., 2), x first, in [0, 1].

    Returns rows of the table (..., L, 4) int64 and their weights (..., L, 4), corners in the order (x0, y0), (x1, y0),
    (x0, y1), (x1, y1).
    """

    def __init__(self, levels: tuple[Level, ...], device: torch.device | str = "cpu"):
        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.levels = levels
        self.scale = column([level.scale for level in levels], torch.float64)
        self.resolution = column([level.resolution for level in levels], torch.int64)
        self.entries = column([level.entries for level in levels], torch.int64)
        self.offset = column([level.offset for level in levels], torch.int64)
        self.hashed = [index for index, level in enumerate(levels) if level.hashed]

    def __call__(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        # One rounding, as the official fused multiply-add does: (..., 2, L)
        position = (coords.float().unsqueeze(-1) * self.scale + 0.5).float()
        cell = position.floor()
        fraction = position - cell
        cells = torch.stack([cell, cell + 1], -1).long()  # (..., 2, L, 2): lower and upper corner of each axis
        shares = torch.stack([1 - fraction, fraction], -1)
        x, y = cells.unbind(-3)  # (..., L, 2)
        rows = x.unsqueeze(-2) + (y * self.resolution.unsqueeze(-1)).unsqueeze(-1)  # (..., L, 2 of y, 2 of x)
        if self.hashed:
            mixed = x[..., self.hashed, None, :] ^ ((y[..., self.hashed, :, None] * _PRIME) & 0xFFFFFFFF)
            rows[..., self.hashed, :, :] = mixed
        rows = rows % self.entries[:, None, None] + self.offset[:, None, None]
        weights = shares.select(-3, 0).unsqueeze(-2) * shares.select(-3, 1).unsqueeze(-1)
        return rows.flatten(-2), weights.flatten(-2)


class _Mix(torch.autograd.Function):
    """Weighted sums of table rows. The gradient is added row by row, which autograd's own embedding_bag sorts for first."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.count = len(table)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, weights = ctx.saved_tensors
        spread = (weights.unsqueeze(-1) * grad.unsqueeze(1)).flatten(0, 1)
        return grad.new_zeros(ctx.count, grad.shape[1]).index_add_(0, rows.flatten(), spread), None, None


def mix(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Features (..., L * F) of corners `rows`, `weights` (..., L, 4) from `table` (entries, F); level by level.

    Differentiable with respect to the table.
    """
    shape = rows.shape
    out = _Mix.apply(table, rows.reshape(-1, 4), weights.reshape(-1, 4))
    return out.view(*shape[:-2], shape[-2] * table.shape[1])
