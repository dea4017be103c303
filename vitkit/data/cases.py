"""One volume with its mask, and the stores that read them when they are asked for."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from . import scans, volume

ORIENTATION = "RAS"
_CACHED_BYTES = 2 * 1024**3  # voxels that a process keeps: crops of a small set never wait for the disk


@dataclass(eq=False)
class Case:
    """One volume: `data` (C, a, b, c) in the file's units, `mask` (a, b, c) uint8 class numbers or None, `affine` (4, 4) from
    its indices to mm (right, anterior, superior)."""

    name: str
    data: np.ndarray
    mask: np.ndarray | None
    affine: np.ndarray
    notes: tuple[str, ...] = ()
    _even: dict[tuple[float, ...], Case] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> tuple[int, ...]:
        return self.data.shape[1:]

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm of a voxel along the three axes."""
        return tuple(round(float(n), 6) for n in np.sqrt((self.affine[:3, :3] ** 2).sum(0)))

    @cached_property
    def limits(self) -> list[tuple[float, float]]:
        """What becomes 0 and 1 without a window: percentiles of each channel over the whole volume."""
        return [volume.limits(channel) for channel in self.data]

    @cached_property
    def marked(self) -> np.ndarray:
        """Flat indices of the voxels of any class but background."""
        assert self.mask is not None
        return np.flatnonzero((self.mask > 0) & (self.mask != 255))

    def at(self, spacing: Sequence[float] | None) -> Case:
        """This case with voxels of about `spacing` mm (linear; the mask takes the nearest); itself where they are so."""
        if spacing is None or np.allclose(self.spacing, spacing, rtol=1e-2):
            return self
        key = tuple(spacing)
        if key not in self._even:
            even = [volume.resample(self._volume(channel), key) for channel in self.data]
            mask = None
            if self.mask is not None:
                mask = volume.resample(self._volume(self.mask), key, labels=True).data.astype(np.uint8)
            data = np.stack([_compact(one.data) for one in even])
            self._even[key] = replace(self, data=data, mask=mask, affine=even[0].affine, _even={})
        return self._even[key]

    def picture(self) -> Tensor:
        """The middle axial slice of the first channel, uint8 (1, H, W), the front of the body up, for galleries."""
        plane = self.data[0][:, :, self.size[2] // 2].astype(np.float32)
        low, high = self.limits[0]
        grey = np.rint(np.clip((plane - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(grey.T[::-1, ::-1]))[None]

    def _volume(self, channel: np.ndarray) -> volume.Volume:
        return volume.Volume(channel.astype(np.float32), self.spacing, ORIENTATION, self.name, self.affine)  # type: ignore[arg-type]

    @property
    def bytes(self) -> int:
        own = self.data.nbytes + (0 if self.mask is None else self.mask.nbytes)
        return own + sum(one.bytes for one in self._even.values())


@dataclass(eq=False)
class VolumeStore:
    """Where cases come from. `files`: the files of each one's channels, or a folder with a DICOM series (`uids` names
    it then); `masks`: the file of each one's mask, or None."""

    files: list[list[str]]
    masks: list[str | None]
    uids: list[str | None]
    voxels: int = 0  # of all cases together, as far as headers tell
    kind: str = "volume"
    _cache: OrderedDict[int, Case] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": OrderedDict()}

    @property
    def in_memory(self) -> bool:
        """Whether all of it will stay in this process, so that workers, each with a cache of its own, would not help."""
        return 5 * self.voxels < _CACHED_BYTES

    def name(self, row: int) -> str:
        return self.files[row][0] + (f"[{self.uids[row]}]" if self.uids[row] else "")

    def stamp(self, row: int) -> str:
        return " ".join(_stamp(path) for path in self.files[row])

    def raw(self, row: int) -> bytes | None:
        return None

    def grid(self, row: int) -> volume.Grid | None:
        """Where its voxels lie, from the header; None where there is no single header."""
        return header_grid(self.files[row][0])

    def array(self, row: int) -> Any:
        """The `Case` of a row; the same object as long as it stays in memory, so it must not be written to."""
        if row in self._cache:
            self._cache.move_to_end(row)
            return self._cache[row]
        case = read_case(self.files[row], self.masks[row], self.uids[row])
        self._cache[row] = case
        while len(self._cache) > 1 and sum(one.bytes for one in self._cache.values()) > _CACHED_BYTES:
            self._cache.popitem(last=False)
        return case


@dataclass(eq=False)
class MaskStore:
    """The masks of a `VolumeStore`, row by row."""

    volumes: VolumeStore

    def name(self, row: int) -> str:
        return self.volumes.masks[row] or self.volumes.name(row)

    def stamp(self, row: int) -> str:
        path = self.volumes.masks[row]
        return "" if path is None else _stamp(path)

    def raw(self, row: int) -> bytes | None:
        return None

    def array(self, row: int) -> np.ndarray:
        mask = self.volumes.array(row).mask
        if mask is None:
            raise DataError(
                f"{self.volumes.name(row)}: there is no mask of this volume", fix="add one, or leave it out"
            )
        return mask


def read_case(files: Sequence[str], mask: str | None = None, uid: str | None = None) -> Case:
    """A volume whose channels are `files` on one grid (a 4-D NIfTI is several channels), with its mask."""
    channels: list[volume.Volume] = []
    for path in files:
        for time in range(_times(path)):
            channels.append(volume.read(path, orientation=ORIENTATION, time=time, series_uid=uid))
            volume.require_same_grid(channels[0].grid, channels[-1].grid)
    numbers = None
    if mask is not None:
        labels = volume.read(mask, orientation=ORIENTATION)
        volume.require_same_grid(channels[0].grid, labels.grid)
        numbers = scans.mask_numbers(labels.data, mask)
        if numbers.max(initial=0) > 255:
            raise DataError(f"{mask}: class numbers reach {numbers.max()}", fix="class numbers 0..254, 255 = unknown")
        numbers = numbers.astype(np.uint8)
    notes = tuple(dict.fromkeys(note for one in channels for note in one.notes))
    data = np.stack([_compact(one.data) for one in channels])
    return Case(files[0], data, numbers, channels[0].affine, notes)


def header_grid(path: str) -> volume.Grid | None:
    """Where the voxels of a NIfTI file lie, from its header; None for DICOM, whose headers are many."""
    return volume.nifti_grid(path, ORIENTATION) if volume.is_nifti(path) else None


def _times(path: str) -> int:
    """Volumes in a 4-D NIfTI file."""
    if not volume.is_nifti(path):
        return 1
    shape = volume._load(Path(path))[0].shape
    return max([1, *shape[3:]])


def _compact(data: np.ndarray) -> np.ndarray:
    """float32 voxels as int16 where that loses nothing: half the memory."""
    if not data.size or np.abs(data).max() >= 32768:
        return data
    small = data.astype(np.int16)
    return small if np.array_equal(small, data) else data


def _stamp(path: str) -> str:
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", fix="restore the file or read the data again") from None
    return f"{info.st_size} {info.st_mtime_ns}"
