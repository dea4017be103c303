"""Random crops of one picture for its decomposition: pixels, and where each patch of the view lies in the picture.

Source: Jiawei-Yang/Denoising-ViT (commit 82704df), dvt/dataset/transform.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

RATIO = (3 / 4, 4 / 3)


def draw_crops(count: int, size: Sequence[int], scale: tuple[float, float], *, seed: int) -> Tensor:
    """`count` random crops (top, left, height, width, flip) of a picture of `size` (H, W): torchvision's distribution,
    `scale` of the area, mirrored with probability 1/2. int64 (count, 5)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        picture = torch.empty(1, *size, device="meta")
        rows = []
        for _ in range(count):
            crop = RandomResizedCrop.get_params(picture, list(scale), list(RATIO))
            rows.append([*crop, int(torch.rand(()) < 0.5)])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)


def cut(image: Tensor, crop: Sequence[int], size: Sequence[int]) -> Tensor:
    """The view (C, *size) of a float picture (C, H, W): cut, resized (bicubic, antialiased), mirrored."""
    top, left, height, width, flip = (int(value) for value in crop)
    view = image[..., top : top + height, left : left + width]
    view = F.resize(view, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return view.flip(-1) if flip else view


def patch_coordinates(crop: Sequence[int], size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Coordinates (h, w, 2), x first, in [0, 1], of a view's patches in a picture of `size` (H, W). First and last patch
    stand for the crop's edges, not for patch centres; a mirrored view runs from right to left."""
    top, left, height, width, flip = (int(value) for value in crop)
    y = torch.linspace(top / size[0], top / size[0] + height / size[0], grid[0])
    x = torch.linspace(left / size[1], left / size[1] + width / size[1], grid[1])
    if flip:
        x = x.max() - x + x.min()
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], -1)
