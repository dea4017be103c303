"""Drawing cases again: what an interval is, and how it comes from redrawn metrics. `vitkit.evaluate.statistics` explains why.

One draw is a count per case, so a metric that can be written with case weights (`metrics.WEIGHTED`) gets hundreds of
draws from one pass over arrays instead of a Python loop over resampled copies; any other callable is looped over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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


def case_mean(y: Any, values: np.ndarray) -> float:
    """A "metric" for one number per case (a hit, an error in millimetres): its mean. `y` is not looked at."""
    return float(np.asarray(values, dtype=float).mean())


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Plan:
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
    def of(cls, cases: int, groups: np.ndarray | None, strata: np.ndarray | None) -> Plan:
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


def evaluate(metric: Callable, arrays: tuple, weights: np.ndarray) -> np.ndarray:
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


def interval_of(metric: Callable | None, value: float, draws: np.ndarray, plan: Plan, level: float) -> Interval:
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


def shrink(tail: float, units: int, layers: int) -> float:
    """Inverse of `_expand`."""
    from scipy import special

    free = units - layers
    return float(special.stdtr(free, special.ndtri(tail) / math.sqrt(units / free)))
