"""Arithmetic of charts: axes with ticks at round numbers, thinning and smoothing of lines, how numbers are written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
MOST_POINTS = 400  # drawn per line: finer than pixels

Point = tuple[float, ...]


@dataclass(frozen=True)
class Axis:
    """A range of values, its tick positions, and the way from a value to [0, 1]."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Position of `value` between the two ends, 0 to 1."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> list[str]:
        """Tick labels; on a linear axis all with the same number of decimals."""
        if self.log:
            return [short(tick) for tick in self.ticks]
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(self.ticks[0]) or 1.0
        largest = max(abs(tick) for tick in self.ticks)
        if largest >= 1e7 or step < 0.9e-3:
            power = math.floor(math.log10(largest) + 1e-9)
            marks = _decimals([tick / 10.0**power for tick in self.ticks], step / 10.0**power)
            return ["0" if tick == 0 else f"{mark}e{power}" for tick, mark in zip(self.ticks, marks, strict=True)]
        if largest >= 10_000 and step >= 100:
            marks = _decimals([tick / 1000 for tick in self.ticks], step / 1000)
            return ["0" if tick == 0 else f"{mark}k" for tick, mark in zip(self.ticks, marks, strict=True)]
        return _decimals(list(self.ticks), step)


def linear_axis(low: float, high: float, *, about: int = 6, tight: bool = False) -> Axis:
    """An axis over [low, high] with about that many ticks at 1, 2, 2.5 or 5 times a power of ten.

    Its ends are ticks, or with `tight` exactly `low` and `high`. A single value gets room on both sides.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.1 or 1.0
        low, high, tight = low - room, high + room, False
    raw = (high - low) / max(about - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    if tight:
        inside = tuple(tick for tick in ticks if low - 1e-9 * step <= tick <= high + 1e-9 * step)
        return Axis(low, high, inside or (low, high))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float, *, about: int = 5) -> Axis:
    """A logarithmic axis over [low, high] > 0: ticks at powers of ten, with 2 and 5 between them over a short range."""
    if high / low < 1.5:
        low, high = low / 1.5, high * 1.5
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first <= 2:
        marks = [m * 10.0**p for p in range(first, last + 1) for m in (1, 2, 5)]
        start = max(mark for mark in marks if mark <= low * 1.001)
        end = min(mark for mark in marks if mark >= high * 0.999)
        return Axis(start, end, tuple(mark for mark in marks if start <= mark <= end), log=True)
    stride = math.ceil((last - first) / about)
    return Axis(10.0**first, 10.0**last, tuple(10.0**p for p in range(first, last + 1, stride)), log=True)


def short(value: float) -> str:
    """A number in four figures: thousands separated, a power of ten only where zeros would have to be counted."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        mantissa, _, power = f"{value:.3e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(power)}" if value > 0 else f"{MINUS}{mantissa[1:]}e{int(power)}"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", MINUS)


def is_noisy(points: Sequence[Sequence[float]]) -> bool:
    """Whether a long line goes up and down so much that its running mean tells more: over four times its range in all."""
    ys = [point[1] for point in points if point[1] is not None and math.isfinite(point[1])]
    travelled = sum(abs(b - a) for a, b in itertools.pairwise(ys))
    return len(ys) >= 80 and travelled > 4 * (max(ys) - min(ys))


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean over `window` points; near the ends over those of them that exist."""
    total = [0.0, *itertools.accumulate(point[1] for point in points)]
    out: list[Point] = []
    for i, point in enumerate(points):
        first, last = max(0, i - window // 2), min(len(points), i + window // 2 + 1)
        out.append((point[0], (total[last] - total[first]) / (last - first)))
    return out


def thin(points: Sequence[Point | None]) -> list[Point | None]:
    """At most `MOST_POINTS`: of each stretch its lowest and highest point, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return list(points)
    out: list[Point | None] = []
    stretches = MOST_POINTS // 2
    for k in range(stretches):
        part = points[k * len(points) // stretches : (k + 1) * len(points) // stretches]
        heights = [(point[1], i) for i, point in enumerate(part) if point is not None]
        out += [part[i] for i in sorted({min(heights)[1], max(heights)[1]})] if heights else [None]
    return out


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted positions moved as little as a greedy pass can so that neighbours are `gap` apart and all lie in [low, high]."""
    out = list(wanted)
    for i in range(1, len(out)):
        out[i] = max(out[i], out[i - 1] + gap)
    if out and out[-1] > high:
        out[-1] = max(high, low + gap * (len(out) - 1))
        for i in range(len(out) - 2, -1, -1):
            out[i] = min(out[i], out[i + 1] - gap)
    return out


def _decimals(values: list[float], step: float) -> list[str]:
    """`values`, multiples of `step`, with just the decimals that tell them apart."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if any(abs(round(value, decimals) - value) > step * 1e-3 for value in values):
        decimals += 1  # steps of 0.25
    return [f"{value:.{decimals}f}".replace("-", MINUS) for value in values]
