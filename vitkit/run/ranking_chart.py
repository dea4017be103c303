"""The critical-difference picture of a `vitkit.evaluate.ranking.Ranking`, in the style of `vitkit.run.charts`.

Models hang from an axis of average ranks, the best on the left; a bar under the axis joins models that the test cannot
tell apart; the ruler above it is the critical difference (Demsar 2006).
"""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from vitkit.evaluate.ranking import Ranking
from vitkit.run import charts

_ROW, _BAR = 20.0, 9.0  # pixels between labels, and between bars


def ranking_chart(ranking: Ranking, *, title: str = "Average ranks") -> Markup:
    """The picture as SVG, once for wide and once for narrow places."""
    return charts._figure(lambda size: _draw(ranking, size), title, _in_words(ranking), [], legend_when_wide=False)


def add_ranking(report: Any, title: str, ranking: Ranking) -> None:
    """Put the picture into a `vitkit.run.report.Report`, with its verdict and how to read it."""
    note = (
        f"{ranking.verdict} Bars join models that cannot be told apart: their average ranks differ by less than the "
        f"critical difference (Nemenyi's test at {ranking.level:.0%})."
    )
    report._add(title, ranking_chart(ranking, title=title), note)


def _draw(ranking: Ranking, size: Any) -> tuple[Markup, float]:
    """Labels of the better half are on the left, of the others on the right, each with its rank."""
    count = len(ranking.names)
    longest = 30 if size.wide else 15
    labels = [
        f"{charts._cut(name, longest)} {rank:.2f}" for name, rank in zip(ranking.names, ranking.ranks, strict=True)
    ]
    half = (count + 1) // 2
    left = max(charts._width(text) for text in labels[:half]) + 16
    right = size.width - max(charts._width(text) for text in labels[half:]) - 16
    top = 56.0

    def x(rank: float) -> float:
        return left + (rank - 1) / (count - 1) * (right - left)

    parts = [charts._stroke("axis", left, top, right, top)]
    every = max(1, math.ceil(count / 10))
    for tick in range(1, count + 1, every):
        parts.append(charts._stroke("axis", x(tick), top - 5, x(tick), top))
        parts.append(charts._text("tick mid", x(tick), top - 9, str(tick)))
    reach = min(x(1 + ranking.critical), right)
    parts += [charts._stroke("line c0", left, 20, reach, 20)]
    parts += [charts._stroke("line c0", at, 16, at, 24) for at in (left, reach)]
    more = "" if x(1 + ranking.critical) <= right else " (longer than the axis)"
    parts.append(charts._text("label", left, 11, f"critical difference {ranking.critical:.2f}{more}"))
    bars = top + 10
    for row, (first, last) in enumerate(ranking.alike):
        at = bars + _BAR * row
        a, b = x(ranking.ranks[first]) - 3, x(ranking.ranks[last]) + 3
        hover = f"cannot be told apart: {', '.join(ranking.names[first : last + 1])}"
        shape = '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="4" rx="2"><title>{}</title></rect>'
        parts.append(Markup(shape).format(a, at - 2, b - a, hover))
    start = bars + _BAR * len(ranking.alike) + 14
    for i, text in enumerate(labels):
        row = i if i < half else count - 1 - i
        at, end = start + _ROW * row, left - 6 if i < half else right + 6
        parts.append(charts._stroke("axis", x(ranking.ranks[i]), top, x(ranking.ranks[i]), at))
        parts.append(charts._stroke("axis", x(ranking.ranks[i]), at, end, at))
        style, place = ("label end", left - 10) if i < half else ("label", right + 10)
        parts.append(charts._text(style, place, at + 4, text, ranking.names[i]))
    return charts._join(parts), start + _ROW * half + 4


def _in_words(ranking: Ranking) -> str:
    same = [" and ".join((ranking.names[a], ranking.names[b])) for a, b in ranking.alike]
    joined = f"; not told apart, with all between them: {', '.join(same)}" if same else ""
    return f"{ranking}{joined}"
