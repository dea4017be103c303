"""How sure a number is: intervals over cases, patients or seeds, and paired comparison of two models.

The interval is the *expanded percentile* bootstrap (Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
arXiv 1411.5279): quantiles of the redrawn metric, taken a little further out so that few independent units do not give
too narrow an interval, as a Student quantile does for a mean. BCa was not chosen: it needs a jackknife over all
cases, and its bias and skewness corrections are themselves noisy for the coarse metrics (accuracy, AUC of a rare
class) reported here.

Two models on the same cases: `paired_bootstrap` gives the interval of their difference; `mcnemar` (accuracy, exact),
`delong` (AUC) and `permutation` (any metric, patients whole) are tests that hold where few cases decide and a bootstrap
is too sure of itself. Many pairs: `compare_all` with `holm` or `benjamini_hochberg`. Many data sets: `combine` here and
`vitkit.evaluate.ranking`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from vitkit.errors import DataError
from vitkit.evaluate.paired_tests import PairedTest, delong, mcnemar, permutation
from vitkit.evaluate.resampling import Difference, Interval, Plan, case_mean, evaluate, interval_of, shrink

__all__ = [
    "Difference",
    "Interval",
    "Pair",
    "PairedTest",
    "benjamini_hochberg",
    "bootstrap",
    "case_mean",
    "combine",
    "compare_all",
    "delong",
    "holm",
    "mcnemar",
    "mean_interval",
    "paired_bootstrap",
    "permutation",
]


@dataclass(frozen=True)
class Pair:
    """Models `a` and `b` of `compare_all`, their difference, and its p-value corrected for the number of pairs."""

    a: str
    b: str
    difference: Difference
    corrected: float


def bootstrap(
    metric: Callable,
    *arrays: np.ndarray,
    groups: np.ndarray | None = None,
    strata: np.ndarray | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | list[Interval]:
    """Interval of `metric(*arrays)` over redrawn cases; a metric that returns a vector gives one Interval per entry.

    groups: (N,) names of what is independent (patients, slides); whole groups are drawn. strata: (N,) labels whose
    counts each draw keeps (`strata=y` keeps every class as frequent as it is). Draws in which the metric is undefined
    (one class only) are left out; when more than half are, there is no interval. Accuracy that is the same in every
    draw (all right or all wrong) gets the exact binomial interval. The order in which arrays hold the cases does not
    change what is estimated.
    """
    value = np.asarray(metric(*arrays), dtype=float)
    plan = Plan.of(len(arrays[0]), groups, strata)
    draws = np.concatenate([evaluate(metric, arrays, w) for w in plan.draws(n, seed)], axis=-1)
    if value.ndim == 0:
        return interval_of(metric, float(value), draws, plan, level)
    return [interval_of(metric, float(v), d, plan, level) for v, d in zip(value, draws, strict=True)]


def paired_bootstrap(
    metric: Callable,
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    strata: np.ndarray | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Is model `a` better than `b` on the same cases? Every draw scores both, so what is hard for both cancels.

    The p-value inverts the interval: p < 1 - level exactly when zero lies outside (up to the resolution 2 / n).
    """
    first, second = float(metric(y, a)), float(metric(y, b))
    plan = Plan.of(len(y), groups, strata)
    draws = np.concatenate([evaluate(metric, (y, a), w) - evaluate(metric, (y, b), w) for w in plan.draws(n, seed)])
    interval = interval_of(None, first - second, draws, plan, level)
    kept = draws[~np.isnan(draws)]
    if math.isnan(interval.low):
        p = 1.0 if len(kept) and not kept.any() else float("nan")
    else:
        tail = min((kept <= 0).sum(), (kept >= 0).sum())
        p = 2 * shrink((tail + 1) / (len(kept) + 1), plan.units, plan.layers)
    return Difference(
        first - second, interval.low, interval.high, plan.units, level, interval.note, min(p, 1.0), first, second
    )


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval for the mean over all seeds. One seed has no interval."""
    from scipy import special

    seeds = np.asarray(values, dtype=float)
    if seeds.ndim != 1 or len(seeds) == 0 or not np.isfinite(seeds).all():
        raise DataError(
            f"cannot average {seeds.tolist()}", fix="give one finite value per seed; repeat the seeds that failed"
        )
    mean, n = float(seeds.mean()), len(seeds)
    if n == 1:
        return Interval(mean, float("nan"), float("nan"), 1, level, "one seed: no interval")
    half = float(special.stdtrit(n - 1, 0.5 + level / 2) * seeds.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n, level)


# ---------------------------------------------------------------- many pairs, many data sets


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values for which "below 0.05" wrongly accuses anybody in at most 5 % of studies (Holm 1979). NaN stays NaN."""
    return _corrected(p, lambda v: np.maximum.accumulate(np.minimum(v * np.arange(len(v), 0, -1), 1.0)))


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """p-values for which at most 5 % of those "below 0.05" are wrong on average (Benjamini & Hochberg 1995)."""
    from scipy import stats

    return _corrected(p, stats.false_discovery_control)


def compare_all(
    metric: Callable,
    y: np.ndarray,
    models: Mapping[str, np.ndarray],
    *,
    correction: Literal["holm", "benjamini_hochberg"] = "holm",
    **bootstrapped: Any,
) -> list[Pair]:
    """Every pair of `models` (name -> scores of the same cases) by `paired_bootstrap`, p-values corrected together."""
    if len(models) < 2:
        raise DataError(f"{len(models)} models to compare", fix="give the scores of at least two")
    if correction not in ("holm", "benjamini_hochberg"):
        raise DataError(f"there is no correction {correction!r}", fix="holm or benjamini_hochberg")
    pairs = list(combinations(models, 2))
    found = [paired_bootstrap(metric, y, models[a], models[b], **bootstrapped) for a, b in pairs]
    fixed = (holm if correction == "holm" else benjamini_hochberg)([one.p for one in found])
    return [Pair(a, b, one, float(p)) for (a, b), one, p in zip(pairs, found, fixed, strict=True)]


def combine(
    p: Sequence[float],
    *,
    signs: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    method: Literal["stouffer", "fisher"] = "stouffer",
) -> float:
    """One p-value from those of independent data sets.

    signs: of the differences, for two-sided `p`: data sets that disagree then speak against each other (without them
    every small p counts as evidence, whatever its direction). weights: for "stouffer", e.g. roots of case counts.
    """
    from scipy import stats

    given = np.asarray(p, dtype=float)
    if len(given) == 0 or not ((given >= 0) & (given <= 1)).all():
        raise DataError(f"cannot combine p-values {given.tolist()}", fix="give one in [0, 1] a data set")
    given = np.clip(given, 1e-300, 1.0)
    if signs is None:
        return float(stats.combine_pvalues(given, method=method, weights=weights).pvalue)
    sign = np.asarray(signs, dtype=float)
    sides = [np.where(way * sign > 0, given / 2, 1 - given / 2) for way in (1, -1)]
    both = [stats.combine_pvalues(one, method=method, weights=weights).pvalue for one in sides]
    return float(min(1.0, 2 * min(both)))


def _corrected(p: Sequence[float], rule: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`rule` on the known p-values in ascending order, back in the given order."""
    given = np.asarray(p, dtype=float)
    if ((given < 0) | (given > 1)).any():
        raise DataError(f"p-values {given.tolist()} are not all in [0, 1]", fix="give probabilities, NaN where unknown")
    order = np.argsort(given, kind="stable")[: int((~np.isnan(given)).sum())]
    out = np.full(len(given), np.nan)
    if len(order):
        out[order] = rule(given[order])
    return out
