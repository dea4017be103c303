"""What a set of scores is worth, for one label per image ("single") and for several ("multi").

Every metric takes `(y, scores)`:

* single: `y` (N,) integers, -1 = unlabelled and left out; `scores` (N, C), or predicted classes (N,) where those do;
* multi: `y` (N, C) of 0, 1 and NaN = unknown and left out; `scores` (N, C).

A metric that has nothing to measure (no labelled case, no class with both values) is NaN, not 0: a report shows it as
missing. (`auc_each` alone gives 0, by protocol.) Each is one column of a weighted form, `WEIGHTED[metric](y, scores,
weights)` with `weights` (N, B), which gives all B bootstrap draws of `vitkit.evaluate.statistics` at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vitkit.errors import ConfigError, DataError

_MAIN = {"single": "accuracy", "multi": "mean_auc"}
# Functions of this module by which an epoch may be picked: higher is better. The first is the task's own choice.
NAMES = {
    "single": ("accuracy", "balanced_accuracy", "macro_f1", "mean_auc", "quadratic_kappa", "cohen_kappa"),
    "multi": ("mean_auc", "mean_average_precision", "macro_f1"),
}
_EPS = np.finfo(np.float64).eps  # a probability of exactly 0 costs 36 nats rather than infinity


def main_metric(task: str) -> str:
    """Name of the metric that model selection uses and reports show first; also the function's name in this module."""
    if task not in _MAIN:
        raise ConfigError(f"task {task!r} has no metrics here", fix=f"use one of {sorted(_MAIN)}")
    return _MAIN[task]


def summary(task: str, y: np.ndarray, scores: np.ndarray, *, also: str | None = None) -> dict[str, float]:
    """Every scalar metric of the task, the main one first. `scores` (N, C) are probabilities. `also`: one of `NAMES` that
    is not among them by itself (quadratic kappa is for ordered classes only)."""
    main_metric(task)
    chosen: tuple[Callable[[np.ndarray, np.ndarray], float], ...]
    if task == "single":
        chosen = (accuracy, balanced_accuracy, macro_f1, mean_auc, log_loss, calibration_error)
    else:
        chosen = (mean_auc, mean_average_precision, macro_f1, log_loss, calibration_error)
    found = {metric.__name__: metric(y, scores) for metric in chosen}
    if also is not None and also not in found:
        found[also] = globals()[also](y, scores)
    return found


# ---------------------------------------------------------------- one label per image


def accuracy(y: np.ndarray, scores: np.ndarray) -> float:
    """Share of labelled cases whose highest score is the true class (the first of equal scores counts)."""
    return _plain(_accuracy, y, scores)


def balanced_accuracy(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean recall over the classes that occur in `y`: every class counts the same, however rare."""
    return _plain(_balanced_accuracy, y, scores)


def macro_f1(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean F1 over classes that occur in `y` or among the predictions; multi-label predictions are `scores >= 0.5`."""
    return _plain(_macro_f1, y, scores)


def quadratic_kappa(y: np.ndarray, scores: np.ndarray) -> float:
    """Agreement beyond chance for ordered classes (grades): a mistake costs the square of its distance in grades.

    (O - E) / (1 - E) with agreement 1 - (i - j)^2 / (C - 1)^2 weighted by the confusion matrix (O) and by the product of
    its margins (E); 1 = perfect, 0 = chance. NaN when chance already agrees fully. C is the number of scores, or, given
    predictions, the highest class that occurs; the value does not depend on it.
    """
    return _plain(_quadratic_kappa, y, scores)


def cohen_kappa(y: np.ndarray, scores: np.ndarray) -> float:
    """Agreement beyond chance where every mistake costs the same (Cohen's kappa): for classes without an order."""
    return _plain(_cohen_kappa, y, scores)


def confusion(y: np.ndarray, scores: np.ndarray, n_classes: int | None = None) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted. Give `n_classes` when `scores` are predictions (N,)."""
    truth, predicted, classes = _single(y, scores)
    n = classes if n_classes is None else n_classes
    if classes > n:
        raise DataError(
            f"class {classes - 1} occurs but n_classes is {n}", fix="pass the number of classes of the data set"
        )
    known = truth >= 0
    return np.bincount(truth[known] * n + predicted[known], minlength=n * n).reshape(n, n)


# ---------------------------------------------------------------- masks


def dice(y: np.ndarray, predicted: np.ndarray, *, least: int = 0) -> float:
    """Mean over images of 2 TP / (2 TP + FP + FN) of the foreground: every class but 0. Masks (N, H, W) of class numbers;
    pixels where `y` is 255 are left out. An image without foreground scores 1 when none is predicted.

    least: count at least so many true positives (1 in NKUhealong/DVPT's Evaluator).
    """
    hit, false, missed = _foreground(y, predicted, least)
    return float(np.mean(_or_one(2 * hit, 2 * hit + false + missed))) if len(hit) else float("nan")


def iou(y: np.ndarray, predicted: np.ndarray, *, least: int = 0) -> float:
    """Mean over images of TP / (TP + FP + FN), otherwise as `dice`."""
    hit, false, missed = _foreground(y, predicted, least)
    return float(np.mean(_or_one(hit, hit + false + missed))) if len(hit) else float("nan")


def _foreground(y: np.ndarray, predicted: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each image (N,): rightly, wrongly, and not found."""
    y, predicted = np.asarray(y), np.asarray(predicted)
    if y.shape != predicted.shape or y.ndim < 2:
        raise DataError(
            f"masks {y.shape} and predictions {predicted.shape} do not fit together",
            fix="class numbers (N, H, W) for both; take argmax over the classes first",
        )
    known, truth, said = y != 255, y != 0, predicted != 0
    axes = tuple(range(1, y.ndim))
    hit = (truth & said & known).sum(axes)
    return np.maximum(hit, least), (~truth & said & known).sum(axes), (truth & ~said & known).sum(axes)


def _or_one(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.ones(len(top)), where=bottom > 0)


# ---------------------------------------------------------------- ranking


def auc_each(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class (C,): P(positive scores above negative), ties half; single-label is
    one-vs-rest.

    A class whose known labels are all equal gets 0; it says nothing and `mean_auc` leaves it out (protocol of
    `medical_mae`).
    """
    return np.nan_to_num(_plain(_auc_each, y, scores), nan=0.0)


def mean_auc(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean of `auc_each` over the classes with both label values; NaN when there is none."""
    return _plain(_mean_auc, y, scores)


def average_precision_each(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Average precision of each class (C,): sum over thresholds of recall gained x precision; NaN without positives."""
    labels, scores = _columns(y, scores)
    out = np.full(labels.shape[1], np.nan)
    for c in range(labels.shape[1]):
        known = ~np.isnan(labels[:, c])
        order = np.argsort(-scores[known, c], kind="stable")
        positive, score = labels[known, c][order] == 1, scores[known, c][order]
        if not positive.any():
            continue
        last = np.flatnonzero(np.append(np.diff(score) != 0, True))  # equal scores share one threshold
        hits = np.cumsum(positive)[last]
        out[c] = np.sum(np.diff(hits, prepend=0) * hits / (last + 1)) / hits[-1]
    return out


def mean_average_precision(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean of `average_precision_each` over the classes with a positive; NaN when there is none."""
    return float(_nanmean(average_precision_each(y, scores)))


# ---------------------------------------------------------------- probabilities


def log_loss(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean negative log-probability, in nats, of the true class (single) or of every known label (multi)."""
    return _plain(_log_loss, y, scores)


def calibration_error(y: np.ndarray, scores: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - frequency| over equally wide bins, weighted by how many cases
    fall in each.

    Single-label: confidence of the predicted class (Guo et al. 2017, arXiv 1706.04599). Multi-label: the positive
    probability against the frequency of positives, per class, then the mean over classes with a known label.
    """
    _probabilities(y, scores)
    if np.ndim(y) == 1:
        truth, predicted, _ = _single(y, scores)
        known = truth >= 0
        return _calibration(np.max(scores, axis=1)[known], (predicted == truth)[known], bins)
    labels, scores = _columns(y, scores)
    each = [_calibration(s[~np.isnan(t)], t[~np.isnan(t)], bins) for t, s in zip(labels.T, scores.T, strict=True)]
    return float(_nanmean(np.array(each)))


def _calibration(confidence: np.ndarray, hit: np.ndarray, bins: int) -> float:
    if len(confidence) == 0:
        return float("nan")
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bins are (low, high]
    gap = np.bincount(place, confidence, bins) - np.bincount(place, hit.astype(float), bins)
    return float(np.abs(gap).sum() / len(confidence))


# ---------------------------------------------------------------- weighted forms: weights (N, B) -> (B,) or (C, B)


def _accuracy(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    truth, predicted, _ = _single(y, scores)
    return _ratio(
        weights[(truth >= 0) & (truth == predicted)].sum(0, dtype=float), weights[truth >= 0].sum(0, dtype=float)
    )


def _balanced_accuracy(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    right, true, _ = _counts(y, scores, weights)
    return _nanmean(_ratio(right, true))


def _macro_f1(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    right, true, predicted = _counts(y, scores, weights)
    return _nanmean(_ratio(2 * right, true + predicted))


def _quadratic_kappa(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _kappa(y, scores, weights, lambda i, j: (i - j) ** 2)


def _cohen_kappa(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _kappa(y, scores, weights, lambda i, j: i != j)


def _kappa(y: np.ndarray, scores: np.ndarray, weights: np.ndarray, cost: Callable) -> np.ndarray:
    """1 - cost of the confusions / their cost if truth and prediction were independent; the cost's scale cancels."""
    truth, predicted, classes = _single(y, scores)
    rows = np.flatnonzero(truth >= 0)
    grade = np.arange(classes)
    costs = cost(grade[:, None], grade).astype(float)
    table = _sum_rows(weights.astype(float), rows, truth[rows] * classes + predicted[rows], classes**2)
    table = table.reshape(classes, classes, -1)  # (true, predicted, B)
    found = np.einsum("ij,ijb->b", costs, table)
    chance = np.einsum("ij,ib,jb->b", costs, table.sum(1), table.sum(0))
    return 1 - _ratio(found * table.sum((0, 1)), chance)


def _auc_each(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    labels, scores = _columns(y, scores)
    return np.stack([_auc(labels[:, c], scores[:, c], weights) for c in range(labels.shape[1])])


def _mean_auc(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _nanmean(_auc_each(y, scores, weights))


def _log_loss(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    _probabilities(y, scores)
    scores = np.asarray(scores, dtype=float)
    if np.ndim(y) == 1:
        truth, _, _ = _single(y, scores)
        known = truth >= 0
        cost, count = -np.log(np.maximum(scores[known, truth[known]], _EPS)), known[known].astype(float)
    else:
        labels, scores = _columns(y, scores)
        given = np.where(labels == 1, scores, 1 - scores)
        cost = np.where(np.isnan(labels), 0.0, -np.log(np.maximum(given, _EPS))).sum(1)
        known, count = np.ones(len(labels), bool), (~np.isnan(labels)).sum(1).astype(float)
    return _ratio(cost @ weights[known], count @ weights[known])


WEIGHTED: dict[Callable, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    accuracy: _accuracy,
    balanced_accuracy: _balanced_accuracy,
    quadratic_kappa: _quadratic_kappa,
    cohen_kappa: _cohen_kappa,
    macro_f1: _macro_f1,
    auc_each: _auc_each,
    mean_auc: _mean_auc,
    log_loss: _log_loss,
}


def _plain(weighted: Callable, y: np.ndarray, scores: np.ndarray):
    value = weighted(y, scores, np.ones((len(y), 1)))[..., 0]
    return float(value) if value.ndim == 0 else value


def _auc(label: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted Mann-Whitney statistic for every column of `weights` (N, B), without sorting or looping over the
    columns.

    The L distinct scores of the rarer side cut the other side into 2 L + 1 stretches (below, equal, between, ...);
    only the stretches' total weights are accumulated.
    """
    positive, negative = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    if len(positive) > len(negative):
        positive, negative, score = negative, positive, -score
    if len(positive) == 0:
        return np.full(weights.shape[1], np.nan)
    level, place = np.unique(score[positive], return_inverse=True)
    other = score[negative]
    stretch = np.searchsorted(level, other, side="left") + np.searchsorted(level, other, side="right")
    mine = _sum_rows(weights, positive, place, len(level))  # (L, B)
    below = np.cumsum(_sum_rows(weights, negative, stretch, 2 * len(level) + 1), axis=0)  # (2 L + 1, B)
    area = (mine * (below[:-1:2] + below[1::2])).sum(0, dtype=float) / 2
    return _ratio(area, mine.sum(0, dtype=float) * below[-1].astype(float))


def _counts(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted counts per class, each (C, B): predicted rightly, truly there, predicted."""
    if np.ndim(y) == 2:
        labels, scores = _columns(y, scores)
        known, true, said = ~np.isnan(labels), labels == 1, scores >= 0.5
        return tuple(m.T.astype(weights.dtype) @ weights for m in (true & said & known, true & known, said & known))
    truth, predicted, classes = _single(y, scores)
    known = truth >= 0
    truth, predicted, weights = truth[known], predicted[known], weights[known]
    right = truth == predicted
    every = np.arange(len(truth))
    return (
        _sum_rows(weights, every[right], truth[right], classes),
        _sum_rows(weights, every, truth, classes),
        _sum_rows(weights, every, predicted, classes),
    )


def _sum_rows(weights: np.ndarray, rows: np.ndarray, into: np.ndarray, size: int) -> np.ndarray:
    """Add `weights[rows]` up by destination: (size, B). A sparse product is several times faster than ufuncs here."""
    from scipy import sparse

    ones = np.ones(len(rows), dtype=weights.dtype)
    return sparse.csr_array((ones, (into.reshape(-1), rows)), shape=(size, len(weights))) @ weights


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """`top / bottom` with NaN where there is nothing below the line."""
    return np.divide(top, bottom, out=np.full(np.shape(bottom), np.nan), where=np.asarray(bottom) > 0)


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without the NaNs, and NaN (no warning) where nothing is left."""
    return _ratio(np.nansum(values, axis=0), np.sum(~np.isnan(values), axis=0).astype(float))


# ---------------------------------------------------------------- what came in


def _single(y: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """-> true classes, predicted classes, number of classes; `scores` may already be predicted classes."""
    y, scores = np.asarray(y), np.asarray(scores)
    if y.ndim != 1 or len(y) != len(scores) or scores.ndim > 2:
        raise DataError(
            f"labels {y.shape} and scores {scores.shape} do not fit together",
            fix="one label per image is labels (N,) with scores (N, C) or predicted classes (N,)",
        )
    truth = y.astype(np.int64)
    if scores.ndim == 1:
        predicted = scores.astype(np.int64)
        return truth, predicted, int(max(truth.max(initial=-1), predicted.max(initial=-1))) + 1
    _finite(scores)
    if truth.max(initial=-1) >= scores.shape[1]:
        raise DataError(
            f"label {truth.max()} has no column among {scores.shape[1]} scores", fix="give one score per class"
        )
    return truth, scores.argmax(1), scores.shape[1]


def _columns(y: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> labels (N, C) of 0, 1, NaN and scores (N, C); single labels become one-vs-rest columns."""
    y, scores = np.asarray(y), np.asarray(scores, dtype=float)
    if y.ndim == 1 and scores.ndim == 2:
        truth, _, classes = _single(y, scores)
        labels = (truth[:, None] == np.arange(classes)).astype(float)
        labels[truth < 0] = np.nan
        return labels, scores
    if y.shape != scores.shape or y.ndim != 2:
        raise DataError(
            f"labels {y.shape} and scores {scores.shape} do not fit together",
            fix="several labels per image are labels (N, C) with scores (N, C)",
        )
    _finite(scores)
    labels = y.astype(float)
    if not np.isin(labels[~np.isnan(labels)], (0.0, 1.0)).all():
        raise DataError(
            "several labels per image must be 0, 1 or NaN (unknown)", fix="map uncertain labels to one of these"
        )
    return labels, scores


def _finite(scores: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(scores).all(1))
    if len(bad):
        raise DataError(
            f"scores of {len(bad)} cases are not finite (first: case {bad[0]})", fix="find out why the model gave NaN"
        )


def _probabilities(y: np.ndarray, scores: np.ndarray) -> None:
    scores = np.asarray(scores)
    single = np.ndim(y) == 1
    inside = scores.size == 0 or (scores.min() >= -1e-6 and scores.max() <= 1 + 1e-6)
    if scores.ndim != 2 or not inside or (single and not np.allclose(scores.sum(1), 1, atol=1e-3)):
        raise DataError(
            "these scores are not probabilities"
            + (" that sum to one over the classes" if single else " between 0 and 1"),
            fix="apply softmax (one label per image) or sigmoid (several) to logits first",
        )
