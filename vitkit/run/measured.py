"""The files of an evaluation: results.json, predictions, passport, summary, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from vitkit.run.config import Config
from vitkit.run.environment import environment
from vitkit.run.folder import RunFolder
from vitkit.run.measure import short_name, write_results
from vitkit.run.outcomes import Measured, Outcome, entry, known, labels_of
from vitkit.run.report import Report
from vitkit.settings import SEGMENTING, TRAINED, Task

WORDS = {
    "knn": "k nearest neighbours",
    "linear": "linear probe",
    "mlknn": "ML-kNN",
    "linear_grid": "linear grid (SGD)",
    "few_shot": "few-shot",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "bitfit": "BitFit",
    "adaptformer": "AdaptFormer",
    "dvpt": "DVPT",
    "vpt": "VPT",
    "segment_linear": "linear decoder",
    "segment_unet": "U-Net decoder",
    "segment_light": "light decoder",
    "segment_upernet": "UPerNet",
    "segment_pyramid": "simple feature pyramid",
}
AXES = {"knn": "neighbours k", "mlknn": "neighbours k", "linear": "penalty", "linear_grid": "learning rate"}


def write_evaluation(folder: RunFolder, measured: Measured, config: Config) -> Path:
    """Write everything into `folder`, the summary (which makes the run finished) last; returns the report's path."""
    from vitkit.data.splits import save
    from vitkit.run.results import write_predictions

    task = Task("multi" if measured.images.task == "multi" else "single", tuple(measured.images.classes))
    entries = {outcome.protocol: entry(outcome, measured) for outcome in measured.outcomes}
    for outcome in measured.outcomes:
        if outcome.scores is not None:
            path = folder.path / f"predictions_{outcome.protocol}.csv"
            write_predictions(path, measured.part, outcome.scores, task)
    save(measured.images, folder.path / "splits.csv")
    measured.passport.save(folder.path)
    write_results(folder.path / "results.json", _results(measured, entries, config))
    report = evaluation_report(measured, config).write(folder.path / "report.html")
    folder.finish(_summary(measured, entries))
    return report


def verdict(measured: Measured) -> str:
    """The result in one sentence: every protocol where there are two, else the best, and what it is clearly ahead of."""
    what = {"mean_auc": "Mean AUC", "iou": "Foreground IoU"}.get(measured.main, measured.main.capitalize())
    scored = f"{len(measured.part):,} {measured.split} {measured.unit}, from {measured.trained_on:,} labelled ones"
    ranked = _ranked(measured.outcomes)
    if len(ranked) <= 2:
        return f"{what} on {scored}: {'; '.join(f'{WORDS[one.protocol]} {_value(one)}' for one in measured.outcomes)}."
    best = next(one for one in ranked if one.behind is None and (one.scores is not None or one.tables is not None))
    rivals = [one for one in ranked if one.behind is not None]
    level = [WORDS[one.protocol] for one in rivals if not (known(one.behind.high) and one.behind.high < 0)]
    text = f"Best {what[0].lower()}{what[1:]} on {scored}: {WORDS[best.protocol]} {_value(best)}."
    if level:
        return f"{text} Not clearly behind it: {', '.join(level)}."
    others = "The other is" if len(rivals) == 1 else f"The other {len(rivals)} are"
    return f"{text} {others} behind by more than chance explains."


def evaluation_report(measured: Measured, config: Config) -> Report:
    """Verdict, one table and an ordered chart of all protocols, how each chose, what each costs, details."""
    model = short_name(config.inputs.model)
    trained = any(one.protocol in TRAINED for one in measured.outcomes)
    title = "Protocols" if trained else "Frozen features"
    report = Report(title, f"{model} on {measured.images.name}", kicker="vitkit evaluate")
    report.sentence(verdict(measured))
    pace = "all from the cache" if measured.images_per_second is None else f"{measured.images_per_second:,.0f} images/s"
    facts: list[tuple[str, Any] | tuple[str, Any, str]] = [
        (f"labelled training {measured.unit}", f"{measured.trained_on:,}"),
        (f"{measured.split} {measured.unit}", f"{len(measured.part):,}", _clusters(measured)),
    ]
    if measured.feature_dim:
        facts.append(("feature", f"{measured.feature_dim:,} values", pace))
    report.facts(facts)
    report.section("Results")
    for text in measured.cautions:
        report.sentence(f"Caution: {text}.")
    _table(report, measured, config)
    _chart(report, measured)
    _few_shot(report, measured)
    if measured.gallery:
        names = [WORDS[f"segment_{name}"] for _, name in measured.gallery[0][2:]]
        rows = [[(picture, "") for picture, _ in row] for row in measured.gallery]
        note = "From the worst to the best of the best decoder's scored pictures, evenly spread; classes in colours."
        report.pictures("Truth and predictions", rows, note, columns=["image", "truth", *names])
    report.section("What was chosen")
    _chosen(report, measured)
    _choices(report, measured)
    if measured.images.task == "single":
        report.section("Which classes are confused")
        _confusions(report, measured)
    elif measured.images.task == "multi":
        report.section("Label by label")
        _labels(report, measured)
    else:
        report.section("Class by class")
        _classes(report, measured)
    report.section("How it was measured")
    report.details("Settings", config.values)
    report.details("Model", measured.passport.to_dict())
    report.details("Data", {"read as": measured.images.understood, "fingerprint": measured.images.fingerprint})
    report.details("Environment", environment())
    return report


def _ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda one: -one.interval.value if known(one.interval.value) else np.inf)


def _table(report: Report, measured: Measured, config: Config) -> None:
    """One row a protocol, best first: its figure, how far it is behind, what it costs."""
    outcomes, main = _ranked(measured.outcomes), measured.main
    paired = any(one.behind is not None for one in outcomes)
    columns = ["protocol", _words(main), *(["behind the best"] if paired else [])]
    rows = []
    for one in outcomes:
        behind = [one.behind] if paired else []
        rows.append([WORDS[one.protocol], one.interval, *behind, one.trained, round(one.seconds, 1)])
    drawn = "whole groups" if measured.part.group is not None else measured.unit
    said = [f"Small figures: 95 %, bootstrap over {drawn} of the {measured.split} split, which nothing was chosen on"]
    if any(one.protocol == "few_shot" for one in outcomes):
        said.append("few-shot: the interval is over draws of the labelled images and cannot be set against the others")
    if paired:
        said.append(
            "behind the best: difference on the same cases, clear where its interval is below 0 (which protocol is"
        )
        said[-1] += " best was seen on these cases, which flatters it a little)"
    said += _cost_notes(measured, config)
    note = ". ".join(text[0].upper() + text[1:] for text in said) + "."
    best = {} if outcomes[0].protocol == "few_shot" else {_words(main): "max"}
    report.table("Scores and cost", [*columns, "trained", "seconds"], rows, note, best=best)


def _cost_notes(measured: Measured, config: Config) -> list[str]:
    said = ["trained: parameters that were fitted", "seconds: of fitting and choosing, without the features"]
    if measured.images_per_second is not None and measured.unit == "images":
        total = sum(len(measured.images.part(split)) for split in ("train", "val", "test"))
        said[1] += f", which took {total / measured.images_per_second:,.0f} s once for all"
    if any(one.protocol in TRAINED for one in measured.outcomes):
        said.append(
            f"every trained protocol: {config.own.epochs} epochs of batches of {config.machine.batch_size} on the same images,"
            " at the learning rate of its own recipe unless set; one run each, so its luck of the seed is not in the interval"
        )
    if not config.own.refit and any(one.protocol in ("linear_grid", *SEGMENTING) for one in measured.outcomes):
        said.append("heads are trained on the training split alone (--refit true: on train + validation, as published)")
    return said


def _chart(report: Report, measured: Measured) -> None:
    bars = [(WORDS[one.protocol], one.interval.value, *_ends(one)) for one in _ranked(measured.outcomes)]
    report.bars(f"{_words(measured.main)} with its interval", bars, reference=_chance(measured))


def _few_shot(report: Report, measured: Measured) -> None:
    found = next((one for one in measured.outcomes if one.protocol == "few_shot"), None)
    if found is None:
        return
    lines: dict[str, Any] = {{"linear": "linear probe", "knn": "kNN"}[head]: line for head, line in found.lines.items()}
    full = next((one for one in measured.outcomes if one.protocol == "linear"), None)
    note = f"{found.note[0].upper()}{found.note[1:]}. The same {len(measured.part):,} {measured.split} {measured.unit}."
    if full is not None:
        note += f" All {measured.trained_on:,} labels: {full.interval.value:.3f} (linear probe)."
    report.curves("Few-shot", lines, f"labelled {measured.unit} a class", _words(measured.main), log_x=True, note=note)


def _chosen(report: Report, measured: Measured) -> None:
    """What each protocol chose on what, and the figures beside the main one."""
    outcomes = _ranked(measured.outcomes)
    rows = []
    for one in outcomes:
        notes = "; ".join(filter(None, [one.interval.note, one.note]))
        rows.append([WORDS[one.protocol], one.chosen, one.picked_on, notes])
    report.table("", ["protocol", "chosen", "on", "remarks"], rows)
    shown = [one for one in outcomes if len(one.metrics) > 1]
    if shown:
        others = [name for name in shown[0].metrics if name != measured.main]
        rows = [[WORDS[o.protocol], *(o.intervals.get(name, o.metrics[name]) for name in others)] for o in shown]
        report.table("Other figures", ["protocol", *map(_words, others)], rows)


def _choices(report: Report, measured: Measured) -> None:
    """The curves that hyper-parameters were chosen by."""
    drawn = [one for one in measured.outcomes if len(one.curve) > 1 and one.protocol != "few_shot"]
    for outcome in drawn:
        name = outcome.protocol
        axis = AXES.get(name, "epoch" if name in TRAINED else "learning rate")
        metric = "mean AUC" if name in ("linear_grid", "mlknn") else _words(measured.main)
        report.curves(
            f"{WORDS[name][0].upper()}{WORDS[name][1:]}: {metric} by {axis}",
            outcome.lines or {name: outcome.curve},
            axis,
            "",
            log_x=name not in TRAINED,
            half=len(drawn) > 1,
            note=f"Chosen: {outcome.chosen}, on {outcome.picked_on}.",
        )


def _confusions(report: Report, measured: Measured) -> None:
    """Of both where there are two, else of the best."""
    from vitkit.evaluate import metrics

    scored = [one for one in _ranked(measured.outcomes) if one.scores is not None]
    for outcome in scored if len(scored) <= 2 else scored[:1]:
        matrix = metrics.confusion(labels_of(measured.part), outcome.scores).tolist()
        report.confusion(f"Confusion, {WORDS[outcome.protocol]}", matrix, measured.images.classes)


def _labels(report: Report, measured: Measured) -> None:
    """AUC of each label with its interval, under every protocol."""
    from vitkit.evaluate import metrics, statistics

    y, groups = labels_of(measured.part), measured.part.group
    outcomes = [one for one in _ranked(measured.outcomes) if one.scores is not None]
    each: list[Any] = [statistics.bootstrap(metrics.auc_each, y, o.scores, groups=groups, seed=0) for o in outcomes]
    rows = []
    for c, name in enumerate(measured.images.classes):
        unknown = int(np.isnan(y[:, c]).sum())
        one_sided = np.nanmin(y[:, c], initial=1) == np.nanmax(y[:, c], initial=0) or unknown == len(y)
        cells = [None if one_sided else intervals[c] for intervals in each]
        rows.append([name, int(np.nansum(y[:, c])), len(y) - unknown, *cells])
    columns = ["label", "positives", "known", *(f"AUC, {WORDS[o.protocol]}" for o in outcomes)]
    note = "A label with one value only among these images has no AUC and is left out of the mean."
    report.table("Each label", columns, rows, note)


def _classes(report: Report, measured: Measured) -> None:
    """IoU of each class of the masks, background included."""
    outcomes = _ranked(measured.outcomes)
    each = [one.detail["iou_each"] for one in outcomes]
    names = [*measured.images.classes, *(f"class {c}" for c in range(len(measured.images.classes), len(each[0])))]
    rows = [[name, *(values[c] for values in each)] for c, name in enumerate(names)]
    note = "Pixels of all scored pictures together, at the size the model sees. The first class is not in the mean."
    report.table("IoU of each class", ["class", *(WORDS[one.protocol] for one in outcomes)], rows, note)


def _results(measured: Measured, entries: dict[str, Any], config: Config) -> dict[str, Any]:
    images, passport = measured.images, measured.passport
    more = {
        o.protocol: {"curve": o.curve, **({"lines": o.lines} if o.lines else {}), **o.detail} for o in measured.outcomes
    }
    return {
        "protocols": {name: {**found, **more[name]} for name, found in entries.items()},
        "model": {"ref": config.inputs.model, "arch": passport.arch, "sha256": passport.base.get("sha256")},
        "data": {"name": images.name, "fingerprint": images.fingerprint, "counts": images.counts},
        "scored": measured.unit,
        "trained_on": measured.trained_on,
        "feature_dim": measured.feature_dim,
        "images_per_second": measured.images_per_second,
        "cautions": measured.cautions,
        "environment": environment(),
    }


def _summary(measured: Measured, entries: dict[str, Any]) -> dict[str, Any]:
    """As training runs write theirs, so that evaluations can be compared by the same means."""
    rows = []
    for one in measured.outcomes:
        found = entries[one.protocol]
        for metric, value in one.metrics.items():
            main = SimpleNamespace(low=found["low"], high=found["high"]) if metric == measured.main else None
            limits = main or one.intervals.get(metric)
            low, high = (None, None) if limits is None else (limits.low, limits.high)
            row = {"name": f"{one.protocol} {metric}", "value": value, "low": low, "high": high}
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


def _chance(measured: Measured) -> tuple[str, float] | None:
    if measured.images.task == "multi":
        return ("chance", 0.5)
    if measured.images.task == "mask":
        return None
    counts = np.bincount(labels_of(measured.part))
    return ("always the largest class", float(counts.max() / counts.sum()))


def _clusters(measured: Measured) -> str:
    group = measured.part.group
    return "" if group is None else f"{len(np.unique(group)):,} groups"


def _words(name: str) -> str:
    return (
        name.replace("_", " ").replace("auc", "AUC").replace("f1", "F1").replace("iou", "IoU").replace("dice", "Dice")
    )
