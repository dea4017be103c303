"""`read(..., kind="frames")`: places in streams of frames, for methods that learn from what comes before and after.

An entry is a `Moment`: a stream, a frame, and the bounds that nothing may look across: those of its episode and of its split.
Splits are cut by time, the end of every stream for the test, because neighbouring frames are nearly the same picture.
Views make tensors of a moment (`vitkit.data.frame_views`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from . import tables
from .found import Found, count, some
from .images import SPLITS, Images
from .streams import Stream, find

OBSERVATION = 3  # frames stacked, unless a method's settings say otherwise


@dataclass(frozen=True)
class Moment:
    """Frame `index` of `stream`; frames low..high-1 may be looked at with it."""

    stream: Stream
    index: int
    low: int
    high: int

    @property
    def name(self) -> str:
        return f"{self.stream.name}[{self.index}]"


@dataclass(frozen=True, eq=False)
class FrameStore:
    """Moments of streams; see `images.Store`. Row r is frame `index[r]` of stream `which[r]` within its bounds."""

    streams: list[Stream]
    which: np.ndarray
    index: np.ndarray
    low: np.ndarray
    high: np.ndarray
    kind: str = "frames"

    def name(self, row: int) -> str:
        return f"{self.streams[self.which[row]].name}[{self.index[row]}]"

    def stamp(self, row: int) -> str:
        return f"{self._stamps[self.which[row]]} {self.index[row]} {self.low[row]} {self.high[row]}"

    @cached_property
    def _stamps(self) -> list[str]:
        return [stream.source.stamp() for stream in self.streams]

    def raw(self, row: int) -> None:
        return None

    def array(self, row: int) -> Any:
        """The `Moment` of a row."""
        return Moment(self.streams[self.which[row]], int(self.index[row]), int(self.low[row]), int(self.high[row]))


def read_frames(
    spec: str | Path, columns: tables.Columns | None = None, *, val: float = 0.15, test: float = 0.2
) -> Found:
    """Streams of a file or folder (`vitkit.data.streams.find`) as moments, split by time.

    Every stream's last `test` share of frames is for the test, `val` before it for validation. Pieces with fewer than three
    observations of three frames are left out, and named; DataError when nothing is left.
    """
    if columns is not None and columns.by_hand:
        raise ConfigError(
            f"{spec}: columns were named ({some(columns.by_hand)}), but streams have none", fix="leave them out"
        )
    path = Path(spec).expanduser()
    streams, said = find(path)
    rows: list[tuple[np.ndarray, ...]] = []
    short: list[str] = []
    lost = 0
    for number, stream in enumerate(streams):
        if stream.length < 3 * OBSERVATION:
            short.append(f"{stream.name} ({stream.length})")
            continue
        for low, high, split in _pieces(stream, val, test):
            if high - low < 3 * OBSERVATION:
                lost += high - low
                continue
            index = np.arange(low, high - OBSERVATION + 1)
            same = np.ones_like(index)
            rows.append((number * same, index, low * same, high * same, SPLITS.index(split) * same))
    if short:
        words = f"{count(len(short), 'stream')} shorter than three observations of {OBSERVATION} frames: {some(short)}"
        if not rows:
            raise DataError(f"{path}: {words}", fix=f"streams of {3 * OBSERVATION} frames or more")
        said.append(f"WARNING: left out {words}")
    if not rows:
        raise DataError(
            f"{path}: every episode is shorter than three observations of {OBSERVATION} frames",
            fix=f"episodes of {3 * OBSERVATION} frames or more, also after splitting by time",
        )
    columns_of = [np.concatenate(column).astype(np.int64) for column in zip(*rows, strict=True)]
    which, index, lows, highs, numbers = columns_of
    store = FrameStore(streams, which, index, lows, highs)
    splits = np.array(SPLITS)[numbers]
    frames = sum(stream.length for stream in streams)
    episodes = sum(len(stream.bounds()) for stream in streams)
    heads = [
        f"{count(len(streams), 'stream')} of {frames:,} frames in {count(episodes, 'episode')} "
        f"({some(stream.name for stream in streams)})",
        "every stream is split by time: its end for the test, what is before that for validation",
    ]
    if lost:
        said.append(f"{lost} frames of pieces shorter than three observations are left out")
    names = [f"{streams[w].name}[{i}]" for w, i in zip(which.tolist(), index.tolist(), strict=True)]
    return Found(path.stem, store, names, split=splits, said=[*heads, *said])


def _pieces(stream: Stream, val: float, test: float) -> list[tuple[int, int, str]]:
    """(first frame, one past the last, split) of every part of every episode."""
    n = stream.length
    cut_test = n - int(n * test)
    cut_val = cut_test - int(n * val)
    pieces = []
    for low, high in stream.bounds():
        for start, stop, split in ((0, cut_val, "train"), (cut_val, cut_test, "val"), (cut_test, n, "test")):
            first, last = max(low, start), min(high, stop)
            if first < last:
                pieces.append((first, last, split))
    return pieces


def actions(images: Images, frames: int = OBSERVATION) -> np.ndarray:
    """(N,) int64: what was done after the last frame of each moment's observation. DataError where nothing was logged."""
    store = images.store
    if not isinstance(store, FrameStore):
        raise ConfigError(f"{images.name} holds no streams of frames", fix='read(..., kind="frames")')
    silent = [stream.name for stream in store.streams if stream.actions is None]
    if silent:
        raise DataError(
            f"{images.name}: no actions are logged for {some(silent)}",
            fix="an array `actions` beside `frames`, as vitkit play collect writes it",
        )
    found = [store.streams[store.which[row]].actions for row in images.rows.tolist()]
    last = np.minimum(store.index[images.rows] + frames - 1, store.high[images.rows] - 1)
    return np.array([logged[i] for logged, i in zip(found, last.tolist(), strict=True)], dtype=np.int64)
