"""Videos: files that PyAV decodes and folders of frames, one entry each. Nothing is decoded until a view asks for frames.

`Video` gives frames by number. The frames of a file are listed by their time stamps (read without decoding); where these are
not evenly spaced (variable frame rate), number j is the frame nearest in time to the j-th of as many even steps. A file that
ends before its header says so is refused: it is never silently half-read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, MissingExtra
from . import pixels

SUFFIXES = frozenset(  # what FFmpeg reads under other endings can be named in a table
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".mts", ".m2ts"}
)
_HELD = 0.9  # share of the frames a header promises below which a file counts as truncated


class Video(Protocol):
    """What views take."""

    name: str

    def __len__(self) -> int:
        """Frames."""

    def read(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """uint8 (n, C, H, W) of these frames, in this order; repeated ones are decoded once. C is 3, or 1 for grey."""

    def picture(self) -> Tensor:
        """uint8 (C, H, W) to look at."""


@dataclass(frozen=True, eq=False)
class VideoStore:
    """One video a row: a file, or a folder of frames. See `images.Store`."""

    paths: list[str]
    kind = "video"

    def name(self, row: int) -> str:
        return self.paths[row]

    def stamp(self, row: int) -> str:
        path = self.paths[row]
        try:
            info = os.stat(path)
            size = len(os.listdir(path)) if os.path.isdir(path) else info.st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}", fix="restore the file or read the data again") from None
        return f"{size} {info.st_mtime_ns}"

    def raw(self, row: int) -> None:
        return None

    def array(self, row: int) -> Any:
        return open_video(self.paths[row])


def open_video(path: str | Path) -> Video:
    """The video in a file or a folder of frames. Raises DataError where there is none."""
    path = str(path)
    return FrameFolder(path) if os.path.isdir(path) else VideoFile(path)


class _Pictured:
    """What both kinds share: the middle frame stands for the video."""

    def picture(self: Any) -> Tensor:
        """uint8 (C, H, W): the middle frame."""
        return self.read([len(self) // 2])[0]


class FrameFolder(_Pictured):
    """Images of one size in a folder, in natural order (2 before 10)."""

    def __init__(self, path: str):
        self.name = path
        self.files = frame_files(path)
        if not self.files:
            raise DataError(f"{path}: no frames in this folder", fix="numbered images, or remove the folder")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        wanted = np.asarray(numbers, dtype=np.int64)
        found: dict[int, np.ndarray] = {}
        for number in np.unique(wanted).tolist():
            file = os.path.join(self.name, self.files[number])
            found[number] = pixels.decode(pixels.read_bytes(file), file)[0]
        shapes = {array.shape for array in found.values()}
        if len(shapes) > 1:
            raise DataError(f"{self.name}: frames of different sizes ({sorted(shapes)[:3]})", fix="one size a video")
        frames = torch.from_numpy(np.stack([found[number] for number in wanted.tolist()]))
        return frames.unsqueeze(1) if frames.ndim == 3 else frames.permute(0, 3, 1, 2)


def frame_files(folder: str) -> list[str]:
    """Names of the image files in a folder, 2 before 10."""
    names = [name for name in os.listdir(folder) if pixels.is_image(name) and not name.startswith(".")]
    return sorted(names, key=lambda name: [int(w) if w.isdigit() else w.lower() for w in re.split(r"(\d+)", name)])


@dataclass(frozen=True)
class Stamps:
    """When the frames of a file are shown: ascending `pts` (n,) in ticks of the stream (None where the file lacks them), and
    `place` (n,), the frame of the file that each number stands for (differs from 0, 1, ... at a variable frame rate)."""

    pts: np.ndarray | None
    place: np.ndarray
    rate: float  # frames a second, on average
    variable: bool


class VideoFile(_Pictured):
    """A file that PyAV opens."""

    def __init__(self, path: str):
        self.name = path
        try:
            info = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}", fix="restore the file or read the data again") from None
        if not info.st_size:
            raise DataError(f"{path}: empty (0 bytes)", fix="copy it again or remove it")
        self.stamps = stamps_of(path, info.st_mtime_ns, info.st_size)

    def __len__(self) -> int:
        return len(self.stamps.place)

    @property
    def rate(self) -> float:
        """Frames a second, on average."""
        return self.stamps.rate

    def read(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        wanted = self.stamps.place[np.asarray(numbers, dtype=np.int64)]
        needed = np.unique(wanted)
        found = self._decoded(needed, seek=self.stamps.pts is not None and needed[0] > 0)
        if found is None:  # the jump landed behind the first frame, or stamps are not those of the packets
            found = self._decoded(needed, seek=False) or {}
        lost = [number for number in needed.tolist() if number not in found]
        if lost:
            raise DataError(
                f"{self.name}: {len(lost)} of {len(needed)} frames asked for cannot be decoded, e.g. frame {lost[0]} of "
                f"{len(self)}",
                fix="the file is damaged: make it again from its source, or remove it",
            )
        return torch.from_numpy(np.stack([found[number] for number in wanted.tolist()])).permute(0, 3, 1, 2)

    def _decoded(self, needed: np.ndarray, seek: bool) -> dict[int, np.ndarray] | None:
        """RGB (H, W, 3) of the frames `needed`, ascending; None where a jump to the key frame before them does not work."""
        stamps, last = self.stamps, int(needed[-1])
        found: dict[int, np.ndarray] = {}
        asked = set(needed.tolist())
        with opened(self.name) as (container, stream):
            if seek:
                assert stamps.pts is not None
                container.seek(int(stamps.pts[needed[0]]), stream=stream, backward=True)
            for number, frame in enumerate(container.decode(stream)):
                if stamps.pts is not None and frame.pts is not None:
                    number = int(np.searchsorted(stamps.pts, frame.pts))
                    known = number < len(stamps.pts) and stamps.pts[number] == frame.pts
                    if not known or (seek and not found and number > needed[0]):
                        if seek:
                            return None
                        continue
                elif seek:
                    return None
                if number in asked and not frame.is_corrupt:
                    found[number] = upright(frame)
                if number >= last:
                    break
        return found


def upright(frame: Any) -> np.ndarray:
    """RGB pixels of a decoded frame, turned as a phone's file says."""
    array = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


@contextmanager
def opened(path: str) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a file; errors of FFmpeg become DataErrors that name it."""
    try:
        import av
    except ModuleNotFoundError:
        raise MissingExtra("av", "video") from None
    av.logging.set_level(None)  # FFmpeg would write about damaged files to the terminal; errors are raised anyway
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise DataError(f"{path}: there is no video in this file", fix="remove it, or name another column")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # workers share the cores
            yield container, stream
    except av.FFmpegError as error:
        raise DataError(
            f"{path}: cannot be decoded as a video ({error.strerror or error})", fix="make it again, or remove it"
        ) from None


@lru_cache(maxsize=4096)
def stamps_of(path: str, changed: int, size: int) -> Stamps:
    """The time stamps of a file's frames, read without decoding them. Raises DataError for files without frames, and for
    those that end before their header says."""
    with opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        promised, base = stream.frames, float(stream.time_base or 0)
        duration = stream.duration * base if stream.duration else (container.duration or 0) / 1e6
        average = float(stream.average_rate or 0)
    n = len(packets)
    if not n:
        raise DataError(f"{path}: a video without frames", fix="make it again, or remove it")
    broken = sum(packet.is_corrupt for packet in packets)
    times = [packet.pts if packet.pts is not None else packet.dts for packet in packets]
    pts = None
    if all(time is not None for time in times) and len(set(times)) == n:
        pts = np.sort(np.array(times, np.int64))
    held = n / promised if promised else 1.0
    if pts is not None and duration and average and not promised:
        held = (float(pts[-1] - pts[0]) * base + 1 / average) / duration
    if held < _HELD or broken:
        what = f"{broken} damaged packets" if broken else f"{held:.0%} of what its header promises"
        raise DataError(f"{path}: truncated or damaged: it holds {n} frames, {what}", fix="copy it again, or remove it")
    place, variable, rate = np.arange(n), False, average
    if pts is not None and n > 2:
        step = float(pts[-1] - pts[0]) / (n - 1)
        even = pts[0] + step * np.arange(n)
        variable = bool(np.abs(pts - even).max() > step)
        rate = 1 / (step * base) if base else average
        if variable:
            after = np.clip(np.searchsorted(pts, even), 1, n - 1)
            place = np.where(even - pts[after - 1] <= pts[after] - even, after - 1, after)
    return Stamps(pts, place, rate, variable)
