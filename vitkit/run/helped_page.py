"""The page of `vitkit compare A B --data D`: a verdict with intervals, differences, pictures; results.json beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitkit.data.images import Images
from vitkit.run.comparing import p_words
from vitkit.run.environment import environment
from vitkit.run.helped_gain import DRAWS, Gain
from vitkit.run.helped_measure import VIEW, Found
from vitkit.run.helped_words import WORDS, forgetting, has, metric_words, outcome, point, signed, verdict
from vitkit.run.measure import write_results
from vitkit.run.report import Report

if TYPE_CHECKING:
    from vitkit.run.config import Config
    from vitkit.run.helped_models import Side

SHOWN = 6  # pictures of a kind
THUMB, SMALL = 144, 112  # pixels; small ones fit twice three on a page
PAPER = 244  # grey of the border that makes pictures square
COLUMNS = ["measure", "A", "B", "gain", "p", "exact test", "cases"]


def write(
    page: Path,
    sides: Sequence[Side],
    found: Found,
    kept: Found | None,
    cautions: Sequence[str],
    config: Config,
) -> dict[str, Any]:
    """Write the page and results.json (beside a page that was named: its name with .json); the figures as plain values."""
    forgot, memory = forgetting(sides, kept, config.own.margin)
    sentences = [*verdict(sides, found), *([memory] if memory else [])]
    viewed = found.viewed
    content = {
        "verdict": " ".join(sentences),
        "outcome": outcome(found),
        "forgot": forgot,
        "report": str(page),
        "results": str(results_beside(page)),
        "decided_by": found.main.measure,
        "rows": [one.row() for one in found.gains],
        "few_shot": [{**one, "gain": asdict(one["gain"])} for one in found.few_gains],
        "features": {
            "values": found.dims,
            **({} if viewed is None else {"effective_rank": viewed.rank, "uniformity": viewed.uniformity}),
            **({} if viewed is None else {"alignment": viewed.alignment}),
        },
        "agreement": found.agreement,
        "general": None if kept is None else {**_of(kept), "rows": [one.row() for one in kept.gains]},
        "models": {side.letter: side.facts for side in sides},
        "data": _of(found),
        "cautions": [*cautions, *found.notes],
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    about = {"settings": dict(config.values), "environment": environment()}
    write_results(results_beside(page), {**content, **about})
    _page(sides, found, kept, content, sentences, config).write(page)
    return content


def results_beside(page: Path) -> Path:
    return page.with_name("results.json") if page.name == "compare.html" else page.with_suffix(".json")


def _page(
    sides: Sequence[Side],
    found: Found,
    kept: Found | None,
    content: dict[str, Any],
    sentences: Sequence[str],
    config: Config,
) -> Report:
    a, b = sides
    report = Report("Did it help?", f"{b} against {a} on {found.images.name}", kicker="vitkit compare")
    report.sentence(sentences[0])
    report.facts(_facts(found, kept))
    if sentences[1:]:
        report.sentence(" ".join(sentences[1:]))
    report.section("On your images")
    report.table("B minus A, in points", COLUMNS, [_row(one) for one in found.gains], _how(found))
    bars = [
        (_row(one)[0], *(round(100 * v, 1) for v in (d.value, d.low, d.high)))
        for one in found.gains
        if has(d := one.difference)
    ]
    if bars:
        report.bars("Gain of B in points, with 95 % intervals", bars, "Left of zero B is worse.")
    if found.few:
        _few_shot(report, found)
    _changed(report, found)
    _views(report, found, config.own.hflip)
    report.section("What needs no labels")
    _features(report, found)
    _agreement(report, found)
    if kept is not None:
        report.section("Forgetting")
        report.sentence(sentences[-1])
        report.table(f"B minus A on {kept.images.name}", COLUMNS, [_row(one) for one in kept.gains], _how(kept))
    report.section("How it was measured")
    for text in content["cautions"]:
        report.sentence(f"Note: {text}.")
    report.details("Models", content["models"])
    report.details("Settings", dict(config.values))
    report.details("Environment", environment())
    return report


def _facts(found: Found, kept: Found | None) -> list[tuple[str, str, str]]:
    """What decides, what stands beside it, and what was kept: at most four."""
    shown = [("gain, " + WORDS[one.measure], one) for one in found.gains if one.metric != "auc"][:3]
    if kept is not None:
        shown.append((f"kept on {kept.images.name}", kept.main))
    out = []
    for name, one in shown:
        d = one.difference
        span = f"{point(d.low)} to {point(d.high)} points" if has(d) else d.note
        out.append((name, signed(d.value), span))
    return out


def _row(one: Gain) -> list[Any]:
    d = one.difference
    p, exact = (bare_p(v) for v in (one.p, one.exact))
    name = WORDS[one.measure] if one.metric == "found again" else f"{WORDS[one.measure]}, {metric_words(one)}"
    return [name, round(100 * d.a, 1), round(100 * d.b, 1), cell(d), p, f"{exact} ({one.test})", d.n]


def bare_p(p: float) -> str:
    """A p-value as a table's cell, on one line."""
    return "–" if math.isnan(p) else p_words(p).removeprefix("p ").removeprefix("= ").replace(" ", "\N{NO-BREAK SPACE}")


def cell(interval: Any) -> SimpleNamespace:
    """A table's cell in points (or percent) with one decimal."""
    ends = (round(100 * interval.low, 1), round(100 * interval.high, 1)) if has(interval) else (None, None)
    return SimpleNamespace(value=round(100 * interval.value, 1), low=ends[0], high=ends[1])


def _how(found: Found) -> str:
    drawn = (
        f"each of {DRAWS:,} bootstrap draws scores both models on the same redrawn cases (images, or whole patients)"
    )
    text = f"Paired: {drawn}. p is the larger of the bootstrap's and the exact test's."
    if len(found.scored):
        text += (
            f" Probes were trained on {found.trained_on:,} images, hyper-parameters chosen without the {found.split} images; "
            "the interval is about other test images, not about other training images."
        )
    return text


def _few_shot(report: Report, found: Found) -> None:
    if not found.few_gains:
        return
    what = metric_words(found.main)
    report.curves(
        "Few labels: linear probe on k images a class",
        {letter: [(k, *(100 * v for v in rest)) for k, *rest in points] for letter, points in found.few.items()},
        "training images a class",
        f"{what}, %",
        log_x=True,
        note="Mean over random draws of the training images, the same for both models; band: 95 % over draws.",
    )
    rows = []
    for one in found.few_gains:
        rows.append([one["k"], round(100 * one["a"], 1), round(100 * one["b"], 1), cell(one["gain"])])
    report.table("", ["images a class", "A", "B", "gain"], rows, "Intervals over draws of the training images (t).")


def _changed(report: Report, found: Found) -> None:
    """Images that only one of the two gets right."""
    if found.predicted is None or found.scored.labels is None:
        return
    y, (a, b) = found.scored.labels, found.predicted
    names = found.scored.classes
    for title, where in (
        ("Right with B, wrong with A", (b == y) & (a != y)),
        ("Wrong with B, right with A", (a == y) & (b != y)),
    ):
        index = np.flatnonzero(where)
        if len(index):
            wrong = a if title.startswith("Right") else b
            shown = index[np.linspace(0, len(index) - 1, min(SHOWN, len(index))).round().astype(int)]
            row = [(_thumb(found.scored, i), f"{names[y[i]]}, not {names[wrong[i]]}") for i in shown.tolist()]
            report.pictures(f"{title}: {len(index)} of {len(y)} (linear probe)", [row])


def _views(report: Report, found: Found, hflip: bool) -> None:
    """Images whose other view only one model finds again, and what the other took for it."""
    from vitkit.evaluate import label_free

    if found.viewed is None:
        return
    (hit_a, hit_b), (other_a, other_b) = found.viewed.hits[VIEW], found.viewed.others[VIEW]
    first, second = (label_free.views(found.viewed.images, VIEW, seed=seed, hflip=hflip) for seed in (1, 2))
    for winner, loser, index, other in (
        ("B", "A", np.flatnonzero((hit_b == 1) & (hit_a == 0)), other_a),
        ("A", "B", np.flatnonzero((hit_a == 1) & (hit_b == 0)), other_b),
    ):
        rows = [
            [(_thumb(views, k, SMALL), "") for views, k in ((first, i), (second, i), (second, int(other[i])))]
            for i in index[:4].tolist()
        ]
        if rows:
            heads = ["one view", f"{winner} finds its own", f"{loser} takes this"]
            report.pictures(f"Only {winner} finds these again: {len(index)} of {len(hit_a)}", rows, columns=heads)


def _features(report: Report, found: Found) -> None:
    viewed = found.viewed
    rows = [["values in a feature", *(f"{dim:,}" for dim in found.dims)]]
    if viewed is not None:
        rows = [
            ["effective rank (RankMe)", *(f"{value:.1f}" for value in viewed.rank)],
            *rows,
            ["uniformity (lower is more evenly spread)", *(f"{v:.2f}".replace("-", "−") for v in viewed.uniformity)],
            ["alignment of views (lower is closer)", *(f"{value:.3f}" for value in viewed.alignment)],
        ]
    report.table("Features", ["", "A", "B"], rows, _FEATURES)


_FEATURES = (
    "Effective rank: how many directions the features use (RankMe); higher often goes with better probes, and it falls when "
    "a model collapses. Uniformity and alignment (Wang & Isola) need each other: a collapsed model is perfectly aligned. "
    "All on the same images; models of other widths are not comparable in rank alone."
)


def _agreement(report: Report, found: Found) -> None:
    if not found.agreement:
        return
    one = found.agreement
    rows = [
        ["linear CKA, unbiased", f"{one['cka']:.3f}", "0"],
        [
            f"shared among the {one['k']:.0f} nearest images",
            f"{one['neighbours_shared']:.1%}",
            f"{one['neighbours_by_chance']:.1%}",
        ],
    ]
    note = (
        f"On {int(one['images']):,} images. 1 = both arrange the images alike. A change that helped may agree little, and "
        "one that did nothing agrees fully."
    )
    report.table("How far A and B agree", ["", "value", "by chance"], rows, note)


def _thumb(images: Images, i: int, side: int = THUMB) -> np.ndarray:
    """uint8 (side, side, 3): the whole picture on a square, so that rows of pictures line up."""
    from PIL import Image

    pixels = images.picture(i).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)).convert("RGB")
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), (PAPER, PAPER, PAPER))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)


def _of(found: Found) -> dict[str, Any]:
    """A data set as plain values."""
    images = found.images
    scored = len(found.scored) or (0 if found.viewed is None else len(found.viewed.images))
    named = {"name": images.name, "fingerprint": images.fingerprint, "images": len(images), "scored": scored}
    return {**named, "split": found.split or None, "same_features": found.same, "notes": found.notes}
