"""The three places pictures are read from: files, members of tar archives, arrays in memory. See `images.Store`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import DataError
from . import pixels


@dataclass(frozen=True, eq=False)
class FileStore:
    """One file a picture."""

    paths: list[str]
    deep: str = "full"  # 16-bit rule, see `pixels`

    def name(self, row: int) -> str:
        return self.paths[row]

    def stamp(self, row: int) -> str:
        try:
            info = os.stat(self.paths[row])
        except OSError as error:
            raise DataError(
                f"{self.paths[row]}: {error.strerror}", fix="restore the file or read the data again"
            ) from None
        return f"{info.st_size} {info.st_mtime_ns} {self.deep}"

    def raw(self, row: int) -> bytes:
        return pixels.read_bytes(self.paths[row])

    def array(self, row: int) -> np.ndarray:
        return pixels.decode(self.raw(row), self.paths[row], deep=self.deep)[0]


@dataclass(frozen=True, eq=False)
class TarStore:
    """Members of uncompressed tar archives, read at their offsets: any picture costs one seek, nothing is unpacked."""

    archives: list[str]
    keys: list[str]
    archive: np.ndarray  # (N,) index into archives
    offset: np.ndarray  # (N,) first byte of the member
    size: np.ndarray  # (N,) bytes
    deep: str = "full"

    def name(self, row: int) -> str:
        return f"{self.archives[self.archive[row]]}::{self.keys[row]}"

    def stamp(self, row: int) -> str:
        info = os.stat(self.archives[self.archive[row]])
        return f"{info.st_size} {info.st_mtime_ns} {self.offset[row]} {self.size[row]} {self.deep}"

    def raw(self, row: int) -> bytes:
        name, size = self.name(row), int(self.size[row])
        try:
            with open(self.archives[self.archive[row]], "rb") as file:
                file.seek(int(self.offset[row]))
                raw = file.read(size)
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror})", fix="restore the archive") from None
        if not raw or len(raw) < size:
            what = "empty (0 bytes)" if not size else f"truncated: {len(raw)} of {size} bytes"
            raise DataError(f"{name}: the member is {what}", fix="write the archive again")
        return raw

    def array(self, row: int) -> np.ndarray:
        return pixels.decode(self.raw(row), self.name(row), deep=self.deep)[0]


@dataclass(frozen=True, eq=False)
class ArrayStore:
    """Pictures of one size in memory: `parts` are uint8 (N, H, W) or (N, H, W, 3), one after the other."""

    source: str  # "cifar10.npz", "digits"
    parts: dict[str, np.ndarray]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(part) for part in self.parts.values())])

    def _find(self, row: int) -> tuple[str, int]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return list(self.parts)[part], row - int(self._starts[part])

    def short(self, row: int) -> str:
        """`x_train[17]`, or `[17]` when there is only one array."""
        key, position = self._find(row)
        return f"{key if len(self.parts) > 1 else ''}[{position}]"

    def name(self, row: int) -> str:
        short = self.short(row)
        return self.source + (short if short.startswith("[") else f":{short}")

    @cached_property
    def _digest(self) -> str:
        h = hashlib.blake2b(digest_size=16)
        for key, part in self.parts.items():
            h.update(f"{key} {part.shape}".encode())
            h.update(np.ascontiguousarray(part).data)
        return h.hexdigest()

    def stamp(self, row: int) -> str:
        return f"{self._digest} {row}"

    def raw(self, row: int) -> None:
        return None

    def array(self, row: int) -> np.ndarray:
        key, position = self._find(row)
        return self.parts[key][position].copy()  # a transform in place must not reach the data
