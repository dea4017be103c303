"""Multi-crop views of DINOv2: two large crops and several small ones of each picture, each changed in its own way.

The picture is decoded once; every crop is cut before it is resized. Values stay uint8 until the model's device.
Source: DINOv2, data/augmentations.py. Crops and flips are torchvision's `RandomResizedCrop`; colour is drawn as its
`ColorJitter` draws it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..errors import ConfigError
from .transforms import Preprocess, to_channels

JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
JITTER_P, GREY_P, SOLARISE_P, SOLARISE_AT = 0.8, 0.2, 0.2, 128
BLUR_KERNEL, BLUR_SIGMA = 9, (0.1, 2.0)
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class MultiCrop:
    """Picture (C, H, W) -> {"image": first large crop, "image_2": second, "image_local": (L, C, h, w) small ones}."""

    preprocess: Preprocess
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    local_size: tuple[int, int] = (96, 96)
    local_crops: int = 8
    hflip: bool = True
    blur_p: tuple[float, float, float] = (0.0, 0.9, 0.5)  # first large crop, second, small ones: what the code does
    colour: float = 1.0  # strength of jitter, grey and solarisation; 0 leaves pixels as they are

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        size = self.preprocess.image_size
        views = {
            "image": self._view(image, self.global_scale, size, self.blur_p[0], 0.0),
            "image_2": self._view(image, self.global_scale, size, self.blur_p[1], SOLARISE_P),
        }
        if self.local_crops:
            small = [
                self._view(image, self.local_scale, self.local_size, self.blur_p[2], 0.0)
                for _ in range(self.local_crops)
            ]
            views["image_local"] = torch.stack(small)
        return views

    def _view(
        self, image: Tensor, scale: tuple[float, float], size: tuple[int, ...], blur: float, sun: float
    ) -> Tensor:
        channels = len(self.preprocess.mean)
        top, left, height, width = _box(image, scale)
        x = image[..., top : top + height, left : left + width]
        x = F.resize(x, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
        if self.hflip and random.random() < 0.5:
            x = x.flip(-1)
        if self.colour:
            x = jitter(x, self.colour) if random.random() < JITTER_P else x
            if x.shape[0] == 3 and random.random() < GREY_P * self.colour:
                x = F.rgb_to_grayscale(x, num_output_channels=3)
        if random.random() < blur:
            sigma = random.uniform(*BLUR_SIGMA)
            x = F.gaussian_blur(x, [BLUR_KERNEL, BLUR_KERNEL], [sigma, sigma])
        if self.colour and random.random() < sun:
            x = F.solarize(x, SOLARISE_AT)
        return to_channels(x, channels).contiguous()


def _box(image: Tensor, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop: up to ten tries, then the largest central one."""
    rows, columns = image.shape[-2:]
    for _ in range(10):
        area = rows * columns * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= columns and 0 < height <= rows:
            return random.randint(0, rows - height), random.randint(0, columns - width), height, width
    width = min(columns, round(rows * RATIO[1]))
    height = min(rows, round(columns / RATIO[0]))
    return (rows - height) // 2, (columns - width) // 2, max(1, height), max(1, width)


def jitter(x: Tensor, strength: float = 1.0) -> Tensor:
    """Brightness, contrast, saturation and hue in random order, each by a factor around 1 (hue: a shift); a grey picture
    has only the first two."""
    amounts = [amount * strength for amount in JITTER]
    changes = [
        lambda x, f: F.adjust_brightness(x, f),
        lambda x, f: F.adjust_contrast(x, f),
        lambda x, f: F.adjust_saturation(x, f),
        lambda x, f: F.adjust_hue(x, f),
    ]
    order = list(range(4 if x.shape[0] == 3 else 2))
    random.shuffle(order)
    for i in order:
        low = -amounts[3] if i == 3 else max(0.0, 1 - amounts[i])
        high = amounts[3] if i == 3 else 1 + amounts[i]
        x = changes[i](x, random.uniform(low, high))
    return x


def local_size_of(image_size: tuple[int, int], patch: tuple[int, int], asked: int | str) -> tuple[int, int]:
    """Pixels of the small crops: as asked, or 3/7 of the model's image size (96 of 224) in whole patches."""
    if asked == "auto":
        sides = [max(step, round(side * 3 / 7 / step) * step) for side, step in zip(image_size, patch, strict=True)]
        return sides[0], sides[1]
    side = int(asked)
    for step in patch:
        if side < step or side % step:
            near = max(step, round(side / step) * step)
            raise ConfigError(
                f"local_size is {side} pixels, and a patch has {step}", fix=f"a multiple of the patch size, e.g. {near}"
            )
    return side, side
