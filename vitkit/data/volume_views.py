"""Views of volumes: a `cases.Case` to crops float32 (C, a, b, c) in [0, 1] of the size that the passport asks for.

Voxels are cut out before they are cast and scaled: by `preprocess.window` (low, high) in the file's units, or by percentiles
of the whole volume. Volumes that are smaller than the crop are padded with 0 on both sides (masks with "unknown").
Randomness comes from torch's global generator, which the loader seeds for every volume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError
from .cases import Case
from .images import UNKNOWN

_TRIES = 32


def pretrain_view(
    preprocess: Any,
    *,
    crops: int = 1,
    foreground: float = 0.75,
    flip: float = 0.5,
    rotate90: float = 0.3,
    intensity: float = 0.1,
    scale: object = None,
    hflip: bool = True,
) -> VolumeView:
    """Random crops, `foreground` of them centred on a voxel above 0 (Hi-End-MAE: 6 of 8); flips, quarter turns and changes of
    brightness with these probabilities. `scale` is for images: crops of volumes are never resized. Without `hflip` nothing is
    mirrored."""
    changes = (flip if hflip else 0.0, rotate90, intensity)
    return VolumeView(preprocess, crops, foreground, *changes, labels=False)


def finetune_view(
    preprocess: Any,
    *,
    crops: int = 1,
    foreground: float = 0.5,
    flip: float = 0.2,
    rotate90: float = 0.2,
    intensity: float = 0.1,
    scale: object = None,
    hflip: bool = True,
    randaug: str | None = None,
    rotate: float = 0.0,
) -> VolumeView:
    """Random crops with their masks, `foreground` of them centred on a voxel of any class (Hi-End-MAE: half): a dict of
    "image" and "mask" where the case has one. `randaug` and `rotate` are for images and not used."""
    return VolumeView(preprocess, crops, foreground, flip if hflip else 0.0, rotate90, intensity, labels=True)


def eval_view(preprocess: Any) -> Callable[[Case], Tensor]:
    """The crop in the middle, (C, a, b, c)."""
    return CentreView(preprocess)


@dataclass(frozen=True)
class VolumeView:
    """Built by `pretrain_view` and `finetune_view`; several crops stand in an axis of their own, (K, C, a, b, c)."""

    preprocess: Any
    crops: int
    foreground: float
    flip: float
    rotate90: float
    intensity: float
    labels: bool

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ConfigError(f"crops is {self.crops}", fix="at least 1")
        for name in ("foreground", "flip", "rotate90", "intensity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="a probability from 0 to 1")

    def __call__(self, case: Case) -> Any:
        case = fitting(case, self.preprocess)
        pairs = [self._crop(case) for _ in range(self.crops)]
        if self.crops == 1:
            image, mask = pairs[0]
        else:
            image = torch.stack([one for one, _ in pairs])
            mask = torch.stack([one for _, one in pairs]) if pairs[0][1] is not None else None  # type: ignore[misc]
        return image if mask is None else {"image": image, "mask": mask}

    def _crop(self, case: Case) -> tuple[Tensor, Tensor | None]:
        size = self.preprocess.image_size
        start = self._start(case, size)
        image = cut(case, start, size, self.preprocess.window)
        mask = cut_mask(case, start, size) if self.labels and case.mask is not None else None
        for axis in range(3):
            if torch.rand(()) < self.flip:
                image, mask = image.flip(axis + 1), None if mask is None else mask.flip(axis)
        if torch.rand(()) < self.rotate90:
            turns = 2 if size[0] != size[1] else int(torch.randint(1, 4, ()))  # a quarter turn needs equal sides
            image, mask = image.rot90(turns, (1, 2)), None if mask is None else mask.rot90(turns, (0, 1))
        if torch.rand(()) < self.intensity:
            image = image * (1 + float(torch.empty(()).uniform_(-0.1, 0.1)))
        if torch.rand(()) < self.intensity:
            image = image + float(torch.empty(()).uniform_(-0.1, 0.1))
        return image.contiguous(), None if mask is None else mask.contiguous()

    def _start(self, case: Case, size: tuple[int, ...]) -> list[int]:
        """The corner of a crop around a voxel that is drawn, moved inside where it can be."""
        wanted = bool(torch.rand(()) < self.foreground)
        centre = (
            self._masked_voxel(case, wanted) if self.labels and case.mask is not None else self._voxel(case, wanted)
        )
        corners = zip(centre, size, case.size, strict=True)
        return [max(0, min(at - side // 2, whole - side)) for at, side, whole in corners]

    def _masked_voxel(self, case: Case, wanted: bool) -> list[int]:
        """A voxel of any class, or one of background."""
        assert case.mask is not None
        if wanted and len(case.marked):
            flat = int(case.marked[int(torch.randint(len(case.marked), ()))])
            return [int(i) for i in np.unravel_index(flat, case.size)]
        return self._drawn(case, lambda at: bool(case.mask[at] == 0))  # type: ignore[index]

    def _voxel(self, case: Case, wanted: bool) -> list[int]:
        """A voxel that is brighter than what becomes 0, or one that is not."""
        low = self.preprocess.window[0] if self.preprocess.window else case.limits[0][0]
        return self._drawn(case, lambda at: bool(case.data[0][at] > low) == wanted)

    @staticmethod
    def _drawn(case: Case, fits: Callable[[tuple[int, ...]], bool]) -> list[int]:
        """A random voxel that fits, or any one where such voxels are too rare to be found."""
        at = [0, 0, 0]
        for _ in range(_TRIES):
            at = [int(torch.randint(side, ())) for side in case.size]
            if fits(tuple(at)):
                break
        return at


@dataclass(frozen=True)
class CentreView:
    """Built by `eval_view`."""

    preprocess: Any

    def __call__(self, case: Case) -> Tensor:
        case, size = fitting(case, self.preprocess), self.preprocess.image_size
        start = [max(0, (whole - side) // 2) for whole, side in zip(case.size, size, strict=True)]
        return cut(case, start, size, self.preprocess.window).contiguous()


def whole(case: Case, preprocess: Any) -> Tensor:
    """All of a volume, (C, a, b, c) float32 in [0, 1], at the passport's spacing."""
    case = fitting(case, preprocess)
    return cut(case, [0, 0, 0], case.size, preprocess.window)


def fitting(case: Case, preprocess: Any) -> Case:
    """The case at the passport's spacing. Raises DataError when it has other channels than the model."""
    channels = len(preprocess.mean)
    if len(case.data) != channels:
        raise DataError(
            f"{case.name}: {len(case.data)} channels, and the model takes {channels}",
            fix=f"--in_chans {len(case.data)} for a new model, or volumes with {channels}",
        )
    return case.at(preprocess.spacing)


def cut(case: Case, start: list[int], size: Any, window: tuple[float, float] | None) -> Tensor:
    """A block (C, *size) float32 in [0, 1], padded with 0 where the volume ends."""
    at = tuple(slice(a, a + side) for a, side in zip(start, size, strict=True))
    block = torch.from_numpy(case.data[(slice(None), *at)].astype(np.float32))
    for channel, (low, high) in zip(block, [window] * len(block) if window else case.limits, strict=True):
        channel.sub_(low).div_(max(high - low, 1e-6)).clamp_(0, 1)
    return _padded(block, size, 0.0)


def cut_mask(case: Case, start: list[int], size: Any) -> Tensor:
    """The class numbers of a block, uint8 (*size), 255 where the volume ends."""
    at = tuple(slice(a, a + side) for a, side in zip(start, size, strict=True))
    assert case.mask is not None
    return _padded(torch.from_numpy(case.mask[at].copy()), size, UNKNOWN)


def _padded(block: Tensor, size: Any, value: float) -> Tensor:
    """Half of what is missing in front, as MONAI's sliding window pads."""
    missing = [max(0, side - have) for side, have in zip(size, block.shape[-3:], strict=True)]
    if not any(missing):
        return block
    pads = [part for n in reversed(missing) for part in (n // 2, n - n // 2)]
    return F.pad(block, pads, value=value)
