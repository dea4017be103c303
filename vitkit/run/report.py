"""Reports of runs, for a person who asks "and, did it work?".

`run_report` makes the report of one run folder from what the run wrote there, `compare_report` that of several side by
side; `Report` is for those who want to say something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from vitkit.run.axes import is_noisy, short
from vitkit.run.charts import COLOURS
from vitkit.run.folder import RunFolder
from vitkit.run.page import Report
from vitkit.run.tables import number_style
from vitkit.run.values import differing, flatten, shown

__all__ = ["Report", "compare_report", "run_report"]

_CLOCK = ("step", "epoch", "seconds", "time")
_SHORT = {"auc": "AUC", "f1": "F1", "lr": "learning rate"}
_PACE = {"img_per_s": "images a second", "data_wait": "share of time waiting for data", "peak_gb": "peak memory, GB"}


def run_report(folder: RunFolder) -> Path:
    """Write report.html of one run, finished or not, from the files in its folder; returns the path.

    Raises ConfigError where there is no run.
    """
    config, summary, records = folder.read_config(), folder.read_summary(), folder.records()
    about = " · ".join(folder.kind.split("."))
    subject = [_tail(config[key]) for key in ("model", "data") if config.get(key)]
    report = Report(about, " on ".join(subject), kicker=f"vitkit run · {folder.path.absolute().name}")
    if summary is None:
        last = max((record.get("step") or 0 for record in records), default=0)
        report.sentence(f"Not finished: {last:,} steps so far. The same command resumes it.")
    else:
        report.sentence(summary.get("verdict") or "Finished.")
        report.facts(_key_figures(summary, records))
        _results(report, summary)
    galleries = folder.read_pictures()
    if galleries:
        report.section("Pictures")
    for one in galleries:
        rows = [[((folder.path / "pictures" / name).read_bytes(), text) for name, text in row] for row in one["rows"]]
        report.gallery(one["title"], rows, one.get("columns", []), one.get("note", ""))
    if records:
        report.section("Training")
        _curves(report, {"": records})
    report.section("How it was run")
    report.details("Settings", config)
    if summary is not None:
        numbers = {
            k: v for k, v in summary.items() if k not in ("verdict", "metrics", "tables", "confusion") and _scalar(v)
        }
        report.details("Figures", numbers)
    report.details("Environment", folder.read_environment())
    return report.write(folder.path / "report.html")


def compare_report(
    folders: Sequence[RunFolder],
    path: str | Path | None = None,
    *,
    verdict: str = "",
    tables: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write runs side by side: final figures, `tables` ({title, columns, rows, note}), settings that differ, curves overlaid.

    By default into compare.html beside the first run. Raises ConfigError where there is no run.
    """
    names = _names([folder.path for folder in folders])
    configs = [folder.read_config() for folder in folders]
    summaries = [folder.read_summary() or {} for folder in folders]
    flats = [
        flatten({"verb": folder.kind, **config, "out": None}) for folder, config in zip(folders, configs, strict=True)
    ]
    keys = list(dict.fromkeys(key for flat in flats[1:] for key in differing(flats[0], flat)))
    report = Report("Comparison", ", ".join(names), kicker=f"vitkit compare · {len(names)} runs")
    how_many = f"{len(keys)} settings differ" if len(keys) != 1 else "one setting differs"
    report.sentence(verdict or f"{len(names)} runs side by side; {how_many}.")
    report.section("Results")
    rows = _side_by_side(summaries)
    if rows:
        report.table("Final figures", ["figure", "split", *names], rows, _interval_note(summaries))
    for table in tables:
        report.table(table["title"], table["columns"], table["rows"], table.get("note", ""))
    report.section("Settings that differ")
    if keys:
        report.table("", ["setting", *names], [[key, *(shown(flat, key) for flat in flats)] for key in keys])
    else:
        report.sentence("None: the runs have the same settings.")
    report.section("Training")
    _curves(report, {name: folder.records() for name, folder in zip(names, folders, strict=True)})
    report.section("Every setting")
    for name, config in zip(names, configs, strict=True):
        report.details(name, config)
    return report.write(path or folders[0].path.absolute().parent / "compare.html")


def _key_figures(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """What a reader looks for first: the leading metrics, how much was trained, how long it took."""
    out = []
    for metric in summary.get("metrics", [])[:2]:
        if metric.get("value") is None:
            continue
        limits = [metric[end] for end in ("low", "high") if metric.get(end) is not None]
        style = number_style([metric["value"], *limits])
        parts = [f"{style(limits[0])} to {style(limits[1])}"] if len(limits) == 2 else []
        parts.append(
            f"{metric['n']:,} {metric.get('split') or ''} images".replace("  ", " ") if metric.get("n") else ""
        )
        out.append((_words(metric["name"]), style(metric["value"]), ", ".join(part for part in parts if part)))
    trained, total = summary.get("trained_parameters"), summary.get("total_parameters")
    if trained is not None:
        share = f"{trained / total:.2%} of {_many(total)}" if total else ""
        out.append(("trained weights", _many(trained), share))
    if summary.get("seconds") is not None:
        pace = [record["img_per_s"] for record in records if _scalar(record.get("img_per_s"))]
        steps = f"{summary['steps']:,} steps" if summary.get("steps") else ""
        speed = f"{short(median(pace))} images/s" if pace else ""
        out.append(("time", _duration(summary["seconds"]), ", ".join(part for part in (steps, speed) if part)))
    return out


def _results(report: Report, summary: Mapping[str, Any]) -> None:
    metrics, tables, confusion = summary.get("metrics") or [], summary.get("tables") or [], summary.get("confusion")
    if not (metrics or tables or confusion):
        return
    report.section("Results")
    if metrics:
        splits = any(metric.get("split") for metric in metrics)
        rows = [
            [_words(m["name"]), *([m.get("split")] if splits else []), _shown_interval(m), m.get("n")] for m in metrics
        ]
        columns = ["figure", *(["split"] if splits else []), "value", "images"]
        report.table("Final figures", columns, rows, _interval_note([summary]))
    if confusion:
        report.confusion("Confusion", confusion["matrix"], confusion["classes"])
    for table in tables:  # intervals come back from JSON as mappings
        rows = [[_shown_interval(cell) if isinstance(cell, Mapping) else cell for cell in row] for row in table["rows"]]
        report.table(table["title"], table["columns"], rows, table.get("note", ""))


def _curves(report: Report, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Charts of every logged number: losses together, validation scores together, the rest one each.

    `runs` maps names to records; with several runs each number has a chart of its own with a line a run.
    """
    everything = [record for records in runs.values() for record in records]
    keys = dict.fromkeys(k for record in everything for k, v in record.items() if k not in _CLOCK and _scalar(v))
    x = "epoch" if all("epoch" in r for r in everything if keys.keys() & r.keys()) else "step"
    groups: list[tuple[str, list[str]]] = []
    if len(runs) == 1:
        losses = [key for key in keys if key.endswith("loss")]
        unit = [k for k in keys if k.startswith("val_") and k not in losses and _within_unit(everything, k)]
        groups += [("loss", losses)]
        groups += [("validation", unit[i : i + COLOURS]) for i in range(0, len(unit), COLOURS)]
    told = {key for _, group in groups for key in group} | set(_PACE)
    groups += [(_words(key), [key]) for key in keys if key not in told]
    groups = [(title, group) for title, group in groups if group]
    for title, group in groups:
        series = {
            (name if len(runs) > 1 else _line_name(title, key)): [
                (r[x], r[key]) for r in records if _scalar(r.get(key)) and _scalar(r.get(x))
            ]
            for name, records in runs.items()
            for key in group
        }
        ys = [y for points in series.values() for _, y in points if y is not None]
        wide_range = title == "loss" and ys and min(ys) > 0 and max(ys) > 50 * min(ys)
        smooth = any(is_noisy(points) for points in series.values())
        note = "Faint: as logged. Bold: running mean." if smooth else ""
        half = len(groups) > 1
        report.curves(
            title[:1].upper() + title[1:], series, x, "", log_y=bool(wide_range), smooth=smooth, half=half, note=note
        )
    pace = {text: [r[key] for r in everything if _scalar(r.get(key))] for key, text in _PACE.items()}
    said = [f"{text}: {short(median(values))}" for text, values in pace.items() if values]
    if said and len(runs) == 1:
        report.sentence("Medians while training: " + "; ".join(said) + ".")


def _side_by_side(summaries: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of (figure, split, value in each run); "–" where a run lacks it."""
    found = [{(m["name"], m.get("split")): _shown_interval(m) for m in s.get("metrics", [])} for s in summaries]
    keys = dict.fromkeys(key for one in found for key in one)
    rows: list[list[Any]] = [[_words(name), split, *(one.get((name, split)) for one in found)] for name, split in keys]
    for key in ("trained_parameters", "seconds"):
        if any(key in s for s in summaries):
            rows.append([_words(key), None, *(s.get(key) for s in summaries)])
    return rows


def _interval_note(summaries: Sequence[Mapping[str, Any]]) -> str:
    some = any(m.get("low") is not None for s in summaries for m in s.get("metrics", []))
    return "Small figures: interval of the value over redrawn images, 95 % unless a row says otherwise." if some else ""


def _shown_interval(metric: Mapping[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(value=metric.get("value"), low=metric.get("low"), high=metric.get("high"))


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names, start=1)]


def _tail(value: Any) -> str:
    """The last part of a path; other values as they are."""
    return str(value).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]


def _within_unit(records: Sequence[Mapping[str, Any]], key: str) -> bool:
    values = [record[key] for record in records if _scalar(record.get(key))]
    return all(0 <= value <= 1 for value in values)


def _scalar(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(name: str) -> str:
    """A key as words: "val_mean_auc" -> "validation mean AUC"."""
    words = re.sub(r"^val ", "validation ", str(name).replace("_", " ").replace("/", " "))
    return re.sub(r"\b(auc|f1|lr)\b", lambda found: _SHORT[found.group()], words)


def _line_name(title: str, key: str) -> str:
    """A key as the name of a line, without what the title of its chart says already."""
    if title == "loss":
        return {"loss": "training", "val_loss": "validation"}.get(key, _words(key))
    return _words(key.removeprefix("val_")) if title == "validation" else _words(key)


def _many(count: float) -> str:
    """A count in three figures: 312 k, 5.72 M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {sign}"
    return f"{count:,.0f}"


def _duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
