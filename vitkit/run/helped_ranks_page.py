"""The words and the page of `vitkit compare A B C --data D1,D2,...`: scores, order, pairs; results.json beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.run.comparing import p_words
from vitkit.run.environment import environment
from vitkit.run.helped_gain import DRAWS, LEVEL
from vitkit.run.helped_page import bare_p, cell, results_beside
from vitkit.run.helped_ranks import Scored, Standing
from vitkit.run.helped_words import METRICS, WORDS, has
from vitkit.run.measure import write_results
from vitkit.run.ranking_chart import add_ranking
from vitkit.run.report import Report

if TYPE_CHECKING:
    from vitkit.run.config import Config
    from vitkit.run.helped_models import Side

FEW = 3  # data sets with a sentence each, and models with an interval each in the table


def write(
    page: Path,
    sides: Sequence[Side],
    scored: Sequence[Scored],
    standing: Standing,
    cautions: Sequence[str],
    config: Config,
) -> dict[str, Any]:
    """Write the page and results.json; the figures as plain values."""
    sentences = verdict(sides, scored, standing)
    content = {
        "verdict": " ".join(sentences),
        "best": {one.name: sides[one.best].letter for one in scored},
        "report": str(page),
        "results": str(results_beside(page)),
        "ranking": _ranking(standing),
        "data": [_of(one, sides) for one in scored],
        "models": {side.letter: side.facts for side in sides},
        "cautions": [*cautions, *(f"{one.name}: {note}" for one in scored for note in one.notes)],
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    about = {"settings": dict(config.values), "environment": environment()}
    write_results(results_beside(page), {**content, **about})
    _page(sides, scored, standing, content, sentences, config).write(page)
    return content


# ---------------------------------------------------------------- in words


def verdict(sides: Sequence[Side], scored: Sequence[Scored], standing: Standing) -> list[str]:
    """Over all data sets first, then each of a few; of many the table says it."""
    each = [_on_one(sides, one) for one in scored] if len(scored) <= FEW else []
    if standing.ranking is not None:
        return [standing.ranking.verdict, *each]
    return [_of_two(sides, scored, standing), *each] if len(scored) > 1 else each


def _of_two(sides: Sequence[Side], scored: Sequence[Scored], standing: Standing) -> str:
    """Two models over several data sets."""
    a, b = sides
    gains = [one.gains[0, 1].difference.value for one in scored]
    up, down, p = sum(v > 0 for v in gains), sum(v < 0 for v in gains), standing.combined
    count = f"higher on {up}, lower on {down} of {len(scored)} data sets"
    if math.isnan(p) or p >= LEVEL:
        return f"No difference between {a} and {b} could be shown over {len(scored)} data sets: B is {count} ({p_words(p)})."
    higher = up > down or (up == down and sum(gains) > 0)
    way = "better" if higher else "worse"
    return f"{b} is {way} than {a} over {len(scored)} data sets: {count} (combined {p_words(p)})."


def _on_one(sides: Sequence[Side], one: Scored) -> str:
    """ "On clothing B (deit) scores best, 71.2 % accuracy by linear probe (205 test images), and is better than A and C.\""""
    best, name = sides[one.best], one.name
    by = "found again in another view" if one.metric == "found again" else f"{_metric(one)} by {WORDS[one.measure]}"
    text = f"On {name} {best} scores best, {one.values[one.best].value:.1%} {by} ({one.cases})".replace("%", " %", 1)
    others = [i for i in range(len(sides)) if i != one.best]
    worse = [sides[i].letter for i in others if one.better(i, one.best)]
    left = [sides[i].letter for i in others if not one.better(i, one.best)]
    if not worse:
        return f"{text}, but no other is shown to be worse."
    rest = f"; {_and(left)} cannot be told from it" if left else ""
    return f"{text}, and is better than {_and(worse)}{rest}."


def _metric(one: Scored) -> str:
    return METRICS.get(one.metric, one.metric.replace("_", " "))


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---------------------------------------------------------------- the page


def _page(
    sides: Sequence[Side],
    scored: Sequence[Scored],
    standing: Standing,
    content: dict[str, Any],
    sentences: Sequence[str],
    config: Config,
) -> Report:
    title = "Which is best?" if len(sides) > 2 else "Did it help?"
    about = f"{', '.join(map(str, sides))} on {_and([one.name for one in scored])}"
    report = Report(title, about, kicker=f"vitkit compare · {len(sides)} models, {len(scored)} data sets")
    report.sentence(sentences[0])
    if sentences[1:]:
        report.sentence(" ".join(sentences[1:]))
    report.section("Scores")
    _scores(report, sides, scored)
    if standing.ranking is not None:
        add_ranking(report, "Average ranks over the data sets", standing.ranking)
    for one in scored:
        bars = [
            (str(side), round(100 * v.value, 1), *((round(100 * v.low, 1), round(100 * v.high, 1)) if has(v) else ()))
            for side, v in zip(sides, one.values, strict=True)
        ]
        report.bars(f"{one.name}: {_measure(one)}, %", bars)
    report.section("Pairs")
    _pairs(report, sides, scored)
    report.section("How it was measured")
    for text in content["cautions"]:
        report.sentence(f"Note: {text}.")
    report.details("Models", content["models"])
    report.details("Settings", dict(config.values))
    report.details("Environment", environment())
    return report


def _scores(report: Report, sides: Sequence[Side], scored: Sequence[Scored]) -> None:
    """A row a data set: the scores, and what the best one is shown to be better than."""
    measures = list(dict.fromkeys(_measure(one) for one in scored))
    differ, wide = len(measures) > 1, len(sides) <= FEW
    rows: list[list[Any]] = []
    for one in scored:
        worse = [side.letter for i, side in enumerate(sides) if i != one.best and one.better(i, one.best)]
        said = f"{sides[one.best].letter}{', better than ' + _and(worse) if worse else ''}"
        values = [cell(v) if wide else round(100 * v.value, 1) for v in one.values]
        rows.append([one.name, *([_measure(one)] if differ else []), one.cases, *values, said])
    columns = ["data", *(["measure"] if differ else []), "cases", *(side.letter for side in sides), "best"]
    named = "; ".join(f"{side.letter} = {side.name or side.ref}" for side in sides)
    note = (
        f"{named}. All models answer the same images; hyper-parameters were chosen without them. Better: shown by the paired "
        "tests below."
    )
    title = "In percent" if differ else f"{measures[0][0].upper()}{measures[0][1:]}, in percent"
    report.table(f"{title}, with 95 % intervals" if wide else title, columns, rows, note)


def _measure(one: Scored) -> str:
    return WORDS[one.measure] if one.metric == "found again" else f"{WORDS[one.measure]}, {_metric(one)}"


def _pairs(report: Report, sides: Sequence[Side], scored: Sequence[Scored]) -> None:
    rows: list[list[Any]] = []
    for one in scored:
        for (i, j), gain in one.gains.items():
            shown = bare_p(one.corrected[i, j])
            better = sides[j].letter if one.better(i, j) else sides[i].letter if one.better(j, i) else "–"
            rows.append([one.name, sides[i].letter, sides[j].letter, cell(gain.difference), shown, better])
    note = (
        f"Second minus first, in points. Paired: each of {DRAWS:,} bootstrap draws scores both on the same redrawn cases "
        "(images, or whole patients), and an exact test has to agree. p is corrected for the pairs of a data set (Holm); "
        "intervals are not."
    )
    report.table("Every pair", ["data", "first", "second", "difference", "p", "better"], rows, note)


# ---------------------------------------------------------------- plain values


def _of(one: Scored, sides: Sequence[Side]) -> dict[str, Any]:
    pairs = [
        {"first": sides[i].letter, "second": sides[j].letter, **gain.row(), "p_corrected": one.corrected[i, j]}
        for (i, j), gain in one.gains.items()
    ]
    values = {side.letter: asdict(value) for side, value in zip(sides, one.values, strict=True)}
    named = {"name": one.name, "fingerprint": one.images.fingerprint, "cases": one.cases}
    return {**named, "measure": one.measure, "metric": one.metric, "scores": values, "pairs": pairs}


def _ranking(standing: Standing) -> dict[str, Any] | None:
    if standing.ranking is None:
        return None if math.isnan(standing.combined) else {"p_combined": standing.combined}
    one = standing.ranking
    order = [{"model": n, "rank": r, "wins": w} for n, r, w in zip(one.names, one.ranks, one.wins, strict=True)]
    return {"order": order, "p_friedman": one.p, "critical_difference": one.critical, "data_sets": one.n}
