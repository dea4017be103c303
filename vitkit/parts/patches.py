"""Pixels of some patches, taken from images, volumes and videos without touching the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def patch_pixels(images: Tensor, patch_size: Sequence[int], keep: Tensor) -> Tensor:
    """Pixels (B, K, C * ph * pw), channel slowest, of the patches `keep` (B, K) without touching the other patches; of
    volumes and videos (B, C, a, b, c), too."""
    axes = len(patch_size)
    view = images
    for axis, step in enumerate(patch_size):
        view = view.unflatten(2 + 2 * axis, (-1, step))  # (B, C, rows, ph, columns, pw)
    grid = view.shape[2 : 2 + 2 * axes : 2]
    view = view.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
    places, rest = [], keep
    for side in reversed(grid[1:]):
        places.append(rest % side)
        rest = rest.div(side, rounding_mode="floor")
    rows = torch.arange(len(images), device=images.device).unsqueeze(1)
    return view[(rows, rest, *reversed(places))].flatten(2)
