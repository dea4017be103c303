"""`vitkit evaluate --protocols metadata`: what frozen features know about columns of a table, with chance and intervals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitkit.data.images import Images
from vitkit.errors import ConfigError
from vitkit.evaluate.metadata import Column, Found, Settings, measure, parse
from vitkit.run.config import Config
from vitkit.run.folder import RunFolder
from vitkit.run.report import Report
from vitkit.settings import METADATA

WORDS = {
    "r2": "R²",
    "mae": "mean absolute error",
    "correlation": "correlation",
    "mean_auc": "mean AUC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
}
SMALL = 30  # units below which a test says so


def asked(config: Config) -> bool:
    """Whether this evaluation is of metadata. Raises ConfigError where it is mixed with other protocols or names no column."""
    own = config.own
    if own.protocols == "auto":
        return own.metadata_columns is not None
    if METADATA not in own.protocols:
        if own.metadata_columns is not None:
            raise ConfigError("metadata_columns is for the protocol metadata", fix="--protocols metadata")
        return False
    if set(own.protocols) != {METADATA}:
        others = ", ".join(name for name in own.protocols if name != METADATA)
        raise ConfigError(
            f"metadata has a report of its own, and {others} was asked for beside it",
            fix="two commands; the second --out may be another folder",
        )
    if not own.metadata_columns:
        raise ConfigError("metadata needs columns of the table", fix="--metadata_columns age,sex,view")
    return True


@dataclass
class Probed:
    """Everything that was found, for files and report."""

    images: Images
    found: list[Found]
    seconds: list[float]
    corrected: np.ndarray
    width: int
    speed: float | None
    cautions: list[str]
    passport: Any


def metadata_job(config: Config) -> dict[str, dict[str, Any]]:
    """Probe every column: {column: {"name", "value", "low", "high", "n", "chosen", "chance", "p", other metrics}}."""
    from vitkit.run.batches import open_data, open_model, speaker
    from vitkit.run.measure import _home, device_of, feature_parts, overlap_with_training, straddling

    device, say = device_of(config.machine, "evaluate"), speaker(config.machine.quiet)
    own = replace(config.own, protocols=(METADATA,))
    values = {"protocols": own.protocols, "metadata_columns": own.metadata_columns}
    config = Config({**config.groups, "own": own}, {**config.values, **values})
    settings = Settings(own.metadata_folds, own.permutations, seed=config.machine.seed)
    kinds = dict(_named(name) for name in own.metadata_columns)
    with torch.random.fork_rng(devices=[]):
        unlabelled = replace(config.inputs, label_columns=())
        images = open_data(unlabelled, say, keep=tuple(kinds))
        columns = [parse(name, list(images.columns[name]), kind) for name, kind in kinds.items()]
        for column in columns:
            say(_described(column))
        with _home(config, "evaluate") as folder:
            vit: Any = open_model(config.inputs, seed=config.machine.seed, say=say).eval()
            cautions = straddling(images) + overlap_with_training(vit, images) + _coarse(settings, len(columns))
            for text in cautions:
                say(f"caution: {text}")
            cache = None if folder is None else folder.path / "cache"
            x, speed = feature_parts(vit, {"all": images}, config.machine, device, cache)
            probed = _probe(np.asarray(x["all"]), columns, images, settings, say)
            probed.speed, probed.cautions, probed.passport = speed, cautions, vit.passport
            if folder is not None:
                say(f"report: {write(folder, probed, config)}")
    return entries(probed)


def _named(name: str) -> tuple[str, str | None]:
    """`age` or `age:number`."""
    column, _, kind = name.rpartition(":")
    return (column, kind) if column else (name, None)


def _coarse(settings: Settings, columns: int) -> list[str]:
    """A caution where so few shuffles could not show anything."""
    if not settings.permutations or columns < 0.05 * (settings.permutations + 1):
        return []
    return [
        f"{settings.permutations} shuffles cannot give p below 0.05 for {columns} columns, however clear they are: "
        f"--permutations {max(200, 40 * columns)}"
    ]


def _described(column: Column) -> str:
    known = int(column.known.sum())
    lost = len(column.values) - known
    what = f"{len(column.classes)} classes" if column.kind == "class" else "numbers"
    coded = column.kind == "number" or all(word.replace(".", "").isdecimal() for word in column.classes)
    other = f" ({column.name}:{'class' if column.kind == 'number' else 'number'} reads it otherwise)" if coded else ""
    unknown = f", {lost:,} unknown" if lost else ""
    return f"column {column.name!r}: {what}, {known:,} known{unknown}{other}"


def _probe(x: np.ndarray, columns: list[Column], images: Images, settings: Settings, say: Callable) -> Probed:
    from vitkit.evaluate.statistics import holm

    found, seconds = [], []
    for column in columns:
        began, told = time.perf_counter(), [time.perf_counter()]

        def tick(done: int, total: int, column: Column = column, began: float = began, told: list = told) -> None:
            now = time.perf_counter()
            if now - told[0] > 10:
                left = (now - began) / done * (total - done)
                say(f"{column.name}: {done} of {total} shuffles, {left:.0f} s left")
                told[0] = now

        one = measure(x, column, images.split, images.group, settings, on_shuffle=tick)
        seconds.append(time.perf_counter() - began)
        found.append(one)
        say(f"{column.name}: {WORDS[one.main]} {one.metrics[one.main].value:.4f}, {seconds[-1]:.1f} s")
    corrected = holm([one.p for one in found]) if settings.permutations else np.full(len(found), np.nan)
    return Probed(images, found, seconds, corrected, x.shape[1], None, [], None)


# ---------------------------------------------------------------- figures and files


def entries(probed: Probed) -> dict[str, dict[str, Any]]:
    """Plain values of every column; the main metric under "value"."""
    out = {}
    for one, seconds, corrected in zip(probed.found, probed.seconds, probed.corrected, strict=True):
        main = one.metrics[one.main]
        entry = {"name": one.main, "value": main.value, "low": main.low, "high": main.high, "n": len(one.rows)}
        entry |= {
            "kind": one.column.kind,
            "chosen": _chosen(one),
            "picked_on": "validation",
            "trained_on": one.trained_on,
        }
        entry |= {
            "split": _scored(probed.images, one),
            "seconds": round(seconds, 3),
            "p": one.p,
            "p_holm": float(corrected),
        }
        for name, interval in one.metrics.items():
            entry |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        entry |= {f"baseline_{name}": value for name, value in one.baseline.items()}
        if len(one.chance):
            entry |= {"chance": float(np.nanmean(one.chance)), "chance_95": float(np.nanquantile(one.chance, 0.95))}
        notes = "; ".join(filter(None, [main.note, one.note]))
        out[one.column.name] = {**entry, **({"note": notes} if notes else {})}
    return out


def _scored(images: Images, one: Found) -> str:
    splits = np.unique(images.split[one.rows])
    return str(splits[0]) if len(splits) == 1 else "folds"


def _chosen(one: Found) -> str:
    low, high = min(one.chosen), max(one.chosen)
    return f"penalty={low:.2g}" if low == high else f"penalty={low:.2g} to {high:.2g}"


def write(folder: RunFolder, probed: Probed, config: Config) -> Path:
    """predictions_COLUMN.csv, results.json, report.html and the summary; returns the report."""
    import pandas as pd

    from vitkit.data.splits import save
    from vitkit.run.environment import environment
    from vitkit.run.files import atomic_write
    from vitkit.run.measure import write_results

    plain = entries(probed)
    for one in probed.found:
        names = [probed.images.names[i] for i in one.rows.tolist()]
        frame = pd.DataFrame({"image": names})
        if one.column.kind == "number":
            frame["true"], frame["predicted"] = one.truth, one.said.round(6)
        else:
            words = one.column.classes
            frame["true"] = [words[i] for i in one.truth]
            frame["predicted"] = [words[i] for i in one.said.argmax(1)]
            for c, word in enumerate(words):
                frame[f"p({word})"] = one.said[:, c].round(6)
        atomic_write(folder.path / f"predictions_{_file(one.column.name)}.csv", frame.to_csv(index=False))
    save(probed.images, folder.path / "splits.csv")
    probed.passport.save(folder.path)
    more = {one.column.name: {"curve": one.curve, "shuffles": one.chance.tolist()} for one in probed.found}
    images = probed.images
    content = {
        "columns": {name: {**entry, **more[name]} for name, entry in plain.items()},
        "model": {
            "ref": config.inputs.model,
            "arch": probed.passport.arch,
            "sha256": probed.passport.base.get("sha256"),
        },
        "data": {"name": images.name, "fingerprint": images.fingerprint, "counts": images.counts},
        "feature_dim": probed.width,
        "images_per_second": probed.speed,
        "cautions": probed.cautions,
        "environment": environment(),
    }
    write_results(folder.path / "results.json", content)
    report = page(probed, config).write(folder.path / "report.html")
    rows = []
    for name, entry in plain.items():
        row = {"name": f"{name} {entry['name']}", "value": entry["value"], "low": entry["low"], "high": entry["high"]}
        rows.append({**row, "n": entry["n"], "split": entry["split"]})
    summary = {"verb": "evaluate", "task": "metadata", "verdict": verdict(probed), "metrics": rows}
    folder.finish({**summary, "seconds": round(sum(probed.seconds), 3)})
    return report


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


# ---------------------------------------------------------------- the page


def verdict(probed: Probed) -> str:
    """Which columns the features know more about than chance explains, in one or two sentences."""
    said, open_ = [], []
    for one, p in zip(probed.found, probed.corrected, strict=True):
        value = one.metrics[one.main].value
        text = f"{one.column.name} ({WORDS[one.main]} {value:.2f})"
        clear = p < 0.05 if np.isfinite(p) else one.metrics[one.main].low > one.baseline[one.main]
        (said if clear else open_).append(text)
    parts = [f"The frozen features know more than chance about {_list(said)}."] if said else []
    if open_:
        parts.append(f"{'Not' if said else 'Nothing is'} shown beyond chance{' for' if said else ':'} {_list(open_)}.")
    return " ".join(parts)


def _list(items: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def page(probed: Probed, config: Config) -> Report:
    """Verdict, a table of all columns against their baselines and chance, a chart of each, how it was measured."""
    from vitkit.run.environment import environment
    from vitkit.run.measure import short_name

    images = probed.images
    report = Report("Metadata", f"{short_name(config.inputs.model)} on {images.name}", kicker="vitkit evaluate")
    report.sentence(verdict(probed))
    pace = "from the cache" if probed.speed is None else f"{probed.speed:,.0f} images/s"
    facts: list[Any] = [("images", f"{len(images):,}"), ("feature", f"{probed.width:,} values", pace)]
    if images.group is not None:
        facts.insert(1, ("groups", f"{len(np.unique(images.group)):,}", "never divided"))
    report.facts(facts)
    report.section("Results")
    for text in probed.cautions:
        report.sentence(f"Caution: {text}.")
    _table(report, probed)
    for one in probed.found:
        _column(report, one)
    report.section("How it was measured")
    report.details("Settings", config.values)
    report.details("Model", probed.passport.to_dict())
    report.details("Data", {"read as": images.understood, "fingerprint": images.fingerprint})
    report.details("Environment", environment())
    return report


def _table(report: Report, probed: Probed) -> None:
    rows: list[list[Any]] = []
    for one, corrected in zip(probed.found, probed.corrected, strict=True):
        first = True
        for name, interval in one.metrics.items():
            chance = float(np.nanquantile(one.chance, 0.95)) if first and len(one.chance) else None
            p = round(float(corrected), 4) if first and np.isfinite(corrected) else None
            label, n = (one.column.name, len(one.rows)) if first else ("", None)
            rows.append([label, WORDS[name], interval, one.baseline.get(name), chance, p, n])
            first = False
    columns = ["column", "figure", "value", "without images", "chance, 95 %", "p", "scored"]
    drawn = "whole groups" if probed.images.group is not None else "images"
    note = (
        f"Small figures: 95 % interval, bootstrap over {drawn} of the scored images. Without images: the training "
        "median, mean or largest class. Chance: the figure below which 95 % of fits to shuffled values stay (exchanged "
        "between groups, penalty chosen again each time); p is corrected for the number of columns (Holm)."
    )
    report.table("What the features know", columns, rows, note)


def _column(report: Report, one: Found) -> None:
    name, picked = one.column.name, _chosen(one)
    note = f"Chosen: {picked}. {one.note[:1].upper()}{one.note[1:]}{'.' if one.note else ''}".strip()
    if one.column.kind == "number":
        points = [(float(t), float(s)) for t, s in zip(one.truth, one.said, strict=True)]
        low, high = float(one.truth.min()), float(one.truth.max())
        ideal = [(low + (high - low) * i / 40, low + (high - low) * i / 40) for i in range(41)]
        report.scatter(
            f"{name}: predicted against true", {name: points, "equal": ideal}, "true", "predicted", note=note
        )
    else:
        from vitkit.evaluate import metrics

        matrix = metrics.confusion(one.truth, one.said).tolist()
        report.confusion(f"{name}: confusion", matrix, one.column.classes, note)
    if len(one.chance):
        best = [("features", one.metrics[one.main].value), ("shuffled values, mean", float(np.nanmean(one.chance)))]
        best.append(("shuffled values, best of all", float(np.nanmax(one.chance))))
        report.bars(f"{name}: {WORDS[one.main]}", best, reference=("without images", one.baseline[one.main]))
