"""DICOM slices -> a stack: which files belong together, in which order they lie, what is missing or double.

Slices are ordered by the position of each along the normal of its plane (ImagePositionPatient and
ImageOrientationPatient), never by file name or number, unless there are no positions.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from .dicom_tags import SUFFIXES, Header, get, header, is_dicom, layout, number, numbers, open_file
from .found import count, some

_GAP = 1.5  # a step this many times the usual one is a gap
_SHIFT = 0.01  # mm sideways a mm along the normal: less is rounding of the positions
_UNEVEN = 0.05  # steps that differ by more than this share of the usual one are uneven


@dataclass(frozen=True)
class Slice:
    """One plane of a stack."""

    path: str
    frame: int
    size: tuple[int, int]
    position: tuple[float, ...]  # mm, patient coordinates (left, posterior, superior), of the centre of the first pixel
    orientation: tuple[float, ...]  # directions of a row and of a column
    spacing: tuple[float, ...]  # mm between rows, between columns
    number: float | None
    location: float | None


@dataclass(frozen=True)
class Stack:
    """Slices in order. `step` is the usual distance in mm (0 when unknown), `notes` what a reader should know."""

    slices: list[Slice]
    places: list[float]  # mm along the normal
    step: float
    notes: list[str]
    doubles: list[Slice]  # slices left out because another lies at the same place


def dicom_files(folder: str | Path) -> list[str]:
    """DICOM files in `folder` and below, sorted, by their mark or ending; the index file DICOMDIR is left out."""
    found = []
    for path, _, names in os.walk(folder):
        for name in names:
            full = os.path.join(path, name)
            if name.startswith(".") or name.upper() == "DICOMDIR":
                continue
            if name.lower().endswith(SUFFIXES) or is_dicom(full):
                found.append(full)
    return sorted(found)


def by_series(headers: Iterable[Header]) -> dict[str, list[Header]]:
    """Files that can be read as pictures, by SeriesInstanceUID ("" for files without one)."""
    found: dict[str, list[Header]] = defaultdict(list)
    for one in headers:
        if not one.problem and not one.no_picture:
            found[one.series].append(one)
    return dict(found)


def one_series(folder: str | Path, series: str | None = None) -> list[Header]:
    """The headers of the single series in a folder, or of the named one. Raises DataError when there are several."""
    headers = [header(path) for path in dicom_files(folder)]
    broken = [one for one in headers if one.problem]
    if broken:
        raise DataError(broken[0].problem + (f" ({count(len(broken), 'such file')})" if len(broken) > 1 else ""))
    found = by_series(headers)
    if not found:
        raise DataError(f"{folder}: holds no DICOM pictures", fix="give a folder with the slices of one series")
    if series is not None:
        if series not in found:
            raise DataError(f"{folder}: there is no series {series}", fix=f"there are: {some(found)}")
        return found[series]
    if len(found) > 1:
        listed = some([f"{uid or '(no SeriesInstanceUID)'} {len(files)}" for uid, files in found.items()], 4)
        raise DataError(
            f"{folder}: slices of {len(found)} series are mixed ({listed})",
            fix="one folder a series, or name one: series=UID",
        )
    return next(iter(found.values()))


def slices_of(headers: Sequence[Header]) -> list[Slice]:
    """All planes of some files; the frames of an enhanced multi-frame file are planes of their own."""
    found = []
    for one in headers:
        if one.frames == 1:
            place = (one.position, one.orientation, one.spacing, one.number, one.location)
            found.append(Slice(one.path, 0, one.size, *place))
            continue
        ds = open_file(one.path, one.path, stop_before_pixels=True)
        size = layout(ds, one.path)
        for frame in range(one.frames):
            tags = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
            position, orientation, spacing = (tuple(numbers(ds, tag, frame)) for tag in tags)
            if not get(ds, "PerFrameFunctionalGroupsSequence"):
                position = ()  # the file's one position cannot be that of every frame
            found.append(Slice(one.path, frame, (size.rows, size.columns), position, orientation, spacing, frame, None))
    return found


def stack(slices: Sequence[Slice], name: str) -> Stack:
    """Order slices along their normal. Raises DataError when sizes, orientations or spacings are mixed, or when
    nothing tells the order."""
    _require_alike(slices, name)
    places, notes = _places(slices, name)
    order = sorted(
        range(len(slices)), key=lambda i: (places[i], _or(slices[i].number), slices[i].path, slices[i].frame)
    )
    kept: list[int] = []
    doubles = []
    for i in order:
        if kept and abs(places[i] - places[kept[-1]]) < 1e-3:
            doubles.append(slices[i])
        else:
            kept.append(i)
    if doubles:
        notes.append(
            f"{count(len(doubles), 'slice')} at a place that another has already (echoes, times or copies): the "
            "volume takes the lowest InstanceNumber"
        )
    steps = np.diff([places[i] for i in kept])
    step = float(np.median(steps)) if len(steps) else 0.0
    for k in np.flatnonzero(steps > _GAP * step)[:3].tolist():
        before, after = (os.path.basename(slices[kept[j]].path) for j in (k, k + 1))
        notes.append(f"gap of {steps[k]:g} mm between {before} and {after}, where slices lie {step:g} mm apart")
    gaps = int((steps > _GAP * step).sum())
    if gaps > 3:
        notes.append(f"{gaps} gaps in all")
    if not gaps and len(steps) and np.abs(steps - step).max() > _UNEVEN * step:
        notes.append(f"uneven steps: slices lie {steps.min():g} to {steps.max():g} mm apart, taken as {step:g}")
    return Stack([slices[i] for i in kept], [places[i] for i in kept], step, notes, doubles)


def _or(value: float | None) -> float:
    return np.inf if value is None else value


def _require_alike(slices: Sequence[Slice], name: str) -> None:
    sizes = sorted({one.size for one in slices})
    if len(sizes) > 1:
        words = some([f"{h} x {w}" for h, w in sizes], 3)
        raise DataError(f"{name}: slices of different size are mixed ({words})", fix="one folder a series")
    for what, tolerance in (("orientation", 1e-3), ("spacing", 1e-3)):
        known = [np.array(getattr(one, what)) for one in slices if getattr(one, what)]
        odd = [one for one in known if one.shape != known[0].shape or np.abs(one - known[0]).max() > tolerance]
        if odd:
            raise DataError(
                f"{name}: slices of different {what} are mixed ({len(odd)} of {len(slices)} differ from the first)",
                fix="keep the slices of one plane, without the localizer",
            )


def _places(slices: Sequence[Slice], name: str) -> tuple[list[float], list[str]]:
    """(mm along the normal, notes); without positions SliceLocation, then InstanceNumber give the order."""
    if all(len(one.position) == 3 and len(one.orientation) == 6 for one in slices):
        normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
        return [float(np.dot(one.position, normal)) for one in slices], []
    if len(slices) == 1:
        return [0.0], ["no ImagePositionPatient"]
    if all(one.location is not None for one in slices):
        return [_or(one.location) for one in slices], ["no ImagePositionPatient: ordered by SliceLocation"]
    if all(one.number is not None for one in slices) and len({one.path for one in slices}) == len(slices):
        note = "no ImagePositionPatient: ordered by InstanceNumber, distance unknown (taken as 1 mm)"
        return [_or(one.number) for one in slices], [note]
    raise DataError(
        f"{name}: nothing tells how {count(len(slices), 'slice')} lie (no ImagePositionPatient, SliceLocation or "
        "InstanceNumber)",
        fix="they may be a film or single pictures: read them as images",
    )


def thickness(path: str) -> float:
    """mm of a single slice: SpacingBetweenSlices, else SliceThickness, else 1."""
    ds = open_file(path, path, stop_before_pixels=True)
    return abs(number(ds, "SpacingBetweenSlices") or number(ds, "SliceThickness") or 1.0)


def affine(found: Stack) -> np.ndarray:
    """(4, 4): indices (slice, row, column) -> mm towards right, anterior, superior, as in NIfTI. Slices that are shifted
    against each other (a tilted gantry) give a sheared one."""
    first = found.slices[0]
    rows, columns = first.spacing if len(first.spacing) == 2 else (1.0, 1.0)
    along = np.array(first.orientation if len(first.orientation) == 6 else (1, 0, 0, 0, 1, 0), float)
    row, column = along[:3], along[3:]  # directions in which the column index and the row index grow
    step = found.step or thickness(first.path)
    matrix = np.eye(4)
    matrix[:3, 0] = _stacking(found, np.cross(row, column)) * step
    matrix[:3, 1], matrix[:3, 2] = column * rows, row * columns
    matrix[:3, 3] = first.position if len(first.position) == 3 else (0, 0, 0)
    matrix[:2] *= -1  # DICOM counts towards left and posterior
    return matrix


def _stacking(found: Stack, normal: np.ndarray) -> np.ndarray:
    """(3,) where the next slice lies, for one mm along the normal: the normal itself, unless slices are shifted sideways."""
    first, last = found.slices[0], found.slices[-1]
    height = found.places[-1] - found.places[0]
    if {len(one.position) for one in (first, last)} != {3} or len(first.orientation) != 6 or height <= 0:
        return normal
    along = (np.array(last.position) - np.array(first.position)) / height
    return along if np.abs(along - normal).max() > _SHIFT else normal
