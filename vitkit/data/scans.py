"""Pictures that are frames of DICOM files or slices of volumes: what kind a file is, and the store they are read from."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import ConfigError, DataError, nearest
from . import pixels
from .dicom_tags import SUFFIXES as DICOM_SUFFIXES
from .dicom_tags import is_dicom
from .windowing import Window, require_window

if TYPE_CHECKING:
    from .dicom_tags import Header
    from .images import Images
    from .volume import Grid

NIFTI_SUFFIXES = (".nii", ".nii.gz")
# What each index of a volume grows towards when its slices are looked at (see `volume`).
PLANES = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
Kind = Literal["picture", "dicom", "nifti", ""]
_CACHED_BYTES = 512 * 1024**2  # uint8 volumes that a process keeps: neighbouring slices are asked for together


@dataclass(frozen=True)
class How:
    """How scans become pictures. `frames`: "all", "middle", or k evenly spaced ones of each volume or film."""

    frames: str | int = "all"
    plane: str = "axial"
    window: Window | None = None

    def __post_init__(self) -> None:
        frames = int(self.frames) if str(self.frames).isdecimal() else self.frames
        object.__setattr__(self, "frames", frames)
        if frames not in ("all", "middle") and not (isinstance(frames, int) and frames >= 1):
            raise ConfigError(f"frames={self.frames!r}", fix='"all", "middle", or how many of each volume')
        if self.plane not in PLANES:
            near = nearest(self.plane, PLANES)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"plane={self.plane!r}", fix=f"{hint}one of {', '.join(PLANES)}")
        object.__setattr__(self, "window", require_window(self.window))

    def choose(self, n: int) -> list[int]:
        """Which of `n` slices in order are taken."""
        if self.frames == "all":
            return list(range(n))
        k = 1 if self.frames == "middle" else int(self.frames)
        return sorted({min(n - 1, int((2 * i + 1) * n / (2 * k))) for i in range(k)})


def kind(path: str) -> Kind:
    """What a file is: by its ending, and by the DICOM mark where it has none (or one of digits only, as UIDs end)."""
    name = os.path.basename(path)
    if name.startswith(".") or name.upper() == "DICOMDIR":
        return ""
    if pixels.is_image(name):
        return "picture"
    lower = name.lower()
    if lower.endswith(NIFTI_SUFFIXES):
        return "nifti"
    suffix = Path(lower).suffix
    if suffix in DICOM_SUFFIXES:
        return "dicom"
    return "dicom" if (not suffix or suffix[1:].isdigit()) and is_dicom(path) else ""


def by_ending(name: str) -> bool:
    """Whether a file name alone tells that the file can be read."""
    return pixels.is_image(name) or name.lower().endswith((*NIFTI_SUFFIXES, *DICOM_SUFFIXES))


@dataclass(frozen=True, eq=False)
class ScanStore:
    """One frame or slice a row, of files of any kind. `volume` numbers what a row is a slice of (-1: of nothing),
    `place` its order there; `headers` and `grids` are what was read while indexing, by file."""

    files: list[str]
    kinds: Sequence[Kind]
    file: np.ndarray  # (N,) index into files
    frame: np.ndarray  # (N,)
    volume: np.ndarray  # (N,)
    place: np.ndarray  # (N,)
    how: How = field(default_factory=How)
    deep: str = "full"
    headers: Mapping[int, Header] = field(default_factory=dict)
    grids: Mapping[int, Grid] = field(default_factory=dict)
    notes: Mapping[str, list[str]] = field(default_factory=dict)  # volume's name -> what its order or header lacks
    labels: bool = False  # masks: class numbers instead of brightness

    def _several(self, file: int) -> bool:
        one = self.headers.get(file)
        return self.kinds[file] == "nifti" or (one is not None and one.frames > 1)

    def name(self, row: int) -> str:
        file = int(self.file[row])
        return f"{self.files[file]}[{self.frame[row]}]" if self._several(file) else self.files[file]

    def stamp(self, row: int) -> str:
        path = self.files[self.file[row]]
        try:
            info = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}", fix="restore the file or read the data again") from None
        how = f"{self.how.plane} {self.how.window} {self.deep}"
        return f"{info.st_size} {info.st_mtime_ns} {self.frame[row]} {how}"

    def raw(self, row: int) -> bytes | None:
        """Bytes of plain pictures; scans have only pixels."""
        file = int(self.file[row])
        return pixels.read_bytes(self.files[file]) if self.kinds[file] == "picture" else None

    def array(self, row: int) -> np.ndarray:
        file, frame = int(self.file[row]), int(self.frame[row])
        path = self.files[file]
        if self.kinds[file] == "picture":
            return pixels.decode(pixels.read_bytes(path), path, deep=self.deep)[0]
        if self.kinds[file] == "dicom":
            from . import dicom

            return dicom.decode(path, frame=frame, window=self.how.window)[0]
        slices = slices_of(path, self.how, labels=self.labels)
        if frame >= len(slices):
            raise DataError(f"{path}: there is no slice {frame}", fix=f"slices run from 0 to {len(slices) - 1}")
        return slices[frame].copy()

    def is_medical(self, row: int) -> bool:
        """Whether the picture comes from a DICOM or NIfTI file."""
        return self.kinds[int(self.file[row])] != "picture"


_cache: OrderedDict[tuple, np.ndarray] = OrderedDict()
_lock = Lock()


def slices_of(path: str, how: How, *, labels: bool = False) -> np.ndarray:
    """(D, H, W) of a NIfTI file: uint8 brightness, or the class numbers of a mask. The last volumes are kept."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", fix="restore the file") from None
    key = (path, info.st_size, info.st_mtime_ns, how.plane, how.window, labels)
    from . import volume

    with _lock:  # also while reading: threads ask for neighbouring slices, and one of them is to read the volume
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
        read = volume.read(path, orientation=PLANES[how.plane])
        found = mask_numbers(read.data, path) if labels else volume.to_uint8(read, window=how.window)
        _cache[key] = found
        while len(_cache) > 1 and sum(one.nbytes for one in _cache.values()) > _CACHED_BYTES:
            _cache.popitem(last=False)
    return found


def mask_numbers(data: np.ndarray, path: str) -> np.ndarray:
    """Class numbers of a mask volume as integers; DataError when they are fractions or negative."""
    whole = np.rint(data)
    if np.abs(whole - data).max(initial=0) > 1e-3 or whole.min(initial=0) < 0:
        raise DataError(f"{path}: a mask must hold one class number per voxel", fix="whole numbers from 0 on")
    return whole.astype(np.uint8 if whole.max(initial=0) < 256 else np.int32)


def mask_values(path: str) -> set[int]:
    """The class numbers that a mask volume holds."""
    return set(np.unique(slices_of(path, How(), labels=True)).tolist())


def volumes(images: Images) -> tuple[np.ndarray, np.ndarray] | None:
    """((N,) number of the volume that each picture is a slice of, (N,) its order in there), or None without volumes.

    A volume is a NIfTI file, a DICOM series whose slices have positions, or a DICOM file with several frames. Numbers
    count 0, 1, ...; a picture that is no slice is a volume of its own. For pooling slices into one row a volume.
    """
    store = images.store
    if not isinstance(store, ScanStore) or (store.volume[images.rows] < 0).all():
        return None
    raw = store.volume[images.rows].astype(np.int64)
    alone = raw < 0
    raw[alone] = raw.max() + 1 + np.arange(alone.sum())
    _, first, numbers = np.unique(raw, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # in order of first appearance
    return rank[numbers], store.place[images.rows].copy()
