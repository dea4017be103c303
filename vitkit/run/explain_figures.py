"""What the figures of `vitkit explain` mean: means over pictures with intervals, and verdicts in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitkit.run.explain_maps import KINDS, Shown

FEWEST = 5  # pictures from which an interval is given


def summarise(shown: list[Shown], kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Means over the pictures with intervals: how far each kind of map is ahead of random ones, what randomising leaves."""
    from vitkit.evaluate import statistics

    found: dict[str, dict[str, Any]] = {}
    for kind in [*kinds, *(name for name in shown[0].scores if name not in kinds)]:
        rows = [one.scores[kind] for one in shown if kind in one.scores]
        entry: dict[str, Any] = {}
        for key in ("insertion", "deletion", "correlation_top", "correlation_all"):
            values = np.array([row[key] for row in rows if key in row], float)
            if values.size and not np.isnan(values).all():
                entry[key] = float(np.nanmean(values))
        if "insertion" in entry:
            entry["gap"] = entry["insertion"] - entry["deletion"]
        if "insertion" in entry and kind != "random":
            ahead = np.array([_gap(one.scores[kind]) - _gap(one.scores["random"]) for one in shown])
            interval: Any = statistics.bootstrap(np.mean, ahead) if len(ahead) >= FEWEST else None
            entry["ahead"] = float(ahead.mean())
            if interval is not None:
                entry["ahead_low"], entry["ahead_high"] = interval.low, interval.high
        found[kind] = entry
    return found


def _gap(scores: dict[str, float]) -> float:
    return scores["insertion"] - scores["deletion"]


def verdict_of(entry: Mapping[str, Any]) -> str:
    """What a kind's figures mean, in words."""
    if "ahead" not in entry:
        return "not scored: the model has no classes" if "correlation_all" in entry else "not scored"
    low, high = entry.get("ahead_low", math.nan), entry.get("ahead_high", math.nan)
    if math.isnan(low):
        return f"{'ahead of' if entry['ahead'] > 0 else 'not ahead of'} random maps, on too few pictures to tell"
    if low > 0:
        words = "more faithful than random"
    else:
        words = "less faithful than random" if high < 0 else "not shown to be more faithful than random"
    if entry.get("correlation_all", 0) > 0.5:
        words += ", and hardly changed by random weights: it shows the image more than the model"
    elif entry.get("correlation_top", 0) > 0.9:
        words += "; blind to the head and the last block"
    return words


def headline(summary: dict[str, dict[str, Any]], count: int) -> str:
    """The verdict of the page in one sentence."""
    scored = {kind: entry for kind, entry in summary.items() if "ahead" in entry}
    pictures = f"{count} image{'s' if count > 1 else ''}"
    if not scored:
        return f"Maps of {pictures}, without figures of how faithful they are."
    best = max((kind for kind in scored if kind in KINDS), key=lambda kind: scored[kind]["ahead"])
    entry = scored[best]
    figures = (
        f"insertion minus deletion {number(entry['gap'])}, random maps {number(summary['random']['gap'])}, {pictures}"
    )
    if (entry.get("ahead_low") or 0) > 0:
        return f"{KINDS[best]} is the most faithful here ({figures}): {verdict_of(entry)}."
    return f"No map is shown to be more faithful than a random one; the closest is {KINDS[best]} ({figures})."


def number(value: float) -> str:
    """Two decimals; what rounds to zero has no sign."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text
