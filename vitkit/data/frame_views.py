"""Views of moments in streams: one observation, or the four images of TOV-VICReg.

An observation is `frames` consecutive frames stacked as channels: grey frames one channel each, with `colour` three. Its
neighbours start `frames` earlier and later, so that they share no frame, but never beyond the moment's bounds: at the ends
they overlap or coincide with it, as in mgoulao/TOV-VICReg.

Photometric changes are torchvision's on uint8. Official parameters, x: random resized crop, colour jitter (0.4, 0.4, 0.2, 0.1)
with probability 0.8, grey 0.2, mirror 0.5. y: the same and solarisation above 120 with probability 0.2. z, w: jitter and
grey only. The authors' Gaussian blur (7 x 7, deviation at most 0.2 pixels) weighs a neighbour with 4e-6 and changes no
uint8 pixel, so it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..errors import ConfigError, DataError
from .frames import Moment
from .transforms import RATIO, to_channels

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
SEARCH = 8  # frames to either side that may stand in for an almost black one


@dataclass(frozen=True)
class Augment:
    """Random changes of x, y, z and w: crop area range, mirroring, and how photometric changes see the frames."""

    scale: tuple[float, float] = (0.08, 1.0)
    hflip: bool = True
    photometric: str = "stacked"

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"crop_scale={tuple(self.scale)}", fix="a fraction of the area from low to high, 0 < low <= high <= 1"
            )


@dataclass(frozen=True)
class Observe:
    """A moment to its observation: uint8 (frames or 3 frames, height, width) of `size`.

    Frames that are up to a patch larger than `size` lose their last rows and columns (the authors' 84 pixels, of which their
    patch projection reads 80); others are resized.
    """

    size: tuple[int, int]
    patch: tuple[int, int] = (1, 1)
    frames: int = 3
    colour: bool = False
    flicker: float = 2.0

    def __call__(self, moment: Moment) -> Tensor:
        return self.fit(self.at(moment, 0))

    def at(self, moment: Moment, shift: int) -> Tensor:
        """The observation `shift` observations later (earlier when negative), at the frames' own size."""
        if moment.high - moment.low < 3 * self.frames:
            raise DataError(
                f"{moment.name}: its piece of {moment.high - moment.low} frames is shorter than three observations "
                f"of {self.frames}",
                fix="longer streams, or fewer frames",
            )
        start = min(max(moment.index + shift * self.frames, moment.low), moment.high - self.frames)
        block = moment.stream.read(start, start + self.frames)
        if self.flicker:
            block = self._unflickered(block, moment, start)
        tensor = torch.from_numpy(np.ascontiguousarray(block))
        tensor = tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor.unsqueeze(1)  # (f, 1 or 3, H, W)
        return to_channels(tensor, 3 if self.colour else 1).flatten(0, 1)

    def _unflickered(self, block: np.ndarray, moment: Moment, start: int) -> np.ndarray:
        """Almost black frames replaced by the nearest in the moment's bounds that is not."""
        dark = block.reshape(len(block), -1).mean(1) < self.flicker
        if not dark.any():
            return block
        block = block.copy()
        for i in np.flatnonzero(dark).tolist():
            for away in (d for step in range(1, SEARCH + 1) for d in (-step, step)):
                place = start + i + away
                if moment.low <= place < moment.high:
                    other = moment.stream.read(place, place + 1)[0]
                    if other.mean() >= self.flicker:
                        block[i] = other
                        break
        return block

    def fit(self, image: Tensor) -> Tensor:
        """`image` (C, H, W) at `size`."""
        target = self.target(image)
        if tuple(image.shape[-2:]) != target:
            image = F.resize(image, list(target), antialias=True)
        return image[..., : self.size[0], : self.size[1]].contiguous()

    def target(self, image: Tensor) -> tuple[int, int]:
        """The size that crops are resized to before the rest beyond the last whole patch is cut off."""
        (h, w), (height, width) = image.shape[-2:], self.size
        inside = 0 <= h - height < self.patch[0] and 0 <= w - width < self.patch[1]
        return (h, w) if inside else (height, width)


@dataclass(frozen=True)
class FourViews:
    """A moment to {"image": x, "image_y": y, "image_z": o_{t-1}, "image_w": o_{t+1}}, changed at random by `augment`."""

    size: tuple[int, int]
    patch: tuple[int, int] = (1, 1)
    frames: int = 3
    colour: bool = False
    flicker: float = 2.0
    augment: Augment | None = None

    def __call__(self, moment: Moment) -> dict[str, Tensor]:
        observe = Observe(self.size, self.patch, self.frames, self.colour, self.flicker)
        now, before, after = (observe.at(moment, shift) for shift in (0, -1, 1))
        if self.augment is None:
            x, z, w = (observe.fit(one) for one in (now, before, after))
            return {"image": x, "image_y": x.clone(), "image_z": z, "image_w": w}
        return {
            "image": self._cropped(observe, now, solarise=False),
            "image_y": self._cropped(observe, now, solarise=True),
            "image_z": observe.fit(self._light(before)),
            "image_w": observe.fit(self._light(after)),
        }

    def _cropped(self, observe: Observe, image: Tensor, solarise: bool) -> Tensor:
        assert self.augment is not None
        top, left, height, width = crop_box(image.shape[-2], image.shape[-1], self.augment.scale)
        target = list(observe.target(image))
        image = F.resize(image[..., top : top + height, left : left + width], target, antialias=True)
        image = self._light(image)
        if self.augment.hflip and _chance(0.5):
            image = image.flip(-1)
        if solarise and _chance(0.2):
            image = F.solarize(image, 120)
        return image[..., : self.size[0], : self.size[1]].contiguous()

    def _light(self, image: Tensor) -> Tensor:
        """Colour jitter and greyscale, on the stack as RGB or the same on every frame."""
        assert self.augment is not None
        stacked = self.augment.photometric == "stacked"
        parts = image.unsqueeze(0) if stacked else image.unflatten(0, (self.frames, -1))  # (f or 1, c, H, W)
        if _chance(0.8):
            for change in jitter(coloured=parts.shape[1] == 3):
                parts = change(parts)
        if _chance(0.2) and parts.shape[1] == 3:
            parts = F.rgb_to_grayscale(parts, num_output_channels=3)
        return parts.flatten(0, 1)


def jitter(coloured: bool) -> list[Callable[[Tensor], Tensor]]:
    """Brightness, contrast and, for RGB, saturation and hue by random amounts in random order."""
    amounts = {name: 1 + width * _uniform() for name, width in JITTER.items() if name != "hue"}
    hue = JITTER["hue"] * _uniform()
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.adjust_brightness(x, amounts["brightness"]),
        lambda x: F.adjust_contrast(x, amounts["contrast"]),
        lambda x: F.adjust_saturation(x, amounts["saturation"]),
        lambda x: F.adjust_hue(x, hue),
    ]
    return [changes[i] for i in torch.randperm(4).tolist() if coloured or i < 2]


def crop_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of torchvision's RandomResizedCrop: ten draws of area and ratio, then the whole picture.

    (`vitkit.data.transforms.crop_box` is the masked autoencoders' one: another distribution.)
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale).item()
        ratio = math.exp(torch.empty(1).uniform_(low, high).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(torch.randint(0, height - h + 1, ())), int(torch.randint(0, width - w + 1, ()))
            return top, left, h, w
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _uniform() -> float:
    """From -1 to 1."""
    return 2 * float(torch.rand(())) - 1


def _chance(probability: float) -> bool:
    return bool(torch.rand(()) < probability)
