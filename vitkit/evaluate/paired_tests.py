"""Tests of two models on the same cases that hold where few cases decide: McNemar's (accuracy, exact), exchanged answers
(any metric, patients whole), and DeLong's (AUC)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vitkit.errors import DataError
from vitkit.evaluate import metrics
from vitkit.evaluate.resampling import Difference, Plan, case_mean

_BLOCK = 1 << 22  # signs drawn at once


@dataclass(frozen=True)
class PairedTest:
    """Two-sided `p` of no difference between two models, from `n` cases or groups; `statistic` as the test says."""

    p: float
    statistic: float
    n: int
    note: str = ""


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
    plan = Plan.of(len(y), groups, None)
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
    unit = Plan.of(len(y), groups, None).unit[known]
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
        drawn = rng.integers(0, 2, size=(min(block, n - start), len(live)), dtype=np.int8) * 2.0 - 1
        beyond += int((np.abs(drawn @ live) >= edge).sum())
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
