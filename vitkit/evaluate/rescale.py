"""Pixels as the radiology benchmark prepares them: each channel of each image stretched to [0, 1], then mean and std.

Grey values of scanners have no common scale, so an image is stretched from its own minimum to its own maximum, channel by
channel, after it has been resized and cropped (Baharoon et al., arXiv 2312.02366, data/transforms.py). A constant slice,
which the official code divides by zero, becomes all zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitkit.errors import DataError
from vitkit.passport import IMAGENET_MEAN, IMAGENET_STD, Preprocess

DEFAULT = Preprocess(IMAGENET_MEAN, IMAGENET_STD)


def min_max(images: Tensor) -> Tensor:
    """(..., H, W) of any type to float32 in [0, 1], each channel of each image on its own; a constant one becomes 0."""
    x = images.float()
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    span = high - low
    if not torch.isfinite(span).all():
        raise DataError("there are pixels that are not finite", fix="clip the intensities to a finite window first")
    return torch.where(span > 0, (x - low) / torch.where(span > 0, span, 1), 0)


def eval_view(
    images: Tensor, size: int | tuple[int, int], *, resize: int | None = None, preprocess: Preprocess = DEFAULT
) -> Tensor:
    """(..., C, H, W) to the model's input (..., C, *size): resize (bicubic, antialiased), centre crop, stretch, normalise.

    resize: side of the square that is resized to before the crop, by default `size` (the crop then cuts nothing); the
    kNN protocols use 256 for 224. Grey (1, H, W) is repeated to the channels that `preprocess` has.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if images.shape[-3] == 1:
        images = images.expand(*images.shape[:-3], preprocess.in_chans, *images.shape[-2:])
    if images.shape[-3] != preprocess.in_chans:
        raise DataError(
            f"images have {images.shape[-3]} channels, the model takes {preprocess.in_chans}", fix="convert them first"
        )
    sides = [height, width] if resize is None else [resize, resize]
    x = F.resize(images.float(), sides, interpolation=InterpolationMode.BICUBIC, antialias=True)
    x = min_max(F.center_crop(x, [height, width]))
    flat = x.reshape(-1, *x.shape[-3:])
    return preprocess.normalise(flat).reshape(x.shape)


def window(volume: Tensor, low: float, high: float) -> Tensor:
    """Intensities clipped to [low, high], e.g. Hounsfield units -1024..600 for AMOS."""
    if not low < high:
        raise DataError(f"the window is {low} to {high}", fix="the lower end first")
    return volume.float().clamp(low, high)
