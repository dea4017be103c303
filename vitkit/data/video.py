"""`read_videos`: from a folder, a table or a list of videos (or "digits") to a data set whose entries are whole videos.

A video is a file that FFmpeg reads, or a folder of numbered frames. Folders, tables and splits are read as those of images
are (`folders`, `tables`); beside them the lists of VideoMAE, one `path`, `path label` or `path number label` a line.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from . import folders, pixels, tables
from .found import Found, by_name, count, encode, some
from .images import Images
from .labels import read_labels
from .video_files import SUFFIXES, VideoStore, open_video

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["VideoStore", "open_video", "read_videos"]
_COLUMNS = [
    "video",
    "video_path",
    "video_file",
    "clip",
    "clip_path",
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
]
_ACCEPTED = "a video file, a folder of videos or of folders of frames, a .csv with path,label, or a .txt list"


def read_videos(spec: str | Path | Images, columns: tables.Columns) -> Found:
    """The videos that `spec` names. Raises DataError naming file, value and fix."""
    if spec == "digits":
        from .digit_videos import read_digit_videos

        return _without_table(read_digit_videos(), columns)
    path = Path(str(spec)).expanduser()
    if not path.exists():
        raise DataError(f"{spec}: there is no such file or folder", fix=f"data of a video model are {_ACCEPTED}")
    if path.is_dir():
        return _folder(path, columns)
    suffix = path.suffix.lower()
    if suffix in tables.SUFFIXES:
        return _table(path, columns)
    if suffix == ".txt":
        return _without_table(_list(path), columns)
    if suffix in SUFFIXES:
        one = Found(path.name, VideoStore([str(path)]), [path.name], said=[f"one video, {path.name}"])
        return _without_table(one, columns)
    raise DataError(f"{spec}: files of this kind are not read as videos", fix=f"give {_ACCEPTED}")


def _without_table(found: Found, columns: tables.Columns) -> Found:
    if columns.by_hand:
        what = f"{found.name}: columns were named ({some(columns.by_hand)}), but it is not a table"
        raise DataError(what, fix="give a .csv or .parquet file")
    if columns.labels == [] and found.task is not None:
        found.task, found.labels, found.classes = None, None, []
        found.said.append("labels left aside, as asked")
    return found


def _folder(path: Path, columns: tables.Columns) -> Found:
    tree = scan(path)
    table = next(
        (
            path / f"{stem}{end}"
            for stem in tables.BESIDE
            for end in tables.SUFFIXES
            if (path / f"{stem}{end}").is_file()
        ),
        None,
    )
    if columns.by_hand or (table and not folders.has_classes(tree)):
        if table is None:
            what = f"{path}: columns were named ({some(columns.by_hand)}), but there is no table"
            raise DataError(what, fix=f"add one of {', '.join(f'{name}.csv' for name in tables.BESIDE)}")
        return _table(table, columns)
    if not tree.files:
        endings = some([f"{n} {ending}" for ending, n in tree.others.most_common()], 6)
        raise DataError(f"{path}: holds no videos ({endings or 'the folder is empty'})", fix=f"data are {_ACCEPTED}")
    found = folders.read_classes(tree, "full") if folders.has_classes(tree) else folders.read_unlabelled(tree, "full")
    found.store = VideoStore([str(path / name) for name in found.names])
    found.said = [re.sub(r"\b([\d,]+) image(s?)\b", r"\1 video\2", line) for line in found.said]
    frames = sum(os.path.isdir(one) for one in found.store.paths)
    if frames:
        found.said.append(f"{count(frames, 'folder')} of frames, each a video")
    if table:
        found.said.append(f"{table.name} in the folder is not used (give {table} to read it instead)")
    return _without_table(found, columns)


def scan(root: Path) -> folders.Tree:
    """Video files, and folders that hold two or more image files themselves, under `root`; links are followed once."""
    files: list[str] = []
    others: Counter[str] = Counter()
    seen = {os.path.realpath(root)}
    for folder, inside, names in os.walk(root, followlinks=True):
        below = Path(folder).relative_to(root).as_posix()
        inside[:] = sorted(name for name in inside if not name.startswith((".", "__")) and _first(folder, name, seen))
        kept = sorted(name for name in names if not name.startswith("."))
        pictures = [name for name in kept if pixels.is_image(name)]
        if len(pictures) > 1 and below != ".":
            files.append(below)
            inside[:] = []
            continue
        for name in kept:
            if Path(name).suffix.lower() in SUFFIXES:
                files.append(name if below == "." else f"{below}/{name}")
            else:
                others[Path(name).suffix.lower() or name] += 1
    files.sort()
    tops = {file.partition("/")[0] for file in files}
    empty = [entry.name for entry in sorted(os.scandir(root), key=lambda e: e.name) if entry.is_dir()]
    return folders.Tree(root, files, others, [name for name in empty if name not in tops and not name.startswith(".")])


def _first(folder: str, name: str, seen: set[str]) -> bool:
    real = os.path.realpath(os.path.join(folder, name))
    new = real not in seen
    seen.add(real)
    return new


def _table(path: Path, columns: tables.Columns) -> Found:
    """One row a video; names are relative to the table's folder, or absolute. Split, group and label columns as of images."""
    table = tables.load(path)
    for name in columns.by_hand:
        if name not in table:
            raise DataError(f"{path}: there is no column {name!r}", fix=f"columns: {some(list(table), 20)}")
    column = columns.image or by_name(table, _COLUMNS, set())
    if column is None:
        has = f"columns: {some(list(table), 20)}"
        raise DataError(
            f"{path}: no column names the videos ({has})", fix="name it with image_column, or call it `path`"
        )
    values = table[column].tolist()
    files = [str(path.parent / value) for value in values]
    tables._require_files(files, values, path, column, "file")
    name = path.parent.name if path.stem in tables.BESIDE else path.stem
    said = [f"{count(len(table), 'row')} of {path.name}: videos from column {column!r}"]
    found, used = Found(name, VideoStore(files), values, said=said), {column}
    used.add(tables._splits(found, table, path, used))
    _groups(found, table, columns, used)
    read_labels(found, table, path, columns.labels, used)
    tables._once(found, path)
    return found


def _groups(found: Found, table: pd.DataFrame, columns: tables.Columns, used: set[str]) -> None:
    column = columns.group or by_name(table, [*tables._GROUP, "person", "actor"], used, ending="_group")
    if column:
        values = table[column]
        found.group = np.array([value or f"(alone {row})" for row, value in enumerate(values)])
        found.said.append(
            f"groups from column {column!r}: {count(len(set(values)), 'group')}, never divided between splits"
        )
        used.add(column)


def _list(path: Path) -> Found:
    """VideoMAE's lists: `path`, `path label`, or `path number label` with label -1 for none."""
    lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    wrong = [number for number, words in enumerate(lines, 1) if len(words) > 3]
    if wrong or not lines:
        what = f"line {wrong[0]} has {len(lines[wrong[0] - 1])} words" if wrong else "the list is empty"
        raise DataError(f"{path}: {what}", fix="`path`, `path label` or `path number label` a line; a .csv for more")
    names = [words[0] for words in lines]
    labels = [words[-1] if len(words) > 1 and words[-1] != "-1" else None for words in lines]
    files = [str(path.parent / name) for name in names]
    tables._require_files(files, names, path, "1", "file")
    found = Found(path.stem, VideoStore(files), names, said=[f"{count(len(names), 'video')} listed in {path.name}"])
    if any(label is not None for label in labels):
        found.labels, found.classes = encode(labels)
        found.task = "single"
        found.said.append(f"classes: {some(found.classes, 20)}")
    return found
