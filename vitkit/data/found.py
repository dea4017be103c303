"""What the readers share: the half-finished result of reading, words for splits, class names, counting aloud."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError, nearest
from .images import SPLITS, Masks, Store

if TYPE_CHECKING:
    import pandas as pd

_SPLIT_WORDS = {
    "train": "train training",
    "val": "val valid validation dev",
    "test": "test testing",
    "unlabelled": "unlabelled unlabeled",
}
SPLIT_NAMES = {word: split for split, words in _SPLIT_WORDS.items() for word in words.split()}
_CLASS_FILES = ("classes.json", "classes.csv", "classes.txt")


@dataclass
class Found:
    """A data set as its files describe it. `split` None: nothing was said about splits."""

    name: str
    store: Store
    names: list[str]
    task: str | None = None
    classes: list[str] = field(default_factory=list)
    labels: np.ndarray | None = None
    split: np.ndarray | None = None
    group: np.ndarray | None = None
    masks: Masks | None = None
    said: list[str] = field(default_factory=list)
    rows: np.ndarray | None = None  # row of every picture in `store` (and of its mask); None: 0, 1, 2, ...
    frames: np.ndarray | None = None  # the frame that a table asks for, -1 for all (DICOM and NIfTI only)
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # kept text, see Images.columns

    def keep(self, index: np.ndarray) -> None:
        """Leave only the pictures at `index`."""
        rows = np.arange(len(self.names)) if self.rows is None else self.rows
        self.rows, self.names = rows[index], [self.names[i] for i in index.tolist()]
        self.labels = None if self.labels is None else self.labels[index]
        self.split = None if self.split is None else self.split[index]
        self.group = None if self.group is None else self.group[index]
        self.frames = None if self.frames is None else self.frames[index]
        self.columns = {name: cells[index] for name, cells in self.columns.items()}


def split_name(word: str) -> str | None:
    """train, val, test or unlabelled for the usual words in any case, else None."""
    return SPLIT_NAMES.get(word.strip().lower())


def some(items: Iterable[object], n: int = 5) -> str:
    """`a, b, c and 12 more`: the first few of a list, and how many there are beside them."""
    items = list(items)
    rest = f" and {len(items) - n:,} more" if len(items) > n else ""
    words = [str(item) for item in items[:n]]
    return ("; " if any(", " in word for word in words) else ", ").join(words) + rest


def count(n: int, one: str, many: str = "") -> str:
    """`1 image`, `1,204 images`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def choose(word: str, valid: Sequence[str]) -> str:
    """The end of an error's fix: the nearest valid name first, then some of the others."""
    near = nearest(word, valid)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    return f"{hint}there are: {some(valid, 20)}"


def encode(words: Sequence[str | None], known: Sequence[str] = ()) -> tuple[np.ndarray, list[str]]:
    """Class words -> ((N,) int64 with -1 for None, class names). Whole numbers are ordered as numbers, words as words.

    `known` are names that the data set lists for the numbers 0, 1, ...: then the numbers are class indices.
    """
    found = {word for word in words if word is not None}
    numbers = all(word.isdecimal() and str(int(word)) == word for word in found)
    if numbers and known and found and max(map(int, found)) < len(known):
        classes, position = list(known), {str(i): i for i in range(len(known))}
    else:
        classes = sorted(found, key=int if numbers else str)
        position = {word: i for i, word in enumerate(classes)}
    labels = np.array([-1 if word is None else position[word] for word in words], dtype=np.int64)
    return labels, classes


def class_names(folder: Path) -> tuple[list[str], int | None, str]:
    """(names of the classes 0, 1, ..., the value to be ignored, file) from classes.json, .csv or .txt beside the data.

    classes.json holds a list, or {"classes": list or {"0": name}, "ignore_index": 11}; classes.csv the columns
    `label` (or the row's number) and `name`; classes.txt one name a line. ([], None, "") when there is no such file.
    """
    path = next((folder / name for name in _CLASS_FILES if (folder / name).is_file()), None)
    if path is None:
        return [], None, ""
    try:
        names, ignore = _parse_classes(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read as a list of classes ({error})", fix='e.g. {"classes": ["cat", "dog"]}'
        ) from None
    return [str(name) for name in names], ignore, path.name


def _parse_classes(path: Path) -> tuple[list[object], int | None]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()], None
    if path.suffix == ".csv":
        import csv

        rows = list(csv.DictReader(text.splitlines()))
        column = next(c for c in ("name", "class", "class_name", "wnid", *rows[0]) if c in rows[0])
        if "label" in rows[0] and column != "label" and all(row["label"].isdecimal() for row in rows):
            rows.sort(key=lambda row: int(row["label"]))
            _require_counting([int(row["label"]) for row in rows])
        return [row[column] for row in rows], None
    content = json.loads(text)
    ignore = content.get("ignore_index") if isinstance(content, dict) else None
    names = content.get("classes", content) if isinstance(content, dict) else content
    if isinstance(names, dict):
        _require_counting(sorted(int(key) for key in names))
        names = [names[key] for key in sorted(names, key=int)]
    return list(names), ignore


def _require_counting(numbers: list[int]) -> None:
    if numbers != list(range(len(numbers))):
        raise ValueError(f"class numbers {some(numbers)} do not count 0, 1, 2, ...")


def which(where: np.ndarray) -> str:
    """`row 3`, `rows 3, 8`: the True positions of a table's column, counted from 1 below the header."""
    numbers = np.flatnonzero(where) + 1
    return ("row " if len(numbers) == 1 else "rows ") + some(numbers.tolist())


def by_name(table: pd.DataFrame, names: list[str], used: set[str], ending: str = "") -> str | None:
    """The first column called like one of `names` (best first; case and spaces do not matter), or ending so."""
    lower = {column.lower().replace(" ", "_"): column for column in table if column not in used}
    found = next((lower[name] for name in names if name in lower), None)
    if found is None and ending:
        found = next((column for name, column in lower.items() if name.endswith(ending)), None)
    return found


def describe_splits(split: np.ndarray) -> str:
    """`train 900, val 186, test 205`."""
    return ", ".join(f"{name} {n:,}" for name in SPLITS if (n := int((split == name).sum())))
