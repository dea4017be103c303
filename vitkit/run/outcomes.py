"""What an evaluation finds: one `Outcome` a protocol, all of them `Measured`, and how they are judged and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitkit.data.images import Images


@dataclass
class Outcome:
    """One protocol on one split: probabilities `scores` (N, C) where it gives one set, what was chosen on what, and the
    curve it was chosen by.

    trained: parameters that were fitted. behind: value minus that of the best protocol, paired. tables: confusions of
    masks (N, C, C). lines: curves of a chart, where one is not enough. detail: more for results.json.
    """

    protocol: str
    scores: np.ndarray | None
    chosen: str
    picked_on: str
    curve: list[tuple[float, float]]
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    interval: Any = None
    note: str = ""
    trained: int = 0
    behind: Any = None
    tables: np.ndarray | None = None
    lines: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)  # of further metrics
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """Everything that an evaluation found, for its files and its report."""

    images: Images
    part: Images  # the scored images
    split: str
    trained_on: int
    feature_dim: int
    images_per_second: float | None
    cautions: list[str]
    outcomes: list[Outcome]
    passport: Any = None
    unit: str = "images"  # what is scored
    gallery: list[list[tuple[Any, str]]] = field(default_factory=list)  # rows of (picture, caption): masks

    @property
    def main(self) -> str:
        return next(iter(self.outcomes[0].metrics))


def varies(part: Images) -> bool:
    """Whether some label takes two values among these images."""
    y = labels_of(part)
    if y.ndim == 1:
        return len(np.unique(y[y >= 0])) > 1
    return bool(((y == 1).any(0) & (y == 0).any(0)).any())


def judge(outcome: Outcome, part: Images, task: str) -> None:
    """Metrics of an outcome on the scored images, once, and the interval of the main one (patients drawn whole)."""
    from vitkit.evaluate import metrics, statistics

    if outcome.scores is None:  # judged by its protocol
        return
    outcome.metrics = metrics.summary(task, labels_of(part), outcome.scores)
    main = getattr(metrics, metrics.main_metric(task))
    outcome.interval = statistics.bootstrap(main, labels_of(part), outcome.scores, groups=part.group, seed=0)


def entry(outcome: Outcome, measured: Measured) -> dict[str, Any]:
    """An outcome as plain values: the main metric under "value", the others by name."""
    interval = outcome.interval
    found = {"name": measured.main, "value": interval.value, "low": interval.low, "high": interval.high}
    found |= {"n": len(measured.part), "split": measured.split, "chosen": outcome.chosen}
    found |= {"picked_on": outcome.picked_on, "seconds": round(outcome.seconds, 3), "trained": outcome.trained}
    for name, one in outcome.intervals.items():
        found |= {f"{name}_low": one.low, f"{name}_high": one.high}
    if outcome.behind is not None:
        found["behind"] = {"value": outcome.behind.value, "low": outcome.behind.low, "high": outcome.behind.high}
    notes = "; ".join(filter(None, [interval.note, outcome.note]))
    return {**found, **outcome.metrics, **({"note": notes} if notes else {})}


def labels_of(images: Images) -> np.ndarray:
    """The labels of images that `labelled_parts` let through: there are some."""
    assert images.labels is not None
    return images.labels


def known(value: float | None) -> bool:
    """Whether there is a number."""
    return value is not None and not math.isnan(value)


def compare_outcomes(outcomes: Sequence[Outcome], part: Images, task: str) -> None:
    """How far each protocol is behind the best on the same cases: a paired interval, patients drawn whole."""
    from vitkit.evaluate import masks, metrics, statistics

    if task == "mask":
        measure: Any = lambda y, tables: masks.table_iou(tables)  # noqa: E731
        table = {one.protocol: one.tables for one in outcomes if one.tables is not None}
        truth = np.zeros(len(part))
    else:
        measure = getattr(metrics, metrics.main_metric(task))
        table = {one.protocol: one.scores for one in outcomes if one.scores is not None}
        truth = labels_of(part)
    if len(table) < 2:
        return
    ranked = [one for one in outcomes if one.protocol in table]
    best = max(ranked, key=lambda one: -np.inf if np.isnan(one.interval.value) else one.interval.value)
    for one in ranked:
        if one is not best:
            one.behind = statistics.paired_bootstrap(
                measure, truth, table[one.protocol], table[best.protocol], groups=part.group, seed=0
            )
