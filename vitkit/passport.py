"""What must travel with weights so that nobody feeds them the wrong pixels or reads the wrong tensor.

A `Passport` says how the model is built, how images are prepared for it, which tensor is its feature, where the weights
came from and under what licence. `vitkit.weights.load` puts one on every model (`vit.passport`); a run folder keeps it
as `passport.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkit.errors import WeightsError, nearest
from vitkit.run.files import atomic_write

FORMAT = 1
FILE = "passport.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STEMS = {1: "grey", 3: "rgb"}
KINDS = ("image", "volume", "video")
_SIDES = {
    "image": (2, "height and width in pixels, e.g. [224, 224]"),
    "volume": (3, "voxels along the three axes, e.g. [96, 96, 96]"),
    "video": (3, "frames, height and width, e.g. [16, 224, 224]"),
}


@dataclass(frozen=True)
class Preprocess:
    """From a file to what the model expects: resize, crop, scale to [0, 1], subtract mean, divide by std.

    Of volumes and videos, too: `kind` says which, and `image_size` then has three sides.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_size: tuple[int, ...] = (224, 224)  # height, width in pixels; (a, b, c) voxels; (frames, height, width)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # the short side is resized to image_size / crop_pct before the crop
    channels: str = ""  # "rgb", "grey", or "multi" for other counts; follows from the mean when not given
    crop_mode: str = "center"
    kind: str = "image"  # "image", "volume" or "video"
    window: tuple[float, float] | None = (
        None  # volumes: (low, high) in the file's units become 0 and 1; None: percentiles
    )
    spacing: tuple[float, float, float] | None = None  # volumes: millimetres of a voxel; None: as the file has it
    frame_stride: int = 4  # videos: every so many frames of the file is one of the clip

    def __post_init__(self) -> None:
        for name in ("mean", "std", "window", "spacing"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        object.__setattr__(self, "image_size", tuple(int(value) for value in self.image_size))
        if self.kind not in KINDS:
            raise WeightsError(f"kind is {self.kind!r}", fix=f"one of {', '.join(KINDS)}")
        sides, words = _SIDES[self.kind]
        if len(self.image_size) != sides or min(self.image_size) < 1:
            raise WeightsError(f"image_size is {self.image_size}", fix=words)
        if self.window is not None and not self.window[0] < self.window[1]:
            raise WeightsError(f"window is {self.window}", fix="(low, high) in the file's units, low first")
        if self.spacing is not None and (len(self.spacing) != 3 or min(self.spacing) <= 0):
            raise WeightsError(f"spacing is {self.spacing}", fix="three lengths in mm, e.g. [1.5, 1.5, 1.5]")
        if self.frame_stride < 1:
            raise WeightsError(f"frame_stride is {self.frame_stride}", fix="1 or more frames")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise WeightsError(
                f"mean {self.mean} and std {self.std} do not fit", fix="one mean and one positive std a channel"
            )
        if not 0 < self.crop_pct <= 1:
            raise WeightsError(f"crop_pct is {self.crop_pct}", fix="a share above 0 and at most 1, e.g. 0.875")
        channels = self.channels or _STEMS.get(self.in_chans, "multi")
        if channels != _STEMS.get(self.in_chans, "multi"):
            raise WeightsError(f"channels is {channels!r} with {self.in_chans} means", fix="grey has 1 mean, rgb has 3")
        object.__setattr__(self, "channels", channels)

    @property
    def in_chans(self) -> int:
        return len(self.mean)

    def normalise(self, x: Tensor) -> Tensor:
        """Pixels (..., C, H, W) of images or (..., C, a, b, c) of volumes and videos, uint8 or floating in [0, 1], to what
        the model takes: float32 on `x`'s device."""
        mean, std = self._constants(x)
        x = x.to(torch.float32).div(255) if x.dtype == torch.uint8 else x.to(torch.float32)
        return x.sub(mean).div(std)

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`: model input (B, C, H, W) back to pixels in [0, 1] (clipped), float32."""
        mean, std = self._constants(x)
        return x.to(torch.float32).mul(std).add(mean).clamp(0, 1)

    def differences(self, other: Preprocess) -> list[str]:
        """What differs, in words; empty when both prepare images alike."""
        found = []
        for name in (f.name for f in dataclasses.fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            close = isinstance(mine, tuple) and len(mine) == len(theirs)
            close = close and all(abs(a - b) <= 1e-6 for a, b in zip(mine, theirs, strict=True))
            if mine != theirs and not close:
                found.append(f"{name} {_words(mine)} against {_words(theirs)}")
        return found

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sides = _SIDES[self.kind][0]
        if x.ndim <= sides or x.shape[-1 - sides] != self.in_chans:
            axes = {"image": "height, width", "volume": "a, b, c", "video": "frames, height, width"}[self.kind]
            raise WeightsError(
                f"{self.kind}s of shape {tuple(x.shape)} for a model of {self.in_chans} channels ({self.channels})",
                fix=f"pass (batch, {self.in_chans}, {axes})",
            )
        return _column(self.mean, x.device, sides), _column(self.std, x.device, sides)


@dataclass(frozen=True)
class Feature:
    """Which tensor is the model's feature, and two facts that change it silently when they are wrong."""

    pool: str = "token"  # timm's global_pool: "token", "avg", "map", "" ...
    norm: str = "norm"  # the LayerNorm that made it: "norm" (before pooling), "fc_norm" (after), "none"
    positions: str = "timm"  # how the position table is resampled: vitkit.parts.positions
    rope: str = "float32"  # precision of rotary periods: "float32", or "bfloat16" as DINOv3's authors keep them

    def __post_init__(self) -> None:
        from vitkit.parts.positions import RULES

        allowed = {"norm": ("norm", "fc_norm", "none"), "positions": RULES, "rope": ("float32", "bfloat16")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise WeightsError(f"feature.{name} is {getattr(self, name)!r}", fix=f"one of {', '.join(values)}")


@dataclass
class Passport:
    """All that is known about a model's weights besides the numbers."""

    arch: str  # a timm name, or the bare class "VisionTransformer", "VisionTransformerDistilled" or "Eva"
    arch_kwargs: dict[str, Any] = field(default_factory=dict)  # what that name is built with, plain JSON types
    preprocess: Preprocess = field(default_factory=Preprocess)
    feature: Feature = field(default_factory=Feature)
    licence: str | None = None
    classes: list[str] | None = None
    task: str | None = None  # "single", "multi" or None: what the head was trained for
    # kind "timm", "file", "run" or "random"; ref; sha256 of its trunk before adaptation; seed; load: its arguments
    base: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)  # adapters on top of the base: {"method", "settings"}
    lineage: list[dict[str, Any]] = field(default_factory=list)  # everything done so far, oldest first
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, content: dict[str, Any], *, where: str = "this passport") -> Passport:
        """Strict inverse of `to_dict`: unknown formats, unknown keys and missing keys raise WeightsError."""
        if not isinstance(content, dict) or "format" not in content:
            raise WeightsError(
                f"{where} is not a vitkit passport: it has no 'format'", fix="name a run folder of vitkit"
            )
        if content["format"] != FORMAT:
            raise WeightsError(
                f"{where} has format {content['format']!r}; this version of vitkit reads format {FORMAT}",
                fix="use the version of vitkit that wrote it, or a newer one",
            )
        _check_keys(cls, content, where, required=("arch", "preprocess", "feature"))
        parts = dict(content)
        for key, kind in (("preprocess", Preprocess), ("feature", Feature)):
            _check_keys(kind, parts[key], f"{where}, {key},")
            parts[key] = kind(**parts[key])
        if parts.get("task") not in (None, "single", "multi"):
            raise WeightsError(f"{where} has task {parts['task']!r}", fix="single, multi or null")
        return cls(**parts)

    def save(self, folder: str | Path) -> Path:
        """Write `passport.json` into `folder` in one step. A base on disk is also noted relative to the folder, so
        that both can be moved together."""
        path = Path(folder) / FILE
        content = self.to_dict()
        base = content["base"]
        if base.get("kind") in ("file", "run") and base.get("ref"):
            try:
                base["relative"] = Path(os.path.relpath(base["ref"], Path(folder).resolve())).as_posix()
            except ValueError:  # another drive: there is no relative path
                base.pop("relative", None)
        atomic_write(path, json.dumps(content, indent=1) + "\n")
        return path

    @classmethod
    def read(cls, folder: str | Path) -> Passport:
        """The passport of a run folder (or a passport file). Raises WeightsError when there is none or it is broken."""
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise WeightsError(f"{path} does not exist", fix="name a finished run folder") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise WeightsError(
                f"{path} is not valid JSON: {error}", fix="restore the file or repeat the run"
            ) from error
        return cls.from_dict(content, where=str(path))

    def require_same_preprocessing(self, other: Passport, what: str) -> None:
        """Raise WeightsError naming every difference between how `self` and `other` prepare images."""
        found = self.preprocess.differences(other.preprocess)
        if found:
            raise WeightsError(
                f"{what}: images are prepared differently: {'; '.join(found)}",
                fix="use the preprocessing of the model that made the first, or make both again from one model",
            )


def _check_keys(kind: type, content: Any, where: str, required: tuple[str, ...] = ()) -> None:
    names = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(content, dict):
        raise WeightsError(f"{where} is {type(content).__name__}, not a mapping", fix="restore the file")
    for key in content:
        if key not in names:
            close = nearest(key, names)
            raise WeightsError(
                f"{where} has an unknown key {key!r}", fix=f"did you mean {close[0]!r}?" if close else f"known: {names}"
            )
    missing = [key for key in required if key not in content]
    if missing:
        raise WeightsError(f"{where} lacks {', '.join(missing)}", fix="restore the file or repeat the run")


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@lru_cache(maxsize=64)
def _column(values: tuple[float, ...], device: torch.device, sides: int) -> Tensor:
    """(C, 1, 1) or (C, 1, 1, 1) on the device, made once: a copy to the device in every step would make the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, *[1] * sides)
