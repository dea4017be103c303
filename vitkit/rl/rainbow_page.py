"""The page of `vitkit rl rainbow`: returns of training episodes, the evaluation beside random play, and the settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np


def write(found: dict[str, Any], settings: Any) -> dict[str, Any]:
    """Write results.json and report.html into the run's folder; `found` with "verdict", "mean", "report"."""
    from vitkit.run.files import atomic_write
    from vitkit.run.page import Report

    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    found["verdict"], found["mean"], found["random mean"] = verdict(found)
    report = Report(
        f"Rainbow on {settings.env}", f"encoder {settings.model}, {'frozen' if settings.frozen else 'trained'}"
    )
    report.sentence(found["verdict"])
    report.facts([("steps", f"{settings.steps:,}"), ("training", f"{found['seconds']:.0f} s")])
    curve = found["returns"]
    if len(curve) > 1:
        series = {"episode": [(float(step), float(score)) for step, score in curve]}
        if len(curve) >= 10:
            scores = np.convolve([score for _, score in curve], np.ones(5) / 5, "valid")
            series["mean of five"] = [(float(curve[i + 4][0]), float(score)) for i, score in enumerate(scores)]
        report.curves(
            "Returns while training", series, "agent step", "return", note="noisy layers explore; rewards unclipped"
        )
    rows = [
        [f"{i + 1}", own, theirs]
        for i, (own, theirs) in enumerate(zip(found["evaluated"], found["random"], strict=True))
    ]
    if rows:
        report.table(
            "Evaluation episodes", ["episode", "agent", "random actions"], rows, "without noise; seeds of their own"
        )
    said = [[name, json.dumps(value)] for name, value in asdict(settings).items()]
    report.table("Settings", ["setting", "value"], said)
    atomic_write(folder / "report.html", report.html())
    found["report"] = str(folder / "report.html")
    atomic_write(folder / "results.json", json.dumps(found, indent=1) + "\n")
    return found


def verdict(found: dict[str, Any]) -> tuple[str, float | None, float | None]:
    """(one sentence, mean return of the agent, of random actions), with two standard errors of the difference."""
    own, other = np.array(found["evaluated"], float), np.array(found["random"], float)
    if len(own) < 2:
        return f"{found['steps']:,} steps; not evaluated (evaluate is {len(own)}).", None, None
    difference = own.mean() - other.mean()
    width = 2.0 * float(np.sqrt(own.var(ddof=1) / len(own) + other.var(ddof=1) / len(other)))
    judged = "better than" if difference > width else "worse than" if difference < -width else "not told apart from"
    words = (
        f"After {found['steps']:,} steps the agent's return is {own.mean():.1f} (mean of {len(own)} episodes), {judged} "
        f"random actions ({other.mean():.1f}; difference {difference:+.1f}, about {difference - width:+.1f} to "
        f"{difference + width:+.1f})."
    )
    return words, float(own.mean()), float(other.mean())
