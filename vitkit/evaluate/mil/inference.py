"""Slide-level statistics that `vitkit.evaluate.statistics` does not have: the "basic" interval and Fisher's combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vitkit.errors import DataError
from vitkit.evaluate import metrics
from vitkit.evaluate.statistics import Difference, Interval, paired_bootstrap

from .survival import concordance


def slide_metric(y: np.ndarray, scores: np.ndarray) -> tuple[Callable, np.ndarray, np.ndarray]:
    """(metric, y, scores) as `statistics.bootstrap` takes them.

    y: integer labels (N,) give the AUC (macro one-vs-rest for scores (N, C), C > 1), signed times (N,) as floats Harrell's
    C. scores (N,) or (N, 1) are the only column of two classes.
    """
    y, scores = np.asarray(y), np.asarray(scores, dtype=float)
    if np.issubdtype(y.dtype, np.floating):
        return concordance, y.reshape(-1), scores.reshape(-1)
    if scores.ndim == 1 or scores.shape[1] == 1:
        return metrics.mean_auc, y.reshape(-1, 1).astype(float), scores.reshape(-1, 1)
    return metrics.mean_auc, y.reshape(-1), scores


def score(y: np.ndarray, scores: np.ndarray) -> float:
    """AUC or C-index of `scores` (see `slide_metric`); NaN where it is undefined (one class only, no event)."""
    metric, y, scores = slide_metric(y, scores)
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
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Scores of two models on the same slides, paired; whole patients are redrawn when they are given."""
    metric, truth, a_scores = slide_metric(y, a)
    _, _, b_scores = slide_metric(y, b)
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
