"""Position tables of ViTs: the fixed sine-cosine one, and resampling a table to another grid by a named rule.

Rules differ, and the difference is large away from the native grid, so the rule is data that travels with the weights:

    "timm"    bicubic with antialiasing to the new size (timm, DINOv2 with registers)
    "mae"     bicubic, align_corners=False, no antialiasing, to the new size (MAE util/pos_embed.py, DeiT fine-tuning)
    "dinov2"  bicubic, no antialiasing, by the scale factor (new + 0.1) / old (DINO and DINOv2 vision_transformer.py)

Every rule copies the rows of prefix tokens and returns an equal grid untouched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.errors import WeightsError

Rule = Literal["timm", "dinov2", "mae"]
RULES: tuple[str, ...] = get_args(Rule)


def resample_positions(
    table: Tensor,
    new_grid: Sequence[int],
    *,
    prefix: int,
    rule: Rule | str,
    old_grid: Sequence[int] | None = None,
) -> Tensor:
    """`table` (1, prefix + h * w, D) resampled to `new_grid` (h', w'): (1, prefix + h' * w', D), in the table's dtype.

    prefix: leading rows that belong to class, distillation or register tokens; copied.
    old_grid: (h, w) of the table; may be left out only when its patch rows form a square.
    Raises WeightsError for an unknown rule or rows that do not fit `old_grid`.
    """
    if rule not in RULES:
        raise WeightsError(f"unknown position rule {rule!r}", fix=f"one of {', '.join(RULES)}")
    rows = table.shape[1] - prefix
    old = square_grid(rows) if old_grid is None else (int(old_grid[0]), int(old_grid[1]))
    if old is None or math.prod(old) != rows:
        raise WeightsError(
            f"a position table with {rows} patch rows does not fit {'a square grid' if old is None else f'grid {old}'}",
            fix="give old_grid=(rows, columns) of the table",
        )
    new = (int(new_grid[0]), int(new_grid[1]))
    if new == old:
        return table
    maps = table[:, prefix:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    if rule == "dinov2":
        # The factor itself (not the size) drives the sampling positions; flooring old * factor gives back `new`.
        factor = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        maps = F.interpolate(maps, scale_factor=factor, mode="bicubic", antialias=False)
    elif rule == "mae":
        maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False, antialias=False)
    else:
        maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    patches = maps.permute(0, 2, 3, 1).reshape(1, math.prod(new), -1).to(table.dtype)
    return torch.cat([table[:, :prefix], patches], dim=1)


def square_grid(count: int) -> tuple[int, int] | None:
    """The square grid of `count` patches, or None when `count` is not a perfect square."""
    side = math.isqrt(count) if count > 0 else 0
    return (side, side) if side and side * side == count else None


def sincos_2d(dim: int, grid: Sequence[int], *, prefix: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine table (prefix + h * w, dim), float32 computed in float64; `prefix` leading rows are zero.

    The first dim/2 channels encode the column, the others the row; each half holds all sines, then all cosines, of
    pos * 10000^(-k / (dim/4)), k = 0 .. dim/4 - 1. Rows are row-major over the grid (MAE util/pos_embed.py, there for
    square grids). Raises WeightsError unless `dim` is a multiple of 4.
    """
    if dim % 4 or dim <= 0:
        raise WeightsError(f"a 2-D sine-cosine table needs a width that is a multiple of 4, got {dim}")
    height, width = int(grid[0]), int(grid[1])
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))

    def axis(positions: np.ndarray) -> np.ndarray:
        angles = np.outer(positions.astype(np.float64), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    columns = np.tile(np.arange(width), height)
    rows = np.repeat(np.arange(height), width)
    table = np.concatenate([axis(columns), axis(rows)], axis=1)  # (h * w, dim)
    return torch.from_numpy(np.concatenate([np.zeros((prefix, dim)), table]).astype(np.float32))


def is_sincos(table: Tensor, *, prefix: int) -> bool:
    """Whether `table` (1, prefix + N, D) is the fixed sine-cosine table of a square grid (to half precision)."""
    grid = square_grid(table.shape[1] - prefix)
    if grid is None or table.shape[2] % 4:
        return False
    fixed = sincos_2d(table.shape[2], grid, prefix=prefix)
    return bool((table[0].float() - fixed).abs().max() < 1e-2)
