"""Metadata correlation: what frozen features know of age, sex, view or device, beyond what shuffled values give.

Paper: Perez-Garcia et al., RAD-DINO, arXiv 2401.10815 (linear and logistic probes of metadata on the class token).

What happens, and where: a column of a table becomes numbers or classes (`parse`); ridge regression (`ridge`) or logistic
regression (`vitkit.evaluate.linear`) is fitted to the training images' features, its penalty chosen on validation images, and
scored once (`measure`). Intervals draw whole patients. For chance, the values are exchanged between the patients of the
training and validation images, everything is chosen and fitted again, and scored on the true values, `permutations` times:
p = (1 + draws that did as well) / (1 + draws). `folds` scores every image instead, by models that saw none of its patient.

Differs from the paper: its splits and penalties are not published; chance and intervals are ours. A confounder (a hospital
whose patients are older) is not told apart from the thing itself.

Cost: one eigendecomposition of min(images, width) rows for all penalties and all shuffled columns of numbers together; a
logistic path of some tenths of a second for each shuffle of a class.

    vitkit evaluate --model M --data scans/labels.csv --protocols metadata --metadata_columns age,sex,view --out runs/meta
    vitkit.evaluate(model=M, data="scans/labels.csv", protocols="metadata", metadata_columns="age,sex", out="runs/meta")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.ridge import correlation, mae, r2, ridge

UNKNOWN = frozenset({"", "na", "n/a", "nan", "none", "null", "unknown", "?"})
_AGE = re.compile(r"(\d{1,3})[Yy]")  # DICOM writes 058Y
FEW = 5  # whole numbers with at most so many values are codes, not quantities
SHUFFLED = 1e-3  # tolerance of logistic fits to shuffled values, which need no last digits
EDGE = "the {} penalty tried was best"


@dataclass(frozen=True)
class Settings:
    """Probes of metadata columns on frozen features."""

    folds: int = 0
    """0: the data's own splits; 2 or more: every image is scored by a model of the other folds (patients whole)"""
    permutations: int = 200
    """shuffles behind the chance level; 0 = none"""
    penalties: tuple[float, ...] = (
        1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4,
    )  # fmt: skip
    """of ridge regression, on the mean squared error with features of deviation 1"""
    seed: int = 0
    """of folds and shuffles"""

    def __post_init__(self) -> None:
        if self.folds < 0 or self.folds in (1, 2):
            raise ConfigError(f"metadata_folds is {self.folds}", fix="0, or 3 or more: one to score, one to choose on")
        if self.permutations < 0:
            raise ConfigError(f"permutations is {self.permutations}", fix="0 or more, e.g. 200")
        if not self.penalties or min(self.penalties) <= 0:
            raise ConfigError(f"penalties {self.penalties} must be positive", fix="use for example (1e-2, 1, 100)")


@dataclass(frozen=True)
class Column:
    """Values of every image: float with NaN, or class numbers with -1, where unknown."""

    name: str
    kind: Literal["number", "class"]
    values: np.ndarray
    classes: tuple[str, ...] = ()

    @property
    def known(self) -> np.ndarray:
        return ~np.isnan(self.values) if self.kind == "number" else self.values >= 0


@dataclass
class Found:
    """A column's probe on the scored images (`rows` into all of them).

    said: predicted numbers (n,) or probabilities (n, C). metrics: name -> Interval, the main one first. baseline: the same
    names without features (training median, largest class). chance: the main metric under each shuffle. p: of the main
    metric. curve: (penalty, validation score) of the one split.
    """

    column: Column
    rows: np.ndarray
    truth: np.ndarray
    said: np.ndarray
    chosen: list[float]
    metrics: dict[str, Any]
    baseline: dict[str, float]
    chance: np.ndarray
    p: float
    trained_on: int
    curve: list[tuple[float, float]] = field(default_factory=list)
    note: str = ""

    @property
    def main(self) -> str:
        return next(iter(self.metrics))


# ---------------------------------------------------------------- columns


def parse(name: str, cells: Sequence[tuple[str, ...]], kind: str | None = None) -> Column:
    """Texts of a table -> values. `kind` None: numbers where all known cells are numbers, unless whole and few."""
    texts = []
    for i, cell in enumerate(cells):
        if len(cell) > 1:
            raise DataError(
                f"column {name!r}: image {i + 1} has several values ({', '.join(cell[:3])})", fix="one value an image"
            )
        text = cell[0] if cell else ""
        texts.append("" if text.lower() in UNKNOWN else text)
    if kind not in (None, "number", "class"):
        raise ConfigError(f"metadata_columns names {name}:{kind}", fix=f"{name}:number, {name}:class, or {name} alone")
    numbers = [_number(text) for text in texts]
    known = [text for text in texts if text]
    if not known:
        raise DataError(f"column {name!r} holds no value", fix="another column")
    wrong = [text for text, number in zip(texts, numbers, strict=True) if text and number is None]
    if kind == "number" and wrong:
        raise DataError(f"column {name!r} holds {wrong[0]!r}, which is no number", fix=f"{name}:class")
    values = {number for number in numbers if number is not None}
    if kind is None:
        coded = len(values) <= FEW and all(float(v).is_integer() for v in values)
        kind = "class" if wrong or coded else "number"
    if kind == "number":
        array = np.array([np.nan if number is None else number for number in numbers])
        return Column(name, "number", array)
    from vitkit.data.found import encode

    labels, classes = encode([text or None for text in texts])
    return Column(name, "class", labels, tuple(classes))


def _number(text: str) -> float | None:
    age = _AGE.fullmatch(text)
    try:
        value = float(age.group(1) if age else text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


# ---------------------------------------------------------------- the probe


def measure(
    x: np.ndarray,
    column: Column,
    split: np.ndarray,
    groups: np.ndarray | None = None,
    settings: Settings = Settings(),
    *,
    on_shuffle: Callable[[int, int], None] | None = None,
) -> Found:
    """Probe one column: features x (N, D), `split` (N,) of train, val, test, unlabelled (trained on, too).

    Without a test split the validation images are scored, and a fifth of the training images (groups whole) chooses.
    Raises DataError where too few images or groups are known, or the value never varies.
    """
    rows = np.flatnonzero(column.known)
    group = np.arange(len(column.values)).astype(str) if groups is None else np.asarray(groups).astype(str)
    scored_split = "test" if (split == "test").any() else "val"
    parts = _parts(column, rows, split[rows], scored_split, group[rows], settings)
    said, chosen, curve = _fitted(x, column, column.values, parts, settings)
    scored = np.concatenate([test for _, _, test in parts])
    order = np.argsort(scored, kind="stable")
    scored, said = scored[order], said[order]
    truth = column.values[scored]
    main: Any = r2 if column.kind == "number" else _auc()
    chance = _chance(x, column, parts, group, settings, scored, order, main, on_shuffle)
    value = main(truth, said)
    p = (1 + int((chance >= value).sum())) / (1 + len(chance)) if len(chance) else float("nan")
    learnt = np.concatenate([np.concatenate([a, b]) for a, b, _ in parts])
    return Found(
        column,
        scored,
        truth,
        said,
        chosen,
        _intervals(column, truth, said, group[scored]),
        _baseline(column, column.values[np.unique(learnt)] if settings.folds else column.values[parts[0][0]], truth),
        chance,
        p,
        len(rows) if settings.folds else len(parts[0][0]),
        curve,
        _edges(chosen, settings, column),
    )


def _parts(
    column: Column, rows: np.ndarray, split: np.ndarray, scored: str, group: np.ndarray, settings: Settings
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(train, val, scored) rows of each fit; one where the data's own splits are used."""
    if settings.folds:
        fold = _folds(group, settings.folds, settings.seed)
        if fold.max() + 1 < settings.folds:
            raise DataError(
                f"column {column.name!r}: {len(np.unique(group))} groups for {settings.folds} folds", fix="fewer folds"
            )
        parts = []
        for f in range(settings.folds):
            g = (f + 1) % settings.folds
            parts.append((rows[(fold != f) & (fold != g)], rows[fold == g], rows[fold == f]))
    else:
        train = np.isin(split, ("train", "unlabelled"))
        test, val = split == scored, (split == "val") & (scored != "val")
        if not val.any() and train.any():
            val = train & np.isin(
                group, np.unique(group[train])[_folds(np.unique(group[train]), 5, settings.seed) == 0]
            )
            train &= ~val
        parts = [(rows[train], rows[val], rows[test])]
    for part, what in zip(zip(*parts, strict=True), ("train on", "choose on", "score"), strict=True):
        if min(map(len, part)) < 2:
            raise DataError(
                f"column {column.name!r}: {min(map(len, part))} known values to {what}",
                fix="more images with a value, or metadata_folds=5 instead of the splits",
            )
    for train_rows, _, _ in parts:
        if len(np.unique(column.values[train_rows])) < 2:
            raise DataError(f"column {column.name!r} never varies among the training images", fix="another column")
    if len(np.unique(column.values[np.concatenate([test for *_, test in parts])])) < 2:
        raise DataError(f"column {column.name!r} never varies among the scored images", fix="another column or split")
    return parts


def _folds(group: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Fold of every entry, groups whole: in random order, each group into the smallest fold."""
    names, unit = np.unique(group, return_inverse=True)
    sizes, total = np.bincount(unit), np.zeros(count)
    fold = np.zeros(len(names), int)
    for u in np.random.default_rng(seed).permutation(len(names)):
        fold[u] = int(total.argmin())
        total[fold[u]] += sizes[u]
    return fold[unit]


def _fitted(
    x: np.ndarray,
    column: Column,
    values: np.ndarray,
    parts: Sequence[Any],
    settings: Settings,
    tolerance: float = 1e-6,
) -> tuple[np.ndarray, list[float], list[tuple[float, float]]]:
    """Predictions of all scored rows in the order of `parts`, penalties chosen, and the first curve of choice."""
    refit, said, chosen, curve = bool(settings.folds), [], [], []
    for train, val, test in parts:
        if column.kind == "number":
            y = values.reshape(len(values), -1)
            predicted, penalty, errors = ridge(
                x[train], y[train], x[val], y[val], x[test], settings.penalties, refit=refit
            )
            said.append(predicted if values.ndim > 1 else predicted[:, 0])
            chosen.append(float(penalty[0]))
            spread = max(float(np.var(y[val, 0])), 1e-12)
            line = [(p, 1 - float(e) / spread) for p, e in zip(settings.penalties, errors[:, 0], strict=True)]
        else:
            from vitkit.evaluate import linear

            probe = linear.fit(
                x[train],
                values[train],
                x[val],
                values[val],
                n_classes=len(column.classes),
                settings=linear.Settings(refit=refit, tolerance=tolerance),
            )
            said.append(probe.scores(x[test]))
            chosen.append(probe.chosen)
            line = probe.curve
        curve = curve or line
    return np.concatenate(said), chosen, curve if len(parts) == 1 else []


def _chance(
    x: np.ndarray,
    column: Column,
    parts: Sequence[Any],
    group: np.ndarray,
    settings: Settings,
    scored: np.ndarray,
    order: np.ndarray,
    main: Callable,
    on_shuffle: Callable[[int, int], None] | None,
) -> np.ndarray:
    """The main metric on the true values, after learning from shuffled ones: (permutations,)."""
    if not settings.permutations:
        return np.zeros(0)
    rng, truth = np.random.default_rng(settings.seed + 1), column.values[scored]
    learnt = np.unique(np.concatenate([np.concatenate([train, val]) for train, val, _ in parts]))
    shuffles = []
    for _ in range(settings.permutations):
        values = column.values.copy()
        values[learnt] = shuffled(values[learnt], group[learnt], rng)
        shuffles.append(values)
    if column.kind == "number":  # all in one decomposition
        said = _fitted(x, column, np.stack(shuffles, 1), parts, settings)[0][order]
        return np.array([main(truth, said[:, i]) for i in range(settings.permutations)])
    out = []
    with _one_thread():
        for i, values in enumerate(shuffles):
            out.append(main(truth, _fitted(x, column, values, parts, settings, SHUFFLED)[0][order]))
            if on_shuffle is not None:
                on_shuffle(i + 1, settings.permutations)
    return np.array(out)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hundreds of small fits: threads would wait for each other longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shuffled(values: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values exchanged between groups: each gets those of another one, as many as it has images (drawn again where that
    one has fewer), so that images of a patient stay as alike as they were."""
    _, unit = np.unique(group, return_inverse=True)
    members = [np.flatnonzero(unit == u) for u in range(unit.max() + 1)]
    out = values.copy()
    for mine, donor in zip(members, rng.permutation(len(members)), strict=True):
        theirs = rng.permutation(members[donor])
        more = rng.choice(theirs, max(0, len(mine) - len(theirs)))
        out[mine] = values[np.concatenate([theirs, more])[: len(mine)]]
    return out


def _auc() -> Callable:
    from vitkit.evaluate import metrics

    return metrics.mean_auc


def _intervals(column: Column, truth: np.ndarray, said: np.ndarray, group: np.ndarray) -> dict[str, Any]:
    from vitkit.evaluate import metrics, statistics

    if column.kind == "number":
        wanted: dict[str, Callable] = {"r2": r2, "mae": mae, "correlation": correlation}
    else:
        wanted = {
            "mean_auc": metrics.mean_auc,
            "accuracy": metrics.accuracy,
            "balanced_accuracy": metrics.balanced_accuracy,
        }
    return {name: statistics.bootstrap(metric, truth, said, groups=group, seed=0) for name, metric in wanted.items()}


def _baseline(column: Column, learnt: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """What is reached without a look at the images."""
    if column.kind == "number":
        middle, mean = np.full(len(truth), np.median(learnt)), np.full(len(truth), learnt.mean())
        return {"r2": r2(truth, mean), "mae": mae(truth, middle)}
    largest = np.bincount(learnt).argmax()
    return {
        "mean_auc": 0.5,
        "accuracy": float((truth == largest).mean()),
        "balanced_accuracy": 1 / len(np.unique(truth)),
    }


def _edges(chosen: Sequence[float], settings: Settings, column: Column) -> str:
    if column.kind != "number" or len(settings.penalties) < 2:
        return ""
    low, high = min(settings.penalties), max(settings.penalties)
    if all(p == high for p in chosen):
        return EDGE.format("largest") + ": the features say little about it"
    return EDGE.format("smallest") if all(p == low for p in chosen) else ""
