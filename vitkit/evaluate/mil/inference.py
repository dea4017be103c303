"""Slide-level statistics that `vitkit.evaluate.statistics` does not have: the "basic" interval and Fisher's combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vitkit.errors import DataError
from vitkit.evaluate import metrics
from vitkit.evaluate.statistics import Difference, Interval, paired_bootstrap

from .survival import concordance


def slide_metric(
    y: np.ndarray, scores: np.ndarray, fold: np.ndarray | None = None
) -> tuple[Callable, np.ndarray, np.ndarray]:
    """(metric, y, scores) as `statistics.bootstrap` takes them.

    y: integer labels (N,) give the AUC (macro one-vs-rest for scores (N, C), C > 1), signed times (N,) as floats Harrell's
    C. scores (N,) or (N, 1) are the only column of two classes. fold (N,): scores of different folds come of different
    models and are never compared with each other; the metric is the mean over folds.
    """
    y, scores = np.asarray(y), np.asarray(scores, dtype=float)
    scores = scores.reshape(len(scores), -1)
    survival = np.issubdtype(y.dtype, np.floating)
    if fold is not None:
        metric = concordance_by_fold if survival else auc_by_fold
        return metric, np.stack([y.reshape(-1), np.asarray(fold, dtype=float)], axis=1), scores
    if survival:
        return concordance, y.reshape(-1), scores.reshape(-1)
    if scores.shape[1] == 1:
        return metrics.mean_auc, y.reshape(-1, 1).astype(float), scores
    return metrics.mean_auc, y.reshape(-1), scores


def auc_by_fold(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean over folds of the AUC within each; y (N, 2) are classes and folds. Folds with one class do not count."""
    return float(_auc_by_fold(y, scores, np.ones((len(y), 1), np.float32))[0])


def concordance_by_fold(y: np.ndarray, scores: np.ndarray) -> float:
    """Mean over folds of Harrell's C within each; y (N, 2) are signed times and folds."""
    return float(_concordance_by_fold(y, scores, np.ones((len(y), 1), np.float32))[0])


def _auc_by_fold(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _fold_mean(y, scores, weights, np.int64)


def _concordance_by_fold(y: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _fold_mean(y, scores, weights, np.float64)


def _fold_mean(y: np.ndarray, scores: np.ndarray, weights: np.ndarray, kind: type) -> np.ndarray:
    """Weighted form: weights (N, B) -> (B,)."""
    total, count = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for fold in np.unique(y[:, 1]):
        rows = y[:, 1] == fold
        metric, truth, own = slide_metric(y[rows, 0].astype(kind), scores[rows])
        values = metrics.WEIGHTED[metric](truth, own, weights[rows])
        known = ~np.isnan(values)
        total[known] += values[known]
        count += known
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


metrics.WEIGHTED[auc_by_fold] = _auc_by_fold
metrics.WEIGHTED[concordance_by_fold] = _concordance_by_fold


def score(y: np.ndarray, scores: np.ndarray, fold: np.ndarray | None = None) -> float:
    """AUC or C-index of `scores` (see `slide_metric`); NaN where it is undefined (one class only, no event)."""
    metric, y, scores = slide_metric(y, scores, fold)
    return float(metric(y, scores))


def basic_interval(
    y: np.ndarray,
    scores: np.ndarray,
    *,
    draws: np.ndarray | None = None,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The "basic" bootstrap interval of owkin/HistoSSLscaling, to compare with published numbers: (2 v - q_high, 2 v - q_low)
    from the quantiles of the redrawn metric. `statistics.bootstrap` is the better one for your own.

    draws: (n, N) indices of redrawn slides; drawn with `seed` when not given. Draws with one class are left out and counted
    in the note (the original stops at them).
    """
    metric, y, scores = slide_metric(y, scores)
    count = len(y)
    if draws is None:
        draws = np.random.default_rng(seed).integers(0, count, size=(n, count))
    draws = np.asarray(draws, dtype=np.int64)
    if draws.ndim != 2 or draws.size == 0 or draws.min() < 0 or draws.max() >= count:
        raise DataError(f"draws of shape {draws.shape} for {count} slides", fix="indices (n, N) of redrawn slides")
    flat = (draws + np.arange(len(draws))[:, None] * count).reshape(-1)
    weights = np.bincount(flat, minlength=draws.shape[0] * count).reshape(-1, count).T.astype(np.float32)
    values = metrics.WEIGHTED[metric](y, scores, weights)
    kept = values[~np.isnan(values)]
    value, skipped = float(metric(y, scores)), len(values) - len(kept)
    if np.isnan(value) or not len(kept):
        return Interval(value, float("nan"), float("nan"), count, level, "undefined on these slides")
    low, high = np.quantile(kept, ((1 - level) / 2, (1 + level) / 2))
    note = f"{skipped} of {len(values)} draws left out: undefined" if skipped else ""
    return Interval(value, float(2 * value - high), float(2 * value - low), count, level, note)


def compare_scores(
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    patients: np.ndarray | None = None,
    fold: np.ndarray | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Scores of two models on the same slides, paired; whole patients are redrawn when they are given."""
    metric, truth, a_scores = slide_metric(y, a, fold)
    _, _, b_scores = slide_metric(y, b, fold)
    return paired_bootstrap(metric, truth, a_scores, b_scores, groups=patients, n=n, seed=seed, level=level)


def fisher(differences: Sequence[Difference | float]) -> float:
    """One p-value from independent cohorts' (Fisher 1925: -2 sum ln p against chi-squared with 2 k degrees of freedom).

    Two-sided p-values lose their sign: look whether the cohorts differ in the same direction. Cohorts whose p is undefined
    raise DataError.
    """
    from scipy.stats import combine_pvalues

    p = np.array([d.p if isinstance(d, Difference) else d for d in differences], dtype=float)
    if p.size == 0 or not ((p > 0) & (p <= 1)).all():
        raise DataError(
            f"cannot combine the p-values {p.tolist()}", fix="one p in (0, 1] per cohort; leave out cohorts without one"
        )
    return float(combine_pvalues(p, method="fisher").pvalue)
