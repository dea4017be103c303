"""B minus A in one measure on the same images, with the rule that decides whether it counts.

A difference counts when its 95 % interval excludes 0 *and* an exact test agrees, since a bootstrap is too sure of itself
where a handful of images decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from vitkit.evaluate.statistics import Difference

LEVEL = 0.05
DRAWS = 5000


@dataclass
class Gain:
    """B minus A in one measure on the same images. `p` is the larger of the bootstrap's and of the exact test's."""

    measure: str
    metric: str
    difference: Difference
    test: str
    exact: float

    @property
    def p(self) -> float:
        known = [p for p in (self.difference.p, self.exact) if not math.isnan(p)]
        return max(known, default=math.nan)

    @property
    def proven(self) -> bool:
        """Whether chance is an unlikely explanation."""
        return self.p < LEVEL and not self.difference.low <= 0 <= self.difference.high

    def row(self) -> dict[str, Any]:
        """Plain values for files and callers."""
        d = self.difference
        found = {"measure": self.measure, "metric": self.metric, "a": d.a, "b": d.b, "gain": d.value, "low": d.low}
        found |= {"high": d.high, "p": self.p, "p_bootstrap": d.p, "p_exact": self.exact, "test": self.test}
        found |= {"independent": d.n, "note": d.note}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}


def gain(measure: str, y: np.ndarray, a: np.ndarray, b: np.ndarray, task: str, groups: np.ndarray | None) -> Gain:
    """B minus A in the task's main metric, from the scores of both; groups are drawn and exchanged whole."""
    from vitkit.evaluate import metrics, statistics

    name = metrics.main_metric(task)
    metric = getattr(metrics, name)
    difference = _named(statistics.paired_bootstrap(metric, y, b, a, groups=groups, n=DRAWS))
    if task == "single" and groups is None:
        return Gain(measure, name, difference, "McNemar", statistics.mcnemar(y, b, a).p)
    draws = 10_000 if task == "single" else 1000
    exact = statistics.permutation(metric, y, b, a, groups=groups, n=draws).p
    return Gain(measure, name, difference, "permutation", exact)


def gain_of_auc(
    measure: str, y: np.ndarray, a: np.ndarray, b: np.ndarray, task: str, groups: np.ndarray | None
) -> Gain | None:
    """B minus A in the AUC of a binary label by DeLong's test; None where the label has more values."""
    from vitkit.evaluate import statistics

    if a.shape[1] != (2 if task == "single" else 1):
        return None
    area = _named(statistics.delong(y if task == "single" else y[:, 0], b, a, groups=groups))
    return Gain(measure, "auc", area, "DeLong", area.p)


def gain_of_means(measure: str, metric: str, a: np.ndarray, b: np.ndarray, groups: np.ndarray | None) -> Gain:
    """B minus A in the mean of one number an image."""
    from vitkit.evaluate import statistics

    difference = _named(statistics.paired_bootstrap(statistics.case_mean, a, b, a, groups=groups, n=DRAWS))
    exact = statistics.permutation(statistics.case_mean, a, b, a, groups=groups).p
    return Gain(measure, metric, difference, "permutation", exact)


def _named(difference: Difference) -> Difference:
    """B minus A was asked for, so what came first is B's value."""
    return replace(difference, a=difference.b, b=difference.a)
