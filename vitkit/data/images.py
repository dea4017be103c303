"""`Images`: an index of pictures with their labels, splits and groups. Nothing is decoded until a picture is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, nearest
from . import pixels

SPLITS = ("train", "val", "test", "unlabelled")


class Store(Protocol):
    """Where pixels live: files, frames of scans, members of tar archives, or an array in memory."""

    def name(self, row: int) -> str:
        """What errors call the picture: a path that can be opened, or `file.npz[17]`."""

    def stamp(self, row: int) -> str:
        """Something that changes when the picture does, without decoding it."""

    def raw(self, row: int) -> bytes | None:
        """The encoded bytes; None where there are only pixels."""

    def array(self, row: int) -> np.ndarray:
        """uint8 (H, W) or (H, W, 3); a store with a `kind` gives what the views of that kind take."""


UNKNOWN = 255  # mask value of pixels that count for nothing in losses and scores


@dataclass(frozen=True)
class Masks:
    """Segmentation masks that belong to pictures row by row."""

    store: Store
    ignore: int | None = None  # the value of pixels that belong to no class
    binary: bool = False  # masks stored as 0/255 or as instance numbers: every non-zero pixel is class 1

    def array(self, row: int) -> np.ndarray:
        """(H, W) uint8 class numbers, UNKNOWN where pixels belong to no class."""
        name = self.store.name(row)
        raw = self.store.raw(row)
        values = self.store.array(row) if raw is None else pixels.decode_mask(raw, name)  # None: a slice of a volume
        unknown = values == self.ignore if self.ignore is not None else np.zeros(values.shape, bool)
        if self.binary:
            values = values > 0
        known = values[~unknown]
        if known.size and known.max() > 255:
            raise DataError(
                f"{name}: mask values reach {known.max()}, but there can be at most 256 classes",
                fix="numbers of single objects belong into a folder called instances/; else save class numbers 0..255",
            )
        return np.where(unknown, UNKNOWN, values).astype(np.uint8)


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """Pictures with what is known about them, one row a picture.

    `labels` is (N,) int64 with -1 = unlabelled (task "single"), (N, C) float32 with nan = unknown (task "multi"),
    or None (tasks "mask" and None). `split` holds train, val, test or unlabelled; `group` whatever must not be
    divided between splits (a patient, a slide), or is None. `understood` says in sentences how the data were read.
    """

    name: str
    task: str | None
    classes: list[str]
    labels: np.ndarray | None
    split: np.ndarray
    group: np.ndarray | None
    store: Store
    rows: np.ndarray  # int64 (N,): the row of each picture in `store`
    names: list[str]  # short and stable: relative to the data set, used in split files and the fingerprint
    masks: Masks | None = None
    understood: list[str] = field(default_factory=list)
    # Kept columns of a table: (N,) tuples of the texts of each picture.
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.rows)
        for what, column in (
            ("labels", self.labels),
            ("split", self.split),
            ("group", self.group),
            ("names", self.names),
        ):
            if column is not None and len(column) != n:
                raise DataError(f"{self.name}: {len(column)} {what} for {n} images")

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        counts = ", ".join(f"{k} {v}" for k, v in self.counts.items())
        return f"Images({self.name!r}, {len(self)} images, task={self.task}, {len(self.classes)} classes, {counts})"

    @property
    def paths(self) -> list[str]:
        """The file of every picture, or `name[17]` for arrays."""
        return [self.store.name(row) for row in self.rows.tolist()]

    @property
    def in_memory(self) -> bool:
        """Whether pixels are already decoded (.npz, digits) or soon will be (few volumes), so that worker processes would not
        help."""
        return getattr(self.store, "in_memory", hasattr(self.store, "parts"))

    @property
    def counts(self) -> dict[str, int]:
        """Pictures in each split, in the order train, val, test, unlabelled; splits without any are left out."""
        found = {split: int((self.split == split).sum()) for split in SPLITS}
        return {split: n for split, n in found.items() if n}

    @property
    def kind(self) -> str:
        """What an entry is: "image", or "volume", "video", "frames" as `read(kind=...)` found it."""
        return getattr(self.store, "kind", "image")

    def path(self, i: int) -> str:
        """The file of picture `i`, without listing all of them."""
        return self.store.name(int(self.rows[i]))

    def decode(self, i: int) -> Any:
        """uint8 (C, H, W) with C = 1 (grey) or 3 (RGB); of other kinds whatever their store gives to their views. Raises
        DataError naming the file when it is damaged."""
        array = self.store.array(int(self.rows[i]))
        if self.kind != "image":
            return array
        tensor = torch.from_numpy(array)
        return (
            tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
        )  # channels last in memory: resizes 1.7x faster

    def picture(self, i: int) -> Tensor:
        """uint8 (C, H, W) to look at: the picture itself; of other kinds what the entry's own `picture()` gives, such as the
        middle frame of a video."""
        entry = self.decode(i)
        return entry if isinstance(entry, Tensor) else entry.picture()

    def mask(self, i: int) -> Tensor:
        """uint8 (H, W): the class number of every pixel of picture `i`."""
        if self.masks is None:
            raise DataError(
                f"{self.name}: there are no masks", fix="give a folder with images/ and masks/, or mask_column"
            )
        return torch.from_numpy(self.masks.array(int(self.rows[i])))

    def subset(self, indices: Sequence[int] | np.ndarray) -> Images:
        """The pictures at `indices`, in that order. A boolean array of the full length selects where it is True."""
        index = np.asarray(indices)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise DataError(f"{self.name}: a boolean selection of shape {index.shape} for {len(self)} images")
            index = np.flatnonzero(index)
        index = index.astype(np.int64).reshape(-1)
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise DataError(
                f"{self.name}: index {index.max() if index.max() >= len(self) else index.min()} for {len(self)} images"
            )
        take = lambda column: None if column is None else column[index]  # noqa: E731
        return replace(
            self,
            labels=take(self.labels),
            split=self.split[index],
            group=take(self.group),
            rows=self.rows[index],
            names=[self.names[i] for i in index.tolist()],
            understood=list(self.understood),
            columns={name: cells[index] for name, cells in self.columns.items()},
        )

    def part(self, *splits: str) -> Images:
        """The pictures of one split, or of several: `part("train", "unlabelled")` is what self-supervision may see."""
        for split in splits:
            if split not in SPLITS:
                near = nearest(split, SPLITS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(f"there is no split {split!r}", fix=f"{hint}splits are {', '.join(SPLITS)}")
        return self.subset(np.isin(self.split, splits))

    def few(self, k_per_class: int, seed: int = 0) -> Images:
        """At most `k_per_class` labelled pictures a class; with the same seed fewer are contained in more.

        Multi-label: pictures are added, in a seeded order, while one of their classes still lacks positives.
        """
        from .splits import few

        if k_per_class < 1:
            raise ConfigError(f"k_per_class={k_per_class}", fix="at least 1 picture a class")
        if self.labels is None:
            raise DataError(f"{self.name}: picking pictures by class needs labels, and there are none")
        return self.subset(few(self.labels, len(self.classes), k_per_class, seed))

    def with_splits(self, val: float, test: float, seed: int = 0) -> Images:
        """New splits: stratified, groups kept together; old ones are forgotten. What is unlabelled among labelled data
        stays so; data without any labels are divided at random."""
        from .splits import draw

        among = self.split != "unlabelled" if self.task else np.ones(len(self), bool)
        split, said = draw(self, among, val=val, test=test, seed=seed)
        return replace(self, split=split, understood=[*self.understood, *said])

    @cached_property
    def fingerprint(self) -> str:
        """Hash over names, file sizes and times (or pixels in memory), labels and splits: changes when the data do."""
        h = hashlib.blake2b(digest_size=16)
        h.update(repr((self.task, self.classes, len(self), self.masks is not None and self.masks.binary)).encode())
        for row, name, split in zip(self.rows.tolist(), self.names, self.split.tolist(), strict=True):
            h.update(f"{name}\0{split}\0{self.store.stamp(row)}\n".encode())
            if self.masks is not None:
                h.update(self.masks.store.stamp(row).encode())
        if self.labels is not None:
            h.update(np.ascontiguousarray(self.labels).tobytes())
        for name, cells in self.columns.items():
            h.update(repr((name, cells.tolist())).encode())
        return h.hexdigest()
