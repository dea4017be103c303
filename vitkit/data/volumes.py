"""Whole volumes as a data set: NIfTI files, nnU-Net folders and DICOM series, with masks voxel on voxel, or without.

What `read(kind="volume")` understands, the first that fits:

    a .csv, .tsv or .parquet, or a folder with one    columns image, mask (or label, where it names files), split, group
    imagesTr/ [labelsTr/ imagesTs/] [dataset.json]    nnU-Net; `case_0000`, `case_0001` are channels of one volume
    a folder of such folders                          all of their volumes, without masks
    images/ + labels/ (or masks/)                     paired by file name
    any other folder                                  every NIfTI file and DICOM series; train/, val/, test/ are splits
    one file, or "digits": scikit-learn's handwriting moved through the slices of small volumes, nothing to download

An entry is a `cases.Case`: voxels in the file's own units and its mask, axes turned to right, anterior, superior (RAS, as
MONAI and Hi-End-MAE have them). Volumes are read when they are asked for; the last ones stay in memory.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from . import scans, series, tables, volume
from .cases import ORIENTATION, MaskStore, VolumeStore, header_grid
from .dicom_tags import header
from .found import Found, by_name, class_names, count, some, split_name
from .images import Masks

IMAGES, LABELS = ("imagesTr", "images"), ("labelsTr", "labels", "masks")
_CHANNEL = re.compile(r"_(\d{4})$")
_PATHS = (".nii", ".nii.gz")


def read_volumes(spec: str | Path, columns: tables.Columns) -> Found:
    """The volumes that `spec` means; see the module. Raises DataError naming file and fix."""
    if spec == "digits":
        from .digit_volumes import read_digits

        return read_digits()
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(
            f"{spec}: there is no such file or folder", fix="a folder of NIfTI files or DICOM series, or a table"
        )
    if path.is_file():
        found = _table(path, columns) if path.suffix.lower() in tables.SUFFIXES else _one_file(path)
    else:
        found = _folder(path, columns)
    if columns.labels == [] and found.task is not None:
        found.task, found.masks, found.classes = None, None, []
        found.said.append("masks left aside, as asked")
    return found


def _folder(path: Path, columns: tables.Columns) -> Found:
    table = next(
        (path / f"{s}{e}" for s in tables.BESIDE for e in tables.SUFFIXES if (path / f"{s}{e}").is_file()), None
    )
    if table is not None:
        return _table(table, columns)
    inside = [one for one in sorted(path.iterdir()) if one.is_dir()]
    if any((path / name).is_dir() and (name == "imagesTr" or _beside(path)) for name in IMAGES):
        return _pairs(path)
    several = [one for one in inside if (one / "imagesTr").is_dir()]
    if several:
        parts = [_pairs(one, prefix=f"{one.name}/", masks=False) for one in several]
        files = [f for part in parts for f in part.store.files]  # type: ignore[attr-defined]
        names = [name for part in parts for name in part.names]
        said = [f"{path.name}: {count(len(names), 'volume')} of {len(several)} nnU-Net folders, without their masks"]
        return _found(path.name, files, [None] * len(files), [None] * len(files), names, said)
    return _loose(path)


def _one_file(path: Path) -> Found:
    if scans.kind(str(path)) not in ("nifti", "dicom"):
        raise DataError(
            f"{path}: not a volume", fix="give .nii, .nii.gz, a folder of them, or a folder of DICOM series"
        )
    return _found(path.name, [[str(path)]], [None], [None], [path.name], [f"one volume, {path.name}"])


def _table(path: Path, columns: tables.Columns) -> Found:
    """One row a volume; file names are relative to the table, or absolute."""
    table = tables.load(path)
    for name in columns.by_hand:
        if name not in table:
            raise DataError(f"{path}: there is no column {name!r}", fix=f"there are: {some(list(table), 20)}")
    used: set[str] = set()

    def take(chosen: str | None, names: list[str], files: bool = False) -> str | None:
        found = chosen or by_name(table, names, used)
        if (
            found is not None
            and files
            and not chosen
            and not table[found].astype(str).str.lower().str.endswith(_PATHS).any()
        ):
            return None
        used.update([found] if found else [])
        return found

    image = take(columns.image, ["image", "path", "file", "volume", "image_path", "filename", "scan"])
    if image is None:
        raise DataError(f"{path}: no column with the files of volumes", fix="image_column=...")
    mask = take(columns.mask, ["mask", "label", "segmentation", "mask_path", "label_path"], files=True)
    split, group = (
        take(None, ["split", "subset", "partition", "set"]),
        take(columns.group, ["group", "patient", "subject"]),
    )
    root = path.parent
    files = [[str(root / str(value))] for value in table[image]]
    gone = [one[0] for one in files if not os.path.exists(one[0])]
    if gone:
        raise DataError(f"{path}: {count(len(gone), 'volume')} do not exist: {some(gone, 3)}", fix="correct the table")
    masks: list[str | None] = [None] * len(files)
    if mask is not None:
        masks = [str(root / str(value)) if isinstance(value, str) and value else None for value in table[mask]]
    words = [f"image = {image}"] + [f"{a} = {b}" for a, b in (("mask", mask), ("split", split), ("group", group)) if b]
    said = [f"{path.name}: {count(len(files), 'volume')}; columns {', '.join(words)}"]
    names = [str(value) for value in table[image]]
    found = _found(path.parent.name or path.name, files, masks, [None] * len(files), names, said, root)
    if split is not None:
        given = [split_name(str(value)) for value in table[split]]
        if None in given:
            odd = str(table[split].iloc[given.index(None)])
            raise DataError(f"{path}: split {odd!r}", fix="train, val, test or unlabelled")
        found.split = np.array(given, dtype="<U10")
    if group is not None:
        found.group = table[group].astype(str).to_numpy()
    return found


def _beside(path: Path) -> bool:
    return any((path / name).is_dir() for name in LABELS)


def _pairs(path: Path, *, prefix: str = "", masks: bool = True) -> Found:
    """nnU-Net's folders, or images/ and labels/ with equal file names."""
    folder = next(path / name for name in IMAGES if (path / name).is_dir())
    nnunet = folder.name == "imagesTr"
    cases = _channels(folder) if nnunet else {_stem(one): [one] for one in _niftis(folder)}
    other = next((path / name for name in LABELS if (path / name).is_dir()), None) if masks else None
    labels = {} if other is None else {_stem(one): one for one in _niftis(other)}
    if not cases:
        raise DataError(f"{folder}: holds no NIfTI files", fix="volumes as .nii.gz")
    alone = sorted(set(labels) - set(cases))
    if alone:
        raise DataError(
            f"{other}: {count(len(alone), 'mask')} of volumes that are not there: {some(alone, 3)}",
            fix=f"equal file names in {folder.name}/ and {other.name if other else ''}/"
            + (", channels with _0000 behind" if nnunet else ""),
        )
    if nnunet and (path / "imagesTs").is_dir():
        cases |= {f"imagesTs/{name}": files for name, files in _channels(path / "imagesTs").items()}
    names = list(cases)
    files = [[str(one) for one in cases[name]] for name in names]
    found_masks = [str(labels[name]) if name in labels else None for name in names]
    kind = "nnU-Net folder" if nnunet else f"{folder.name}/ and {other.name}/" if other else folder.name
    said = [
        f"{path.name}: {count(len(names), 'volume')} ({kind}), {sum(m is not None for m in found_masks)} with masks"
    ]
    return _found(path.name, files, found_masks, [None] * len(files), [prefix + name for name in names], said, path)


def _loose(path: Path) -> Found:
    """Every NIfTI file and DICOM series below a folder."""
    files: list[list[str]] = [[str(one)] for one in _niftis(path, deep=True)]
    uids: list[str | None] = [None] * len(files)
    names = [os.path.relpath(one[0], path) for one in files]
    by_folder: dict[str, list[str]] = defaultdict(list)
    for one in series.dicom_files(path):
        by_folder[os.path.dirname(one)].append(one)
    for folder, members in sorted(by_folder.items()):
        found = series.by_series(header(one) for one in members)
        for uid, slices in sorted(found.items()):
            if len(slices) < 2 and slices[0].frames < 2:
                continue  # a localizer or single picture
            files.append([folder] if len(slices) > 1 else [slices[0].path])
            uids.append(uid if len(found) > 1 else None)
            names.append(os.path.relpath(folder, path) + (f"[{uid}]" if len(found) > 1 else ""))
    if not files:
        raise DataError(f"{path}: holds no volumes", fix="NIfTI files (.nii, .nii.gz) or folders with DICOM series")
    found_ = _found(
        path.name, files, [None] * len(files), uids, names, [f"{path.name}: {count(len(files), 'volume')}"], path
    )
    split = [split_name(Path(name).parts[0]) for name in names]
    if all(split):
        found_.split = np.array(split, dtype="<U10")
    return found_


def _found(
    name: str,
    files: list[list[str]],
    masks: Sequence[str | None],
    uids: Sequence[str | None],
    names: list[str],
    said: list[str],
    root: Path | None = None,
) -> Found:
    """A `Found` of volumes, their masks compared with them by their headers, classes named."""
    store = VolumeStore(files, list(masks), list(uids))
    sizes = []
    for one, mask in zip(files, masks, strict=True):
        grid = header_grid(one[0])
        if grid is None:
            continue
        sizes.append(grid.shape)
        store.voxels += int(np.prod(grid.shape)) * len(one)
        if mask is not None:
            if not os.path.exists(mask):
                raise DataError(f"{mask}: there is no such mask (of {one[0]})", fix="correct the table or add the file")
            volume.require_same_grid(grid, volume.nifti_grid(mask, ORIENTATION))
    if sizes:
        low, high = np.min(sizes, axis=0), np.max(sizes, axis=0)
        words = _x(low) if (low == high).all() else f"{_x(low)} to {_x(high)}"
        said.append(f"voxels along right, anterior, superior: {words}")
    found = Found(name, store, names, said=said)
    if any(mask is not None for mask in masks):
        found.task, found.masks = "mask", Masks(MaskStore(store))
        found.classes = _classes(root, store, said)
        if any(mask is None for mask in masks):
            found.split = np.array(["unlabelled" if mask is None else "train" for mask in masks], dtype="<U10")
    return found


def _classes(root: Path | None, store: VolumeStore, said: list[str]) -> list[str]:
    """Names of the classes 0, 1, ...: from dataset.json or classes.json, else numbers, for which all masks are read."""
    if root is not None and (root / "dataset.json").is_file():
        try:
            labels = json.loads((root / "dataset.json").read_text(encoding="utf-8"))["labels"]
            pairs = (
                {int(k): v for k, v in labels.items()}
                if str(next(iter(labels))).isdigit()
                else {int(v): k for k, v in labels.items() if not isinstance(v, list)}
            )
            return [str(pairs.get(i, f"class {i}")) for i in range(max(pairs) + 1) if i != 255]
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise DataError(
                f"{root / 'dataset.json'}: no readable labels ({error})", fix='"labels": {"background": 0, ...}'
            ) from None
    known = class_names(root)[0] if root is not None else []
    if known:
        return known
    seen: set[int] = set()
    for mask in store.masks:
        if mask is not None:
            labels_ = scans.mask_numbers(volume.read(mask, orientation=None).data, mask)
            seen.update(np.unique(labels_).tolist())
    highest = max(max(seen - {255}, default=1), 1)
    said.append(f"classes 0 to {highest} (class 0 is background)")
    return ["background", *(f"class {i}" for i in range(1, highest + 1))]


def _niftis(folder: Path, deep: bool = False) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(one for one in found if one.is_file() and volume.is_nifti(one) and not one.name.startswith("."))


def _channels(folder: Path) -> dict[str, list[Path]]:
    """nnU-Net's cases: files of one name but for _0000, _0001, ..."""
    found: dict[str, list[Path]] = defaultdict(list)
    for one in _niftis(folder):
        found[_CHANNEL.sub("", _stem(one))].append(one)
    return dict(found)


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _x(sides: Sequence[int]) -> str:
    return " x ".join(str(int(side)) for side in sides)
