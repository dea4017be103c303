"""How sure a number is: intervals over cases, patients or seeds, and paired comparison of two models.

The interval is the *expanded percentile* bootstrap (Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
arXiv 1411.5279): quantiles of the redrawn metric, taken a little further out so that few independent units do not give
too narrow an interval, as a Student quantile does for a mean. BCa was not chosen: it needs a jackknife over all
cases, and its bias and skewness corrections are themselves noisy for the coarse metrics (accuracy, AUC of a rare
class) reported here.

One draw is a count per case, so a metric that can be written with case weights (`metrics.WEIGHTED`) gets hundreds of
draws from one pass over arrays instead of a Python loop over resampled copies; any other callable is looped over.

Two models on the same cases: `paired_bootstrap` gives the interval of their difference; `mcnemar` (accuracy, exact),
`delong` (AUC) and `permutation` (any metric, patients whole) are tests that hold where few cases decide and a bootstrap
is too sure of itself. Many pairs: `compare_all` with `holm` or `benjamini_hochberg`. Many data sets: `combine` here and
`vitkit.evaluate.ranking`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from vitkit.errors import DataError
from vitkit.evaluate import metrics

_BLOCK = 1 << 22  # weights held at once: 16 MB in float32


@dataclass(frozen=True)
class Interval:
    """`value` with the interval [`low`, `high`] at confidence `level` from `n` independent units (cases, groups or
    seeds).

    Where no honest interval exists, `low` and `high` are NaN and `note` says why.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    note: str = ""

    def __str__(self) -> str:
        shown = f"{self.value:.3f}" if math.isnan(self.low) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{shown} ({self.note})" if self.note else shown


@dataclass(frozen=True)
class Difference(Interval):
    """metric(a) - metric(b) on the same cases; `p` is two-sided: the level at which the interval just touches zero."""

    p: float = float("nan")
    a: float = float("nan")
    b: float = float("nan")

    def __str__(self) -> str:
        return f"{super().__str__()}, p = {self.p:.3g}"


@dataclass(frozen=True)
class PairedTest:
    """Two-sided `p` of no difference between two models, from `n` cases or groups; `statistic` as the test says."""

    p: float
    statistic: float
    n: int
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """Models `a` and `b` of `compare_all`, their difference, and its p-value corrected for the number of pairs."""

    a: str
    b: str
    difference: Difference
    corrected: float


def case_mean(y: Any, values: np.ndarray) -> float:
    """A "metric" for one number per case (a hit, an error in millimetres): its mean. `y` is not looked at."""
    return float(np.asarray(values, dtype=float).mean())


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
    plan = _Plan.of(len(arrays[0]), groups, strata)
    draws = np.concatenate([_evaluate(metric, arrays, w) for w in plan.draws(n, seed)], axis=-1)
    if value.ndim == 0:
        return _interval(metric, float(value), draws, plan, level)
    return [_interval(metric, float(v), d, plan, level) for v, d in zip(value, draws, strict=True)]


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
    plan = _Plan.of(len(y), groups, strata)
    draws = np.concatenate([_evaluate(metric, (y, a), w) - _evaluate(metric, (y, b), w) for w in plan.draws(n, seed)])
    interval = _interval(None, first - second, draws, plan, level)
    kept = draws[~np.isnan(draws)]
    if math.isnan(interval.low):
        p = 1.0 if len(kept) and not kept.any() else float("nan")
    else:
        tail = min((kept <= 0).sum(), (kept >= 0).sum())
        p = 2 * _shrink((tail + 1) / (len(kept) + 1), plan.units, plan.layers)
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


# ---------------------------------------------------------------- tests of two models on the same cases


def mcnemar(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> PairedTest:
    """Exact McNemar test of two accuracies: of the cases that only one model gets right, is it one model's too often?

    `a` and `b` are scores (N, C) or predicted classes (N,); y = -1 is left out. `statistic` is how many more cases only
    `a` gets right, `n` how many cases decide. Cases must be independent; use `permutation` for several of a patient.
    """
    from scipy import special

    first, second = _right(y, a), _right(y, b)
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_a + only_b
    p = 1.0 if n == 0 else min(1.0, 2 * float(special.bdtr(min(only_a, only_b), n, 0.5)))
    return PairedTest(p, float(only_a - only_b), n, "both are right on the same cases" if n == 0 else "")


def permutation(
    metric: Callable,
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    n: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Were the models alike, exchanging their answers to any case would change nothing: how rarely do random exchanges
    give a difference as large as the one found?

    groups: (N,) names of what is independent; the answers to a whole patient are exchanged. Means over cases
    (`metrics.accuracy`, `case_mean`) take all 2^N exchanges where `n` allows; other metrics are called 2 `n` times.
    """
    plan = _Plan.of(len(y), groups, None)
    if metric in (metrics.accuracy, case_mean):
        first, second = (_right(y, s) if metric is metrics.accuracy else np.asarray(s, dtype=float) for s in (a, b))
        counted = np.asarray(y) >= 0 if metric is metrics.accuracy else np.ones(len(first), bool)
        gap = np.where(counted, first.astype(float) - second, 0.0) / max(int(counted.sum()), 1)
        return _sign_flips(np.bincount(plan.unit, weights=gap, minlength=plan.units), n, seed)
    found = float(metric(y, a)) - float(metric(y, b))
    if math.isnan(found):
        return PairedTest(math.nan, found, plan.units, "undefined on these cases")
    a, b, rng, beyond = np.asarray(a), np.asarray(b), np.random.default_rng(seed), 0
    for _ in range(n):
        swap = (rng.random(plan.units) < 0.5)[plan.unit].reshape(-1, *[1] * (a.ndim - 1))
        one, other = np.where(swap, b, a), np.where(swap, a, b)
        beyond += abs(float(metric(y, one)) - float(metric(y, other))) >= abs(found) * (1 - 1e-9)
    return PairedTest((beyond + 1) / (n + 1), found, plan.units)


def delong(
    y: np.ndarray, a: np.ndarray, b: np.ndarray, *, groups: np.ndarray | None = None, level: float = 0.95
) -> Difference:
    """AUC(a) - AUC(b) of a binary label with its normal interval (DeLong, DeLong & Clarke-Pearson 1988).

    y: (N,) of 0 and 1; -1 and NaN are left out. Scores (N,), (N, 1), or (N, 2) whose last column counts. With `groups`
    the variance is that of clustered data (Obuchowski 1997): cases of one patient may resemble each other.
    """
    from scipy import special

    y = np.asarray(y, dtype=float).reshape(-1)
    first, second = (_one_column(s, len(y)) for s in (a, b))
    known = y >= 0  # False for NaN too
    unit = _Plan.of(len(y), groups, None).unit[known]
    positive = y[known] == 1
    if positive.all() or not positive.any():
        raise DataError("an AUC needs both classes, and these cases have one", fix="score more cases")
    auc_a, up_a, down_a = _placements(first[known], positive)
    auc_b, up_b, down_b = _placements(second[known], positive)
    gap, n = auc_a - auc_b, len(np.unique(unit))
    variance = _auc_variance(up_a - up_b - gap, down_a - down_b - gap, unit[positive], unit[~positive])
    error = math.sqrt(max(variance, 0.0))
    if not error > 1e-12:
        note = "one independent unit of a class" if math.isnan(error) else "both rank the cases alike"
        note = f"no interval: {note}"
        return Difference(gap, math.nan, math.nan, n, level, note, 1.0 if gap == 0 else math.nan, auc_a, auc_b)
    half, p = float(special.ndtri(0.5 + level / 2)) * error, 2 * float(special.ndtr(-abs(gap) / error))
    return Difference(gap, gap - half, gap + half, n, level, "", p, auc_a, auc_b)


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


def _right(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which cases are right (N,); unlabelled ones are not."""
    y, scores = np.asarray(y), np.asarray(scores)
    if y.ndim != 1 or len(scores) != len(y):
        raise DataError(
            f"answers of shape {scores.shape} for labels of shape {y.shape}", fix="give one class number per case"
        )
    return ((scores.argmax(1) if scores.ndim == 2 else scores) == y) & (y >= 0)


def _sign_flips(gap: np.ndarray, n: int, seed: int) -> PairedTest:
    """Test of a sum of differences (U,) whose signs are exchangeable."""
    found, live = float(gap.sum()), gap[gap != 0]
    if not len(live):
        return PairedTest(1.0, found, len(gap), "no case differs")
    edge = abs(found) - 1e-12 * np.abs(live).sum()
    if 2 ** len(live) <= n:
        signs = 1 - 2 * ((np.arange(2 ** len(live))[:, None] >> np.arange(len(live))) & 1)
        return PairedTest(float((np.abs(signs @ live) >= edge).mean()), found, len(gap), "all exchanges")
    rng, beyond, block = np.random.default_rng(seed), 0, max(1, _BLOCK // len(live))
    for start in range(0, n, block):
        signs = rng.integers(0, 2, size=(min(block, n - start), len(live)), dtype=np.int8) * 2.0 - 1
        beyond += int((np.abs(signs @ live) >= edge).sum())
    return PairedTest((beyond + 1) / (n + 1), found, len(gap))


def _one_column(scores: np.ndarray, cases: int) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    column = scores[:, -1] if scores.ndim == 2 and scores.shape[1] <= 2 else scores
    if column.shape != (cases,):
        raise DataError(
            f"scores of shape {scores.shape} for {cases} cases of a binary label",
            fix="give the score of the positive class",
        )
    return column


def _placements(scores: np.ndarray, positive: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUC, the share of negatives below each positive (P,), and the share of positives above each negative (Q,)."""
    from scipy import stats

    every = stats.rankdata(scores)
    up, down = scores[positive], scores[~positive]
    above = (every[positive] - stats.rankdata(up)) / len(down)
    below = 1 - (every[~positive] - stats.rankdata(down)) / len(up)
    return float(above.mean()), above, below


def _auc_variance(up: np.ndarray, down: np.ndarray, up_unit: np.ndarray, down_unit: np.ndarray) -> float:
    """Variance of an AUC (or of a difference) from centred placements, summed over each unit."""
    size = max(up_unit.max(), down_unit.max()) + 1
    ups, downs = np.bincount(up_unit, up, minlength=size), np.bincount(down_unit, down, minlength=size)
    with_up, with_down, units = (len(np.unique(u)) for u in (up_unit, down_unit, np.concatenate([up_unit, down_unit])))
    if min(with_up, with_down) < 2:
        return math.nan
    own = (ups**2).sum() * with_up / (with_up - 1) / len(up) ** 2
    other = (downs**2).sum() * with_down / (with_down - 1) / len(down) ** 2
    shared = 2 * (ups * downs).sum() * units / (units - 1) / (len(up) * len(down))
    return float(own + other + shared)


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Plan:
    """What is drawn: `unit` (N,) maps cases to units, `pools` lists each stratum's units."""

    unit: np.ndarray
    pools: list[np.ndarray]

    @property
    def units(self) -> int:
        return sum(map(len, self.pools))

    @property
    def layers(self) -> int:
        return len(self.pools)

    @classmethod
    def of(cls, cases: int, groups: np.ndarray | None, strata: np.ndarray | None) -> _Plan:
        for name, given in (("groups", groups), ("strata", strata)):
            if given is not None and len(given) != cases:
                raise DataError(f"{name} has {len(given)} entries for {cases} cases", fix="give one entry per case")
        if cases == 0:
            raise DataError("no cases to bootstrap", fix="check that the split is not empty")
        unit = np.arange(cases) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
        if strata is None:
            return cls(unit, [np.arange(unit.max() + 1)])
        names, layer = np.unique(np.asarray(strata), return_inverse=True)
        layer = layer.reshape(-1)
        first = np.zeros(unit.max() + 1, dtype=np.int64)
        first[unit] = layer
        split = np.flatnonzero(first[unit] != layer)
        if len(split):
            group = np.asarray(groups)[split[0]].item()
            raise DataError(f"group {group!r} lies in several strata", fix="leave strata out, or groups")
        return cls(unit, [np.flatnonzero(first == s) for s in range(len(names))])

    def draws(self, n: int, seed: int) -> Iterator[np.ndarray]:
        """Blocks of case weights (N, block), float32, `n` columns in all. Only N decides the block size."""
        rng = np.random.default_rng(seed)
        block = max(1, min(n, _BLOCK // len(self.unit)))
        for start in range(0, n, block):
            width = min(block, n - start)
            counts = np.zeros((self.units, width), dtype=np.float32)
            for pool in self.pools:
                drawn = rng.integers(0, len(pool), size=(width, len(pool)))
                drawn += np.arange(width)[:, None] * len(pool)
                counts[pool] = np.bincount(drawn.reshape(-1), minlength=width * len(pool)).reshape(width, len(pool)).T
            yield counts[self.unit]


def _evaluate(metric: Callable, arrays: tuple, weights: np.ndarray) -> np.ndarray:
    """The metric in every draw: (B,) or (entries, B)."""
    if metric in metrics.WEIGHTED and len(arrays) == 2:
        return metrics.WEIGHTED[metric](*arrays, weights)
    if metric is case_mean:
        return np.asarray(arrays[-1], dtype=float) @ weights.astype(float) / weights.sum(0)
    arrays = tuple(np.asarray(a) for a in arrays)
    cases = np.arange(len(weights))
    values = []
    for draw in weights.T.astype(np.int64):
        rows = np.repeat(cases, draw)
        values.append(np.asarray(metric(*(a[rows] for a in arrays)), dtype=float))
    return np.stack(values, axis=-1)


# ---------------------------------------------------------------- from draws to an interval


def _interval(metric: Callable | None, value: float, draws: np.ndarray, plan: _Plan, level: float) -> Interval:
    kept = draws[~np.isnan(draws)]
    nothing = (float("nan"), float("nan"), plan.units, level)
    if math.isnan(value):
        return Interval(value, *nothing, "undefined on these cases")
    if plan.units - plan.layers < 1:
        return Interval(value, *nothing, "one independent unit: no interval")
    if len(kept) < len(draws) / 2:
        return Interval(value, *nothing, f"no interval: undefined in {len(draws) - len(kept)} of {len(draws)} draws")
    if np.ptp(kept) <= 1e-12 * max(1.0, abs(value)):
        if metric is metrics.accuracy and value in (0.0, 1.0):
            return _all_or_none(value, plan.units, level)
        return Interval(value, *nothing, "no interval: the same in every draw")
    tail = _expand((1 - level) / 2, plan.units, plan.layers)
    low, high = np.quantile(kept, (tail, 1 - tail))
    return Interval(value, float(low), float(high), plan.units, level)


def _all_or_none(value: float, units: int, level: float) -> Interval:
    """Clopper-Pearson for 0 or all of `units` right: the bound is (alpha / 2)^(1 / units) away from the other end."""
    reach = ((1 - level) / 2) ** (1 / units)
    low, high = (reach, 1.0) if value == 1.0 else (0.0, 1 - reach)
    return Interval(value, low, high, units, level, f"exact binomial: all {units} {'right' if value else 'wrong'}")


def _expand(tail: float, units: int, layers: int) -> float:
    """The further-out tail probability that makes a percentile interval as wide as a Student interval for a mean."""
    from scipy import special

    free = units - layers
    return float(special.ndtr(special.stdtrit(free, tail) * math.sqrt(units / free)))


def _shrink(tail: float, units: int, layers: int) -> float:
    """Inverse of `_expand`."""
    from scipy import special

    free = units - layers
    return float(special.stdtr(free, special.ndtri(tail) / math.sqrt(units / free)))
