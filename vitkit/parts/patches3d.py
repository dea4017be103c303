"""Voxels of the patches of a volume, and back: order (a, b, c) row-major, channel fastest, as Hi-End-MAE has it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitkit.parts.patches import patch_pixels


def patchify_3d(volumes: Tensor, patch_size: Sequence[int], patches: Tensor | None = None) -> Tensor:
    """(B, N, pa * pb * pc * C) of volumes (B, C, a, b, c), or only of `patches` (B, M): others are not copied."""
    if patches is None:
        count = math.prod(side // step for side, step in zip(volumes.shape[2:], patch_size, strict=True))
        patches = torch.arange(count, device=volumes.device).expand(len(volumes), -1)
    voxels = patch_pixels(volumes, patch_size, patches).unflatten(-1, (volumes.shape[1], -1))
    return voxels.transpose(-1, -2).flatten(-2)


def unpatchify_3d(patches: Tensor, patch_size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Inverse of `patchify_3d`: (B, N, pa * pb * pc * C) to volumes (B, C, ga * pa, gb * pb, gc * pc)."""
    x = patches.reshape(len(patches), *grid, *patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(len(patches), x.shape[1], *(n * step for n, step in zip(grid, patch_size, strict=True)))
