"""Pictures in memory: `.npz` files and scikit-learn's digits."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError
from . import pixels
from .found import Found, class_names, count, encode, some, split_name, which
from .stores import ArrayStore

_PICTURES = ("x", "images", "image", "data", "imgs")
_LABELS = ("y", "labels", "label", "targets")
_GROUPS = ("group", "groups", "patient_id", "patient")
_LAYOUT = "x and y, images and labels, or x_train, y_train, x_val, ... (also train_images, train_labels, ...)"


def read_npz(path: Path, labelled: bool = True) -> Found:
    """Arrays `x` and `y`, or `x_train`, `y_train`, ...; optional `classes`, `split`, `group`. y = -1: unlabelled."""
    content = _load(path)
    keys = _find(content, _PICTURES)
    if not keys:
        raise DataError(f"{path}: no pictures among its arrays ({some(content, 12)})", fix=f"name the arrays {_LAYOUT}")
    parts, said = {}, []
    for key, _ in keys:
        parts[key], note = _as_pictures(content[key], f"{path}:{key}")
        said += [note] if note and note not in said else []
    store = ArrayStore(path.name, parts)
    n = sum(map(len, parts.values()))
    shapes = sorted({part.shape[1:] for part in parts.values()})
    sizes = ", ".join(" x ".join(map(str, shape)) for shape in shapes)
    found = Found(path.stem, store, [store.short(row) for row in range(n)])
    found.said = [f"{count(n, 'image')} from {path.name} (arrays {some(parts)}; {sizes})", *said]
    if len(keys) > 1 or keys[0][1]:
        found.split = np.concatenate([np.full(len(parts[key]), split or "train") for key, split in keys])
    else:
        found.split = _column(content, ("split",), n, path, "split")
    if found.split is not None:
        found.split = _as_splits(found.split, path)
    found.group = _column(content, _GROUPS, n, path, "group")
    if labelled:
        _labels(found, content, keys, path)
    if found.labels is None:
        found.said.append("read without labels")
    return found


def rows_of(path: Path, cells: list[str], table: Path) -> tuple[ArrayStore, np.ndarray]:
    """(all pictures of an .npz that holds one array of them, the rows that a table's `index` column names)."""
    content = _load(path)
    keys = [key for key, _ in _find(content, _PICTURES)] or [key for key, a in content.items() if a.ndim in (3, 4)]
    if len(keys) != 1:
        fix = "keep one array of pictures in it, called x"
        raise DataError(
            f"{path}: {table.name} needs one array of pictures, there are {len(keys)}: {some(content)}", fix=fix
        )
    pictures, _ = _as_pictures(content[keys[0]], f"{path}:{keys[0]}")
    wrong = np.array([not cell.isdecimal() or int(cell) >= len(pictures) for cell in cells])
    if wrong.any():
        bad = some([cells[row] for row in np.flatnonzero(wrong)], 3)
        fix = f"row numbers run from 0 to {len(pictures) - 1}"
        raise DataError(f"{table}: column 'index' holds {bad} ({which(wrong)}), not rows of {path.name}", fix=fix)
    return ArrayStore(path.name, {keys[0]: pictures}), np.array([int(cell) for cell in cells], np.int64)


def read_digits() -> Found:
    """scikit-learn's 1,797 handwritten digits (real scans of 43 writers, bundled with the package: no download).

    8 x 8 values 0..16 become 0..255, 32 x 32 pixels (bilinear). Split: 1,097 / 200 / 500, stratified, always the same.
    """
    import torch
    from sklearn.datasets import load_digits

    from .splits import stratified

    pictures, target = load_digits(return_X_y=True)
    values = torch.tensor(pictures.reshape(-1, 1, 8, 8) * (255 / 16), dtype=torch.float32)
    values = torch.nn.functional.interpolate(values, size=(32, 32), mode="bilinear", align_corners=False)
    labels = target.astype(np.int64)
    found = Found(
        "digits", ArrayStore("digits", {"images": values.round().byte()[:, 0].numpy()}), [f"[{i}]" for i in range(1797)]
    )
    found.task, found.classes, found.labels = "single", [str(i) for i in range(10)], labels
    found.split = stratified(labels, val=200 / 1797, test=500 / 1797, seed=0)
    found.said = ["1,797 handwritten digits of scikit-learn, 10 classes, 32 x 32 grey"]
    return found


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        if "allow_pickle" in str(error):
            what, fix = "holds Python objects (pickles), which are never loaded", "save plain arrays with numpy.savez"
        else:
            what, fix = f"is damaged or no .npz file ({error})", "write it again with numpy.savez"
        raise DataError(f"{path}: {what}", fix=fix) from None


def _find(content: dict[str, np.ndarray], words: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Keys that are one of the words, alone or with a split before or after it, with that split."""
    found = []
    for key in content:
        word, split = key.lower(), None
        for end, rest in (word.rpartition("_")[::2], word.partition("_")[::2]):
            for base, name in ((end, rest), (rest, end)):
                if base in words and split_name(name):
                    word, split = base, split_name(name)
        if word in words:
            found.append((key, split))
    with_split = [item for item in found if item[1]]
    return with_split or found[:1]


def _as_pictures(array: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """(uint8 (N, H, W) or (N, H, W, 3), a sentence about how values were scaled or "")."""
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3, 4):
        array = np.moveaxis(array, 1, 3)  # channels first
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (3, 4)) or 0 in array.shape:
        shape = " x ".join(map(str, array.shape)) or "a single number"
        fix = "pictures are (N, H, W), (N, H, W, 3) or (N, 3, H, W)"
        raise DataError(f"{name}: an array of shape {shape} is no stack of pictures", fix=fix)
    array, note = _to_uint8(array, name)
    if array.ndim == 4 and array.shape[3] == 4:  # transparency on white, as for files
        alpha = array[..., 3:].astype(np.uint16)
        array = ((array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(array), note


def _to_uint8(array: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    if array.dtype == np.uint8:
        return array, ""
    if array.dtype == bool:
        return array.astype(np.uint8) * 255, "values true and false became 255 and 0"
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind not in "uif" or not np.isfinite((low, high)).all():
        raise DataError(
            f"{name}: pictures of type {array.dtype} or with values that are not finite", fix="save them as uint8"
        )
    tops = (1.0, 255.0) if array.dtype.kind == "f" else (65535.0,) if array.dtype == np.uint16 else (255.0, 65535.0)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top == 255.0 and array.dtype.kind == "f" and high < pixels.UNCLEAR:  # left [0, 1] a little, or nearly black
        top = None
    if top is None:
        fix = "save uint8, or floats in [0, 1] (clip what leaves it)"
        raise DataError(f"{name}: values from {low:g} to {high:g} have no known meaning as brightness", fix=fix)
    values: np.ndarray = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
    scaled = np.rint(values * (255.0 / top)).astype(np.uint8)
    return scaled, f"{array.dtype} values 0..{top:g} were scaled to 0..255"


def _column(content: dict[str, np.ndarray], names: tuple[str, ...], n: int, path: Path, what: str) -> np.ndarray | None:
    key = next((name for name in names if name in content), None)
    if key is None:
        return None
    column = content[key].astype(str)
    if column.shape != (n,):
        raise DataError(
            f"{path}:{key}: {count(column.size, what)} for {count(n, 'picture')}", fix="one value a picture"
        )
    return column


def _as_splits(words: np.ndarray, path: Path) -> np.ndarray:
    split = [split_name(str(word)) for word in words]
    wrong = sorted({str(word) for word, name in zip(words, split, strict=True) if name is None})
    if wrong:
        raise DataError(
            f"{path}:split: unknown {some(map(repr, wrong))}", fix="splits are train, val, test, unlabelled"
        )
    return np.array(split)


def _labels(found: Found, content: dict[str, np.ndarray], keys: list[tuple[str, str | None]], path: Path) -> None:
    by_split = {split: key for key, split in _find(content, _LABELS)}
    if not by_split:
        return
    columns = []
    for key, split in keys:
        if split not in by_split and None not in by_split:
            raise DataError(f"{path}: {key} has no labels, others do", fix=f"name the arrays {_LAYOUT}")
        label_key = by_split[split if split in by_split else None]
        column, n = content[label_key], len(content[key])
        if column.ndim == 2 and column.shape[1] == 1:
            column = column[:, 0]
        if column.ndim not in (1, 2) or len(column) != n:
            shape = " x ".join(map(str, column.shape))
            raise DataError(f"{path}:{label_key}: labels of shape {shape} for {n} pictures", fix="(N,) or (N, C)")
        columns.append(column)
    if len({column.shape[1:] for column in columns}) > 1:
        raise DataError(
            f"{path}: label arrays have different numbers of columns", fix="the same classes in every split"
        )
    labels = np.concatenate(columns)
    names = [str(name) for name in content["classes"].tolist()] if "classes" in content else class_names(path.parent)[0]
    if labels.ndim == 2:
        _multi(found, labels, names, path)
    else:
        _single(found, labels, names, path)
    found.said.append(f"{count(len(found.classes), 'class', 'classes')}: {some(found.classes, 20)}")


def _multi(found: Found, labels: np.ndarray, names: list[str], path: Path) -> None:
    known = labels[labels == labels] if labels.dtype.kind == "f" else labels
    if labels.dtype.kind not in "buif" or not np.isin(known, (0, 1)).all():
        fix = "several labels a picture are 1 = present, 0 = absent, nan = unknown"
        raise DataError(f"{path}: labels with {labels.shape[1]} columns hold other values than 0 and 1", fix=fix)
    if names and len(names) != labels.shape[1]:
        raise DataError(
            f"{path}: {len(names)} class names for {labels.shape[1]} label columns", fix="one name a column"
        )
    found.task, found.labels = "multi", labels.astype(np.float32)
    found.classes = names or [str(k) for k in range(labels.shape[1])]


def _single(found: Found, labels: np.ndarray, names: list[str], path: Path) -> None:
    if labels.dtype.kind == "f" and (labels == np.rint(labels)).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "uibUS":
        fix = "class numbers or class names; -1 = unlabelled"
        raise DataError(f"{path}: labels of type {labels.dtype} with fractions or nan are no classes", fix=fix)
    labels = labels.astype(np.int64) if labels.dtype.kind in "uib" else labels.astype(str)
    words = [None if word in ("-1", "") else word for word in labels.astype(str).tolist()]
    found.task = "single"
    found.labels, found.classes = encode(words, names)
    none = found.labels < 0
    if none.any():
        found.said.append(f"{count(int(none.sum()), 'image')} without a label (-1)")
        split = np.full(len(words), "train") if found.split is None else found.split
        found.split = np.where(none, "unlabelled", split)
