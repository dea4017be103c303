"""CSV and Parquet tables: one row a picture, with its label or labels, and perhaps its split, group and mask.

Columns are found by name and by content, what was taken is said aloud, and every choice can be made by hand
(`image_column`, `label_columns`, `mask_column`, `group_column`). What labels mean is in `labels`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from . import arrays, scans
from .folders import describe_masks
from .found import SPLIT_NAMES, Found, by_name, choose, count, some, split_name, which
from .images import SPLITS
from .labels import LABEL_NAMES, read_labels
from .stores import FileStore

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tsv", ".parquet")
BESIDE = ("labels", "index", "metadata", "annotations", "data")  # tables looked for in a folder, best first
_IMAGE = [
    "path",
    "file",
    "image",
    "filename",
    "file_name",
    "image_path",
    "filepath",
    "file_path",
    "img",
    "img_path",
    "image_file",
    "picture",
]
_MASK = ["mask", "mask_path", "segmentation", "label_path", "instances"]
_GROUP = [
    "group",
    "group_id",
    "patient",
    "patient_id",
    "patientid",
    "subject",
    "subject_id",
    "case_id",
    "slide",
    "slide_id",
]
_SPLIT = ["split", "subset", "partition", "set"]
_FRAME = ["frame", "frame_number", "frame_index", "slice", "slice_index"]


@dataclass(frozen=True)
class Columns:
    """Columns chosen by the caller; None means: find it."""

    image: str | None = None
    labels: list[str] | None = None  # [] = read without labels
    mask: str | None = None
    group: str | None = None
    keep: tuple[str, ...] = ()  # carried along as text

    @property
    def by_hand(self) -> list[str]:
        """All columns that were named."""
        return [name for name in (self.image, self.mask, self.group, *(self.labels or ()), *self.keep) if name]


def read_table(path: Path, columns: Columns, deep: str) -> Found:
    """The data set that a table describes; file names in it are relative to the table's folder, or absolute."""
    table = load(path)
    for name in columns.by_hand:
        if name not in table:
            raise DataError(f"{path}: there is no column {name!r}", fix=choose(name, list(table)))
    found, used = _pictures(table, path, columns, deep)
    used |= {name for name in (columns.mask, columns.group) if name}
    _frames(found, table, path, used)
    used.add(_splits(found, table, path, used))
    group_column = columns.group or by_name(table, _GROUP, used, ending="_group")
    if group_column:
        values = table[group_column]  # a picture without a group is its own group
        found.group = np.array([value or f"(alone {row})" for row, value in enumerate(values)])
        groups = count(len(set(values)), "group")
        found.said.append(f"groups from column {group_column!r}: {groups}, never divided between splits")
        used.add(group_column)
    found.columns = {name: _cells(table[name].tolist()) for name in columns.keep}
    mask_column = columns.mask or (_mask_column(table, path, used) if columns.labels is None else None)
    if mask_column:
        _masks(found, table, path, mask_column)
    else:
        read_labels(found, table, path, columns.labels, used)
    _once(found, path)
    return found


def load(path: Path) -> pd.DataFrame:
    """The table with every cell as text, missing cells as "" ("NA" and "None" are words, leading zeros stay)."""
    import pandas as pd

    parquet = path.suffix.lower() == ".parquet"
    try:
        if parquet:
            table = pd.read_parquet(path)
        else:
            with path.open(encoding="utf-8-sig", errors="replace") as file:
                separator = max(",;\t", key=file.readline().count)
            options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "skipinitialspace": True}
            # Without a header of its own pandas neither renames equal columns nor takes long rows for an index.
            table = pd.read_csv(path, sep=separator, header=None, **options)
            table = table.iloc[1:].set_axis(table.iloc[0].tolist(), axis=1)
    except (ValueError, OSError) as error:  # the parser errors of pandas and pyarrow are ValueErrors
        text = str(error).strip().splitlines()[0]
        fix = "save it as UTF-8 CSV with a header row, or as Parquet"
        raise DataError(f"{path}: cannot be read as a table ({text})", fix=fix) from None
    table.columns = [str(name).strip() for name in table.columns]
    table = table.loc[:, table.columns != ""]  # the row numbers that pandas writes unless told otherwise
    twice = sorted({name for name in table.columns if list(table.columns).count(name) > 1})
    if twice:
        raise DataError(f"{path}: columns with the same name: {some(twice)}", fix="give every column its own name")
    if not len(table):
        raise DataError(f"{path}: the table has no rows", fix="one row a picture below the header, e.g. path,label")
    cells = {name: [_text(value, path, name) for value in table[name].tolist()] for name in table}
    return pd.DataFrame(cells, dtype=object)


def _text(value: object, path: Path, column: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (dict, bytes)):
        fix = "write them as files and name these in a column `path`"
        raise DataError(f"{path}: column {column!r} holds pictures inside the table", fix=fix)
    if isinstance(value, (list, tuple, np.ndarray)):
        return "|".join(_text(item, path, column) for item in value)
    if value is None or value != value or str(value) == "<NA>":
        return ""
    whole = isinstance(value, (bool, np.bool_)) or (
        isinstance(value, (float, np.floating)) and float(value).is_integer()
    )
    return str(int(value)) if whole else str(value)  # type: ignore[call-overload]


def _cells(values: list[str]) -> np.ndarray:
    """(N,) objects: each a tuple of one text, or of none."""
    cells = np.empty(len(values), object)
    cells[:] = [(value,) if value else () for value in values]
    return cells


def _pictures(table: pd.DataFrame, path: Path, columns: Columns, deep: str) -> tuple[Found, set[str]]:
    """(a reading with its pictures, columns used): files named in a column, or rows of an .npz beside the table."""
    name = path.parent.name if path.stem in BESIDE else path.stem
    rows = f"{count(len(table), 'row')} of {path.name}"
    column = columns.image or by_name(table, _IMAGE, set()) or _looks_like_files(table)
    index, archive = by_name(table, ["index"], set()), _archive(path)
    if not columns.image and index and archive and not (column and (path.parent / table[column].iloc[0]).is_file()):
        store, at = arrays.rows_of(archive, table[index].tolist(), path)
        found = Found(name, store, [f"{archive.name}[{row}]" for row in at.tolist()], rows=at)
        found.said.append(f"{rows}: pictures from {archive.name} by column {index!r}")
        return found, {index, *([column] if column else [])}
    if column is None:
        has = f"columns: {some(list(table), 20)}"
        raise DataError(
            f"{path}: no column names the images ({has})", fix="name it with image_column, or call it `path`"
        )
    values = table[column].tolist()
    empty = np.array([not value for value in values])
    if empty.any():
        fix = "fill in the file or remove the row"
        raise DataError(f"{path}: column {column!r} is empty in {which(empty)}", fix=fix)
    files = [str(path.parent / value) for value in values]  # an absolute name replaces the folder
    _require_files(files, values, path, column, "file")
    endings = sorted({f".{os.path.basename(value).partition('.')[2].lower()}" for value in values} - {"."})
    if endings and not any(os.path.isdir(file) or scans.kind(file) for file in files):
        fix = "convert them to PNG or JPEG, or name another image_column"
        raise DataError(
            f"{path}: column {column!r} names files that are not read as images ({some(endings, 4)})", fix=fix
        )
    return Found(name, FileStore(files, deep), values, said=[f"{rows}: files from column {column!r}"]), {column}


def _require_files(files: list[str], values: list[str], path: Path, column: str, what: str) -> None:
    there = os.path.exists if what == "file" else os.path.isfile  # a folder may be a DICOM series
    lost = [value for value, file in zip(values, files, strict=True) if not there(file)]
    if lost:
        verb = "does" if len(lost) == 1 else "do"
        raise DataError(
            f"{path}: {count(len(lost), what)} of {len(files):,} in column {column!r} {verb} not exist: {some(lost, 3)}",
            fix=f"names are relative to the table's folder, {path.parent}: correct them, name another column, or remove "
            "the rows",
        )


def _looks_like_files(table: pd.DataFrame) -> str | None:
    return next((name for name in table if all(_is_image(value) for value in table[name])), None)


def _is_image(value: str) -> bool:
    return scans.by_ending(os.path.basename(value))


def _frames(found: Found, table: pd.DataFrame, path: Path, used: set[str]) -> None:
    """A column `frame` or `slice` beside DICOM or NIfTI files: that frame of the file, an empty cell for all."""
    column = by_name(table, _FRAME, used)
    if column is None or not isinstance(found.store, FileStore):
        return
    if not any(scans.kind(file) in ("dicom", "nifti") for file in found.store.paths):
        return
    cells = table[column].tolist()
    wrong = np.array([cell != "" and not cell.isdecimal() for cell in cells])
    if wrong.any():
        fix = "numbers of frames from 0 on, or empty for all"
        raise DataError(f"{path}: column {column!r} holds {some(np.array(cells)[wrong], 3)} ({which(wrong)})", fix=fix)
    found.frames = np.array([int(cell) if cell else -1 for cell in cells], np.int64)
    found.names = [f"{name}[{cell}]" if cell else name for name, cell in zip(found.names, cells, strict=True)]
    found.said.append(f"frames from column {column!r}")
    used.add(column)


def _archive(path: Path) -> Path | None:
    """The .npz beside a table: the only one, or the one of the same stem."""
    found = sorted(path.parent.glob("*.npz"))
    same = [file for file in found if file.stem == path.stem]
    return found[0] if len(found) == 1 else next(iter(same), None)


def _splits(found: Found, table: pd.DataFrame, path: Path, used: set[str]) -> str:
    """Fill in the split and return its column ("" when there is none)."""
    column = by_name(table, _SPLIT, used)
    if column is None:
        return ""
    words = table[column].tolist()
    split = [split_name(word) for word in words]
    wrong = np.array([name is None for name in split])
    if wrong.any():
        values = sorted({words[row] for row in np.flatnonzero(wrong)})
        raise DataError(
            f"{path}: column {column!r} holds {some(map(repr, values))} ({which(wrong)})",
            fix=f"splits are {', '.join(SPLITS)} "
            f"(also understood: {', '.join(word for word in SPLIT_NAMES if word not in SPLITS)})",
        )
    found.split = np.array(split)
    found.said.append(f"splits from column {column!r}")
    return column


def _mask_column(table: pd.DataFrame, path: Path, used: set[str]) -> str | None:
    """The column of masks in a table without labels: called mask, or label when its cells are existing image files.

    A table that has both labels and masks is read by its labels (mask_column chooses otherwise).
    """
    label = by_name(table, LABEL_NAMES, used)
    for column in (label,) if label else (by_name(table, [name], used) for name in _MASK):
        if column and all(_is_image(value) and (path.parent / value).is_file() for value in table[column]):
            return column
    return None


def _masks(found: Found, table: pd.DataFrame, path: Path, column: str) -> None:
    values = table[column].tolist()
    named = [value for value in values if value]
    if not named:
        raise DataError(f"{path}: column {column!r} names no mask at all", fix="name another mask_column")
    files = [str(path.parent / value) if value else "" for value in values]
    _require_files([file for file in files if file], named, path, column, "mask")
    keep = np.flatnonzero(np.array(files) != "")
    kind = "instances" if column.lower().startswith("instance") else "masks"
    found.task = "mask"
    found.masks, found.classes, more = describe_masks(FileStore(files), keep, kind, path.parent)
    found.said += [f"masks from column {column!r}", *more]
    if len(keep) < len(files):
        found.said.append(f"left out: {count(len(files) - len(keep), 'image')} without a mask")
        found.keep(keep)


def _once(found: Found, path: Path) -> None:
    """One row a picture: repeated rows are dropped, contradicting ones refused."""
    first: dict[str, int] = {}
    again = []
    for row, name in enumerate(found.names):
        if first.setdefault(name, row) == row:
            continue
        again.append(row)
        for what, column in (("split", found.split), ("label", found.labels), ("group", found.group)):
            if column is None or np.array_equal(column[row], column[first[name]], equal_nan=what == "label"):
                continue
            if what == "group" and column[row].startswith("(alone "):
                continue
            raise DataError(
                f"{path}: {name} is listed twice with a different {what} (rows {first[name] + 1} and {row + 1})",
                fix="one row a picture; write several labels as a|b or in several columns"
                if what == "label"
                else "keep one of the rows",
            )
        for cells in found.columns.values():  # the texts of all its rows belong to the picture
            cells[first[name]] = tuple(dict.fromkeys(cells[first[name]] + cells[row]))
    if again:
        found.said.append(f"{count(len(again), 'repeated row')} of the same picture left out")
        found.keep(np.setdiff1d(np.arange(len(found.names)), again))
