"""From files to frames and slices: DICOM and NIfTI files in a reading become one row a picture.

Done once, after a folder or table was understood, so that DICOM and NIfTI work wherever files do. Headers are read,
pixels are not. Patients become groups: numbered, because groups are written into run folders and an identity must not
be. What was done is said aloud.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import DataError
from . import series
from .dicom_tags import Header, header
from .found import Found, count, some
from .images import Masks
from .scans import PLANES, How, Kind, ScanStore, kind
from .stores import FileStore
from .volume import Grid, nifti_grid, require_same_grid
from .windowing import PERCENTILES

_BIDS = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)(?=[/_])")


@dataclass
class _Rows:
    """Rows being collected; `origin` is the picture of the reading that a row came from."""

    files: list[str] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    headers: dict[int, Header] = field(default_factory=dict)
    grids: dict[int, Grid] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    origin: list[int] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)
    unit: list[str] = field(default_factory=list)  # the volume that a row is a slice of, "" for none
    place: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    out: Counter[str] = field(default_factory=Counter)  # files that are no pictures, by kind

    def new_file(self, path: str, what: Kind) -> int:
        self.files.append(path)
        self.kinds.append(what)
        return len(self.files) - 1

    def add(self, origin: int, file: int, name: str, *, frame: int = 0, unit: str = "", place: int = 0) -> None:
        for column, value in zip(
            (self.origin, self.file, self.frame, self.unit, self.place, self.names),
            (origin, file, frame, unit, place, name),
            strict=True,
        ):
            column.append(value)  # type: ignore[attr-defined]


def unfold(found: Found, how: How) -> Found:
    """The same reading with one row for every frame and slice; readings without DICOM and NIfTI come back as they are.

    Raises DataError when nothing in the data is a picture, a folder of slices mixes series, or a mask does not fit.
    """
    if not isinstance(found.store, FileStore):
        return found
    rows = np.arange(len(found.names)) if found.rows is None else found.rows
    paths = [found.store.paths[row] for row in rows.tolist()]
    kinds: list[Kind | str] = ["folder" if os.path.isdir(path) else kind(path) or "picture" for path in paths]
    if set(kinds) <= {"picture"}:
        return found
    collected = _Rows()
    for i, (path, what) in enumerate(zip(paths, kinds, strict=True)):
        wanted = -1 if found.frames is None else int(found.frames[i])
        if what == "folder":
            _folder(collected, i, path, found.names[i])
        elif what == "dicom":
            _dicom(collected, i, path, found.names[i], wanted)
        elif what == "nifti":
            _nifti(collected, i, path, found.names[i], wanted, how)
        else:
            collected.add(i, collected.new_file(path, "picture"), found.names[i])
    if not collected.origin:
        kinds_out = some([f"{n} {words}" for words, n in collected.out.most_common()], 4)
        raise DataError(f"{found.name}: holds no pictures, only {kinds_out}", fix="give DICOM images or volumes")
    _series_of_files(collected)
    keep = _chosen(collected, how)
    return _rebuilt(found, collected, keep, how)


def _dicom(rows: _Rows, origin: int, path: str, name: str, wanted: int) -> None:
    one = header(path)
    if one.no_picture:
        rows.out[one.no_picture] += 1
        return
    file = rows.new_file(path, "dicom")
    rows.headers[file] = one
    if one.frames == 1 or one.problem:
        rows.add(origin, file, name)
    elif wanted >= 0:
        _require_frame(path, wanted, one.frames)
        rows.add(origin, file, name, frame=wanted)
    else:
        for k in range(one.frames):
            rows.add(origin, file, f"{name}[{k}]", frame=k, unit=path, place=k)


def _nifti(rows: _Rows, origin: int, path: str, name: str, wanted: int, how: How) -> None:
    file = rows.new_file(path, "nifti")
    try:
        grid = nifti_grid(path, PLANES[how.plane])
    except DataError as error:
        rows.headers[file] = Header(path, problem=str(error))
        rows.add(origin, file, name)  # it is named when it is used, and by `vitkit check`
        return
    rows.grids[file] = grid
    rows.notes[name] += grid.notes
    if wanted >= 0:
        _require_frame(path, wanted, grid.shape[0])
        rows.add(origin, file, name, frame=wanted)
        return
    for k in range(grid.shape[0]):
        rows.add(origin, file, f"{name}[{k}]", frame=k, unit=path, place=k)


def _require_frame(path: str, wanted: int, there: int) -> None:
    if wanted >= there:
        raise DataError(f"{path}: there is no frame {wanted}", fix=f"frames run from 0 to {there - 1}")


def _folder(rows: _Rows, origin: int, path: str, name: str) -> None:
    """A folder named in a table: the slices of one DICOM series, in order."""
    headers = series.one_series(path)
    found = series.stack(series.slices_of(headers), path)
    rows.notes[name] += found.notes
    files = {}
    for one in headers:
        files[one.path] = rows.new_file(one.path, "dicom")
        rows.headers[files[one.path]] = one
    for place, plane in enumerate(found.slices):
        short = f"{name.rstrip('/')}/{os.path.relpath(plane.path, path)}"
        frame = f"[{plane.frame}]" if len(found.slices) > len(headers) else ""
        rows.add(origin, files[plane.path], short + frame, frame=plane.frame, unit=path, place=place)


def _series_of_files(rows: _Rows) -> None:
    """Single-frame files of one series that have positions are slices of a volume, in the order of their positions."""
    members = defaultdict(list)
    for row, (file, unit) in enumerate(zip(rows.file, rows.unit, strict=True)):
        one = rows.headers.get(file)
        if one is not None and not unit and one.series and one.frames == 1 and len(one.position) == 3:
            members[one.series].append(row)
    for uid, at in members.items():
        if len(at) < 2:
            continue
        label = f"series of {rows.names[at[0]]}"
        try:
            found = series.stack(series.slices_of([rows.headers[rows.file[row]] for row in at]), label)
        except DataError as error:
            rows.notes[label].append(error.what)
            continue
        rows.notes[label] += found.notes
        order = {one.path: place for place, one in enumerate(found.slices)}
        for row in at:
            path = rows.files[rows.file[row]]
            if path in order:  # one that lies where another does stays a picture of its own
                rows.unit[row], rows.place[row] = f"series {uid}", order[path]


def _chosen(rows: _Rows, how: How) -> np.ndarray:
    """Positions of the rows that `frames` takes of every volume; single pictures stay."""
    if how.frames == "all":
        return np.arange(len(rows.file))
    members = defaultdict(list)
    keep = []
    for row, unit in enumerate(rows.unit):
        if unit:
            members[unit].append(row)
        else:
            keep.append(row)
    for at in members.values():
        at.sort(key=lambda row: rows.place[row])
        keep += [at[k] for k in how.choose(len(at))]
    return np.array(sorted(keep), np.int64)


def _rebuilt(found: Found, rows: _Rows, keep: np.ndarray, how: How) -> Found:
    origin = np.array(rows.origin, np.int64)[keep]
    file, frame, place = (np.array(column, np.int64)[keep] for column in (rows.file, rows.frame, rows.place))
    units = [rows.unit[row] for row in keep.tolist()]
    number = {unit: k for k, unit in enumerate(dict.fromkeys(unit for unit in units if unit))}
    volume = np.array([number.get(unit, -1) for unit in units], np.int64)
    assert isinstance(found.store, FileStore)
    notes = {name: notes for name, notes in rows.notes.items() if notes}
    where = (rows.files, rows.kinds, file, frame, volume, place)
    store = ScanStore(*where, how, found.store.deep, rows.headers, rows.grids, notes)
    take = lambda column: None if column is None else column[origin]  # noqa: E731
    new = replace(
        found,
        store=store,
        names=[rows.names[row] for row in keep.tolist()],
        labels=take(found.labels),
        split=take(found.split),
        group=take(found.group),
        columns={name: cells[origin] for name, cells in found.columns.items()},
        masks=_masks(found, origin, file, store),
        rows=None,
        frames=None,
        said=[*found.said, *_said(rows, keep, how)],
    )
    _groups(new, rows, file, units)
    _folders_are_volumes(new, volume)
    return new


def _said(rows: _Rows, keep: np.ndarray, how: How) -> list[str]:
    said = []
    kinds = Counter(rows.kinds)
    dicom = [one for k, one in rows.headers.items() if rows.kinds[k] == "dicom"]
    if kinds["dicom"]:
        several = [one for one in dicom if one.frames > 1]
        window = how.window and f"window {how.window[0]:g} / {how.window[1]:g}"
        said.append(
            f"{count(kinds['dicom'], 'DICOM file')}: rescale, then {window or 'the window of each file'}, "
            "MONOCHROME1 turned over, 8 bits"
        )
        if several:
            frames = sum(one.frames for one in several)
            said.append(f"{count(len(several), 'file')} with several frames ({frames:,}): each frame is an image")
    if kinds["nifti"]:
        low, high = PERCENTILES
        window = (
            f"window {how.window[0]:g} / {how.window[1]:g}" if how.window else f"its {low:g} to {high:g} percentile"
        )
        slices = sum(grid.shape[0] for grid in rows.grids.values())
        said.append(
            f"{count(kinds['nifti'], 'NIfTI volume')}: each {how.plane} slice is an image ({slices:,}), "
            f"brightness of a volume by {window}"
        )
        times = sum(any(note.startswith("4-D") for note in grid.notes) for grid in rows.grids.values())
        if times:
            said.append(f"{count(times, 'NIfTI file')} with a time axis: the first volume of each")
    if len(keep) < len(rows.file):
        said.append(f"frames={how.frames}: {len(keep):,} of {len(rows.file):,} slices taken")
    if rows.out:
        listed = some([f"{n} {words}" for words, n in rows.out.most_common()], 4)
        n = sum(rows.out.values())
        said.append(
            f"left out: {count(n, 'DICOM file')} that {'is no picture' if n == 1 else 'are no pictures'} ({listed})"
        )
    broken = [rows.files[k] for k, one in rows.headers.items() if one.problem]
    if broken:
        names = some([os.path.basename(path) for path in broken], 3)
        said.append(f"WARNING: {count(len(broken), 'file')} cannot be read ({names}): vitkit check says why")
    return said


def _groups(found: Found, rows: _Rows, file: np.ndarray, units: list[str]) -> None:
    """Patients (else studies, else volumes) as groups, unless the data name groups themselves."""
    owners: list[tuple[str, str]] = []
    patients: dict[int, str] = {}
    words: Counter[str] = Counter()
    of_study = {one.study: one.patient for one in rows.headers.values() if one.study and one.patient}
    for row, (k, unit) in enumerate(zip(file.tolist(), units, strict=True)):
        one = rows.headers.get(k)
        patients[row] = (one.patient or of_study.get(one.study, "")) if one else ""  # a study is of one patient
        owner = ("", f"(alone {row})")
        subject = _BIDS.search(found.names[row])
        if patients[row]:
            owner = ("patient", patients[row])
        elif one and one.study:
            owner = ("study", one.study)
        elif subject:
            owner = ("subject", subject.group(1))
        elif unit:
            owner = ("volume", unit)
        owners.append(owner)
    if found.group is not None:
        straddling = defaultdict(set)
        for row, patient in patients.items():
            if patient:
                straddling[patient].add(str(found.group[row]))
        torn = sum(len(groups) > 1 for groups in straddling.values())
        if torn:
            found.said.append(f"WARNING: {count(torn, 'patient')} (by PatientID) in more than one of the groups given")
        return
    numbers: dict[tuple[str, str], str] = {}
    for what, key in owners:
        if what and (what, key) not in numbers:
            words[what] += 1
            numbers[what, key] = f"{what} {words[what]:04d}"
    found.group = np.array([numbers.get(owner, owner[1]) for owner in owners])
    if not numbers:
        found.group = None
        return
    by = {"patient": "PatientID", "study": "StudyInstanceUID", "subject": "sub-... in the name", "volume": "volume"}
    listed = ", ".join(
        f"{count(n, what, 'studies' if what == 'study' else '')} by {by[what]}" for what, n in words.items()
    )
    found.said.append(f"groups: {listed}, never divided between splits (numbered: no identity is kept)")
    studies = {rows.headers[k].study for k in set(file.tolist()) if k in rows.headers}
    if list(words) == ["patient"] and words["patient"] == 1 and len(studies) > 1:
        found.said.append(
            "WARNING: all studies carry the same PatientID: if it stands for several, name a group_column"
        )


def _folders_are_volumes(found: Found, volume: np.ndarray) -> None:
    """Top folders that each hold just one series are patients or scans, not classes."""
    if found.task != "single" or found.labels is None or found.split is not None or found.masks is not None:
        return
    if not found.said[0].endswith(": one folder a class"):
        return
    pairs = set(zip(found.labels.tolist(), volume.tolist(), strict=True))
    if (volume >= 0).all() and len(pairs) == len(found.classes) == len({v for _, v in pairs}):
        found.task, found.labels = None, None
        found.said[:] = [one for one in found.said if not one.startswith("classes:")]
        found.said.append(f"each of the {count(len(found.classes), 'folder')} is one volume: read without labels")
        found.classes = []


def _masks(found: Found, origin: np.ndarray, file: np.ndarray, store: ScanStore) -> Masks | None:
    """Masks row by row: slices of the mask volumes, each checked against its volume's grid, or single files."""
    if found.masks is None:
        return None
    assert isinstance(found.masks.store, FileStore)
    at = (np.arange(len(found.names)) if found.rows is None else found.rows)[origin]
    files: dict[str, int] = {}
    index = np.array([files.setdefault(found.masks.store.paths[row], len(files)) for row in at.tolist()], np.int64)
    kinds: list[Kind] = [kind(path) or "picture" for path in files]
    paths = list(files)
    pairs = dict.fromkeys(zip(index.tolist(), file.tolist(), strict=True))  # a mask may be named for several files
    for k, of in pairs:
        path = paths[k]
        if kinds[k] == "dicom":
            raise DataError(f"{path}: DICOM masks are not read", fix="save masks as PNG, or as NIfTI for volumes")
        if (kinds[k] == "nifti") != (store.kinds[of] == "nifti"):
            raise DataError(
                f"{path}: the mask of {store.files[of]}, which is of another kind", fix="pair NIfTI with NIfTI"
            )
        if kinds[k] == "nifti" and of in store.grids:
            require_same_grid(store.grids[of], nifti_grid(path, PLANES[store.how.plane]))
    masks = ScanStore(
        paths, kinds, index, store.frame, store.volume, store.place, How(plane=store.how.plane), labels=True
    )
    return replace(found.masks, store=masks)
