"""Streams: frames in order, with what was logged beside them, from arrays, folders of pictures and animations.

A stream's frames are uint8 (H, W), or (H, W, 3) with colour, read when they are asked for; big arrays (.npy) are mapped, never
loaded whole. `episodes` holds the first frame of every episode: nothing may look across one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from . import pixels
from .found import some

ANIMATED = (".gif", ".webp", ".apng")  # may hold several frames
LOGGED = ("actions", "rewards", "episodes", "terminals")
LAYOUT = (
    "an .npz or .npy of uint8 (frames, height, width), also with 3 colours behind, or a folder of those, of GIFs, or with a "
    "folder of frame pictures for each stream"
)


@dataclass
class Stream:
    """`length` frames called `name`. `source` is what they are read from: an array, an .npy file or picture files."""

    name: str
    length: int
    source: Any
    actions: np.ndarray | None = None  # (T,): what was done after seeing frame t
    rewards: np.ndarray | None = None  # (T,): what that brought
    episodes: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames start..stop-1 as uint8 (n, H, W) or (n, H, W, 3)."""
        return self.source.read(start, stop)

    def bounds(self) -> list[tuple[int, int]]:
        """First and one past the last frame of every episode."""
        edges = sorted({0, *(int(start) for start in self.episodes), self.length})
        return list(itertools.pairwise(edges))


@dataclass(eq=False)
class ArraySource:
    """Frames in memory."""

    frames: np.ndarray
    where: str

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.frames[start:stop]

    def stamp(self) -> str:
        return hashlib.blake2b(np.ascontiguousarray(self.frames).data, digest_size=16).hexdigest()


@dataclass(eq=False)
class MappedSource:
    """Frames of an .npy file, mapped: opened in each process on first use."""

    path: str

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.array(_mapped(self.path)[start:stop])

    def stamp(self) -> str:
        return _file_stamp(self.path)


@dataclass(eq=False)
class PictureSource:
    """One picture file a frame."""

    files: list[str]

    def read(self, start: int, stop: int) -> np.ndarray:
        frames = [pixels.decode(pixels.read_bytes(file), file)[0] for file in self.files[start:stop]]
        odd = next((i for i, frame in enumerate(frames) if frame.shape != frames[0].shape), None)
        if odd is not None:
            raise DataError(
                f"{self.files[start + odd]}: {frames[odd].shape} beside {frames[0].shape} of the frame before",
                fix="frames of one stream have one size and are all grey or all coloured",
            )
        return np.stack(frames)

    def stamp(self) -> str:
        h = hashlib.blake2b(digest_size=16)
        for file in self.files:
            h.update(_file_stamp(file).encode())
        return h.hexdigest()


@dataclass(eq=False)
class AnimationSource:
    """All frames of a GIF (or another picture file with several), decoded once a process."""

    path: str

    def read(self, start: int, stop: int) -> np.ndarray:
        return _animation(self.path)[start:stop]

    def stamp(self) -> str:
        return _file_stamp(self.path)


def find(path: Path) -> tuple[list[Stream], list[str]]:
    """(the streams of a file or folder, sentences about what was left out). Raises DataError when there are none."""
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder", fix=f"streams are {LAYOUT}")
    if path.is_file():
        return _file(path), []
    streams, said = [], []
    loose: list[str] = []
    for entry in sorted(path.iterdir(), key=_natural):
        if entry.is_dir():
            inner = [str(p) for p in sorted(entry.iterdir(), key=_natural) if pixels.is_image(p.name)]
            if len(inner) == 1 and not _is_animation(inner[0]):
                said.append(f"{entry.name}/ holds one frame and is left out: a stream has frames in order")
            elif inner and all(not _is_animation(file) for file in inner[:1]):
                streams.append(Stream(entry.name, len(inner), PictureSource(inner)))
            else:
                streams += [_one_animation(Path(file), f"{entry.name}/") for file in inner]
        elif entry.suffix.lower() in (".npz", ".npy") and not _is_log(entry):
            streams += _file(entry)
        elif pixels.is_image(entry.name):
            if _is_animation(str(entry)):
                streams.append(_one_animation(entry))
            else:
                loose.append(str(entry))
    if len(loose) == 1 and not streams:
        raise DataError(
            f"{path}: holds one frame ({Path(loose[0]).name})", fix="a stream has frames in order, nine or more"
        )
    if loose and not streams:
        streams.append(Stream(path.name, len(loose), PictureSource(loose)))
    elif loose:
        said.append(f"{len(loose)} pictures beside the streams are left out, e.g. {Path(loose[0]).name}")
    if not streams:
        raise DataError(f"{path}: holds no streams of frames" + (f" ({'; '.join(said)})" if said else ""), fix=LAYOUT)
    return streams, said


def _file(path: Path) -> list[Stream]:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _npz(path)
    if suffix == ".npy":
        return [_npy(path)]
    if suffix in ANIMATED and _is_animation(str(path)):
        return [_one_animation(path)]
    what = "one picture is no stream" if pixels.is_image(path.name) else "files of this kind hold no streams"
    raise DataError(
        f"{path}: {what}", fix=f"streams are {LAYOUT}; videos: vitkit pretrain videomae_v2, or cut into frames"
    )


def _npz(path: Path) -> list[Stream]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})", fix="write it again with numpy.savez") from None
    streams = []
    for key, frames in content.items():
        if not _is_frames(frames):
            continue
        prefix = "" if key == "frames" else f"{key}."
        logged = {name: content[prefix + name] for name in LOGGED if prefix + name in content}
        name = path.stem if key == "frames" else key
        streams.append(_with_log(Stream(name, len(frames), ArraySource(frames, f"{path}:{key}")), logged, path))
    if not streams:
        shapes = some(f"{key} {array.dtype}{list(array.shape)}" for key, array in content.items())
        raise DataError(f"{path}: no array of frames among {shapes}", fix="uint8 (frames, height, width) or (..., 3)")
    return streams


def _npy(path: Path) -> Stream:
    try:
        frames = _mapped(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as .npy ({error})", fix="write it again with numpy.save") from None
    if not _is_frames(frames):
        raise DataError(
            f"{path}: {frames.dtype} of shape {frames.shape} are no frames",
            fix="uint8 (frames, height, width) or (..., 3)",
        )
    beside = {name: path.with_name(f"{path.stem}.{name}.npy") for name in LOGGED}
    logged = {name: np.load(file, allow_pickle=False) for name, file in beside.items() if file.is_file()}
    return _with_log(Stream(path.stem, len(frames), MappedSource(str(path))), logged, path)


def _with_log(stream: Stream, logged: Mapping[str, np.ndarray], path: Path) -> Stream:
    """`stream` with its actions, rewards and episodes; `episodes` numbers frames, `terminals` marks last ones."""
    for name, values in logged.items():
        if values.shape != (stream.length,):
            raise DataError(
                f"{path}: {name} of {stream.name} has shape {values.shape} for {stream.length} frames",
                fix="one value a frame",
            )
    stream.actions, stream.rewards = logged.get("actions"), logged.get("rewards")
    if "episodes" in logged:
        stream.episodes = np.flatnonzero(np.diff(logged["episodes"], prepend=logged["episodes"][:1] - 1))
    elif "terminals" in logged:
        stream.episodes = np.flatnonzero(np.concatenate([[True], logged["terminals"][:-1].astype(bool)]))
    return stream


def _one_animation(path: Path, prefix: str = "") -> Stream:
    return Stream(f"{prefix}{path.stem}", _frame_count(str(path)), AnimationSource(str(path)))


def _is_frames(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3))


def _is_log(path: Path) -> bool:
    return Path(path.stem).suffix.removeprefix(".") in LOGGED


def _is_animation(path: str) -> bool:
    return Path(path).suffix.lower() in ANIMATED and _frame_count(path) > 1


def _frame_count(path: str) -> int:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return int(getattr(image, "n_frames", 1))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: cannot be read ({error})", fix="remove or replace the file") from None


@lru_cache(maxsize=64)
def _animation(path: str) -> np.ndarray:
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: a frame cannot be decoded ({error})", fix="remove or replace the file") from None


@lru_cache(maxsize=256)
def _mapped(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _file_stamp(path: str) -> str:
    info = os.stat(path)
    return f"{path} {info.st_size} {info.st_mtime_ns}"


def _natural(path: Path) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
