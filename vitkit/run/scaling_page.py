"""The files of a scaling study: scaling.html with curves and tables, results.json, results.csv."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vitkit.run.config import Config
from vitkit.run.environment import environment
from vitkit.run.files import atomic_write
from vitkit.run.measure import write_results
from vitkit.run.report import Report
from vitkit.run.scaling_cells import Cell, Study
from vitkit.run.scaling_chart import cost_chart
from vitkit.run.scaling_found import (
    Findings,
    Step,
    Trend,
    metric_words,
    p_words,
    place_words,
    points,
    span,
    tally,
)

COLUMNS = ["model", "size", "labels", "protocol", "metric", "value", "low", "high", "n", "chosen", "trained_on"]
COSTS = ["parameters", "tokens", "flops", "images_per_second", "batch", "memory"]
WORDS = {"linear": "linear probe", "knn": "kNN"}
_SIGN = {"helps": "helps", "hurts": "HURTS", "not shown": "not shown"}


def write(folder: Path, study: Study, found: Findings, config: Config) -> dict[str, Any]:
    """Write the three files; the figures as plain values."""
    rows = _rows(study)
    page = folder / "scaling.html"
    content: dict[str, Any] = {
        "verdict": " ".join(found.sentences),
        "report": str(page),
        "results": str(folder / "results.json"),
        "csv": str(folder / "results.csv"),
        "metric": study.metric,
        "decided_by": study.protocols[0],
        "split": study.split,
        "images": len(study.scored),
        "sizes": study.sizes,
        "models": [one.facts() for one in study.backbones],
        "cells": rows,
        "missing": [{"model": m, "size": s, "why": why} for (m, s), why in study.missing.items()],
        "trends": [_trend(one) for one in found.trends],
        "steps": [_step(one) for one in found.steps],
        "best": _cell(found.best),
        "enough": _cell(found.enough),
        "front": [list(place) for place in sorted(found.front)],
        "notes": study.notes,
        "data": {"name": study.images.name, "fingerprint": study.images.fingerprint, "counts": study.images.counts},
    }
    write_results(folder / "results.json", {**content, "settings": dict(config.values), "environment": environment()})
    import pandas as pd

    frame = pd.DataFrame(rows, columns=[*COLUMNS, *COSTS, "why"])
    atomic_write(folder / "results.csv", frame.to_csv(index=False))
    _page(study, found, config).write(page)
    return content


def _rows(study: Study) -> list[dict[str, Any]]:
    """One row a cell, empty cells with their reason."""
    out = []
    for one in study.backbones:
        for size in study.sizes:
            for fraction in study.fractions:
                for protocol in study.protocols:
                    row: dict[str, Any] = {"model": one.name, "size": size, "labels": fraction, "protocol": protocol}
                    row["metric"] = study.metric
                    cell = study.cells.get((one.name, size, fraction, protocol))
                    if cell is None:
                        row["why"] = study.missing.get((one.name, size), "")
                    else:
                        i = cell.interval
                        ends = (None, None) if math.isnan(i.low) else (i.low, i.high)
                        row |= {"value": i.value, "low": ends[0], "high": ends[1], "n": i.n, "chosen": cell.chosen}
                        row |= {"trained_on": cell.trained_on, **asdict(study.costs[one.name, size])}
                    out.append(row)
    return out


def _trend(one: Trend) -> dict[str, Any]:
    d = one.difference
    found = {"of": one.family, "from": one.small, "to": one.large, "pairs": one.over, "gain": d.value, "low": d.low}
    return {**found, "high": d.high, "p": d.p, "corrected": one.corrected, "verdict": one.verdict}


def _step(one: Step) -> dict[str, Any]:
    d = one.difference
    found = {"of": one.family, "from": list(one.a), "to": list(one.b), "gain": d.value, "low": d.low, "high": d.high}
    return {**found, "p": d.p, "corrected": one.corrected, "next": one.next, "verdict": one.verdict}


def _cell(one: Cell | None) -> dict[str, Any] | None:
    return None if one is None else {"model": one.model, "size": one.size, "value": one.value}


# ---------------------------------------------------------------- the page


def _page(study: Study, found: Findings, config: Config) -> Report:
    count = f"{len(study.backbones)} backbone{'s' if len(study.backbones) > 1 else ''}"
    sizes = f"{len(study.sizes)} input size{'s' if len(study.sizes) > 1 else ''}"
    report = Report("Scaling", f"{count} x {sizes} on {study.images.name}", kicker="vitkit scaling")
    report.sentence(" ".join(found.sentences))
    report.facts(_facts(study, found))
    report.section("Quality")
    what, how = metric_words(study), WORDS.get(study.protocols[0], study.protocols[0])
    drawn = "whole groups" if study.scored.group is not None else "images"
    band = f"Bands: 95 %, bootstrap over {drawn} of the {len(study.scored):,} {study.split} images."
    report.curves(
        f"{what[0].upper()}{what[1:]} by input size, {how}",
        _by_size(study, study.protocols[0]),
        "input size, px",
        f"{what}, %",
        note=f"{band} Bands of lines may overlap where their paired difference is shown: see the differences below.",
    )
    _against_cost(report, study, found)
    for protocol in study.protocols[1:]:
        name = WORDS.get(protocol, protocol)
        report.curves(
            f"By {name}", _by_size(study, protocol), "input size, px", f"{what}, %", half=len(study.protocols) > 2
        )
    if len(study.fractions) > 1:
        _by_labels(report, study)
    report.section("Cells")
    _cells(report, study, found)
    _differences(report, study, found)
    report.section("How it was measured")
    for text in _how(study):
        report.sentence(text)
    for text in study.notes:
        report.sentence(f"Note: {text}.")
    report.details("Models", {one.name: one.facts() for one in study.backbones})
    report.details("Settings", dict(config.values))
    report.details("Environment", environment())
    return report


def _facts(study: Study, found: Findings) -> list[tuple[str, str, str]]:
    names = {"size": "larger input", "backbone": "larger backbone", "labels": "more labels"}
    out = []
    for one in found.trends:
        p = span(one.difference, one.corrected)
        out.append((names[one.family], f"{points(one.difference.value)} points", f"{one.small} to {one.large}; {p}"))
    for title, cell in (("best", found.best), ("cheapest not shown worse", found.enough)):
        if cell is not None:
            out.append((title, f"{100 * cell.value:.1f} %", place_words((cell.model, cell.size))))
    return out[:5]


def _by_size(study: Study, protocol: str) -> dict[str, list[tuple[float, ...]]]:
    cells, lines = study.main(protocol=protocol), {}
    for one in study.backbones:
        here = [(size, cells.get((one.name, size))) for size in study.sizes]
        lines[one.name] = [_point(size, cell) for size, cell in here if cell is not None]
    return lines


def _point(x: float, cell: Cell) -> tuple[float, ...]:
    """(x, score, low, high) in percent."""
    i = cell.interval
    ends = () if math.isnan(i.low) else (100 * i.low, 100 * i.high)
    return (x, 100 * i.value, *ends)


def _against_cost(report: Report, study: Study, found: Findings) -> None:
    cells, lines = study.main(), {}
    for one in study.backbones:
        here = []
        for size in study.sizes:
            if (one.name, size) in cells:
                cell, cost = cells[one.name, size], study.costs[one.name, size]
                hover = f"{place_words((one.name, size))}: {100 * cell.value:.1f} %, {_giga(cost.flops)} GFLOPs"
                i = cell.interval
                front = (one.name, size) in found.front
                here.append((cost.flops / 1e9, 100 * i.value, 100 * i.low, 100 * i.high, hover, front))
        lines[one.name] = here
    title = f"{metric_words(study)[0].upper()}{metric_words(study)[1:]} against cost"
    chart = cost_chart(lines, title=title, x="GFLOPs of one image (logarithmic)", y=metric_words(study) + ", %")
    note = (
        "Ringed: the Pareto front, cells that no cheaper one reaches; the dashed line is the best score that a cost buys. It "
        "is drawn from these scores as they are: neighbours on it may not differ by more than chance."
    )
    report._add(title, chart, note)


def _by_labels(report: Report, study: Study) -> None:
    """Score by the number of labels at the largest size that every backbone has."""
    having = [s for s in study.sizes if all((one.name, s) in study.costs for one in study.backbones)]
    size = max(having or study.sizes)
    lines = {}
    for one in study.backbones:
        here = [study.main(f).get((one.name, size)) for f in study.fractions]
        lines[one.name] = [_point(cell.trained_on, cell) for cell in here if cell is not None]
    note = "Smaller shares are contained in larger ones; the validation images stay the same."
    report.curves(f"By training labels at {size} px", lines, "labelled training images", f"{metric_words(study)}, %",
                  log_x=True, note=note)  # fmt: skip


def _cells(report: Report, study: Study, found: Findings) -> None:
    """Every cell of every protocol, then what each backbone costs at each size."""
    many, rows = len(study.fractions) > 1, []
    for one in study.backbones:
        for size in study.sizes:
            for fraction in study.fractions:
                cells = [study.cells.get((one.name, size, fraction, p)) for p in study.protocols]
                scores = [None if cell is None else _scaled(cell.interval) for cell in cells]
                cost = study.costs.get((one.name, size))
                giga = None if cost is None else round(cost.flops / 1e9, 2)
                front = (one.name, size) in found.front and fraction == max(study.fractions)
                mark = "front" if front else ""
                rows.append([one.name, size, *([f"{fraction:.0%}"] if many else []), *scores, giga, mark])
    heads = [f"{WORDS.get(p, p)}, %" for p in study.protocols]
    columns = ["backbone", "px", *(["labels"] if many else []), *heads, "GFLOPs", ""]
    note = "Small figures: 95 %. GFLOPs of one image, a multiply and an add counted as two. Front: no cheaper cell is as good."
    report.table("Quality", columns, rows, note, best=dict.fromkeys(heads, "max"))
    for (model, size), why in study.missing.items():
        report.sentence(f"Empty: {model} at {size} px: {why}.")
    each = [
        [name, size, c.parameters / 1e6, c.tokens, c.flops / 1e9, c.images_per_second, round(c.memory / 2**20)]
        for (name, size), c in sorted(study.costs.items(), key=lambda item: item[1].flops)
    ]
    batch = next(iter(study.costs.values())).batch
    note = (
        f"images/s and memory (weights, and what a pass holds at most): forward passes of {batch} images on this machine, in "
        "float32, reading of files not included."
    )
    columns = ["backbone", "px", "million parameters", "tokens", "GFLOPs", "images/s", "memory, MiB"]
    report.table("Cost", columns, each, note)


def _scaled(interval: Any) -> Any:
    ends = (None, None) if math.isnan(interval.low) else (100 * interval.low, 100 * interval.high)
    return SimpleNamespace(value=100 * interval.value, low=ends[0], high=ends[1])


def _differences(report: Report, study: Study, found: Findings) -> None:
    """Where scaling helps and where it fails: steps to the next, then every other pair folded away."""
    for family, title in (
        ("size", "Larger input, same backbone"),
        ("backbone", "Backbone against backbone, same input"),
    ):
        steps = found.of(family)
        if not steps:
            continue
        rows: list[list[Any]] = []
        for one in sorted(steps, key=lambda step: not step.next):
            d, ratio = one.difference, study.costs[one.b].flops / study.costs[one.a].flops
            ends = (None, None) if math.isnan(d.low) else (100 * d.low, 100 * d.high)
            gain = SimpleNamespace(value=100 * d.value, low=ends[0], high=ends[1])
            p = p_words(one.corrected).removeprefix("p ").removeprefix("= ")
            where = one.a[0] if family == "size" else f"{one.a[1]} px"
            ways = [f"{p[1]} px" if family == "size" else p[0] for p in (one.a, one.b)]
            rows.append([where, f"{ways[0]} to {ways[1]}", gain, p, f"x {ratio:.2g}", _SIGN[one.verdict]])
        some = [one for one in steps if one.next and one.larger]
        counted = f"Steps to the next larger one: {tally(some)}. " if some else ""
        note = (
            f"{counted}Points, on the same redrawn test images; p corrected by Holm over these {len(steps)} pairs. Not shown: "
            "chance would explain it, which does not prove equality."
        )
        report.table(title, ["", "step", "gain", "p", "FLOPs", ""], rows, note)


def _how(study: Study) -> list[str]:
    one = next(iter(study.cells.values()))
    if study.metric == "iou":
        text = (
            f"Decoders were trained on frozen feature maps of {one.trained_on:,} images; their rate was picked on validation "
            "images. Pixels and masks were resized to the input size, predictions back to each mask's own size, where "
            "all inputs are judged by the same pixels."
        )
    else:
        text = (
            "Features of the frozen backbones were computed once a size; hyper-parameters of heads were chosen without the "
            f"{study.split} images."
        )
    best = (
        f"The best cell is the best of {len(study.main())} on these {study.split} images, so that its own score is a little "
        "too high; on new images another may win. Differences are about other test images, not about other training images, "
        "and backbones may differ in more than size: in what they were trained on."
    )
    return [text, best]


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g}"
