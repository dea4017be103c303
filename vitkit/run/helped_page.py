"""The words and the page of `vitkit compare A B --data D`: a verdict with intervals, differences, pictures, results.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitkit.data.images import Images
from vitkit.run.environment import environment
from vitkit.run.helped import DRAWS, DUPLICATE, VIEW, Found, Gain, Side
from vitkit.run.measure import write_results
from vitkit.run.report import Report

if TYPE_CHECKING:
    from vitkit.run.config import Config

SHOWN = 6  # pictures of a kind
WORDS = {"linear": "linear probe", "knn": "kNN", VIEW: "found again in another view", DUPLICATE: "near-duplicate found"}
METRICS = {"mean_auc": "mean AUC", "auc": "AUC", "found again": "images"}


def write(
    page: Path,
    sides: tuple[Side, Side],
    found: Found,
    kept: Found | None,
    cautions: Sequence[str],
    config: Config,
) -> dict[str, Any]:
    """Write the page and results.json (beside a page that was named: its name with .json); the figures as plain values."""
    forgot, memory = forgetting(sides, found, kept, config.own.margin)
    sentences = [*verdict(sides, found), *([memory] if memory else [])]
    results = page.with_name("results.json") if page.name == "compare.html" else page.with_suffix(".json")
    content = {
        "verdict": " ".join(sentences),
        "outcome": outcome(found),
        "forgot": forgot,
        "report": str(page),
        "results": str(results),
        "decided_by": found.main.measure,
        "rows": [one.row() for one in found.gains],
        "few_shot": [{**one, "gain": asdict(one["gain"])} for one in found.few_gains],
        "features": [{"measure": name, "a": a, "b": b} for name, a, b in found.spread],
        "agreement": found.agreement,
        "general": None if kept is None else {**_of(kept), "rows": [one.row() for one in kept.gains]},
        "models": {side.letter: {"name": side.name, "ref": side.ref, **_weights(side)} for side in sides},
        "data": _of(found),
        "cautions": [*cautions, *found.notes],
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    write_results(results, {**content, "settings": dict(config.values), "environment": environment()})
    _page(sides, found, kept, content, sentences, config).write(page)
    return content


# ---------------------------------------------------------------- in words


def outcome(found: Found) -> str:
    """ "better", "worse" (B than A), "same" features, or "unclear"."""
    if found.same:
        return "same"
    if not found.main.proven:
        return "unclear"
    return "better" if found.main.difference.value > 0 else "worse"


def verdict(sides: tuple[Side, Side], found: Found) -> list[str]:
    """The sentences about the user's own images."""
    a, b = sides
    labelled, main = bool(len(found.scored)), found.main
    on = _on(found)
    if found.same:
        return [f"No difference: {a} and {b} give the same features on your images (p = 1; {on})."]
    d, what = main.difference, _metric(main)
    if labelled:
        said = [_labelled_sentence(a, b, main, what, on), *_second(found)]
    elif main.proven:
        more = "more" if d.value > 0 else "less"
        said = [
            f"Without labels there is a hint, not a proof: {b} finds an image again in another view {more} often than {a}: "
            f"{_percent(d.b)} against {_percent(d.a)} ({_span(main)}; {on})."
        ]
    else:
        said = [
            f"No difference could be shown without labels: {b} finds {_percent(d.b)} of your images again in another view, "
            f"{a} {_percent(d.a)} ({_span(main)}; {on})."
        ]
    if not labelled:
        said += [_rank_sentence(found), "Labels of a hundred images or more would decide."]
    return said


def forgetting(sides: tuple[Side, Side], found: Found, kept: Found | None, margin: float) -> tuple[bool | None, str]:
    """(True, False, or None where it cannot be told or was not asked; the sentence)."""
    if kept is None:
        return None, ""
    main, name, d = kept.main, kept.images.name, kept.main.difference
    what = "points" if len(kept.scored) else "points of images found again in another view"
    if kept.same:
        return False, f"B forgot nothing: on {name} both give the same features."
    change = f"{_signed(d.value)} {what} on {name}" + (f" ({_span(main)})" if _has(d) else "")
    if not _has(d):
        return None, f"Whether B forgot something cannot be told: {change} ({d.note})."
    if d.low > 0 and main.proven:
        return False, f"B did not forget, it even improved: {change}."
    if main.proven and d.value < 0:
        little = f"; more than {margin:g} points can be ruled out" if 100 * d.low > -margin else ""
        return True, f"B forgot some of what {sides[0]} knew: {change}{little}."
    if 100 * d.low > -margin:
        return False, f"B did not forget: {change}; a loss of more than {margin:g} points can be ruled out."
    return (
        None,
        f"Whether B forgot something cannot be told: {change}; a loss up to {-100 * d.low:.1f} points is possible.",
    )


def _labelled_sentence(a: Side, b: Side, main: Gain, what: str, on: str) -> str:
    d = main.difference
    points = f"{abs(100 * d.value):.1f} points of {what}"
    if main.proven:
        return (
            f"{b} is {'better' if d.value > 0 else 'worse'} than {a} on your images by {points} ({_span(main)}; {on})."
        )
    if d.value == 0 and not _has(d):
        return f"No difference could be shown on your images: {b} and {a} score the same {what} ({d.note}; {on})."
    way = "above" if d.value > 0 else "below"
    scores = f"{b} scores {points} {way} {a}" if d.value else f"{b} and {a} score the same {what}"
    reach = ""
    if _has(d):
        gain, loss = max(100 * d.high, 0), max(-100 * d.low, 0)
        reach = f" A gain of more than {gain:.1f} or a loss of more than {loss:.1f} points is unlikely."
    return f"No difference could be shown on your images: {scores} ({_span(main)}; {on}).{reach}"


def _second(found: Found) -> list[str]:
    """What kNN says beside the linear probe."""
    second = found.gain("knn")
    if second is None:
        return []
    main, d = found.main, second.difference
    shown = f"{_signed(100 * d.value, raw=True)}" + (f", {_span(second)}" if _has(d) else "")
    if second.proven and main.proven:
        same = (d.value > 0) == (main.difference.value > 0)
        return [f"kNN agrees ({shown})."] if same else [f"But kNN says the opposite ({shown}): look at both."]
    if second.proven:
        return [f"kNN alone does show one ({shown})."]
    return [f"kNN alone does not show it ({shown})."] if main.proven else [f"Nor by kNN ({shown})."]


def _rank_sentence(found: Found) -> str:
    _, a, b = found.spread[0]
    rose = b > a
    value = found.main.difference.value
    words = f"the effective rank of the features {'rises' if rose else 'falls'} from {a:.0f} to {b:.0f}"
    if not found.main.proven:
        return f"{words[0].upper()}{words[1:]}."
    agrees = rose == (value > 0)
    return f"{words[0].upper()}{words[1:]}, which {'agrees' if agrees else 'does NOT agree: take the hint with care'}."


def _on(found: Found) -> str:
    if len(found.scored):
        return f"linear probe, {len(found.scored):,} {found.split} images"
    return f"{len(found.viewed or found.images):,} images"


def _metric(gain: Gain) -> str:
    return METRICS.get(gain.metric, gain.metric.replace("_", " "))


def _has(difference: Any) -> bool:
    return not math.isnan(difference.low)


def _span(gain: Gain) -> str:
    """ "95 % 1.0 to 5.2, p = 0.004", in points."""
    from vitkit.run.comparing import _p

    d = gain.difference
    return f"95 % {_point(d.low)} to {_point(d.high)}, {_p(gain.p)}" if _has(d) else _p(gain.p)


def _point(value: float) -> str:
    return f"{100 * value:.1f}".replace("-", "\N{MINUS SIGN}")


def _signed(value: float, *, raw: bool = False) -> str:
    points = value if raw else 100 * value
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# ---------------------------------------------------------------- the page


def _page(
    sides: tuple[Side, Side],
    found: Found,
    kept: Found | None,
    content: dict[str, Any],
    sentences: Sequence[str],
    config: Config,
) -> Report:
    a, b = sides
    report = Report("Did it help?", f"{b} against {a} on {found.images.name}", kicker="vitkit compare")
    report.sentence(" ".join(sentences))
    report.facts(_facts(found, kept))
    report.section("On your images")
    rows = [_row(one) for one in found.gains]
    columns = ["measure", "A", "B", "gain", "p", "exact test", "cases"]
    report.table("B minus A", columns, rows, _how(found))
    bars = [
        (_row(one)[0], 100 * d.value, 100 * d.low, 100 * d.high) for one in found.gains if _has(d := one.difference)
    ]
    if bars:
        report.bars("Gain of B in points, with 95 % intervals", bars, "Left of zero B is worse.")
    if found.few:
        _few_shot(report, found)
    _changed(report, found)
    _views(report, found, config.own.hflip)
    report.section("What needs no labels")
    report.table("Features", ["", "A", "B"], [list(one) for one in found.spread], _FEATURES)
    _agreement(report, found)
    if kept is not None:
        report.section("Forgetting")
        report.sentence(sentences[-1])
        report.table(f"B minus A on {kept.images.name}", columns, [_row(one) for one in kept.gains], _how(kept))
    report.section("How it was measured")
    for text in content["cautions"]:
        report.sentence(f"Note: {text}.")
    report.details("Models", content["models"])
    report.details("Settings", dict(config.values))
    report.details("Environment", environment())
    return report


_FEATURES = (
    "Effective rank: how many directions the features use (RankMe); higher often goes with better probes, and it falls when "
    "a model collapses. Uniformity and alignment (Wang & Isola) need each other: a collapsed model is perfectly aligned. "
    "All on the same images; models of other widths are not comparable in rank alone."
)


def _facts(found: Found, kept: Found | None) -> list[tuple[str, str, str]]:
    out = []
    for one in found.gains:
        if one.metric == "auc":
            continue
        d = one.difference
        span = f"{_point(d.low)} to {_point(d.high)} points" if _has(d) else d.note
        out.append((f"gain, {WORDS[one.measure]}", _signed(d.value), span))
    if kept is not None:
        d = kept.main.difference
        span = f"{_point(d.low)} to {_point(d.high)} points" if _has(d) else d.note
        out.append((f"kept on {kept.images.name}", _signed(d.value), span))
    return out[:5]


def _row(one: Gain) -> list[Any]:
    from vitkit.run.comparing import _p

    d = one.difference
    gain = SimpleNamespace(value=d.value, low=d.low if _has(d) else None, high=d.high if _has(d) else None)
    p, exact = ("–" if math.isnan(v) else _p(v).removeprefix("p ").removeprefix("= ") for v in (one.p, one.exact))
    name = WORDS[one.measure] if one.metric == "found again" else f"{WORDS[one.measure]}, {_metric(one)}"
    return [name, round(d.a, 4), round(d.b, 4), gain, p, f"{exact} ({one.test})", d.n]


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
    shots = len(found.few_gains)
    if not shots:
        return
    report.curves(
        "Few labels: linear probe on k images a class",
        {f"{letter}": points for letter, points in found.few.items()},
        "training images a class",
        "score",
        log_x=True,
        note="Mean over random draws of the training images, the same for both models; band: 95 % over draws.",
    )
    rows = [[one["k"], one["a"], one["b"], one["gain"]] for one in found.few_gains]
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

    if found.viewed is None or VIEW not in found.again:
        return
    hit_a, hit_b, other_a, other_b = found.again[VIEW]
    first, second = (label_free.views(found.viewed, VIEW, seed=seed, hflip=hflip) for seed in (1, 2))
    for winner, index, other in (
        ("B", np.flatnonzero((hit_b == 1) & (hit_a == 0)), other_a),
        ("A", np.flatnonzero((hit_a == 1) & (hit_b == 0)), other_b),
    ):
        loser = "A" if winner == "B" else "B"
        rows = [
            [
                (_thumb(first, i), "one view"),
                (_thumb(second, i), f"found by {winner}"),
                (_thumb(second, int(other[i])), loser),
            ]
            for i in index[:4].tolist()
        ]
        if rows:
            heads = ["one view", f"{winner} finds its own", f"{loser} takes this one"]
            cells = [[(picture, "") for picture, _ in row] for row in rows]
            report.pictures(f"Only {winner} finds these again: {len(index)} of {len(hit_a)}", cells, columns=heads)


def _agreement(report: Report, found: Found) -> None:
    if not found.agreement:
        return
    one = found.agreement
    k = int(one["k"])
    report.table(
        "How far A and B agree",
        ["", "value", "by chance"],
        [
            ["linear CKA, unbiased", one["cka"], 0.0],
            [f"shared among the {k} nearest images", one["neighbours_shared"], one["neighbours_by_chance"]],
        ],
        f"On {int(one['images']):,} images. 1 = both arrange the images alike. A change that helped may agree little, and "
        "one that did nothing agrees fully.",
    )


def _thumb(images: Images, i: int) -> np.ndarray:
    """uint8 (H, W, 3) or (H, W), at most 224 pixels."""
    from PIL import Image

    pixels = images.decode(i).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    picture.thumbnail((160, 160))
    return np.asarray(picture)


# ---------------------------------------------------------------- plain values


def _of(found: Found) -> dict[str, Any]:
    images = found.images
    return {
        "name": images.name,
        "fingerprint": images.fingerprint,
        "images": len(images),
        "scored": len(found.scored) or len(found.viewed or []),
        "split": found.split or None,
        "same_features": found.same,
        "notes": found.notes,
    }


def _weights(side: Side) -> dict[str, Any]:
    passport = side.vit.passport
    preprocess = json.loads(json.dumps(passport.to_dict()["preprocess"]))
    return {"arch": passport.arch, "sha256": passport.base.get("sha256"), "preprocess": preprocess}
