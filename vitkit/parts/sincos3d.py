"""The fixed sine-cosine position table of a grid with three axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkit.errors import WeightsError


def sincos_3d(dim: int, grid: Sequence[int], *, prefix: int = 0) -> Tensor:
    """(prefix + a * b * c, dim), float32 computed in float64; rows row-major over `grid` (a, b, c), `prefix` zero rows first.

    A sixth of the channels each: sines, then cosines, of pos * 10000^(-k / m), k = 0 .. m - 1, m = dim / 6, for the first,
    second and third axis (Hi-End-MAE, networks/vit.py). Raises WeightsError unless `dim` is a multiple of 6.
    """
    if dim % 6 or dim <= 0:
        raise WeightsError(
            f"a 3-D sine-cosine table needs a width that is a multiple of 6, got {dim}",
            fix="another width, or a learned table (positions=keep)",
        )
    omega = 10000.0 ** (-torch.arange(dim // 6, dtype=torch.float64) / (dim // 6))
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten().outer(omega) for axis in axes]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(prefix, dim), table]).float()
