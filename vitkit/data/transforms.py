"""Views: uint8 (C, H, W) of any size and channels -> uint8 (in_chans, h, w) as the model's passport asks for it.

All randomness comes from the global generators of torch, Python and numpy, which the loader seeds for every
picture; so a view is a plain function and can be called by hand. Pixels stay uint8: the model normalises on its device.
A `preprocess` is a passport's `Preprocess` (or anything with its attributes).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..errors import ConfigError

View = Callable[[Any], Any]  # a picture to a picture; of other kinds, and of several views at once, see `loader`
RATIO = (3 / 4, 4 / 3)  # width / height of random crops, in every recipe that vitkit follows
_POLICY = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?)*")
_INTERPOLATIONS = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "nearest": InterpolationMode.NEAREST_EXACT,
}


class Preprocess(Protocol):
    """What a view reads from a passport."""

    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def image_size(self) -> tuple[int, ...]: ...  # (height, width)
    @property
    def interpolation(self) -> str: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def channels(self) -> str: ...  # "rgb" or "grey"


def pretrain_view(preprocess: Preprocess, *, scale: tuple[float, float] = (0.2, 1.0), hflip: bool = True) -> View:
    """The one augmentation of masked autoencoders: a random resized crop of `scale` of the area, and a flip; volumes and
    videos have their own (`volume_views`, `video_views`)."""
    if (own := _own_views(preprocess)) is not None:
        return own.pretrain_view(preprocess, scale=_range(scale), hflip=hflip)
    return TrainView(preprocess, scale=_range(scale), hflip=hflip)


def finetune_view(
    preprocess: Preprocess,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    hflip: bool = True,
    randaug: str | None = "rand-m6-mstd0.5-inc1",
    rotate: float = 0.0,
) -> View:
    """Random resized crop, flip, rotation by up to `rotate` degrees, then RandAugment spelled as in timm.

    "rand-m6-mstd0.5-inc1": 2 operations of magnitude 6 with standard deviation 0.5, severity growing with magnitude.
    """
    if not 0 <= rotate <= 180:
        raise ConfigError(f"rotate={rotate:g}", fix="degrees from 0 to 180")
    if (own := _own_views(preprocess)) is not None:
        return own.finetune_view(preprocess, scale=_range(scale), hflip=hflip, randaug=randaug, rotate=rotate)
    if randaug is not None and not _POLICY.fullmatch(randaug):
        fix = 'spell it as in timm, e.g. "rand-m6-mstd0.5-inc1" (m, n, p, mstd, mmax, inc), or None'
        raise ConfigError(f"randaug={randaug!r} is no RandAugment policy", fix=fix)
    return TrainView(preprocess, scale=_range(scale), hflip=hflip, randaug=randaug, rotate=rotate)


def eval_view(preprocess: Preprocess) -> View:
    """The centre: the short side is resized to floor(size / crop_pct), then the middle of `image_size` is cut out.

    Non-square sizes: the picture is scaled until it just covers (height, width) / crop_pct. `crop_mode` "squash"
    resizes both sides to their target instead, "border" pads the short side with the mean. Equals timm's transforms.
    """
    own = _own_views(preprocess)
    return EvalView(preprocess) if own is None else own.eval_view(preprocess)


def _own_views(preprocess: Preprocess) -> Any:
    """The module with the views of volumes or videos; None for images."""
    kind = getattr(preprocess, "kind", "image")
    if kind == "image":
        return None
    from . import video_views, volume_views

    return {"volume": volume_views, "video": video_views}[kind]


@dataclass(frozen=True)
class TrainView:
    """Built by `pretrain_view` and `finetune_view`."""

    preprocess: Preprocess
    scale: tuple[float, float]
    hflip: bool
    randaug: str | None = None
    rotate: float = 0.0

    def __post_init__(self) -> None:
        _interpolation(self.preprocess), _channels(self.preprocess)

    def __call__(self, image: Tensor) -> Tensor:
        p = self.preprocess
        top, left, height, width = crop_box(image.shape[-2], image.shape[-1], self.scale)
        image = image[..., top : top + height, left : left + width]
        image = F.resize(image, list(p.image_size), interpolation=_interpolation(p), antialias=True)
        if self.hflip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        image = to_channels(image, _channels(p))
        if self.rotate:
            angle = random.uniform(-self.rotate, self.rotate)
            fill = [float(value) for value in _fill(p)]
            image = F.rotate(image, angle, interpolation=InterpolationMode.BILINEAR, fill=fill)
        if self.randaug is not None:
            image = _through_pil(image, self._augment)
        return image.contiguous()

    @cached_property
    def _augment(self) -> Callable:
        p = self.preprocess
        return _randaugment(self.randaug, min(p.image_size), _fill(p), p.interpolation)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_augment"}


@dataclass(frozen=True)
class EvalView:
    """Built by `eval_view`."""

    preprocess: Preprocess

    def __post_init__(self) -> None:
        _interpolation(self.preprocess), _channels(self.preprocess), _mode(self.preprocess)

    def __call__(self, image: Tensor) -> Tensor:
        p = self.preprocess
        size, mode = list(p.image_size), _mode(p)
        target = [math.floor(side / p.crop_pct) for side in size]
        height, width = image.shape[-2:]
        if mode == "center" and target[0] == target[1]:
            short, long = min(height, width), max(height, width)
            other = int(target[0] * long / short)
            new = [target[0], other] if height <= width else [other, target[0]]
        elif mode == "squash":
            new = target
        else:
            ratios = (height / target[0], width / target[1])
            ratio = min(ratios) if mode == "center" else max(ratios)
            new = [max(1, round(height / ratio)), max(1, round(width / ratio))]
        if new != [height, width]:
            image = F.resize(image, new, interpolation=_interpolation(p), antialias=True)
        image = to_channels(image, _channels(p))
        if mode == "border":
            image = _pad(image, size, _fill(p))
        return F.center_crop(image, size).contiguous()


def crop_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop as masked autoencoders are trained with.

    The area and the logarithm of the ratio are drawn once, uniformly; sides that do not fit are cut to the picture.
    (torchvision's RandomResizedCrop draws up to ten times and then falls back to the centre: other statistics.)
    """
    area = height * width * torch.empty(1).uniform_(*scale).item()
    ratio = math.exp(torch.empty(1).uniform_(math.log(RATIO[0]), math.log(RATIO[1])).item())
    w = min(max(1, round(math.sqrt(area * ratio))), width)
    h = min(max(1, round(math.sqrt(area / ratio))), height)
    top = int(torch.randint(0, height - h + 1, ()))
    left = int(torch.randint(0, width - w + 1, ()))
    return top, left, h, w


def to_channels(image: Tensor, channels: int) -> Tensor:
    """1 <-> 3 channels of uint8 (C, H, W): grey is repeated, RGB becomes luma by ITU-R 601 exactly as PIL rounds it."""
    if image.shape[-3] == channels:
        return image
    if channels == 3:
        return image.expand(*image.shape[:-3], 3, *image.shape[-2:])
    r, g, b = image.to(torch.int32).unbind(-3)
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).to(torch.uint8).unsqueeze(-3)


def _range(scale: tuple[float, float]) -> tuple[float, float]:
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ConfigError(f"scale={tuple(scale)}", fix="a fraction of the area from low to high, 0 < low <= high <= 1")
    return float(low), float(high)


def _interpolation(preprocess: Preprocess) -> InterpolationMode:
    if preprocess.interpolation not in _INTERPOLATIONS:
        raise ConfigError(
            f"interpolation {preprocess.interpolation!r} is not known for uint8 tensors",
            fix=f"one of {', '.join(_INTERPOLATIONS)}",
        )
    return _INTERPOLATIONS[preprocess.interpolation]


def _channels(preprocess: Preprocess) -> int:
    channels = {"rgb": 3, "grey": 1}.get(preprocess.channels)
    if channels is None or channels != len(preprocess.mean):
        raise ConfigError(
            f"channels {preprocess.channels!r} with {len(preprocess.mean)} means",
            fix='pictures are "rgb" with 3 means or "grey" with 1',
        )
    return channels


def _mode(preprocess: Preprocess) -> str:
    mode = getattr(preprocess, "crop_mode", "center")
    if mode not in ("center", "squash", "border"):
        raise ConfigError(f"crop_mode={mode!r}", fix="center, squash or border")
    return mode


def _fill(preprocess: Preprocess) -> tuple[int, ...]:
    """The mean colour: zero after normalisation."""
    return tuple(min(255, round(255 * value)) for value in preprocess.mean)


def _pad(image: Tensor, size: list[int], fill: tuple[int, ...]) -> Tensor:
    height, width = image.shape[-2:]
    if height >= size[0] and width >= size[1]:
        return image
    h, w = max(height, size[0]), max(width, size[1])
    top, left = (h - height) // 2, (w - width) // 2
    canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, h, w)
    canvas[:, top : top + height, left : left + width] = image
    return canvas


def _through_pil(image: Tensor, augment: Callable) -> Tensor:
    """Apply a function of PIL images to uint8 (C, H, W)."""
    from PIL import Image

    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    array = np.array(augment(Image.fromarray(np.ascontiguousarray(array))))
    return torch.from_numpy(array)[None] if array.ndim == 2 else torch.from_numpy(array).permute(2, 0, 1)


@lru_cache(maxsize=8)
def _randaugment(policy: str, size: int, fill: tuple[int, ...], interpolation: str) -> Callable:
    """timm's RandAugment with the parameters that timm's own training script gives it."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    options = {
        "translate_const": int(size * 0.45),
        "img_mean": fill if len(fill) == 3 else fill[0],
        "interpolation": str_to_pil_interp(interpolation),
    }
    return rand_augment_transform(policy, options)
