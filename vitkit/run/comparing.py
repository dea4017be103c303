"""Finished runs side by side, and whether one is better: differences are paired on the same test images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.errors import ConfigError
from vitkit.run.folder import RunFolder

DRAWS = 5000  # bootstrap draws: p-values down to 0.0004
LEVEL = 0.05


@dataclass
class Side:
    """A finished run with what it predicted: `predictions` by protocol ("" for a training run)."""

    folder: RunFolder
    name: str
    summary: dict[str, Any]
    task: str | None
    predictions: dict[str, Any]  # pandas frames indexed by image
    groups: dict[str, str]  # of each image, where the data have groups

    @property
    def split(self) -> str:
        return next((m["split"] for m in self.summary.get("metrics", []) if m.get("split")), "test")


@dataclass
class Pair:
    """Run `a` against run `b` on the images that both scored; `note` says what was left out, or why nothing is compared."""

    a: str
    b: str
    protocol: str
    metric: str = ""
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    values: tuple[float, float] = (math.nan, math.nan)
    n: int = 0
    same: bool = False  # both test sets hold exactly the same images
    split: str = "test"
    note: str = ""

    @property
    def proven(self) -> bool:
        """Whether chance is an unlikely explanation: p after correction for the number of pairs."""
        return self.p < LEVEL

    def row(self) -> dict[str, Any]:
        """Plain values for callers."""
        found = {"a": self.a, "b": self.b, "protocol": self.protocol or None, "metric": self.metric or None}
        numbers = {"a_value": self.values[0], "b_value": self.values[1], "difference": self.value}
        numbers |= {"low": self.low, "high": self.high, "p": self.p}
        return {
            **found,
            **{k: None if math.isnan(v) else v for k, v in numbers.items()},
            "n": self.n,
            "note": self.note,
        }


def compare_job(paths: Sequence[Path], out: str | None = None) -> dict[str, Any]:
    """{"verdict": sentence, "report": path, "rows": one a pair}. Raises ConfigError on a folder that is no finished run."""
    from vitkit.run.report import compare_report

    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(f"the same run is named twice: {', '.join(map(str, paths))}", fix="name different runs")
    sides = [_open(path) for path in paths]
    pairs = correct([pair for a, b in combinations(sides, 2) for pair in compare(a, b)])
    verdict = verdict_of(pairs)
    tables = [_table(pairs)] if any(pair.metric for pair in pairs) else []
    report = compare_report([side.folder for side in sides], out, verdict=verdict, tables=tables)
    return {"verdict": verdict, "report": report, "rows": [pair.row() for pair in pairs]}


def compare(a: Side, b: Side) -> list[Pair]:
    """One pair for every protocol that both runs have predictions of, and for a training run against each protocol of an
    evaluation; where there is none, one empty pair that says why."""
    common = [(name, name) for name in a.predictions if name in b.predictions]
    if not common and ("" in a.predictions or "" in b.predictions):
        common = [(mine, other) for mine in a.predictions for other in b.predictions]
    if not common:
        lacking = [side.name for side in (a, b) if not side.predictions]
        have = f"{' and '.join(lacking)} predicted no test images" if lacking else "they followed different protocols"
        return [Pair(a.name, b.name, "", note=have)]
    return [_paired(a, b, *names) for names in common]


def correct(pairs: list[Pair]) -> list[Pair]:
    """Holm's correction of the p-values over all pairs of runs, in place and for each protocol on its own."""
    for protocol in {pair.protocol for pair in pairs}:
        mine = [pair for pair in pairs if pair.protocol == protocol and not math.isnan(pair.p)]
        floor = 0.0
        for rank, pair in enumerate(sorted(mine, key=lambda pair: pair.p)):
            floor = max(floor, min(1.0, pair.p * (len(mine) - rank)))
            pair.p = floor
    return pairs


def verdict_of(pairs: list[Pair]) -> str:
    """A sentence for each pair; of more than two runs with one protocol, how the best one stands against each other."""
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.a, pair.b)))
    if len(names) == 2:
        return " ".join(map(_sentence, pairs))
    holm = "p-values are corrected for the number of pairs (Holm)."
    if len({pair.protocol for pair in pairs}) > 1 or not all(pair.metric for pair in pairs):
        return " ".join([*map(_sentence, pairs), holm])
    wins = {name: sum((p.value > 0) == (p.a == name) for p in pairs if name in (p.a, p.b)) for name in names}
    best = max(names, key=lambda name: wins[name])
    return " ".join([f"{best} scores best.", *(_sentence(_turned(p, best)) for p in pairs if best in (p.a, p.b)), holm])


def _open(path: Path) -> Side:
    folder = RunFolder(path)
    if not folder.is_run():
        raise ConfigError(f"{path} is not a run folder", fix="give the --out of a vitkit pretrain, adapt or evaluate")
    summary = folder.read_summary()
    if summary is None:
        raise ConfigError(f"{path} is not finished", fix="the same command that started it resumes it")
    task = summary.get("task")
    if task is None and (path / "passport.json").is_file():
        from vitkit.passport import Passport

        task = Passport.read(path).task
    found = {name: _predictions(file) for name, file in _files(path).items()}
    return Side(folder, str(path), summary, task, found, _groups(path / "splits.csv"))


def _files(path: Path) -> dict[str, Path]:
    """predictions.csv of a training run under "", predictions_<protocol>.csv of an evaluation under its protocol."""
    found = {"": path / "predictions.csv"} if (path / "predictions.csv").is_file() else {}
    return found | {file.stem.removeprefix("predictions_"): file for file in sorted(path.glob("predictions_*.csv"))}


def _predictions(file: Path) -> Any:
    import pandas as pd

    try:
        frame = pd.read_csv(file, dtype={"image": str, "label": str, "predicted": str}, keep_default_na=False)
        if not {"image", "label", "predicted"} <= set(frame.columns):
            raise ValueError("no columns image, label and predicted")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", fix="repeat the run; it wrote this file") from None
    return frame.set_index("image")


def _groups(file: Path) -> dict[str, str]:
    import csv

    if not file.is_file():
        return {}
    with file.open(encoding="utf-8-sig", newline="") as opened:
        return {row["name"]: row["group"] for row in csv.DictReader(opened) if row.get("group")}


def _paired(a: Side, b: Side, mine: str, other: str) -> Pair:
    """The difference a - b in the task's main metric on common images with the same label, patients drawn whole."""
    from vitkit.evaluate import metrics, statistics

    first, second = a.predictions[mine], b.predictions[other]
    pair = Pair(a.name, b.name, mine or other, split=a.split if a.split == b.split else f"{a.split} and {b.split}")
    pair.note = _refusal(a, b, first, second)
    if pair.note:
        return pair
    images = [name for name in first.index if name in set(second.index)]
    agree = first.loc[images, "label"].to_numpy() == second.loc[images, "label"].to_numpy()
    kept = [name for name, same in zip(images, agree, strict=True) if same]
    pair.same = len(first) == len(second) == len(images)
    notes = [] if pair.same else [f"the test sets differ: {len(first)} and {len(second)} images, {len(images)} in both"]
    if len(kept) < len(images):
        odd = len(images) - len(kept)
        notes.append(f"{odd} labelled differently in the two runs {'is' if odd == 1 else 'are'} left out")
    notes += [
        text for side, frame, name in ((a, first, mine), (b, second, other)) if (text := _unlike(side, frame, name))
    ]
    pair.note = "; ".join(notes)
    pair.n = len(kept)
    if not kept:
        return pair
    pair.metric = metrics.main_metric(str(a.task))
    arrays = (_single if a.task == "single" else _multi)(first.loc[kept], second.loc[kept])
    owners = [a.groups.get(name) or b.groups.get(name) for name in kept]
    groups = np.array([owner or f"image {name}" for owner, name in zip(owners, kept, strict=True)])
    found = statistics.paired_bootstrap(
        getattr(metrics, pair.metric), *arrays, groups=groups if any(owners) else None, n=DRAWS
    )
    pair.value, pair.low, pair.high, pair.p, pair.values = (
        found.value,
        found.low,
        found.high,
        found.p,
        (found.a, found.b),
    )
    if found.note:
        pair.note = "; ".join(filter(None, [pair.note, found.note]))
    return pair


def _refusal(a: Side, b: Side, first: Any, second: Any) -> str:
    """Why the two cannot be paired; empty when they can."""
    if a.task not in ("single", "multi") or a.task != b.task:
        return f"they solve different tasks ({a.task} and {b.task})"
    if a.task == "multi" and set(_classes(first)) != set(_classes(second)):
        odd = sorted(set(_classes(first)) ^ set(_classes(second)))
        return f"they predict different labels ({', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''} in one only)"
    for side, frame in ((a, first), (b, second)):
        if frame.index.has_duplicates:
            return f"{side.name} names an image twice, so images cannot be matched"
    if not set(first.index) & set(second.index):
        return f"they have no {a.split} image in common"
    return ""


def _unlike(side: Side, frame: Any, protocol: str) -> str:
    """Says so where a run's stored predictions do not give the figure that it reported itself."""
    from vitkit.evaluate import metrics

    main = metrics.main_metric(str(side.task))
    wanted = next(
        (m["value"] for m in side.summary.get("metrics", []) if m["name"] == f"{protocol} {main}".strip()), None
    )
    if wanted is None:
        return ""
    y, scores, _ = (_single if side.task == "single" else _multi)(frame, frame)
    found = getattr(metrics, main)(y, scores)
    if abs(found - wanted) <= 0.002:  # stored probabilities are rounded
        return ""
    return f"{side.name} reported {wanted:.3f}, its stored predictions give {found:.3f}"


def _single(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True and predicted classes as numbers, -1 where there is no label."""
    names = sorted({*first["label"], *first["predicted"], *second["predicted"]} - {""})
    code = {"": -1, **{name: i for i, name in enumerate(names)}}
    y, a, b = (column.map(code).to_numpy() for column in (first["label"], first["predicted"], second["predicted"]))
    return y, a, b


def _multi(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N, C) of 0, 1 and NaN, and both runs' probabilities, columns in the first run's order."""
    names = _classes(first)
    place = {name: i for i, name in enumerate(names)}
    y = np.zeros((len(first), len(names)))
    for row, text in enumerate(first["label"]):
        for word in text.split("|") if text else []:
            if word in place:
                y[row, place[word]] = 1
            elif word[:1] == "?" and word[1:] in place:  # unknown
                y[row, place[word[1:]]] = np.nan
    columns = [f"p({name})" for name in names]
    return y, first[columns].to_numpy(dtype=float), second[columns].to_numpy(dtype=float)


def _classes(frame: Any) -> list[str]:
    return [name[2:-1] for name in frame.columns if name.startswith("p(") and name.endswith(")")]


def _turned(pair: Pair, first: str) -> Pair:
    """The same comparison seen from `first`."""
    if pair.a == first:
        return pair
    changed = {"a": pair.b, "b": pair.a, "value": -pair.value, "low": -pair.high, "high": -pair.low}
    return Pair(**{**vars(pair), **changed, "values": pair.values[::-1]})


def _sentence(pair: Pair) -> str:
    """ "runs/a is better than runs/b by 3.1 points of accuracy (95 % 0.4 to 5.8, p = 0.02) on the same 205 test images.\""""
    if not pair.metric:
        return (
            f"{pair.a} and {pair.b} cannot be compared image by image: {pair.note or 'no common image has one label'}."
        )
    if pair.value < 0:
        pair = _turned(pair, pair.b)
    what = {"mean_auc": "mean AUC"}.get(pair.metric, pair.metric)
    by = f" ({pair.protocol})" if pair.protocol else ""
    images = (
        f"the same {pair.n:,} {pair.split} images"
        if pair.same
        else f"the {pair.n:,} {pair.split} images that both scored"
    )
    points, doubt = f"{100 * pair.value:.1f} points of {what}{by}", ""
    if not math.isnan(pair.low):
        doubt = f"95 % {100 * pair.low:.1f} to {100 * pair.high:.1f}, {p_words(pair.p)}"
    if pair.value == 0:
        text = f"{pair.a} and {pair.b} have the same {what}{by} on {images}" + (f" ({doubt})." if doubt else ".")
    elif pair.proven:
        text = f"{pair.a} is better than {pair.b} by {points} ({doubt}) on {images}."
    else:
        why = (
            f"the difference could be chance ({doubt})"
            if doubt
            else f"nothing says whether that is chance ({pair.note})"
        )
        text = f"{pair.a} scores {points} above {pair.b} on {images}, but {why}."
    return text if not pair.note or not doubt else f"{text} Note: {pair.note}."


def p_words(p: float) -> str:
    return "p unknown" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _table(pairs: list[Pair]) -> dict[str, Any]:
    from types import SimpleNamespace

    protocols = any(pair.protocol for pair in pairs)
    rows = []
    for pair in pairs:
        cell = SimpleNamespace(value=pair.value, low=pair.low, high=pair.high)
        names = [pair.a, pair.b, *([pair.protocol] if protocols else [])]
        p = None if math.isnan(pair.p) else p_words(pair.p).removeprefix("p ").removeprefix("= ")
        rows.append([*names, pair.metric.replace("_auc", " AUC"), cell if pair.metric else None, p, pair.n, pair.note])
    return {
        "title": "Paired differences",
        "columns": [
            "run",
            "against",
            *(["protocol"] if protocols else []),
            "metric",
            "difference",
            "p",
            "images",
            "note",
        ],
        "rows": rows,
        "note": f"Each of {DRAWS:,} draws scores both runs on the same redrawn test images (patients or slides stay whole), "
        "so what is hard for both cancels. p is corrected for the number of pairs (Holm); intervals are not.",
    }
