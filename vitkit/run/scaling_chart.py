"""Score against cost on a logarithmic axis, in the style of `vitkit.run.charts`: a line a backbone, the front ringed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vitkit.run import charts
from vitkit.run.axes import linear_axis, log_axis, short

# (cost, score, low, high, hover text, on the front)
Point = tuple[float, float, float, float, str, bool]


def cost_chart(lines: Mapping[str, Sequence[Point]], *, title: str, x: str, y: str) -> Markup:
    """The picture as SVG, once for wide and once for narrow places. Rings and the dashed staircase: the front."""
    keep = {
        name: sorted(p for p in points if p[0] > 0 and math.isfinite(p[0] + p[1])) for name, points in lines.items()
    }
    keep = {name: points for name, points in keep.items() if points}
    if not keep:
        return charts._empty("no cell was computed")
    every = [p for points in keep.values() for p in points]
    heights = [v for p in every for v in p[1:4] if math.isfinite(v)]

    def draw(size: Any) -> tuple[Markup, float]:
        x_axis = log_axis(min(p[0] for p in every), max(p[0] for p in every))
        frame = charts._Frame(size, x_axis, linear_axis(min(heights), max(heights)), right=14, top=28)
        parts = [frame.grid(x, y), _front(every, frame)]
        for index, points in enumerate(keep.values()):
            style = charts._colour(index)
            parts.append(charts._path(f"line {style}", [p[:2] for p in points], frame))
            for cost, score, low, high, hover, on_front in points:
                at = frame.x(cost)
                if math.isfinite(low + high):
                    whisker = Markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>')
                    parts.append(whisker.format(at, frame.y(high), frame.y(low)))
                if on_front:
                    ring = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="7.5" fill="none" stroke="currentColor"/>')
                    parts.append(ring.format(at, frame.y(score)))
                parts.append(charts._circle(f"dot {style}", at, frame.y(score), 4.0, hover))
        return charts._join(parts), size.height

    about = "; ".join(
        f"{name}: " + ", ".join(f"{short(p[1])} at {short(p[0])}{' (front)' if p[5] else ''}" for p in points)
        for name, points in keep.items()
    )
    return charts._figure(draw, title, about, list(keep), legend_when_wide=True, kind=" dots")


def _front(every: Sequence[Point], frame: Any) -> Markup:
    """The best score that a cost can buy, as a staircase to the right edge."""
    points = sorted(p for p in every if p[5])
    if not points:
        return Markup("")
    steps = [f"M{frame.x(points[0][0]):.1f} {frame.y(points[0][1]):.1f}"]
    steps += [f"H{frame.x(p[0]):.1f}V{frame.y(p[1]):.1f}" for p in points[1:]]
    return Markup('<path class="reference" fill="none" d="{}H{:.1f}"/>').format("".join(steps), frame.right)
