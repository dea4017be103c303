"""Which of several models is best over several data sets: average ranks, Friedman's test, Nemenyi's critical difference.

Demsar 2006 (JMLR 7, "Statistical Comparisons of Classifiers over Multiple Data Sets"): on every data set the models get
ranks 1 to K, the Friedman test asks whether the average ranks could be equal, and two models differ when their average
ranks are further apart than the critical difference

    CD = q sqrt(K (K + 1) / (6 N)),

with N data sets and q the studentised range quantile over infinitely many degrees of freedom, divided by sqrt 2. It is
conservative and needs many data sets (10 or more): with few the honest picture is one long bar under all models.
`vitkit.run.ranking_chart.ranking_chart` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitkit.errors import DataError


@dataclass(frozen=True)
class Ranking:
    """Models in order, the best first.

    ranks: average rank of each (1 = best everywhere). wins: data sets on which it is (jointly) best. p: of Friedman's
    test. critical: least difference of two average ranks that counts. p_pairs: (K, K) Nemenyi's p-values, 1 on the
    diagonal. alike: index ranges (first, last) of models that the test cannot tell apart, the longest ones only.
    """

    names: tuple[str, ...]
    ranks: tuple[float, ...]
    wins: tuple[int, ...]
    n: int
    level: float
    statistic: float
    p: float
    critical: float
    p_pairs: np.ndarray
    alike: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        order = ", ".join(f"{name} {rank:.2f}" for name, rank in zip(self.names, self.ranks, strict=True))
        return f"{order} (average rank over {self.n} data sets; Friedman p = {self.p:.3g}; CD {self.critical:.2f})"

    @property
    def verdict(self) -> str:
        """What the ranking shows, in a sentence or two."""
        sets = f"over {self.n} data sets"
        if math.isnan(self.p) or self.p >= 1 - self.level:
            chance = "they all score alike" if math.isnan(self.p) else f"Friedman p = {self.p:.2g}"
            return f"No difference between the {len(self.names)} models could be shown {sets} ({chance})."
        worse = [name for name, p in zip(self.names[1:], self.p_pairs[0, 1:], strict=True) if p < 1 - self.level]
        text = f"{self.names[0]} ranks best {sets} (average rank {self.ranks[0]:.2f}; Friedman p = {self.p:.2g})"
        if not worse:
            return (
                f"{text}, but no single model is shown to be worse than it (critical difference {self.critical:.2f})."
            )
        left = [name for name in self.names[1:] if name not in worse]
        rest = f"; {_and(left)} cannot be told from it" if left else ""
        return f"{text} and is better than {_and(worse)}{rest} (critical difference {self.critical:.2f})."


def rank(scores: Mapping[str, Sequence[float]], *, higher_is_better: bool = True, level: float = 0.95) -> Ranking:
    """Rank models by their scores: {model: one score a data set, all in the same order of data sets}.

    A score is one number for each *independent* data set; seeds or folds of one data set are averaged first, otherwise
    chance passes for evidence. Equal scores share their ranks. Raises DataError on fewer than three models (use
    `statistics.paired_bootstrap` and `statistics.combine` for two), fewer than two data sets, or a missing score.
    """
    from scipy import stats

    names = list(scores)
    lengths = {name: len(scores[name]) for name in names}
    if len(names) < 3:
        raise DataError(
            f"{len(names)} models to rank",
            fix="rank three or more; for two use statistics.paired_bootstrap and statistics.combine",
        )
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"models have different numbers of scores: {lengths}", fix="score every model on every data set"
        )
    values = np.array([scores[name] for name in names], dtype=float).T  # (N, K)
    n, k = values.shape if values.ndim == 2 else (0, 0)
    if n < 2:
        raise DataError(f"{n} data sets to rank models over", fix="at least 2; 10 or more to show anything")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(f"{names[column]} has no score on data set {row}", fix="leave that data set or that model out")
    table = stats.rankdata(-values if higher_is_better else values, axis=1)
    mean = table.mean(0)
    order = np.lexsort((np.arange(k), mean))
    tied = bool((np.ptp(table, axis=1) == 0).all())
    statistic, p = (math.nan, math.nan) if tied else map(float, stats.friedmanchisquare(*table.T))
    error = math.sqrt(k * (k + 1) / (6 * n))
    gaps = np.abs(mean[order][:, None] - mean[order][None]) / error * math.sqrt(2)
    pairs = np.where(np.eye(k, dtype=bool), 1.0, stats.studentized_range.sf(gaps, k, np.inf))
    critical = float(stats.studentized_range.ppf(level, k, np.inf)) / math.sqrt(2) * error
    wins = (table == table.min(1, keepdims=True)).sum(0)
    return Ranking(
        tuple(names[i] for i in order),
        tuple(float(mean[i]) for i in order),
        tuple(int(wins[i]) for i in order),
        n,
        level,
        statistic,
        p,
        critical,
        pairs,
        _alike(mean[order], critical),
    )


def _alike(ranks: np.ndarray, critical: float) -> tuple[tuple[int, int], ...]:
    """Ranges of at least two neighbouring models within the critical difference, none inside another."""
    found: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = int(np.flatnonzero(ranks - ranks[first] <= critical)[-1])
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return tuple(found)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
