"""What a scaling study shows: paired differences with Holm's correction, the two trends, the cheapest good cell, in sentences.

A difference counts when its 95 % interval, over the same redrawn test images for both, leaves out 0 and its p-value, corrected
within its family (all pairs of backbones; all pairs of sizes), is below 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vitkit.evaluate import scaling, statistics
from vitkit.evaluate.statistics import Difference
from vitkit.run.scaling_cells import Cell, Study

LEVEL = 0.05
DRAWS = 5000
UNSURE = 0.05  # a recommendation that may cost more than this is none
ALIKE = 1.1  # backbones whose parameters differ by less than this factor are of one size

Place = tuple[str, int]  # (model, size)
METRICS = {"mean_auc": "mean AUC", "iou": "foreground IoU"}


@dataclass
class Step:
    """From cell `a` to the costlier cell `b`: score(b) - score(a), and its p-value corrected within `family`."""

    family: str  # "backbone" or "size"
    a: Place
    b: Place
    difference: Difference
    corrected: float
    next: bool = False  # no cell lies between them
    larger: bool = True  # b has more pixels, or trained weights and clearly more parameters: a step of scaling

    @property
    def verdict(self) -> str:
        """ "helps", "hurts" or "not shown"."""
        d = self.difference
        if not self.corrected < LEVEL or math.isnan(d.low) or d.low <= 0 <= d.high:
            return "not shown"
        return "helps" if d.value > 0 else "hurts"


@dataclass
class Trend:
    """The largest against the smallest, averaged over the other axis."""

    family: str  # "size", "backbone" or "labels"
    small: str
    large: str
    over: int  # pairs averaged
    difference: Difference
    corrected: float = math.nan

    @property
    def verdict(self) -> str:
        return Step(self.family, ("", 0), ("", 0), self.difference, self.corrected).verdict


@dataclass
class Findings:
    """Everything that follows from the scores."""

    steps: list[Step] = field(default_factory=list)
    trends: list[Trend] = field(default_factory=list)
    best: Cell | None = None
    enough: Cell | None = None  # the cheapest that is not shown to be worse than the best
    gap: Difference | None = None  # best - enough
    front: set[Place] = field(default_factory=set)
    sentences: list[str] = field(default_factory=list)

    def of(self, family: str) -> list[Step]:
        return [one for one in self.steps if one.family == family]


def find(study: Study) -> Findings:
    """Compare the cells of the first protocol with the most labels; nothing is computed from pixels."""
    cells = study.main()
    found = Findings()
    if not cells:
        found.sentences = ["No cell could be computed: the notes below say why."]
        return found
    found.steps = _steps(study, cells)
    found.trends = _trends(study, cells)
    places = list(cells)
    costs, values = [study.costs[p].flops for p in places], [cells[p].value for p in places]
    found.front = {p for p, on in zip(places, scaling.pareto(costs, values), strict=True) if on}
    _recommend(study, cells, found)
    found.sentences = [*_trend_sentences(study, found.trends), *_advice(study, found), *_failures(found)]
    return found


# ---------------------------------------------------------------- differences


def _order(study: Study) -> list[str]:
    """Names of the backbones from few to many parameters, of equal ones the untrained first."""
    return [one.name for one in sorted(study.backbones, key=lambda one: (one.parameters, not one.random))]


def _steps(study: Study, cells: dict[Place, Cell]) -> list[Step]:
    """All pairs of backbones at one size, all pairs of sizes of one backbone; Holm over each of the two families."""
    found: list[Step] = []
    order = _order(study)
    lines = [("backbone", [(m, s) for m in order if (m, s) in cells]) for s in study.sizes]
    lines += [("size", [(m, s) for s in study.sizes if (m, s) in cells]) for m in order]
    for family, places in lines:
        if len(places) < 2:
            continue
        names = {str(i): cells[place].scores for i, place in enumerate(places)}
        falling = dict(reversed(names.items()))  # so that a pair is (more, less)
        above = {one.name: one for one in study.backbones}
        pairs = statistics.compare_all(study.measure, study.truth, falling, groups=study.scored.group, n=DRAWS)
        for pair in pairs:
            b, a = int(pair.a), int(pair.b)
            less, more = above[places[a][0]], above[places[b][0]]
            larger = family == "size" or (
                more.parameters >= ALIKE * less.parameters and (not more.random or _all_random(study))
            )
            found.append(Step(family, places[a], places[b], pair.difference, pair.corrected, b == a + 1, larger))
    for family in ("backbone", "size"):
        some = [one for one in found if one.family == family]
        for one, p in zip(some, statistics.holm([one.difference.p for one in some]), strict=True):
            one.corrected = float(p)
    return found


def _all_random(study: Study) -> bool:
    return all(one.random for one in study.backbones)


def _counted(study: Study) -> set[str]:
    """Backbones that trends are about."""
    return {one.name for one in study.backbones if not one.random or _all_random(study)}


def _trends(study: Study, cells: dict[Place, Cell]) -> list[Trend]:
    found = [one for one in (_size_trend(study, cells), _backbone_trend(study, cells)) if one is not None]
    for one, p in zip(found, statistics.holm([one.difference.p for one in found]), strict=True):
        one.corrected = float(p)
    labels = _label_trend(study)
    return [*found, *([labels] if labels else [])]


def _difference(study: Study, more: Sequence[Cell], less: Sequence[Cell]) -> Difference:
    a, b = ([cell.scores for cell in cells] for cells in (more, less))
    return scaling.mean_difference(study.measure, study.truth, a, b, groups=study.scored.group, n=DRAWS)


def _size_trend(study: Study, cells: dict[Place, Cell]) -> Trend | None:
    """Of the widest pair of sizes, the one that most backbones have; untrained ones do not count, unless all are."""
    order = [m for m in _order(study) if m in _counted(study)]
    pairs = [(a, b) for i, a in enumerate(study.sizes) for b in study.sizes[i + 1 :]]
    having = {(a, b): [m for m in order if (m, a) in cells and (m, b) in cells] for a, b in pairs}
    having = {pair: models for pair, models in having.items() if models}
    if not having:
        return None
    small, large = max(having, key=lambda pair: (len(having[pair]), pair[1] / pair[0]))
    models = having[small, large]
    d = _difference(study, [cells[m, large] for m in models], [cells[m, small] for m in models])
    return Trend("size", f"{small} px", f"{large} px", len(models), d)


def _backbone_trend(study: Study, cells: dict[Place, Cell]) -> Trend | None:
    """Untrained backbones do not count, unless all are; None where all have about the same number of parameters."""
    some = [one for one in study.backbones if one.name in _counted(study) and any(m == one.name for m, _ in cells)]
    some.sort(key=lambda one: one.parameters)
    if len(some) < 2 or some[-1].parameters < ALIKE * some[0].parameters:
        return None
    small, large = some[0].name, some[-1].name
    sizes = [s for s in study.sizes if (small, s) in cells and (large, s) in cells]
    if not sizes:
        return None
    return Trend("backbone", small, large, len(sizes), _difference(study, [cells[large, s] for s in sizes],
                                                                   [cells[small, s] for s in sizes]))  # fmt: skip


def _label_trend(study: Study) -> Trend | None:
    few, many = min(study.fractions), max(study.fractions)
    less, more = study.main(few), study.main(many)
    places = [place for place in more if place in less]
    if few == many or not places:
        return None
    d = _difference(study, [more[p] for p in places], [less[p] for p in places])
    return Trend("labels", f"{few:.0%} of the labels", f"{many:.0%}", len(places), d, d.p)


def _recommend(study: Study, cells: dict[Place, Cell], found: Findings) -> None:
    """The best cell, and the cheapest one that is not shown to be worse (Holm over all cheaper cells)."""
    known = {place: cell for place, cell in cells.items() if not math.isnan(cell.value)}
    if not known:
        return
    cost = {place: study.costs[place].flops for place in known}
    top = max(known, key=lambda place: (known[place].value, -cost[place]))
    found.best = found.enough = known[top]
    cheaper = sorted((place for place in known if cost[place] < cost[top]), key=lambda place: cost[place])
    gaps = [_difference(study, [known[top]], [known[place]]) for place in cheaper]
    for place, gap, p in zip(cheaper, gaps, statistics.holm([gap.p for gap in gaps]), strict=True):
        if not (p < LEVEL and gap.low > 0):
            found.enough, found.gap = known[place], gap
            return


# ---------------------------------------------------------------- in words


def metric_words(study: Study) -> str:
    return METRICS.get(study.metric, study.metric.replace("_", " "))


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_words(p: float) -> str:
    """ "p = 0.004"."""
    return "p unknown" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def span(d: Difference, p: float) -> str:
    """ "95 % 1.0 to 5.2, p = 0.004", in points."""
    if math.isnan(d.low):
        return d.note or "no interval"
    low, high = (f"{100 * v:.1f}".replace("-", "\N{MINUS SIGN}") for v in (d.low, d.high))
    return f"95 % {low} to {high}, {p_words(p)}"


def place_words(place: Place) -> str:
    return f"{place[0]} at {place[1]} px"


_VERBS = {"helps": "helps", "hurts": "hurts", "not shown": "does not help as far as this test can show"}
_SUBJECT = {"size": "a larger input", "backbone": "a larger backbone", "labels": "more labels"}


def _trend_sentences(study: Study, trends: Sequence[Trend]) -> list[str]:
    """ "A larger input helps (+4.2 points of accuracy from 96 to 224 px, ...), but a larger backbone does not ..." """
    parts = []
    for one in trends:
        mean = {"size": "backbones", "backbone": "sizes", "labels": "cells"}[one.family]
        over = f", mean over {one.over} {mean}" if one.over > 1 else ""
        over += "; the two may differ in training too" if one.family == "backbone" else ""
        change = f"{points(one.difference.value)} points of {metric_words(study)} from {one.small} to {one.large}"
        verb = _VERBS[one.verdict]
        if one.family == "labels":  # plural
            verb = {"helps": "help", "hurts": "hurt"}.get(verb, "do not help as far as this test can show")
        parts.append(
            (one.verdict, f"{_SUBJECT[one.family]} {verb} ({change}{over}; {span(one.difference, one.corrected)})")
        )
    out = []
    if len(parts) >= 2 and trends[0].family == "size" and trends[1].family == "backbone":
        joint = "and" if parts[0][0] == parts[1][0] else "but"
        parts[:2] = [("", f"{parts[0][1]}, {joint} {parts[1][1]}")]
    for _, text in parts:
        out.append(f"{text[0].upper()}{text[1:]}.")
    if len({one.name for one in study.backbones if not one.random}) > 1 and "backbone" not in {
        t.family for t in trends
    }:
        out.append(
            "The backbones have about as many parameters, so that the study says which is better, not what size buys."
        )
    return out


def _advice(study: Study, found: Findings) -> list[str]:
    best, enough, gap = found.best, found.enough, found.gap
    if best is None or enough is None:
        return []
    top = f"Best is {place_words((best.model, best.size))} with {100 * best.value:.1f} %"
    if enough is best or gap is None:
        flops = study.costs[best.model, best.size].flops
        cheaper = any(study.costs[p].flops < flops for p, cell in study.main().items() if not math.isnan(cell.value))
        if len(study.main()) == 1:
            return [f"{top}."]
        return [f"{top}; {'every cheaper setting is shown to be worse' if cheaper else 'no setting is cheaper'}."]
    ratio = study.costs[enough.model, enough.size].flops / study.costs[best.model, best.size].flops
    if gap.high > UNSURE or math.isnan(gap.high):
        return [
            f"{top}; which cheaper setting is as good cannot be told from {len(study.scored):,} {study.split} images: "
            f"{place_words((enough.model, enough.size))} is not shown to be worse, but could be, by "
            f"{100 * gap.high:.1f} points."
        ]
    reach = f" (at most {100 * max(gap.high, 0):.1f} points below, 95 %)"
    return [
        f"{top}; the cheapest setting that is not shown to be worse is {place_words((enough.model, enough.size))} with "
        f"{100 * enough.value:.1f} %{reach}, at {_share(ratio)} of the FLOPs."
    ]


def _share(ratio: float) -> str:
    return f"{ratio:.0%}" if ratio >= 0.02 else f"1/{1 / ratio:.0f}"


def _failures(found: Findings) -> list[str]:
    """Where scaling fails: steps up that are shown to hurt."""
    hurting = [one for one in found.steps if one.next and one.larger and one.verdict == "hurts"]
    if not hurting:
        return []
    each = []
    for one in hurting[:4]:
        where = f"{one.a[1]} to {one.b[1]} px for {one.a[0]}" if one.family == "size" else (
            f"{one.a[0]} to {one.b[0]} at {one.a[1]} px")  # fmt: skip
        each.append(f"{where} ({points(one.difference.value)})")
    more = f" and {len(hurting) - 4} more" if len(hurting) > 4 else ""
    return [f"Shown to be worse: from {'; from '.join(each)}{more}."]


def tally(steps: Sequence[Step]) -> str:
    """ "2 help, 1 hurts, 3 not shown" of steps to the next."""
    counts = {name: sum(one.verdict == name for one in steps) for name in ("helps", "hurts", "not shown")}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
