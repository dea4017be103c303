"""Volumes: NIfTI files and DICOM series as (D, H, W) float32 with their spacing, turned one way, windowed, resampled.

`read` turns every volume to one orientation without resampling (flips and transposes): by default "SPL", the letters
saying where each index grows to: slices from feet to head (S), rows from front to back (P), columns to the patient's
left (L), which is how axial slices are looked at. "SAR" is the order that NIfTI calls RAS+, read from its last axis.

    volume = vitkit.data.volume.read("case.nii.gz")              # or a folder with the slices of one DICOM series
    pictures = vitkit.data.volume.to_uint8(volume, window=None)  # (D, H, W)
    even = vitkit.data.volume.resample(volume, (1.0, 1.0, 1.0))  # mm
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import ConfigError, DataError, MissingExtra
from . import dicom, series
from .dicom_tags import _REPLACE, header, is_dicom
from .dicom_tags import SUFFIXES as DICOM_SUFFIXES
from .windowing import PERCENTILES, Window, require_window, window_linear

SUFFIXES = (".nii", ".nii.gz")
PICTURE = "SPL"
_AXES = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
_UNITS = {"meter": 1000.0, "micron": 0.001}
_SAMPLED = 8_000_000  # percentiles of larger volumes are those of every k-th voxel
Time = int | Literal["mean"]


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a file lie, without their values. `affine` as in `Volume`."""

    shape: tuple[int, int, int]  # (D, H, W)
    affine: np.ndarray
    source: str
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along D, H, W."""
        return _spacing(self.affine)


@dataclass(frozen=True, eq=False)
class Volume:
    """`affine` (4, 4) takes indices (d, h, w) to mm (right, anterior, superior); `notes` say what was assumed."""

    data: np.ndarray  # (D, H, W) float32
    spacing: tuple[float, float, float]  # mm along D, H, W
    orientation: str
    source: str
    affine: np.ndarray
    modality: str = ""
    notes: tuple[str, ...] = ()
    inverted: bool = False  # MONOCHROME1: small values are the bright ones

    @property
    def grid(self) -> Grid:
        """Where its voxels lie."""
        return Grid(self.data.shape, self.affine, self.source, self.notes)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        size, mm = (" x ".join(f"{n:g}" for n in numbers) for numbers in (self.data.shape, self.spacing))
        return f"Volume({os.path.basename(self.source)!r}, {size} voxels of {mm} mm, {self.orientation})"


def is_nifti(path: str | Path) -> bool:
    """Whether a file name ends like NIfTI."""
    return str(path).lower().endswith(SUFFIXES)


def read(
    path: str | Path, *, orientation: str | None = PICTURE, time: Time = 0, series_uid: str | None = None
) -> Volume:
    """A NIfTI file, a folder with one DICOM series, or an enhanced multi-frame DICOM file.

    Values are the file's own units (scl_slope/scl_inter, RescaleSlope/Intercept applied); NaN and infinity become the
    smallest finite value. `orientation` None: as stored. `time` chooses a volume of a 4-D NIfTI, or "mean" averages
    them; the first is read by default. `series_uid` chooses among several DICOM series.
    Raises DataError naming file and fix.
    """
    path = Path(path)
    if orientation is not None:
        _require_orientation(orientation)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder", fix="correct the name")
    if is_nifti(path):
        volume = _nifti(path, time)
    elif path.is_dir():
        volume = _series(series.one_series(path, series_uid), str(path))
    elif is_dicom(path) or path.suffix.lower() in DICOM_SUFFIXES:
        volume = _series([_one(path)], str(path))
    else:
        raise DataError(f"{path}: not a volume", fix="give .nii, .nii.gz, or a folder with one DICOM series")
    return volume if orientation is None else reorient(volume, orientation)


def _one(path: Path) -> Any:
    found = header(path)
    if found.problem or found.no_picture:
        raise DataError(found.problem or f"{path}: a DICOM file that holds no picture ({found.no_picture})")
    return found


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError:
        raise MissingExtra("nibabel", "medical") from None
    return nibabel


def nifti_grid(path: str | Path, orientation: str = PICTURE) -> Grid:
    """The grid of a NIfTI file, turned to `orientation`, from its header alone."""
    image, notes = _load(Path(path))
    shape = [*image.shape[:3], 1, 1][:3]
    matrix = _nifti_affine(image, Path(path), notes)
    if len(image.shape) > 3 and image.shape[3] > 1:
        notes.append(f"4-D: volume 0 of {image.shape[3]}")
    order, _, matrix = _turn(tuple(shape[::-1]), matrix, orientation)
    size = tuple(int(shape[::-1][k]) for k in order)
    return Grid(size, matrix, str(path), tuple(notes))  # type: ignore[arg-type]


def _nifti(path: Path, time: Time) -> Volume:
    image, notes = _load(path)
    matrix = _nifti_affine(image, path, notes)
    try:
        data = _one_time(image, path, time, notes)
    except (DataError, ConfigError):
        raise
    except MemoryError:
        raise DataError(f"{path}: too large for the memory there is", fix="resample it first") from None
    except Exception as error:  # nibabel, gzip and zlib each raise their own
        raise _damaged(path, error) from None
    # nibabel's axes are (x, y, z): the last one is the slices.
    return _volume(data.transpose(2, 1, 0), matrix, str(path), "", notes)


def _load(path: Path) -> tuple[Any, list[str]]:
    """(nibabel image, its data not yet read; notes)."""
    nibabel = _nibabel()
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{path}: the file is empty (0 bytes)", fix=_REPLACE)
    try:
        image = nibabel.load(path)
        kind = image.get_data_dtype()
        shape = image.shape
    except Exception as error:
        raise _damaged(path, error) from None
    if kind.names or kind.kind == "c":
        raise DataError(f"{path}: holds {'colours' if kind.names else 'complex numbers'}", fix="save plain numbers")
    if 0 in shape or not shape:
        raise DataError(f"{path}: a volume of shape {tuple(shape)}", fix=_REPLACE)
    return image, []


def _damaged(path: Path, error: Exception) -> DataError:
    words = (str(error) or type(error).__name__).splitlines()[0][:200]
    cut = any(w in words.lower() for w in ("truncated", "expected", "end-of-stream", "end of file", "not enough"))
    return DataError(f"{path}: {'truncated' if cut else 'corrupt'} NIfTI file ({words})", fix=_REPLACE)


def _nifti_affine(image: Any, path: Path, notes: list[str]) -> np.ndarray:
    """(4, 4) from indices (z, y, x) to mm (right, anterior, superior)."""
    matrix = np.array(image.affine, float)
    matrix[:3] *= _UNITS.get(image.header.get_xyzt_units()[0], 1.0)
    if not (image.header["qform_code"] or image.header["sform_code"]):
        notes.append("no orientation in the header: axes taken as stored")
    sizes = np.sqrt((matrix[:3, :3] ** 2).sum(0))
    if not np.isfinite(matrix).all() or (sizes <= 0).any() or abs(np.linalg.det(matrix[:3, :3] / sizes)) < 1e-3:
        mm = " x ".join(f"{s:g}" for s in sizes)
        raise DataError(
            f"{path}: spacing {mm} mm and directions that span no volume", fix="correct the header's affine"
        )
    return matrix[:, [2, 1, 0, 3]]


def _one_time(image: Any, path: Path, time: Time, notes: list[str]) -> np.ndarray:
    """(X, Y, Z) float32 out of a 2-, 3- or 4-D file (axes of length 1 behind the third do not count)."""
    shape = list(image.shape)
    more = [n for n in shape[3:] if n > 1]
    if len(more) > 1:
        raise DataError(
            f"{path}: {len(shape)} axes ({' x '.join(map(str, shape))})", fix="save one volume, or a row of them"
        )
    if not more:
        data = np.asanyarray(image.dataobj).astype(np.float32)
        return data.reshape([*shape[:3], 1, 1][:3] if len(shape) < 3 else shape[:3])
    flat = next(n for n in range(3, len(shape)) if shape[n] > 1)
    at = [slice(None)] * len(shape)
    if time == "mean":
        notes.append(f"4-D: the mean of {more[0]} volumes")
        data = np.asanyarray(image.dataobj).mean(axis=flat, dtype=np.float64).astype(np.float32)
    else:
        if not isinstance(time, int) or not 0 <= time < more[0]:
            raise ConfigError(f"time={time!r} of {path}", fix=f'0 to {more[0] - 1}, or "mean"')
        notes.append(f"4-D: volume {time} of {more[0]}")
        at[flat] = time  # type: ignore[call-overload]
        data = np.asanyarray(image.dataobj[tuple(at)]).astype(np.float32)
    return data.reshape(shape[:3])


def _series(headers: Sequence[Any], name: str) -> Volume:
    found = series.stack(series.slices_of(headers), name)
    planes = [dicom.values(one.path, frame=one.frame) for one in found.slices]
    notes = list(found.notes)
    if headers[0].photometric == "MONOCHROME1":
        notes.append("MONOCHROME1: values are as measured, small means bright; pictures are turned over")
    read = _volume(np.stack(planes), series.affine(found), name, headers[0].modality, notes)
    return replace(read, inverted=headers[0].photometric == "MONOCHROME1")


def _volume(data: np.ndarray, matrix: np.ndarray, source: str, modality: str, notes: list[str]) -> Volume:
    data = np.ascontiguousarray(data, dtype=np.float32)
    wrong = ~np.isfinite(data)
    if wrong.all():
        raise DataError(f"{source}: holds no finite value", fix=_REPLACE)
    if wrong.any():
        notes.append(f"{int(wrong.sum()):,} voxels that are not finite became the smallest value")
        data[wrong] = data[~wrong].min()
    return Volume(data, _spacing(matrix), axis_letters(matrix), source, matrix, modality, tuple(notes))


def _spacing(matrix: np.ndarray) -> tuple[float, float, float]:
    a, b, c = (round(float(n), 6) for n in np.sqrt((matrix[:3, :3] ** 2).sum(0)))
    return a, b, c


def _nearest_axes(matrix: np.ndarray) -> list[tuple[int, int]]:
    """For each index axis the world axis (0 right, 1 anterior, 2 superior) it lies along most, and its sign."""
    directions = matrix[:3, :3] / np.sqrt((matrix[:3, :3] ** 2).sum(0))
    best = max(itertools.permutations(range(3)), key=lambda p: sum(abs(directions[p[k], k]) for k in range(3)))
    return [(best[k], 1 if directions[best[k], k] > 0 else -1) for k in range(3)]


def axis_letters(matrix: np.ndarray) -> str:
    """Where each index grows to, e.g. "SPL": nearest directions of an oblique volume."""
    return "".join(next(letter for letter, at in _AXES.items() if at == axis) for axis in _nearest_axes(matrix))


def _require_orientation(orientation: str) -> None:
    if len(orientation) != 3 or {_AXES.get(letter, (9,))[0] for letter in orientation} != {0, 1, 2}:
        raise ConfigError(f"orientation={orientation!r}", fix=f"one of R/L, A/P, S/I for each axis, e.g. {PICTURE}")


def reorient(volume: Volume, orientation: str = PICTURE) -> Volume:
    """The same voxels with axes in another order and direction; nothing is interpolated."""
    _require_orientation(orientation)
    order, flip, matrix = _turn(volume.data.shape, volume.affine, orientation)
    data = np.flip(volume.data.transpose(order), tuple(k for k, turned in enumerate(flip) if turned))
    spacing = _spacing(matrix)
    return replace(volume, data=np.ascontiguousarray(data), affine=matrix, spacing=spacing, orientation=orientation)


def _turn(shape: tuple[int, ...], matrix: np.ndarray, orientation: str) -> tuple[list[int], list[bool], np.ndarray]:
    """(order of the axes, which of them are flipped then, the new affine)."""
    have = _nearest_axes(matrix)
    order = [next(k for k in range(3) if have[k][0] == _AXES[letter][0]) for letter in orientation]
    flip = [have[k][1] != _AXES[letter][1] for k, letter in zip(order, orientation, strict=True)]
    turned = matrix[:, [*order, 3]].copy()
    for k in np.flatnonzero(flip).tolist():
        turned[:3, 3] += turned[:3, k] * (shape[order[k]] - 1)
        turned[:3, k] *= -1
    return order, flip, turned


def limits(data: np.ndarray, percentiles: tuple[float, float] = PERCENTILES) -> tuple[float, float]:
    """(low, high): percentiles over all voxels, their minimum and maximum where those coincide."""
    flat = data.reshape(-1)[:: max(1, data.size // _SAMPLED)]
    low, high = (float(value) for value in np.percentile(flat, percentiles))
    return (low, high) if high > low else (float(data.min()), float(data.max()))


def to_uint8(
    volume: Volume | np.ndarray, *, window: Window | None = None, percentiles: tuple[float, float] = PERCENTILES
) -> np.ndarray:
    """(D, H, W) uint8: (centre, width) in the volume's units, or its own percentiles, the same for all its slices. Of an
    `inverted` volume (MONOCHROME1) bright means bright afterwards."""
    if isinstance(volume, Volume) and volume.inverted:
        return np.uint8(255) - to_uint8(volume.data, window=window, percentiles=percentiles)
    data = volume.data if isinstance(volume, Volume) else volume
    window = require_window(window)
    if window is not None:
        return np.rint(window_linear(data, *window, "LINEAR_EXACT") * 255).astype(np.uint8)
    low, high = limits(data, percentiles)
    if high <= low:
        return np.zeros(data.shape, np.uint8)
    scaled = (data - np.float32(low)) * np.float32(255.0 / (high - low))
    return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)


def resample(volume: Volume, spacing: Sequence[float], *, labels: bool = False) -> Volume:
    """Linear interpolation (nearest for `labels`) to about `spacing` mm along D, H, W; the edges of the field stay.

    The number of voxels is whole, so the spacing that results may differ a little: `Volume.spacing` tells it. Where
    voxels grow, a Gaussian of half the growth (in voxels) comes first, against aliasing.
    """
    from scipy import ndimage

    wanted = np.array(spacing, float).reshape(-1)
    if wanted.shape != (3,) or not np.isfinite(wanted).all() or (wanted <= 0).any():
        raise ConfigError(f"spacing={spacing!r}", fix="three lengths in mm, e.g. (1.0, 1.0, 1.0)")
    before = np.array(volume.data.shape)
    after = np.maximum(1, np.rint(before * volume.spacing / wanted).astype(int))
    factor = before / after
    data = volume.data
    if not labels and (factor > 1).any():
        data = ndimage.gaussian_filter(data, np.where(factor > 1, (factor - 1) / 2, 0), mode="nearest")
    data = ndimage.zoom(data, after / before, order=0 if labels else 1, mode="nearest", grid_mode=True)
    matrix = volume.affine.copy()
    matrix[:3, 3] += volume.affine[:3, :3] @ ((factor - 1) / 2)
    matrix[:3, :3] *= factor
    return replace(volume, data=data.astype(np.float32), affine=matrix, spacing=_spacing(matrix))


def require_same_grid(volume: Grid, mask: Grid) -> None:
    """DataError when a mask does not lie voxel on voxel over its volume: other shape, spacing, place or direction."""
    name = os.path.basename(volume.source)
    if volume.shape != mask.shape:
        sizes = [" x ".join(map(str, one.shape)) for one in (mask, volume)]
        what = f"is {sizes[0]} voxels, its volume {name} {sizes[1]}"
    elif not np.allclose(volume.spacing, mask.spacing, rtol=1e-2):
        mm = [" x ".join(f"{n:g}" for n in one.spacing) for one in (mask, volume)]
        what = f"has voxels of {mm[0]} mm, its volume {name} {mm[1]}"
    else:
        far = np.array([[*at, 1] for at in itertools.product(*((0, n - 1) for n in volume.shape))]).T
        shift = float(np.abs((volume.affine - mask.affine) @ far).max())
        if shift <= 0.5 * min(volume.spacing):
            return
        what = f"lies {shift:.3g} mm away from its volume {name}"
    raise DataError(f"{mask.source}: the mask {what}", fix="resample the mask to its volume, or pair the right files")
