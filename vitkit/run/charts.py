"""Charts as inline SVG, drawn by arithmetic: no plotting library, no script, readable in both themes and on a phone.

Every chart is drawn twice, for wide and for narrow places, and the style sheet of the report shows the one that fits: an
SVG that merely shrinks takes its labels with it below what can be read. Colours are CSS variables (`--c0` ... `--c5`),
set by the report for light and dark; series beyond the sixth repeat them dashed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from vitkit.run.axes import Axis, Point, is_noisy, linear_axis, log_axis, running_mean, short, spread, thin

COLOURS = 6
HOVER_POINTS = 120  # per line: above this the targets overlap more than they help
_CHAR = 6.8  # generous width of a character at 12 px, so that labels never overlap in a wider font

Series = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class _Size:
    width: int
    height: int
    wide: bool
    x_ticks: int


_WIDE, _NARROW = _Size(760, 300, True, 8), _Size(380, 250, False, 5)


def line_chart(
    series: Series,
    *,
    title: str,
    x: str = "",
    y: str = "",
    log_x: bool = False,
    log_y: bool = False,
    smooth: bool = False,
) -> Markup:
    """Lines of (x, y), or (x, y, low, high) for a shaded band. NaN breaks a line; so do values <= 0 on a log axis.

    `smooth` draws a running mean over each long and noisy line, and the line itself faintly behind it.
    """
    lines: list[_Line] = []
    for name, points in series.items():
        usable = [_usable(point, log_x, log_y) for point in points]
        if any(point is not None for point in usable):
            lines.append(_Line(str(name), usable, len(lines), smooth))
    if not lines:
        return _empty("no finite value was logged")
    xs = [point[0] for line in lines for point in line.finite]
    ys = [value for line in lines for point in line.finite for value in point[1:]]
    direct = 1 < len(lines) <= COLOURS and all(len(line.name) <= 28 for line in lines)

    def draw(size: _Size) -> tuple[Markup, float]:
        x_axis = log_axis(min(xs), max(xs)) if log_x else linear_axis(min(xs), max(xs), about=size.x_ticks, tight=True)
        y_axis = (log_axis if log_y else linear_axis)(min(ys), max(ys))
        labelled = lines if direct and size.wide else []
        room = max((_width(line.end_label) for line in labelled), default=-16) + 30
        frame = _Frame(size, x_axis, y_axis, right=room, top=28 if y else 10)
        parts = [frame.grid(x, y), *(line.draw(frame) for line in lines), _end_labels(labelled, frame)]
        return _join(parts), size.height

    names = [line.name for line in lines]
    return _figure(draw, title, _in_words(lines, x), names if len(names) > 1 else [], legend_when_wide=not direct)


def scatter_chart(groups: Mapping[str, Sequence[Sequence[Any]]], *, title: str, x: str = "", y: str = "") -> Markup:
    """Groups of points (x, y) or (x, y, hover text)."""
    keep = {str(k): [p for p in points if math.isfinite(p[0] + p[1])] for k, points in groups.items()}
    keep = {name: points for name, points in keep.items() if points}
    if not keep:
        return _empty("no finite value was given")
    xs = [p[0] for points in keep.values() for p in points]
    ys = [p[1] for points in keep.values() for p in points]
    radius = 4.0 if len(xs) <= 300 else 2.6

    def draw(size: _Size) -> tuple[Markup, float]:
        frame = _Frame(
            size, linear_axis(min(xs), max(xs)), linear_axis(min(ys), max(ys)), right=14, top=28 if y else 10
        )
        parts = [frame.grid(x, y)]
        for index, (name, points) in enumerate(keep.items()):
            for px, py, *more in points:
                hover = f"{name}: {more[0]}" if more else f"{name}: {short(px)}, {short(py)}"
                parts.append(_circle(f"dot {_colour(index)}", frame.x(px), frame.y(py), radius, hover))
        return _join(parts), size.height

    about = f"{len(xs)} points: " + ", ".join(f"{name} ({len(points)})" for name, points in keep.items())
    return _figure(draw, title, about, list(keep) if len(keep) > 1 else [], legend_when_wide=True, kind=" dots")


def bar_chart(
    items: Sequence[Sequence[Any]], *, title: str, unit: str = "", reference: tuple[str, float] | None = None
) -> Markup:
    """Horizontal bars of (label, value) or (label, value, low, high), from zero; `reference` is a named dashed line."""
    rows = [_Bar.of(item, unit) for item in items if item[1] is not None and math.isfinite(item[1])]
    if not rows:
        return _empty("no finite value was given")
    values = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    values += [0.0, *([reference[1]] if reference else [])]

    def draw(size: _Size) -> tuple[Markup, float]:
        return _draw_bars(size, rows, linear_axis(min(values), max(values), about=6 if size.wide else 4), reference)

    return _figure(draw, title, "; ".join(row.hover for row in rows), [], legend_when_wide=False)


# ---- lines ---------------------------------------------------------------------------------------------------------------


class _Line:
    """One series: thinned for drawing, with its running mean where asked."""

    def __init__(self, name: str, points: list[Point | None], index: int, smooth: bool):
        self.name, self.index = name, index
        self.finite = [point for point in points if point is not None]
        self.points = thin(points)
        self.band = [point for point in self.points if point is not None and len(point) == 4]
        noisy = smooth and not self.band and is_noisy(self.finite)
        self.mean = running_mean(self.finite, max(5, len(self.finite) // 25)) if noisy else None
        self.last = (self.mean or self.finite)[-1]
        self.end_label = f"{name} {short(self.last[1])}"

    def draw(self, frame: _Frame) -> Markup:
        style, parts = _colour(self.index), []
        if self.band:
            edge = [(p[0], p[3]) for p in self.band] + [(p[0], p[2]) for p in reversed(self.band)]
            corners = " ".join(f"{frame.x(px):.1f},{frame.y(py):.1f}" for px, py in edge)
            parts.append(Markup('<polygon class="band {}" points="{}"/>').format(style, corners))
        parts.append(_path(f"line {style} faint" if self.mean else f"line {style}", self.points, frame))
        if self.mean:
            parts.append(_path(f"line {style}", thin(self.mean), frame))
        shown = [point for point in self.points if point is not None]
        if len(shown) <= 24:
            parts += [_circle(f"dot {style}", frame.x(p[0]), frame.y(p[1]), 2.8) for p in shown]
        if frame.size.wide and len(shown) <= HOVER_POINTS:
            parts += [_circle(f"hit {style}", frame.x(p[0]), frame.y(p[1]), 7, self._hover(p)) for p in shown]
        return _join(parts)

    def _hover(self, point: Point) -> str:
        between = f" ({short(point[2])} to {short(point[3])})" if len(point) == 4 else ""
        return f"{self.name}: {short(point[1])}{between} at {short(point[0])}"


def _usable(point: Sequence[float], log_x: bool, log_y: bool) -> Point | None:
    """The point as floats, without a band that is not there; None where it cannot be drawn."""
    values = tuple(math.nan if value is None else float(value) for value in point)
    if len(values) == 4 and not math.isfinite(values[2] + values[3]):
        values = values[:2]
    drawable = all(math.isfinite(value) for value in values)
    drawable = drawable and not (log_x and values[0] <= 0) and not (log_y and min(values[1:]) <= 0)
    return values if drawable else None


def _end_labels(lines: Sequence[_Line], frame: _Frame) -> Markup:
    """Names at the right ends of the lines, pushed apart where they would touch, with a stub of the line's colour."""
    order = sorted(lines, key=lambda line: frame.y(line.last[1]))
    heights = spread([frame.y(line.last[1]) for line in order], 16.0, frame.top, frame.bottom)
    parts = []
    for line, at in zip(order, heights, strict=True):
        end = frame.right + 10
        name = Markup('<tspan class="value"> {}</tspan>').format(short(line.last[1]))
        parts.append(_stroke(f"line {_colour(line.index)}", end, at, end + 10, at))
        parts.append(_text("label", end + 15, at + 4, Markup("{}{}").format(line.name, name)))
    return _join(parts)


def _in_words(lines: Sequence[_Line], x: str) -> str:
    """The chart for those who cannot see it: first, last, lowest and highest value of every line."""
    out = []
    for line in lines:
        ys = [point[1] for point in line.finite]
        out.append(
            f"{line.name}: {len(ys)} points, from {short(ys[0])} at {x or 'x'} {short(line.finite[0][0])} to {short(ys[-1])} "
            f"at {short(line.finite[-1][0])}, lowest {short(min(ys))}, highest {short(max(ys))}"
        )
    return "; ".join(out)


# ---- bars ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bar:
    label: str
    value: float
    low: float | None
    high: float | None
    text: str
    hover: str

    @classmethod
    def of(cls, item: Sequence[Any], unit: str) -> _Bar:
        label, value = str(item[0]), float(item[1])
        low, high = item[2:4] if len(item) >= 4 else (None, None)
        if low is None or high is None or not math.isfinite(low + high):
            low = high = None
        text = f"{short(value)} {unit}".strip()
        between = f" ({short(low)} to {short(high)})" if low is not None and high is not None else ""
        return cls(label, value, low, high, text, f"{label}: {text}{between}")


def _draw_bars(
    size: _Size, rows: Sequence[_Bar], axis: Axis, reference: tuple[str, float] | None
) -> tuple[Markup, float]:
    """The label is left of its bar in a wide place and above it in a narrow one; the value follows bar and interval."""
    left = max(_width(_cut(row.label, 44)) for row in rows) + 14 if size.wide else 2.0
    right = size.width - max(_width(row.text) for row in rows) - 14
    thick, pitch, top = (15, 30, 8.0) if size.wide else (13, 42, 8.0)
    top += 18 if reference else 0
    bottom = top + pitch * len(rows)

    def x(value: float) -> float:
        return left + axis.at(value) * (right - left)

    parts = []
    for tick, label in zip(axis.ticks, axis.labels(), strict=True):
        parts.append(_stroke("rule", x(tick), top, x(tick), bottom))
        parts.append(_text("tick" if x(tick) < 12 else "tick mid", x(tick), bottom + 16, label))
    parts.append(_stroke("axis", x(0.0), top, x(0.0), bottom))
    for i, row in enumerate(rows):
        middle = top + pitch * i + (pitch / 2 if size.wide else pitch - 12)
        at = (left - 10, middle + 4) if size.wide else (left, middle - 12)
        parts.append(
            _text("label end" if size.wide else "label", *at, _cut(row.label, 44 if size.wide else 52), row.label)
        )
        a, b = sorted((x(0.0), x(row.value)))
        bar = '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="2"><title>{}</title></rect>'
        parts.append(Markup(bar).format(a, middle - thick / 2, max(b - a, 0.5), thick, row.hover))
        if row.low is not None and row.high is not None:
            c, d = x(row.low), x(row.high)
            shape = f"M{c:.1f} {middle:.1f}H{d:.1f}M{c:.1f} {middle - 4:.1f}v8M{d:.1f} {middle - 4:.1f}v8"
            parts.append(Markup('<path class="whisker" d="{}"/>').format(shape))
            b = max(b, d)
        parts.append(_text("value", b + 8, middle + 4, row.text))
    if reference:
        there = x(reference[1])
        parts.append(_stroke("reference", there, top - 4, there, bottom))
        place, shift = ("name end", -5) if there > size.width * 0.6 else ("name", 5)
        parts.append(_text(place, there + shift, top - 8, f"{reference[0]} {short(reference[1])}"))
    return _join(parts), bottom + 24


# ---- the frame and small SVG pieces ---------------------------------------------------------------------------------------


class _Frame:
    """The plot area of one chart: pixels for values, and the grid."""

    def __init__(self, size: _Size, x_axis: Axis, y_axis: Axis, *, right: float, top: float):
        self.size, self.x_axis, self.y_axis = size, x_axis, y_axis
        self.left = 12 + max(_width(label) for label in y_axis.labels())
        self.top, self.right, self.bottom = top, size.width - max(right, 14.0), size.height - 42.0

    def x(self, value: float) -> float:
        return self.left + self.x_axis.at(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.at(value) * (self.bottom - self.top)

    def grid(self, x: str, y: str) -> Markup:
        """Hairlines with labels, the x axis with its ticks, and both names (that of y above the axis, not turned)."""
        parts = []
        for tick, label in zip(self.y_axis.ticks, self.y_axis.labels(), strict=True):
            parts.append(_stroke("rule", self.left, self.y(tick), self.right, self.y(tick)))
            parts.append(_text("tick end", self.left - 8, self.y(tick) + 4, label))
        parts.append(_stroke("axis", self.left, self.bottom, self.right, self.bottom))
        free = -math.inf
        for tick, label in zip(self.x_axis.ticks, self.x_axis.labels(), strict=True):
            at, half = self.x(tick), _width(label) / 2
            parts.append(_stroke("axis", at, self.bottom, at, self.bottom + 4))
            if at - half >= free and at + half <= self.size.width:
                parts.append(_text("tick mid", at, self.bottom + 18, label))
                free = at + half + 6
        if x:
            parts.append(_text("name mid", (self.left + self.right) / 2, self.size.height - 5, x))
        if y:
            parts.append(_text("name", 0, 12, _cut(y, 100 if self.size.wide else 52)))
        return _join(parts)


def _figure(
    draw: Callable[[_Size], tuple[Markup, float]],
    title: str,
    about: str,
    names: Sequence[str],
    *,
    legend_when_wide: bool,
    kind: str = "",
) -> Markup:
    """Both drawings, with the legend where names are not written beside the lines."""
    svg = (
        '<svg class="{}" viewBox="0 0 {} {:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    )
    parts = []
    if names:
        keys = [Markup('<li><i class="key {}"></i>{}</li>').format(_colour(i), name) for i, name in enumerate(names)]
        always = "" if legend_when_wide else " narrow"
        parts.append(Markup('<ul class="legend{}">{}</ul>').format(always, _join(keys)))
    for size in (_WIDE, _NARROW):
        body, height = draw(size)
        parts.append(Markup(svg).format("wide" if size.wide else "narrow", size.width, height, title, about, body))
    return Markup('<div class="chart{}">{}</div>').format(kind, _join(parts))


def _colour(index: int) -> str:
    return f"c{index % COLOURS}" + (" dashed" if index >= COLOURS else "")


def _path(style: str, points: Sequence[Point | None], frame: _Frame) -> Markup:
    """A line through the points, lifted where one is missing."""
    steps, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        steps.append(f"{pen}{frame.x(point[0]):.1f} {frame.y(point[1]):.1f}")
        pen = "L"
    return Markup('<path class="{}" d="{}"/>').format(style, "".join(steps))


def _stroke(style: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(style, x1, y1, x2, y2)


def _text(style: str, x: float, y: float, text: str, whole: str = "") -> Markup:
    hover = Markup("<title>{}</title>").format(whole) if whole and whole != text else ""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}{}</text>').format(style, x, y, text, hover)


def _circle(style: str, x: float, y: float, r: float, hover: str = "") -> Markup:
    inside = Markup("<title>{}</title>").format(hover) if hover else ""
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:g}">{}</circle>').format(style, x, y, r, inside)


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _width(text: str) -> float:
    return len(text) * _CHAR


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def _empty(why: str) -> Markup:
    return Markup('<p class="empty">Nothing to draw: {}.</p>').format(why)
