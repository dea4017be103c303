"""The files of an attack: results.json, the adversarial images, summary, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vitkit.data.transforms import eval_view
from vitkit.passport import Passport
from vitkit.run.attacking import WORDS, Attacked, Attempt
from vitkit.run.config import Config
from vitkit.run.environment import environment
from vitkit.run.files import atomic
from vitkit.run.folder import RunFolder
from vitkit.run.measure import known, short_name, write_results
from vitkit.run.report import Report

SHOWN = 6  # images in the report


def write_attack(
    folder: RunFolder | None, attacked: Attacked, passport: Passport, config: Config, say: Any
) -> dict[str, Any]:
    """Write everything into `folder` (where there is one), the summary last; the figures as plain values."""
    entries = {one.name: entry(one, attacked) for one in attacked.attempts if one.eps == config.method.eps}
    found = {
        "verdict": verdict(attacked, entries, config),
        "report": None,
        "clean_accuracy": _interval(attacked.clean == attacked.labels, attacked),
        "attacks": entries,
        "curve": curve(attacked),
        "encoders": attacked.encoders,
        "layers": [one if one == "output" else list(one) for one in attacked.layers],
        "profile": None if attacked.profiles is None else [vars(profile) for profile in attacked.profiles],
    }
    if folder is None:
        return found
    found["report"] = str(folder.path / "report.html")
    _save_examples(folder.path / "adversarial.npz", attacked, config.method.eps)
    data = {"name": attacked.images.name, "fingerprint": attacked.images.fingerprint, "split": attacked.split}
    model = {"ref": config.inputs.model, "arch": passport.arch, "sha256": passport.base.get("sha256")}
    more = {"images": len(attacked.labels), "model": model, "data": data, "cautions": attacked.cautions}
    write_results(folder.path / "results.json", {**found, **more, "environment": environment()})
    attack_report(attacked, found, passport, config).write(folder.path / "report.html")
    folder.finish(_summary(attacked, found))
    say(f"report: {found['report']}")
    return found


def entry(attempt: Attempt, attacked: Attacked) -> dict[str, Any]:
    """Success rates of one attack with 95 % intervals. asr_all: share of all images wrong under attack (clean mistakes
    count). asr_flip: share of the images right when clean that become wrong."""
    wrong, right = attempt.classes != attacked.labels, attacked.clean == attacked.labels
    rates = {"asr_all": _interval(wrong, attacked), "asr_flip": _interval(wrong, attacked, among=right)}
    return {**rates, "eps": attempt.eps, "largest_change": attempt.reach, "seconds": round(attempt.seconds, 3)}


def _interval(hits: np.ndarray, attacked: Attacked, among: np.ndarray | None = None) -> dict[str, float | int | None]:
    """Share of `hits` with its bootstrap interval (exact binomial where all are alike); groups are drawn whole."""
    from vitkit.evaluate import metrics, statistics

    among = np.ones(len(hits), bool) if among is None else among
    group = attacked.images.group
    if not among.any():
        return {"value": None, "low": None, "high": None, "n": 0}
    hits = hits[among].astype(np.int64)
    found: Any = statistics.bootstrap(
        metrics.accuracy, hits, np.ones_like(hits), groups=None if group is None else group[among], seed=0
    )
    low, high = (value if known(value) else None for value in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high, "n": int(among.sum())}


def curve(attacked: Attacked) -> dict[str, list[list[Any]]]:
    """Success (asr_all) with its interval by budget in 255ths, of DTA and of noise."""
    rows = {}
    for name in ("dta", "noise"):
        points = sorted((one for one in attacked.attempts if one.name == name), key=lambda one: one.eps)
        found = [(one, _interval(one.classes != attacked.labels, attacked)) for one in points]
        rows[name] = [[one.eps * 255, *(at[key] for key in ("value", "low", "high"))] for one, at in found]
    return rows


def verdict(attacked: Attacked, entries: dict[str, Any], config: Config) -> str:
    """The result in one sentence."""
    dta, noise = entries["dta"]["asr_flip"], entries["noise"]["asr_flip"]
    size = f"{config.method.eps * 255:.3g}/255"
    if dta["value"] is None:
        return f"The model was right on none of {len(attacked.labels):,} clean images, so there is nothing to fool."
    return (
        f"Knowing only {' and '.join(attacked.encoders)}, DTA at {size} turns {_percent(dta)} of {dta['n']:,} correctly "
        f"classified {attacked.split} images into mistakes; random noise of the same size {_percent(noise)}."
    )


def attack_report(attacked: Attacked, found: dict[str, Any], passport: Passport, config: Config) -> Report:
    """Verdict, success rates with intervals, success by budget, layer profile, pictures, details."""
    report = Report(
        "Downstream transfer attack",
        f"{short_name(config.inputs.model)} on {attacked.images.name}",
        kicker="vitkit attack",
    )
    report.sentence(found["verdict"])
    clean, dta = found["clean_accuracy"], found["attacks"]["dta"]
    report.facts(
        [
            ("clean accuracy", *_fact(clean, f"{clean['n']:,} {attacked.split} images")),
            ("mistakes under DTA", *_fact(dta["asr_all"], "of all images, asr_all")),
            ("attacked", _where(attacked), ", ".join(attacked.encoders)),
        ]
    )
    report.section("Success")
    for text in attacked.cautions:
        report.sentence(f"Caution: {text}.")
    _rates(report, attacked, found)
    points = {WORDS[name]: rows for name, rows in found["curve"].items()}
    if len(found["curve"]["dta"]) > 1:
        report.curves("Mistakes by budget", points, "budget, 255ths", "", note="Bands: 95 % over redrawn images.")
    if attacked.profiles is not None:
        _profile(report, attacked)
    report.section("What it looks like")
    _pictures(report, attacked, passport, config)
    report.section("How it was measured")
    report.sentence(
        "Examples were made on the public trunk, in pixels of [0, 1] after the model's own resize and crop, before any "
        "normalisation. The model under attack was called afterwards, to count. Mistakes on all images (asr_all) include "
        "those that the model makes anyway; flips are counted among images that it gets right."
    )
    report.details("Settings", config.values)
    report.details("Model", passport.to_dict())
    report.details("Data", {"read as": attacked.images.understood, "fingerprint": attacked.images.fingerprint})
    report.details("Environment", environment())
    return report


def _rates(report: Report, attacked: Attacked, found: dict[str, Any]) -> None:
    rows = []
    for name, one in found["attacks"].items():
        cells = [_cell(one[key]) for key in ("asr_flip", "asr_all")]
        rows.append([WORDS[name], *cells, round(one["largest_change"] * 255, 3), one["seconds"]])
    columns = ["attack", "flips", "wrong of all", "change, 255ths", "seconds"]
    drawn = "whole groups" if attacked.images.group is not None else "images"
    note = (
        "Flips: share of the images right when clean that become wrong (asr_flip). Small figures: 95 %, bootstrap over "
        f"{drawn}. Attacks on the trunk see no labels; attacks on the model itself do."
    )
    report.table("Success of each attack", columns, rows, note)
    bars = [
        (WORDS[name], one["asr_all"]["value"], one["asr_all"]["low"], one["asr_all"]["high"])
        for name, one in found["attacks"].items()
    ]
    report.bars("Wrong of all images", bars, reference=("without attack", 1 - found["clean_accuracy"]["value"]))


def _profile(report: Report, attacked: Attacked) -> None:
    """Footprint of an attack at each block, beside that of noise."""
    report.section("Which block is vulnerable")
    for name, profile in zip(attacked.encoders, attacked.profiles or [], strict=True):
        tried = list(profile.candidates)
        lines = {
            "attack at this block": list(zip(tried, profile.footprint, strict=True)),
            "random noise": [(block, profile.noise) for block in (tried[0], tried[-1])],
        }
        last = [(block, profile.row(block)[-1]) for block in tried]
        lines["similarity at the last block"] = last
        chosen = " and ".join(map(str, profile.chosen))
        report.curves(
            f"Similarity left by an attack, {name}" if len(attacked.encoders) > 1 else "Similarity left by an attack",
            lines,
            "attacked block",
            "",
            note=f"Lower is more vulnerable. Mean cosine similarity of clean and attacked tokens over all {profile.depth} "
            f"blocks, {profile.images} {attacked.searched_on} images, no labels. Chosen: block {chosen} (0 is the first).",
        )


def _pictures(report: Report, attacked: Attacked, passport: Passport, config: Config) -> None:
    """Clean, adversarial and amplified difference, flipped images first."""
    adversarial = attacked.find("dta", config.method.eps).classes
    right = attacked.clean == attacked.labels
    flipped = np.flatnonzero(right & (adversarial != attacked.labels))
    rest = np.setdiff1d(np.arange(len(right)), flipped)
    view = eval_view(passport.preprocess)
    gain = 1 if config.method.eps == 0 else max(1, int(0.5 / config.method.eps))
    rows = []
    for i in [*flipped, *rest][:SHOWN]:
        clean = view(attacked.images.decode(int(i))).permute(1, 2, 0).numpy()
        changed = attacked.examples[i]
        difference = 127.5 + gain * (changed.astype(np.float32) - clean)
        names = [attacked.classes[one] for one in (attacked.clean[i], adversarial[i])]
        rows.append(
            [
                (clean, f"seen as {names[0]}"),
                (changed, f"seen as {names[1]}"),
                (difference.clip(0, 255).round().astype(np.uint8), "difference"),
            ]
        )
    report.pictures(
        "Clean, adversarial, difference",
        rows,
        f"Difference times {gain} around grey. Pictures as saved in adversarial.npz, rounded to 8 bits within the budget.",
        columns=["clean", "adversarial", "difference"],
    )


def _save_examples(path: Path, attacked: Attacked, eps: float) -> None:
    """DTA's images rounded to 8 bits with the budget kept, as an .npz that vitkit reads: x_test, y_test, classes."""
    rounded = attacked.find("dta_8bit", eps)
    content: dict[str, Any] = {
        "x_test": attacked.examples,
        "y_test": attacked.labels.astype(np.int64),
        "classes": np.array(attacked.classes),
        "clean_prediction": attacked.clean.astype(np.int64),
        "prediction": rounded.classes.astype(np.int64),
        "names": np.array(attacked.images.names),
    }
    with atomic(path) as file:
        np.savez(file, **content)


def _summary(attacked: Attacked, found: dict[str, Any]) -> dict[str, Any]:
    """As training runs write theirs, so that attacks can be compared by the same means."""
    rows = [{"name": "clean accuracy", **found["clean_accuracy"], "split": attacked.split}]
    for name, one in found["attacks"].items():
        rows += [{"name": f"{name} {key}", **one[key], "split": attacked.split} for key in ("asr_all", "asr_flip")]
    return {
        "verb": "attack",
        "task": "single",
        "verdict": found["verdict"],
        "metrics": rows,
        "seconds": round(sum(one.seconds for one in attacked.attempts), 3),
    }


def _where(attacked: Attacked) -> str:
    parts = ["output" if one == "output" else f"block {' and '.join(map(str, one))}" for one in attacked.layers]
    return "; ".join(parts)


def _percent(rate: dict[str, Any]) -> str:
    ends = "" if rate["low"] is None else f" (95 % {rate['low']:.1%} to {rate['high']:.1%})"
    return f"{rate['value']:.1%}{ends}"


def _fact(rate: dict[str, Any], note: str) -> tuple[str, str]:
    ends = "" if rate["low"] is None else f"{rate['low']:.1%} to {rate['high']:.1%}, "
    return f"{rate['value']:.1%}", ends + note


def _cell(rate: dict[str, Any]) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**rate) if rate["value"] is not None else None
