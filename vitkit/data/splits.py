"""Train, validation and test: stratified, groups kept together, a function of the seed, saved as a table.

Without groups, single-label data are divided class by class and the rounding is carried on from class to class, so
every class gets its share rounded down or up and the totals are right. Otherwise groups (or pictures with several
labels) are given out one by one, those with the rarest label first, to the split that lacks this label most
(Sechidis, Tsoumakas, Vlahavas 2011, "On the stratification of multi-label data", with groups as the examples).
A class with one picture stays in train.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError
from .found import count, describe_splits, some
from .images import SPLITS, Images

_PARTS = ("train", "val", "test")
_COLUMNS = ("name", "split", "label", "group")


def _random(*seeds: int) -> np.random.RandomState:
    """The one stream of numpy whose numbers are promised to stay the same in all versions."""
    return np.random.RandomState([seed & 0xFFFFFFFF for seed in seeds])


def stratified(labels: np.ndarray, *, val: float, test: float, seed: int) -> np.ndarray:
    """(N,) class numbers -> (N,) split names, each class divided in proportion, at least one picture in train."""
    split = np.full(len(labels), "train", dtype="<U10")
    random = _random(seed)
    owed_test = owed_val = 0.0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[random.permutation(len(members))]
        owed_test, owed_val = owed_test + len(members) * test, owed_val + len(members) * val
        if len(members) == 1:
            owed_test, owed_val = owed_test - test, owed_val - val  # it stays in train and owes nothing to the others
            continue
        n_test = min(max(round(owed_test), 0), int(np.ceil(len(members) * test)), len(members) - 1)
        n_val = min(max(round(owed_val), 0), int(np.ceil(len(members) * val)), len(members) - 1 - n_test)
        owed_test, owed_val = owed_test - n_test, owed_val - n_val
        split[members[:n_test]] = "test"
        split[members[n_test : n_test + n_val]] = "val"
    return split


def grouped(counts: np.ndarray, sizes: np.ndarray, *, val: float, test: float, seed: int) -> np.ndarray:
    """Units that must stay whole -> (U,) split names. `counts` (U, C): positives of each label, `sizes` (U,): pictures.

    Rarest label first, larger units first, each to the split that still wants most of that label; units without any
    label go where most pictures are wanted. Equal wishes go to train, then test, then val.
    """
    order = ("train", "test", "val")
    share = np.array([1 - val - test, test, val])
    want_size, want = share * sizes.sum(), share[:, None] * counts.sum(0)  # (3,), (3, C)
    given = np.full(len(sizes), -1)
    random = _random(seed)
    # Larger units first, equal ones in a seeded order: the last units are small and even things out.
    queue = random.permutation(len(sizes))
    queue = queue[np.argsort(-sizes[queue], kind="stable")]

    def give(unit: int, wish: np.ndarray) -> None:
        open_ = np.where(share > 0, wish, -np.inf)
        best = np.flatnonzero(open_ >= open_.max() - 1e-9)
        part = best[np.argmax(want_size[best])]
        given[unit], want_size[part] = part, want_size[part] - sizes[unit]
        want[part] -= counts[unit]

    left = (counts > 0).sum(0).astype(float)  # units that still carry each label
    while (left > 0).any():
        label = int(np.argmin(np.where(left > 0, left, np.inf)))
        for unit in queue[(counts[queue, label] > 0) & (given[queue] < 0)].tolist():
            give(unit, want[:, label])
            left -= counts[unit] > 0
        left[label] = 0
    for unit in queue[given[queue] < 0].tolist():
        give(unit, want_size)
    return _fill_empty(np.array(order)[given], sizes, [part for part, f in zip(order, share, strict=True) if f > 0])


def _fill_empty(split: np.ndarray, sizes: np.ndarray, wanted: list[str]) -> np.ndarray:
    """Give a wanted split that got nothing the smallest unit of a split that has at least two."""
    for part in wanted:
        if (split == part).any():
            continue
        others = [other for other in wanted if (split == other).sum() > 1]
        if others:
            donor = max(others, key=lambda other: int(sizes[split == other].sum()))
            units = np.flatnonzero(split == donor)
            split[units[np.argmin(sizes[units])]] = part
    return split


def draw(
    images: Images, among: np.ndarray, *, val: float, test: float, seed: int, what: str = "split drawn"
) -> tuple[np.ndarray, list[str]]:
    """(the split of every picture, sentences): those in `among` are divided anew, the others keep theirs."""
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise ConfigError(
            f"fractions val={val:g} and test={test:g} leave nothing to train on", fix="each >= 0, together below 1"
        )
    split = images.split.astype("<U10")
    rows = np.flatnonzero(among)
    rows = rows[np.argsort(np.array(images.names, dtype=object)[rows], kind="stable")]  # not the order of the listing
    if not len(rows):
        return split, []
    labels = None if images.labels is None else images.labels[rows]
    if labels is not None and labels.ndim == 1 and images.group is None:
        split[rows] = stratified(labels, val=val, test=test, seed=seed)
        how = "stratified by class"
    else:
        unit = np.arange(len(rows))
        if images.group is not None:
            unit = np.unique(images.group[rows], return_inverse=True)[1]
        positives = _positives(labels, len(images.classes), len(rows))
        counts = np.zeros((unit.max() + 1, positives.shape[1]))
        np.add.at(counts, unit, positives)
        sizes = np.bincount(unit).astype(float)
        fixed = _bound(images, rows, unit, ~among)
        parts = np.full(len(sizes), "train", dtype="<U10")
        free = np.flatnonzero(~fixed)
        if len(free):
            parts[free] = grouped(counts[free], sizes[free], val=val, test=test, seed=seed)
        split[rows] = parts[unit]
        how = ", ".join(
            [
                *(["groups kept together"] if images.group is not None else []),
                *(["stratified by label"] if counts.shape[1] else []),
            ]
        )
    said = [f"{what} with seed {seed} ({how or 'at random'}): {describe_splits(split)}"]
    empty = [part for part, f in zip(_PARTS[1:], (val, test), strict=True) if f > 0 and not (split[rows] == part).any()]
    if empty:
        few_ = "groups" if images.group is not None else "images"
        said.append(f"WARNING: nothing could be put into {' and '.join(empty)}: too few {few_}")
    return split, said


def _positives(labels: np.ndarray | None, classes: int, n: int) -> np.ndarray:
    """(N, C) 0/1 for either kind of label; unknown counts as absent, (N, 0) without labels."""
    if labels is None:
        return np.zeros((n, 0))
    if labels.ndim == 2:
        return np.nan_to_num(labels)
    return np.eye(classes + 1)[labels][:, :classes]  # -1 picks the last row: no class


def _bound(images: Images, rows: np.ndarray, unit: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(U,) groups that also have unlabelled pictures: these may be pre-trained on, so the group must not be tested on."""
    if images.group is None:
        return np.zeros(len(rows), bool)
    seen = np.isin(images.group[rows], np.unique(images.group[others & (images.split == "unlabelled")]))
    return np.bincount(unit, weights=seen) > 0


def complete(images: Images, given: np.ndarray | None, *, val: float, test: float, seed: int) -> Images:
    """The splits that `read` gives: what the data say is kept, a missing validation part is cut out of train.

    Nothing said, or only train: validation and test are both drawn. No validation but a test part: only validation.
    Without labels there is nothing to measure: everything is unlabelled unless the data said otherwise.
    """
    if given is None:
        if images.task is None:
            return replace(images, split=np.full(len(images), "unlabelled"))
        given = np.full(len(images), "train", dtype="<U10")
        if images.labels is not None and images.labels.ndim == 1:
            given[images.labels < 0] = "unlabelled"
    images = replace(images, split=given)
    if images.task is None:
        return replace(images, understood=[*images.understood, f"split given: {describe_splits(given)}"])
    there = set(given.tolist())
    said = []
    split = images.split
    if "train" in there and not {"val", "test"} <= there:
        if there & {"val", "test"}:
            said.append(f"split given: {describe_splits(given)}")
        if "val" not in there:
            among, cut = given == "train", 0.0 if "test" in there else test
            if (val > 0 or cut > 0) and among.any():
                what = "split drawn" if cut else "validation part cut out of train"
                split, more = draw(images, among, val=val, test=cut, seed=seed, what=what)
                said += more
        elif "test" not in there:
            said.append("there is no test part: val both chooses settings and measures")
    else:
        said.append(f"split given: {describe_splits(given)}")
    return replace(images, split=split, understood=[*images.understood, *said])


def leaks(images: Images) -> dict[str, list[str]]:
    """Groups that lie in more than one of train, val and test -> the splits they are in."""
    if images.group is None:
        return {}
    used = np.isin(images.split, _PARTS)
    pairs = sorted(set(zip(images.group[used].tolist(), images.split[used].tolist(), strict=True)))
    found: dict[str, list[str]] = {}
    for group, split in pairs:
        found.setdefault(str(group), []).append(split)
    return {group: sorted(parts, key=SPLITS.index) for group, parts in found.items() if len(parts) > 1}


def few(labels: np.ndarray, classes: int, k: int, seed: int) -> np.ndarray:
    """Sorted indices of at most `k` pictures a class; with one seed the choice for 2 is part of that for 5."""
    order = _random(seed).permutation(len(labels))
    positives = _positives(labels, classes, len(labels))
    if labels.ndim == 1:
        rank = np.cumsum(positives[order], axis=0)
        return np.sort(order[((rank <= k) & (positives[order] > 0)).any(axis=1)])
    have, taken = np.zeros(classes), []
    for row in order.tolist():
        if (positives[row] * (have < k)).any():
            taken.append(row)
            have += positives[row]
    return np.sort(np.array(taken, dtype=np.int64))


def save(images: Images, path: str | Path) -> Path:
    """Write `name,split,label,group`, one row a picture (several labels as a|b). `load` reads it back."""
    from ..run.files import atomic_write

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for i, name in enumerate(images.names):
        group = "" if images.group is None else str(images.group[i])
        writer.writerow([name, images.split[i], _label_text(images, i), group])
    atomic_write(path, text.getvalue())
    return Path(path)


def load(images: Images, path: str | Path) -> Images:
    """`images` with the splits of a saved table. Every picture must be listed; listed pictures must exist."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: splits cannot be read ({error})", fix="name a splits.csv that vitkit wrote") from None
    if not rows or not {"name", "split"} <= rows[0].keys():
        raise DataError(f"{path}: no table of splits", fix="columns name,split (and label,group), one row a picture")
    saved = {row["name"]: row["split"] for row in rows}
    wrong = sorted({split for split in saved.values() if split not in SPLITS}, key=str)
    if wrong:
        raise DataError(f"{path}: unknown split {some(map(repr, wrong))}", fix=f"splits are {', '.join(SPLITS)}")
    unlisted = [name for name in images.names if name not in saved]
    gone = sorted(saved.keys() - set(images.names))
    for names, what in ((unlisted, "not listed in it"), (gone, "listed in it but not in the data")):
        if names:
            fix = "save the splits of these data again; old and new images would otherwise mix"
            raise DataError(f"{path}: {count(len(names), 'image')} of {images.name} {what}: {some(names, 3)}", fix=fix)
    split = np.array([saved[name] for name in images.names])
    return replace(
        images, split=split, understood=[*images.understood, f"splits from {path.name}: {describe_splits(split)}"]
    )


def _label_text(images: Images, i: int) -> str:
    if images.labels is None:
        return ""
    if images.labels.ndim == 1:
        return images.classes[images.labels[i]] if images.labels[i] >= 0 else ""
    return "|".join(images.classes[k] for k in np.flatnonzero(images.labels[i] == 1))
