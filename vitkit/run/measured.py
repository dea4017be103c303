"""The files of an evaluation: results.json, predictions, passport, summary, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vitkit.passport import Passport
from vitkit.run.config import Config
from vitkit.run.environment import environment
from vitkit.run.folder import RunFolder
from vitkit.run.measure import Measured, Outcome, entry, known, labels_of, short_name, write_results
from vitkit.run.report import Report
from vitkit.settings import Task

WORDS = {"knn": "k nearest neighbours", "linear": "linear probe"}


def write_evaluation(folder: RunFolder, measured: Measured, passport: Passport, config: Config) -> Path:
    """Write everything into `folder`, the summary (which makes the run finished) last; returns the report's path."""
    from vitkit.data.splits import save
    from vitkit.run.results import write_predictions

    task = Task("multi" if measured.images.task == "multi" else "single", tuple(measured.images.classes))
    entries = {outcome.protocol: entry(outcome, measured) for outcome in measured.outcomes}
    for outcome in measured.outcomes:
        write_predictions(folder.path / f"predictions_{outcome.protocol}.csv", measured.part, outcome.scores, task)
    save(measured.images, folder.path / "splits.csv")
    passport.save(folder.path)
    write_results(folder.path / "results.json", _results(measured, entries, passport, config))
    report = evaluation_report(measured, passport, config).write(folder.path / "report.html")
    folder.finish(_summary(measured, entries))
    return report


def verdict(measured: Measured) -> str:
    """The result in one sentence."""
    found = [f"{WORDS[one.protocol]} {_value(one)}" for one in measured.outcomes]
    what = {"mean_auc": "Mean AUC"}.get(measured.main, measured.main.capitalize())
    return (
        f"{what} on {len(measured.part):,} {measured.split} images, from {measured.trained_on:,} labelled ones: "
        f"{'; '.join(found)}."
    )


def evaluation_report(measured: Measured, passport: Passport, config: Config) -> Report:
    """Verdict, table and bars with intervals, how hyper-parameters were chosen, confusion or per-label AUC, details."""
    model = short_name(config.inputs.model)
    report = Report("Frozen features", f"{model} on {measured.images.name}", kicker="vitkit evaluate")
    report.sentence(verdict(measured))
    pace = "all from the cache" if measured.images_per_second is None else f"{measured.images_per_second:,.0f} images/s"
    report.facts(
        [
            ("labelled training images", f"{measured.trained_on:,}"),
            (f"{measured.split} images", f"{len(measured.part):,}", _clusters(measured)),
            ("feature", f"{measured.feature_dim:,} values", pace),
        ]
    )
    report.section("Results")
    for text in measured.cautions:
        report.sentence(f"Caution: {text}.")
    _scores(report, measured)
    _choices(report, measured)
    if measured.images.task == "single":
        _confusions(report, measured)
    else:
        _labels(report, measured)
    report.section("How it was measured")
    report.details("Settings", config.values)
    report.details("Model", passport.to_dict())
    report.details("Data", {"read as": measured.images.understood, "fingerprint": measured.images.fingerprint})
    report.details("Environment", environment())
    return report


def _scores(report: Report, measured: Measured) -> None:
    outcomes, main = measured.outcomes, measured.main
    rows = [[_words(main), *(o.interval for o in outcomes)]]
    rows += [[_words(name), *(o.metrics[name] for o in outcomes)] for name in outcomes[0].metrics if name != main]
    drawn = "whole groups" if measured.part.group is not None else "images"
    notes = [f"Small figures: 95 %, bootstrap over {drawn} of the {measured.split} split, which nothing was chosen on."]
    for outcome in outcomes:
        more = [text for text in (outcome.interval.note, outcome.note) if text]
        notes.append(
            "; ".join([f"{WORDS[outcome.protocol]}: {outcome.chosen}, chosen on {outcome.picked_on}", *more]) + "."
        )
    report.table("Scores", ["figure", *(WORDS[o.protocol] for o in outcomes)], rows, " ".join(notes))
    bars = [(WORDS[o.protocol], o.interval.value, *_ends(o)) for o in outcomes]
    report.bars(f"{_words(main)} with its interval", bars, reference=_chance(measured))


def _choices(report: Report, measured: Measured) -> None:
    """The curves that hyper-parameters were chosen by."""
    axes = {"knn": "neighbours k", "linear": "penalty"}
    drawn = [outcome for outcome in measured.outcomes if len(outcome.curve) > 1]
    for outcome in drawn:
        report.curves(
            f"{WORDS[outcome.protocol].capitalize()}: {_words(measured.main)} by {axes[outcome.protocol]}",
            {outcome.protocol: outcome.curve},
            axes[outcome.protocol],
            "",
            log_x=True,
            half=len(drawn) > 1,
            note=f"Chosen: {outcome.chosen}, on {outcome.picked_on}.",
        )


def _confusions(report: Report, measured: Measured) -> None:
    from vitkit.evaluate import metrics

    classes = measured.images.classes
    for outcome in measured.outcomes:
        matrix = metrics.confusion(labels_of(measured.part), outcome.scores).tolist()
        report.confusion(f"Confusion, {WORDS[outcome.protocol]}", matrix, classes)


def _labels(report: Report, measured: Measured) -> None:
    """AUC of each label with its interval, under every protocol."""
    from vitkit.evaluate import metrics, statistics

    y, groups = labels_of(measured.part), measured.part.group
    each: list[Any] = [
        statistics.bootstrap(metrics.auc_each, y, o.scores, groups=groups, seed=0) for o in measured.outcomes
    ]
    rows = []
    for c, name in enumerate(measured.images.classes):
        unknown = int(np.isnan(y[:, c]).sum())
        one_sided = np.nanmin(y[:, c], initial=1) == np.nanmax(y[:, c], initial=0) or unknown == len(y)
        cells = [None if one_sided else intervals[c] for intervals in each]
        rows.append([name, int(np.nansum(y[:, c])), len(y) - unknown, *cells])
    columns = ["label", "positives", "known", *(f"AUC, {WORDS[o.protocol]}" for o in measured.outcomes)]
    note = "A label with one value only among these images has no AUC and is left out of the mean."
    report.table("Each label", columns, rows, note)


def _results(measured: Measured, entries: dict[str, Any], passport: Passport, config: Config) -> dict[str, Any]:
    images = measured.images
    curves = {outcome.protocol: outcome.curve for outcome in measured.outcomes}
    return {
        "protocols": {name: {**found, "curve": curves[name]} for name, found in entries.items()},
        "model": {"ref": config.inputs.model, "arch": passport.arch, "sha256": passport.base.get("sha256")},
        "data": {"name": images.name, "fingerprint": images.fingerprint, "counts": images.counts},
        "trained_on": measured.trained_on,
        "feature_dim": measured.feature_dim,
        "images_per_second": measured.images_per_second,
        "cautions": measured.cautions,
        "environment": environment(),
    }


def _summary(measured: Measured, entries: dict[str, Any]) -> dict[str, Any]:
    """As training runs write theirs, so that evaluations can be compared by the same means."""
    rows = []
    for name, found in entries.items():
        outcome = next(one for one in measured.outcomes if one.protocol == name)
        for metric, value in outcome.metrics.items():
            ends = (found["low"], found["high"]) if metric == measured.main else (None, None)
            row = {"name": f"{name} {metric}", "value": value, "low": ends[0], "high": ends[1]}
            rows.append({**row, "n": found["n"], "split": measured.split})
    return {
        "verb": "evaluate",
        "task": measured.images.task,
        "verdict": verdict(measured),
        "metrics": rows,
        "seconds": round(sum(outcome.seconds for outcome in measured.outcomes), 3),
    }


def _value(outcome: Outcome) -> str:
    low, high = outcome.interval.low, outcome.interval.high
    ends = f" (95 % {low:.1%} to {high:.1%})" if known(low) else ""
    return f"{outcome.interval.value:.1%}{ends}"


def _ends(outcome: Outcome) -> tuple[float, ...]:
    return (outcome.interval.low, outcome.interval.high) if known(outcome.interval.low) else ()


def _chance(measured: Measured) -> tuple[str, float]:
    if measured.images.task == "multi":
        return ("chance", 0.5)
    counts = np.bincount(labels_of(measured.part))
    return ("always the largest class", float(counts.max() / counts.sum()))


def _clusters(measured: Measured) -> str:
    group = measured.part.group
    return "" if group is None else f"{len(np.unique(group)):,} groups"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("auc", "AUC").replace("f1", "F1")
