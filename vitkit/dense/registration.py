"""Registration of two volumes by features of a frozen ViT, without training: joint PCA, then a convex search and Adam.

    f, m = registration.joint_pca(volume_maps(vit, fixed, 96, 1)[-1], volume_maps(vit, moving, 96, 1)[-1])
    field = registration.register(resized(f), resized(m))       # both (C, S, H, W)
    moved = registration.warp(moving, field)

The zero-shot protocol of the DINOv3 medical benchmark (Liu et al., arXiv 2509.06467): slice features of both volumes are
put on one low-dimensional basis, concatenated with MIND self-similarities (`mind`, Heinrich et al. 2012) where that helps, and
matched in the way of ConvexAdam (Siebert et al. 2021): the cost of every displacement of a window is computed on a coarse
grid, a coupled convex optimisation picks a smooth choice, Adam refines it on a finer one. Basis size, window and weights are
not in the text: they are arguments. A displacement points from a voxel of `fixed` to its place in `moving`, in voxels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.errors import ConfigError, DataError

_COUPLING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # growing weight of "stay with the smooth field"


def joint_pca(fixed: Tensor, moving: Tensor, dims: int = 12) -> tuple[Tensor, Tensor]:
    """Maps (S, D, h, w) of both on the `dims` main axes of all their vectors together: (dims, S, h, w), unit variance in
    the mean over axes; the order and relative size of the axes stay."""
    if fixed.ndim != 4 or moving.ndim != 4 or fixed.shape[1] != moving.shape[1]:
        raise DataError(
            f"maps of shapes {tuple(fixed.shape)} and {tuple(moving.shape)}",
            fix="(slices, channels, h, w) of one model",
        )
    rows = [m.float().movedim(1, -1).reshape(-1, m.shape[1]) for m in (fixed, moving)]
    every = torch.cat(rows)
    if not 1 <= dims <= min(every.shape):
        raise ConfigError(f"dims is {dims} of {every.shape[1]} channels", fix=f"1 to {min(every.shape)}")
    mean = every.mean(0)
    values, axes = torch.linalg.eigh((every - mean).T @ (every - mean) / len(every))
    kept = values[-dims:].clamp_min(0).mean().clamp_min(1e-12).sqrt()
    axes = axes[:, -dims:].flip(1) / kept
    found = []
    for row, m in zip(rows, (fixed, moving), strict=True):
        found.append(((row - mean) @ axes).view(m.shape[0], *m.shape[2:], dims).movedim(-1, 0))
    return found[0], found[1]


def mind(volume: Tensor, *, radius: int = 1, dilation: int = 1) -> Tensor:
    """(6, S, H, W) modality-independent neighbourhood descriptor of (S, H, W): exp(-patch distance to each of six neighbours /
    their mean), so that only local structure counts, not brightness."""
    x = volume.float()[None, None]
    size, pad = 2 * radius + 1, dilation
    wide = F.pad(x, (pad,) * 6, mode="replicate")
    shape, found = volume.shape, []
    for axis in range(3):
        for way in (-dilation, dilation):
            start = [pad, pad, pad]
            start[axis] += way
            part = wide[
                ..., start[0] : start[0] + shape[0], start[1] : start[1] + shape[1], start[2] : start[2] + shape[2]
            ]
            square = F.pad((x - part).square(), (radius,) * 6, mode="replicate")
            found.append(F.avg_pool3d(square, size, stride=1)[0, 0])
    distance = torch.stack(found)
    spread = distance.mean(0, keepdim=True)
    spread = spread.clamp(float(spread.mean()) * 1e-3 + 1e-12, float(spread.mean()) * 1e3 + 1e-12)
    return torch.exp(-(distance - distance.amin(0, keepdim=True)) / spread)


def register(
    fixed: Tensor,
    moving: Tensor,
    *,
    grid: int = 4,
    window: int = 3,
    steps: int = 60,
    smooth: float = 1.0,
    lr: float = 0.5,
    fine: int = 2,
) -> Tensor:
    """Displacement (3, S, H, W) in voxels between feature volumes (C, S, H, W) of one shape.

    grid: voxels of a coarse cell; window: displacements tried, in coarse cells to either side; steps, lr, smooth: of Adam on a
    grid `fine` times coarser than the volume, and the weight of its squared differences of neighbours. steps 0: convex part
    only.
    """
    if fixed.shape != moving.shape or fixed.ndim != 4:
        raise DataError(
            f"features of {tuple(fixed.shape)} and {tuple(moving.shape)}", fix="(C, S, H, W), resampled to one shape"
        )
    if grid < 1 or window < 1 or fine < 1 or steps < 0:
        raise ConfigError(
            f"grid {grid}, window {window}, fine {fine}, steps {steps}", fix="whole numbers from 1, steps from 0"
        )
    f, m = fixed.float(), moving.float()
    field = _convex(f, m, grid, window)
    return field if steps == 0 else _adam(f, m, field, fine, steps, smooth, lr)


def warp(volume: Tensor, field: Tensor, *, labels: bool = False) -> Tensor:
    """A volume (S, H, W) or features (C, S, H, W) of `moving` on the grid of `fixed`; labels: nearest instead of linear."""
    x = volume[None, None] if volume.ndim == 3 else volume[None]
    mode = "nearest" if labels else "bilinear"
    out = F.grid_sample(x.float(), _places(field), mode=mode, padding_mode="border", align_corners=True)[0]
    out = out[0] if volume.ndim == 3 else out
    return out.round().to(volume.dtype) if labels else out


def _places(field: Tensor) -> Tensor:
    """Sampling places (1, S, H, W, 3) in grid_sample's order (W, H, S) and range [-1, 1]."""
    shape = field.shape[1:]
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=field.device) for n in shape), indexing="ij")
    out = [2 * (axis + d) / max(n - 1, 1) - 1 for axis, d, n in zip(axes, field, shape, strict=True)]
    return torch.stack(out[::-1], -1)[None]


def _convex(f: Tensor, m: Tensor, grid: int, window: int) -> Tensor:
    """Coupled convex optimisation: the best displacement of each coarse cell, pulled ever more to its neighbours' mean."""
    shape = f.shape[1:]
    f, m = (F.avg_pool3d(x[None], grid, stride=grid, ceil_mode=True)[0] for x in (f, m))
    size = f.shape[1:]
    wide = F.pad(m[None], (window,) * 6, mode="replicate")[0]
    steps = range(-window, window + 1)
    shifts = torch.tensor(
        [(a, b, c) for a in steps for b in steps for c in steps], dtype=torch.float32, device=f.device
    )
    costs = []
    for a, b, c in shifts.int().tolist():
        part = wide[
            :,
            window + a : window + a + size[0],
            window + b : window + b + size[1],
            window + c : window + c + size[2],
        ]
        costs.append((f - part).square().mean(0))
    cost = _averaged(torch.stack(costs))  # (K, s, h, w); one cell alone says too little
    scale = cost.mean().clamp_min(1e-12)
    smooth = _averaged(shifts[cost.argmin(0)].movedim(-1, 0))
    for weight in _COUPLING:
        pull = (shifts[:, :, None, None, None] - smooth).square().sum(1)
        smooth = _averaged(shifts[(cost / scale + weight * pull).argmin(0)].movedim(-1, 0))
    return F.interpolate(grid * smooth[None], size=tuple(shape), mode="trilinear", align_corners=False)[0]


def _averaged(field: Tensor) -> Tensor:
    """Mean of every channel over 3 x 3 x 3 cells, borders repeated."""
    return F.avg_pool3d(F.pad(field[None], (1,) * 6, mode="replicate"), 3, stride=1)[0]


def _adam(f: Tensor, m: Tensor, field: Tensor, fine: int, steps: int, smooth: float, lr: float) -> Tensor:
    """Instance optimisation of the squared feature difference and the field's roughness."""
    shape = f.shape[1:]
    size = tuple(max(2, math.ceil(n / fine)) for n in shape)
    start = F.interpolate(field[None], size=size, mode="trilinear", align_corners=True)
    f, m = (F.interpolate(x[None], size=size, mode="trilinear", align_corners=True)[0] for x in (f, m))
    ratio = (
        torch.tensor([(b - 1) / max(a - 1, 1) for a, b in zip(shape, size, strict=True)])
        .view(1, 3, 1, 1, 1)
        .to(f.device)
    )
    d = (start * ratio).clone().requires_grad_()
    optimizer = torch.optim.Adam([d], lr=lr / fine)
    with torch.enable_grad():
        for _ in range(steps):
            moved = _averaged(d[0])
            match = (
                (F.grid_sample(m[None], _places(moved), padding_mode="border", align_corners=True)[0] - f)
                .square()
                .mean()
            )
            rough = sum(moved.diff(dim=k).square().mean() for k in (1, 2, 3))
            optimizer.zero_grad()
            (match + smooth * rough).backward()
            optimizer.step()
    return F.interpolate(
        _averaged(d.detach()[0])[None] / ratio, size=tuple(shape), mode="trilinear", align_corners=True
    )[0]
