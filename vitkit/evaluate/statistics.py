"""How sure a number is: intervals over cases, patients or seeds, and paired comparison of two models.

The interval is the *expanded percentile* bootstrap (Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
arXiv 1411.5279): quantiles of the redrawn metric, taken a little further out so that few independent units do not give
too narrow an interval, as a Student quantile does for a mean. BCa was not chosen: it needs a jackknife over all
cases, and its bias and skewness corrections are themselves noisy for the coarse metrics (accuracy, AUC of a rare
class) reported here.

One draw is a count per case, so a metric that can be written with case weights (`metrics.WEIGHTED`) gets hundreds of
draws from one pass over arrays instead of a Python loop over resampled copies; any other callable is looped over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
