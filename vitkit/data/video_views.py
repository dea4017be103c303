"""Views of videos: a `video_files.Video` of any length and size -> clips uint8 (C, T, h, w) as the passport asks for them.

A clip is `T` frames, every `frame_stride`-th one of the file, at a random start in training and in the middle otherwise; a
video that is too short goes on with its last frame, as in the authors' code. Only the frames of the clip are decoded. One
crop and one augmentation serve all frames of a clip. Randomness comes from the global generators, as in `transforms`.

Sources: OpenGVLab/VideoMAEv2, dataset/transforms.py (GroupMultiScaleCrop), dataset/datasets.py (test views).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..errors import ConfigError
from . import transforms
from .transforms import Preprocess, View
from .video_files import Video

# Corners, centre, middles of the sides and the points between, in quarters of the free space (right, down).
PLACES = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))
SCALES = (1.0, 0.875, 0.75, 0.66)


def pretrain_view(
    preprocess: Preprocess,
    *,
    scale: tuple[float, float] | None = None,
    hflip: bool = False,
    scales: Sequence[float] = SCALES,
    clips: int = 1,
) -> View:
    """VideoMAE's crops: sides from `scales` of the short side, at one of 13 fixed places, resized. `clips` > 1 takes so many
    crops of the same frames, (clips, C, T, h, w). `scale`, images' random area, has no meaning here."""
    return PretrainView(preprocess, tuple(scales), clips, hflip)


def finetune_view(
    preprocess: Preprocess,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    hflip: bool = True,
    randaug: str | None = None,
    rotate: float = 0.0,
) -> View:
    """A random clip: random resized crop, flip, rotation and RandAugment, each drawn once for all its frames."""
    return FinetuneView(preprocess, transforms.TrainView(_of_images(preprocess), scale, hflip, randaug, rotate))


def eval_view(preprocess: Preprocess) -> View:
    """The middle clip, its centre."""
    return EvalView(preprocess, transforms.EvalView(_of_images(preprocess)))


def test_views(preprocess: Preprocess, *, segments: int = 5, crops: int = 3) -> View:
    """`segments` clips spread over the video, each in `crops` square crops along its long side: (segments crops, C, T, h, w),
    segment by segment. Published: 5 x 3 for Kinetics, 2 x 3 for SSv2."""
    if segments < 1 or crops < 1:
        raise ConfigError(f"{segments} clips x {crops} crops", fix="at least 1 of both")
    return TestViews(preprocess, segments, crops)


test_views.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest reads in its name


def span(preprocess: Any) -> int:
    """Frames of the file from a clip's first frame to the end of its last step: T x stride."""
    return int(preprocess.image_size[0]) * int(preprocess.frame_stride)


def clip_indices(frames: int, preprocess: Any, start: int) -> np.ndarray:
    """The frames (T,) of a clip that begins at `start`; behind the end of the video its last one."""
    length, stride = int(preprocess.image_size[0]), int(preprocess.frame_stride)
    return np.minimum(start + stride * np.arange(length), frames - 1)


@dataclass(frozen=True)
class PretrainView:
    """Built by `pretrain_view`."""

    preprocess: Any
    scales: tuple[float, ...]
    clips: int
    hflip: bool

    def __call__(self, video: Video) -> Tensor:
        frames = _random_clip(video, self.preprocess)
        clips = [self._crop(frames) for _ in range(self.clips)]
        return torch.stack(clips) if self.clips > 1 else clips[0]

    def _crop(self, frames: Tensor) -> Tensor:
        height, width = frames.shape[-2:]
        h, w, top, left = multi_scale_box(height, width, self.scales)
        frames = _resize(frames[..., top : top + h, left : left + w], self.preprocess)
        if self.hflip and torch.rand(()) < 0.5:
            frames = frames.flip(-1)
        return _finished(frames, self.preprocess)


def multi_scale_box(height: int, width: int, scales: Sequence[float]) -> tuple[int, int, int, int]:
    """(h, w, top, left): sides from neighbouring `scales` of the short side, at one of the 13 places."""
    short = min(height, width)
    sides = [max(1, int(short * scale)) for scale in scales]
    pairs = [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1]
    w, h = pairs[int(torch.randint(len(pairs), ()))]
    right, down = PLACES[int(torch.randint(len(PLACES), ()))]
    return h, w, (height - h) // 4 * down, (width - w) // 4 * right


@dataclass(frozen=True)
class FinetuneView:
    """Built by `finetune_view`. `image` is the view of a single frame; each frame sees the same random numbers."""

    preprocess: Any
    image: transforms.TrainView

    def __call__(self, video: Video) -> Tensor:
        frames = _random_clip(video, self.preprocess)
        seed = int(torch.randint(2**31, ()))
        done = []
        for frame in frames:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            done.append(self.image(frame))
        return torch.stack(done, dim=1)


@dataclass(frozen=True)
class EvalView:
    """Built by `eval_view`."""

    preprocess: Any
    image: transforms.EvalView

    def __call__(self, video: Video) -> Tensor:
        start = max(0, (len(video) - span(self.preprocess)) // 2)
        frames = video.read(clip_indices(len(video), self.preprocess, start))
        return self.image(frames).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class TestViews:
    """Built by `test_views`. The video is thinned to every stride-th frame first, and segments start in that."""

    __test__ = False

    preprocess: Any
    segments: int
    crops: int

    def __call__(self, video: Video) -> Tensor:
        p = self.preprocess
        length = int(p.image_size[0])
        sampled = np.arange(0, len(video), int(p.frame_stride))
        room = max((len(sampled) - length) / max(self.segments - 1, 1), 0)
        starts = [int(k * room) for k in range(self.segments)]
        if self.segments == 1:
            starts = [max(0, (len(sampled) - length) // 2)]
        wanted = [sampled[np.minimum(start + np.arange(length), len(sampled) - 1)] for start in starts]
        frames = video.read(np.concatenate(wanted))
        clips = _short_side(frames, p).unflatten(0, (self.segments, length))
        views = [_finished(crop, p) for clip in clips for crop in self._crops(clip)]
        return torch.stack(views)

    def _crops(self, clip: Tensor) -> list[Tensor]:
        h, w = self.preprocess.image_size[1:]
        height, width = clip.shape[-2:]
        free = (height - h, width - w)
        parts = [k / (self.crops - 1) for k in range(self.crops)] if self.crops > 1 else [0.5]
        corners = [(int(part * free[0]), int(part * free[1])) for part in parts]
        return [clip[..., top : top + h, left : left + w] for top, left in corners]


def _random_clip(video: Video, preprocess: Any) -> Tensor:
    """uint8 (T, C, H, W) of a clip at a random start."""
    room = len(video) - span(preprocess)
    start = int(torch.randint(room + 1, ())) if room > 0 else 0
    return video.read(clip_indices(len(video), preprocess, start))


def _of_images(preprocess: Any) -> Any:
    """What the views of single frames read: the same with (height, width)."""
    return replace(preprocess, kind="image", image_size=tuple(preprocess.image_size[1:]))


def _short_side(frames: Tensor, preprocess: Any) -> Tensor:
    """Frames (n, C, H, W) scaled until they just cover the model's size."""
    h, w = preprocess.image_size[1:]
    height, width = frames.shape[-2:]
    ratio = max(h / height, w / width)
    return _resize(frames, preprocess, (max(h, int(height * ratio)), max(w, int(width * ratio))))


def _resize(frames: Tensor, preprocess: Any, size: Sequence[int] | None = None) -> Tensor:
    how = transforms._interpolation(preprocess)
    return F.resize(frames, list(size or preprocess.image_size[1:]), interpolation=how, antialias=True)


def _finished(frames: Tensor, preprocess: Any) -> Tensor:
    """(T, C, h, w) to the model's channels, (C, T, h, w)."""
    return transforms.to_channels(frames, transforms._channels(preprocess)).transpose(0, 1).contiguous()
