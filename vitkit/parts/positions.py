"""Position tables of ViTs: the fixed sine-cosine ones, and resampling a table to another grid by a named rule.

Rules differ, and the difference is large away from the native grid, so the rule is data that travels with the weights:

    "timm"    bicubic with antialiasing to the new size (timm, DINOv2 with registers)
    "mae"     bicubic, align_corners=False, no antialiasing, to the new size (MAE util/pos_embed.py, DeiT fine-tuning)
    "dinov2"  bicubic, no antialiasing, by the scale factor (new + 0.1) / old (DINO and DINOv2 vision_transformer.py)
    "trilinear"  volumes: trilinear over the three axes, align_corners=False
    "video"   videos: bicubic (align_corners=False) in every time step, then linear along time (what VideoMAE V2's
              fine-tuning code means to do)
    "rebuild" videos: a fresh sinusoid for the new grid, whatever the table held (what that code really does)

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
from vitkit.parts.sinusoid import sinusoid

Rule = Literal["timm", "dinov2", "mae", "trilinear", "video", "rebuild"]
RULES: tuple[str, ...] = get_args(Rule)
AXES = {"timm": 2, "dinov2": 2, "mae": 2, "trilinear": 3, "video": 3, "rebuild": 3}  # of the grid that a rule is for


def resample_positions(
    table: Tensor,
    new_grid: Sequence[int],
    *,
    prefix: int,
    rule: Rule | str,
    old_grid: Sequence[int] | None = None,
) -> Tensor:
    """`table` (1, prefix + h * w, D) resampled to `new_grid` (h', w'): (1, prefix + h' * w', D), in the table's dtype.
    Grids of volumes and videos have three axes.

    prefix: leading rows that belong to class, distillation or register tokens; copied.
    old_grid: (h, w) of the table; may be left out only when its patch rows form a square.
    Raises WeightsError for an unknown rule or rows that do not fit `old_grid`.
    """
    if rule not in RULES:
        raise WeightsError(f"unknown position rule {rule!r}", fix=f"one of {', '.join(RULES)}")
    if len(new_grid) != AXES[rule]:
        fits = [name for name, axes in AXES.items() if axes == len(new_grid)]
        raise WeightsError(
            f"position rule {rule!r} is for grids of {AXES[rule]} axes, and this has {len(new_grid)}",
            fix=f"one of {', '.join(fits)}",
        )
    rows = table.shape[1] - prefix
    old: tuple[int, ...] | None = square_grid(rows) if old_grid is None else tuple(int(n) for n in old_grid)
    if old is None or math.prod(old) != rows:
        raise WeightsError(
            f"a position table with {rows} patch rows does not fit {'a square grid' if old is None else f'grid {old}'}",
            fix="give old_grid=(rows, columns) of the table",
        )
    new = tuple(int(n) for n in new_grid)
    if new == old:
        return table
    if rule == "rebuild":
        fresh = sinusoid(math.prod(new), table.shape[-1]).to(table)
        return torch.cat([table[:, :prefix], fresh[None]], dim=1)
    maps = table[:, prefix:].float().reshape(1, *old, -1).movedim(-1, 1)  # (1, D, h, w)
    if rule == "dinov2":
        # The factor itself (not the size) drives the sampling positions; flooring old * factor gives back `new`.
        factor = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        maps = F.interpolate(maps, scale_factor=factor, mode="bicubic", antialias=False)
    elif rule == "mae":
        maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False, antialias=False)
    elif rule == "trilinear":
        maps = F.interpolate(maps, size=new, mode="trilinear", align_corners=False)
    elif rule == "video":
        maps = _resample_video(maps, new)
    else:
        maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    patches = maps.movedim(1, -1).reshape(1, math.prod(new), -1).to(table.dtype)
    return torch.cat([table[:, :prefix], patches], dim=1)


def _resample_video(maps: Tensor, new: Sequence[int]) -> Tensor:
    """(1, D, t, h, w) to (1, D, *new): every step of time by itself, then along time."""
    if tuple(maps.shape[3:]) != tuple(new[1:]):
        steps = maps[0].transpose(0, 1)  # (t, D, h, w)
        steps = F.interpolate(steps, size=tuple(new[1:]), mode="bicubic", align_corners=False)
        maps = steps.transpose(0, 1)[None]
    if maps.shape[2] != new[0]:
        lines = maps.flatten(3).movedim(2, -1).flatten(1, 2)  # (1, D h w, t)
        lines = F.interpolate(lines, size=new[0], mode="linear", align_corners=False)
        maps = lines.unflatten(1, (maps.shape[1], -1)).movedim(-1, 2).unflatten(3, tuple(new[1:]))
    return maps


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
