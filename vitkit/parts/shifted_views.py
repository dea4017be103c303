"""Copies of an image shifted by whole patches and mirrored, and the way back: test-time augmentation without interpolation.

Everything is an index: `cells` (B, V, N) says for each patch of each view which patch of the original grid (h, w) it shows,
row-major, -1 where the shift has uncovered nothing ("hole"). Features of all views are put back by it and averaged.

Source: PH-Reg (0raiser0/PH-Reg, commit 5910d50, utils/denoising.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitkit.errors import ConfigError

POOL = 10  # candidate offsets for each view that is used


def shift_limits(grid: Sequence[int], share: float) -> tuple[int, ...]:
    """Largest shift along each axis, in patches: round(share * patches), as Python rounds. Raises ConfigError where
    nothing could be shifted."""
    limits = tuple(round(share * n) for n in grid)
    if not any(limits):
        side = "x".join(map(str, grid))
        need = next(n for n in range(1, 10_000) if round(share * n) >= 1)
        raise ConfigError(
            f"a grid of {side} patches is too small for shifts of {share:.0%} of it: not one patch",
            fix=f"--image_size of {need} patches or more a side, or a larger --shift_frac",
        )
    return limits


def offset_pool(seed: int, count: int, limits: Sequence[int]) -> np.ndarray:
    """(count, 2) row and column offsets, uniform over [-limit, limit]; all rows are drawn before all columns."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(-limit, limit, count, endpoint=True) for limit in limits], 1)


def draw_flips(seed: int, count: int) -> np.ndarray:
    """(count,) 0 or 1; the first is 0."""
    flips = np.random.default_rng(seed).integers(0, 2, count)
    flips[0] = 0
    return flips


def farthest_points(points: np.ndarray, count: int, first: np.ndarray) -> np.ndarray:
    """(B, count) rows of `points` (B, M, 2): after `first` (B,) always the one farthest from all chosen ones (squared
    Euclidean; of equally far ones the first)."""
    batch = np.arange(len(points))
    points = np.asarray(points, float)
    chosen, left = [np.asarray(first)], np.full(points.shape[:2], np.inf)
    while len(chosen) < count:
        left = np.minimum(left, np.square(points - points[batch, chosen[-1]][:, None]).sum(-1))
        chosen.append(left.argmax(1))
    return np.stack(chosen, 1)


def draw_views(
    seeds: Sequence[int], views: int, grid: Sequence[int], share: float, flips: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (B, V, 2) in patches and flip bits (B, V), a function of each image's seed. The first view is the image."""
    limits, count = shift_limits(grid, share), views * POOL
    pool = np.stack([offset_pool(seed, count, limits) for seed in seeds])
    first = np.array([np.random.default_rng((seed, 1)).integers(count) for seed in seeds])
    chosen = np.take_along_axis(pool, farthest_points(pool, views, first)[..., None], 1)
    chosen[:, 0] = 0
    bits = np.stack([draw_flips((seed, 2), views) for seed in seeds])  # type: ignore[arg-type]
    return chosen, bits if flips else np.zeros_like(bits)


def view_cells(offsets: Tensor, flips: Tensor, grid: Sequence[int]) -> Tensor:
    """`cells` (..., N) of views with offsets (..., 2) and flip bits (...,): shifted by (a, b), a patch (i, j) shows what was
    at (i + a, j + b); then mirrored left to right."""
    h, w = grid
    rows, columns = (torch.arange(n, device=offsets.device) for n in (h, w))
    columns = torch.where(flips[..., None] > 0, columns.flip(0), columns) + offsets[..., 1:]  # (..., w)
    rows = rows + offsets[..., :1]  # (..., h)
    inside = ((rows >= 0) & (rows < h))[..., :, None] & ((columns >= 0) & (columns < w))[..., None, :]
    return torch.where(inside, rows[..., :, None] * w + columns[..., None, :], -1).flatten(-2)


def shift_pixels(images: Tensor, offset: Sequence[int], fill: Tensor | float) -> Tensor:
    """`images` (..., C, H, W) with content moved up and left by `offset` pixels; what is uncovered becomes `fill` (C,)."""
    height, width = images.shape[-2:]
    out = torch.as_tensor(fill, dtype=images.dtype, device=images.device).reshape(-1, 1, 1).expand(images.shape).clone()
    (a, b), spans = offset, []
    for shift, side in ((int(a), height), (int(b), width)):
        start, stop = max(shift, 0), min(side + shift, side)
        if start >= stop:
            return out
        spans.append((slice(start - shift, stop - shift), slice(start, stop)))
    out[..., spans[0][0], spans[1][0]] = images[..., spans[0][1], spans[1][1]]
    return out


def view_pixels(images: Tensor, offsets: Tensor, flips: Tensor, patch: Sequence[int], fill: Tensor) -> Tensor:
    """Every view as pixels (B, V, C, H, W)."""
    step = torch.tensor(patch)
    views = [
        torch.stack([shift_pixels(image, (offset * step).tolist(), fill) for offset in own])
        for image, own in zip(images, offsets.cpu(), strict=True)
    ]
    found = torch.stack(views)
    return torch.where(flips[..., None, None, None].to(found.device) > 0, found.flip(-1), found)


def embeds_patches_alone(vit: nn.Module) -> bool:
    """Whether every patch embedding depends on the pixels of its patch alone, so that shifting images shifts embeddings:
    true of timm's plain projection, false of hybrid and convolutional stems."""
    return type(vit.patch_embed) is PatchEmbed and not vit.patch_embed.dynamic_img_pad


def view_embeddings(
    vit: nn.Module, images: Tensor, cells: Tensor, flips: Tensor, fill: Tensor, mirrored: bool = True
) -> Tensor:
    """Patch embeddings (B V, N, D) of every view, from one embedding of the images, one of their mirror images (unless no
    view is mirrored), and one blank patch.

    Equal to embedding each view's pixels up to the rounding of the convolution, where `embeds_patches_alone`.
    """
    ph, pw = vit.patch_embed.patch_size
    grid = (images.shape[-2] // ph, images.shape[-1] // pw)
    plain = _embedded(vit, images, grid)  # (B, h, w, D)
    turned = _embedded(vit, images.flip(-1), grid).flip(2) if mirrored else plain
    blank = _embedded(vit, fill.to(images).reshape(1, -1, 1, 1).expand(1, -1, *images.shape[2:]), grid)[:, 0, 0]
    batch, dim = len(images), plain.shape[-1]
    table = torch.cat([plain.flatten(1, 2), turned.flatten(1, 2), blank.expand(batch, 1, dim)], 1)  # (B, 2N + 1, D)
    count = grid[0] * grid[1]
    index = torch.where(cells < 0, 2 * count, cells + count * (flips[..., None] > 0))  # (B, V, N)
    start = torch.arange(batch, device=cells.device)[:, None, None] * table.shape[1]
    return table.flatten(0, 1)[(index + start).flatten(0, 1)]


def put_back(patches: Tensor, cells: Tensor) -> Tensor:
    """Mean over views of the features (B V, N, D) of every original patch: (B, N, D). A cell that no view shows is zero."""
    batch, _, count = cells.shape
    start = torch.arange(batch, device=cells.device)[:, None, None] * count
    rows = torch.where(cells < 0, batch * count, cells + start).flatten()  # holes are added up in a last row
    total = patches.new_zeros(batch * count + 1, patches.shape[-1]).index_add_(0, rows, patches.flatten(0, 1))
    seen = torch.bincount(rows, minlength=batch * count + 1)
    mean = total[:-1] / seen[:-1, None].clamp_min(1)
    return mean.unflatten(0, (batch, count))


def _embedded(vit: nn.Module, images: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, h, w, D)."""
    out = vit.patch_embed(images)
    return out if out.ndim == 4 else out.unflatten(1, tuple(grid))
