"""From a table's columns to labels: one class a picture, `a|b`, or several 0/1 columns. Nothing is taken silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from .found import Found, by_name, class_names, count, encode, some, which

if TYPE_CHECKING:
    import pandas as pd

LABEL_NAMES = ["label", "labels", "class", "class_name", "target", "category", "finding_labels", "diagnosis", "y"]
# 0/1-valued columns with these names tell of a picture's circumstances, not of what is seen in it.
_CIRCUMSTANCE = re.compile(
    r"(?i)(.*[_ ])?(id|index|row|sex|gender|age|male|female|view|fold|width|height|site|year|month|day|date|split)([_ ].*)?"
    r"|is_(train|val|valid|test)|unnamed.*"
)
_NONE_OF_THEM = frozenset({"no finding", "nofinding", "normal", "healthy", "none", "negative"})


def read_labels(found: Found, table: pd.DataFrame, path: Path, chosen: list[str] | None, used: set[str]) -> None:
    """Fill in task, classes and labels from the chosen columns; None: from those that are unambiguously labels."""
    if chosen is None:
        single = by_name(table, LABEL_NAMES, used)
        chosen = [single] if single else _label_columns(found, table, used)
        if not chosen:
            rest = [name for name in table if name not in used]
            why = f": none of the columns {some(rest, 20)} is clearly a label (label_columns names it)" if rest else ""
            found.said.append(f"read without labels{why}")
            return
    if not chosen:
        found.said.append("read without labels, as asked")
        return
    optional = np.zeros(len(table), bool) if found.split is None else found.split == "unlabelled"
    read = _several_columns if len(chosen) > 1 else _one_column
    read(found, table, path, chosen, optional)
    if found.labels is not None:
        found.labels[optional] = -1 if found.task == "single" else np.nan  # "unlabelled": nothing may use their labels


def _one_column(found: Found, table: pd.DataFrame, path: Path, chosen: list[str], optional: np.ndarray) -> None:
    """Words, class numbers, or `a|b` for several labels a picture."""
    column = chosen[0]
    words = [re.sub(r"^(\d+)\.0+$", r"\1", value) for value in table[column]]
    missing = np.array([value == "" or value.lower() == "nan" for value in words])
    _require_labels(~missing | optional, path, chosen)
    known: list[str | None] = [None if skip else word for word, skip in zip(words, missing | optional, strict=True)]
    if any(word and "|" in word for word in known):
        lists = [[part.strip() for part in (word or "").split("|") if part.strip()] for word in known]
        numbers, found.classes = encode([part for parts in lists for part in parts])
        labels = np.zeros((len(lists), len(found.classes)), np.float32)
        labels[np.repeat(np.arange(len(lists)), [len(parts) for parts in lists]), numbers] = 1
        found.task, found.labels = "multi", labels
        found.said.append(f"multi-label (a|b) from column {column!r}: {_classes(found)}")
        _drop_none_of_them(found)
        return
    names, _, file = class_names(path.parent)
    found.task = "single"
    found.labels, found.classes = encode(known, names)
    source = f" (named by {file})" if names and found.classes == names else ""
    found.said.append(f"labels from column {column!r}: {_classes(found)}{source}")


def _several_columns(found: Found, table: pd.DataFrame, path: Path, chosen: list[str], optional: np.ndarray) -> None:
    labels = np.full((len(table), len(chosen)), np.nan, np.float32)
    for k, column in enumerate(chosen):
        values, wrong = _numbers(table[column].tolist())
        wrong |= ~np.isnan(values) & (values != 0) & (values != 1)
        if wrong.any():
            examples = sorted({table[column].iloc[row] for row in np.flatnonzero(wrong)})
            raise DataError(
                f"{path}: label column {column!r} holds {some(map(repr, examples), 3)} ({which(wrong)})",
                fix="several label columns hold 1 = present, 0 = absent, empty = unknown; -1 for uncertain must become "
                "one of these",
            )
        labels[:, k] = values
    unknown = np.isnan(labels)
    empty = unknown.all(axis=1) & ~optional
    if (empty | optional).all():
        _require_labels(~empty, path, chosen)
    found.task, found.classes, found.labels = "multi", list(chosen), labels
    found.said.append(f"multi-label, {len(chosen)} columns taken: {some(chosen, 30)}")
    if empty.any():
        found.said.append(
            f"WARNING: {count(int(empty.sum()), 'image')} without any label outside the unlabelled part ({which(empty)})"
        )
    partial = int(unknown[~optional & ~empty].sum())
    if partial:
        found.said.append(
            f"{count(partial, 'cell')} of the label columns empty: unknown, no part in losses and metrics"
        )


def _require_labels(there: np.ndarray, path: Path, columns: list[str]) -> None:
    if there.all():
        return
    where = f"column {columns[0]!r}" if len(columns) == 1 else f"any of the columns {some(map(repr, columns), 3)}"
    raise DataError(
        f"{path}: no label in {where} for {count(int((~there).sum()), 'row')} ({which(~there)})",
        fix="fill them in, remove the rows, or mark them `unlabelled` in a column `split`",
    )


def _numbers(values: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """((N,) float, nan where empty; (N,) bool where there is text that is no number)."""
    words = {"": np.nan, "nan": np.nan, "na": np.nan, "true": 1.0, "false": 0.0}
    numbers, wrong = np.full(len(values), np.nan), np.zeros(len(values), bool)
    for row, value in enumerate(values):
        try:
            numbers[row] = words[value.lower()] if value.lower() in words else float(value)
        except ValueError:
            wrong[row] = True
    return numbers, wrong


def _label_columns(found: Found, table: pd.DataFrame, used: set[str]) -> list[str]:
    """Two or more 0/1-valued columns whose names do not tell of circumstances; else the one other column there is."""
    rest = [name for name in table if name not in used and not _CIRCUMSTANCE.fullmatch(name)]
    binary = []
    for name in rest:
        values, wrong = _numbers(table[name].tolist())
        known = values[~np.isnan(values)]
        if not wrong.any() and known.size and np.isin(known, (0, 1)).all():
            binary.append(name)
    if len(binary) < 2:
        distinct = {name: table[name].nunique() for name in rest}
        return rest if len(rest) == 1 and 2 <= distinct[rest[0]] <= max(2, len(table) // 2) else []
    labels = np.stack([_numbers(table[name].tolist())[0] for name in binary], axis=1)
    none = _none_of_them(binary, labels)
    if none is not None:
        found.said.append(f"column {binary[none]!r} is not taken: it says only that no other label is present")
        used = {*used, binary.pop(none)}
    aside = [name for name in table if name not in used and name not in binary]
    if aside:
        found.said.append(f"columns not taken as labels: {some(aside, 20)} (label_columns chooses by hand)")
    return binary


def _none_of_them(names: list[str], labels: np.ndarray) -> int | None:
    """The column named like `no_finding` that is 1 exactly where all others are 0: it adds nothing to the others."""
    for k, name in enumerate(names):
        if name.lower().replace("_", " ") in _NONE_OF_THEM and len(names) > 2:
            others = np.delete(np.nan_to_num(labels), k, axis=1).max(axis=1)
            if (np.isnan(labels[:, k]) | (labels[:, k] == 1 - others)).all():
                return k
    return None


def _drop_none_of_them(found: Found) -> None:
    assert found.labels is not None
    none = _none_of_them(found.classes, found.labels)
    if none is not None:
        found.said.append(f"{found.classes[none]!r} is not a class: it says only that no other label is present")
        found.labels = np.delete(found.labels, none, axis=1)
        found.classes = [name for k, name in enumerate(found.classes) if k != none]


def _classes(found: Found) -> str:
    return f"{count(len(found.classes), 'class', 'classes')}: {some(found.classes, 20)}"
