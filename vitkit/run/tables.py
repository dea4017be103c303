"""Tables of a report: numbers aligned by column, intervals in small type, a confusion matrix as a heat table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from vitkit.errors import DataError
from vitkit.run.axes import MINUS, short
from vitkit.run.pictures import data_uri, png

MOST_CELLS = 25  # classes up to which a confusion matrix is a table of numbers; above, a picture and the worst pairs


def data_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], best: Mapping[str, str] | None = None) -> Markup:
    """Columns of numbers share their decimals and align right. Cells: text, numbers, booleans, None, or anything with
    `value`, `low` and `high`. `best` names columns whose "max" or "min" is set in bold."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {list(row)!r}")
    shown = [_column([row[i] for row in rows], (best or {}).get(name)) for i, name in enumerate(columns)]
    numeric = [kind for kind, _ in shown]
    head = [Markup('<th scope="col"{}>{}</th>').format(_num(n), name) for name, n in zip(columns, numeric, strict=True)]
    body = [Markup("<tr>{}</tr>").format(Markup("").join(cells[i] for _, cells in shown)) for i in range(len(rows))]
    table = '<div class="scroll"><table class="data"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    return Markup(table).format(Markup("").join(head), Markup("").join(body))


def pairs(mapping: Mapping[str, str]) -> Markup:
    """Names and values, for the details of a run."""
    rows = [Markup('<tr><th scope="row">{}</th><td>{}</td></tr>').format(k, v) for k, v in mapping.items()]
    return Markup('<div class="scroll"><table class="pairs"><tbody>{}</tbody></table></div>').format(
        Markup("").join(rows)
    )


def confusion_table(matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> Markup:
    """Counts with rows = true class, coloured by their share of the row; recall at the right, precision below.

    Raises DataError when the matrix is not square over the classes.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(classes), len(classes)):
        raise DataError(
            f"a confusion matrix of shape {counts.shape} for {len(classes)} classes", fix="one row and column a class"
        )
    if len(classes) > MOST_CELLS:
        return _large_confusion(counts, classes)
    rows_sum, columns_sum = counts.sum(1), counts.sum(0)
    turn = max(len(name) for name in classes) > 4
    head = Markup("").join(
        Markup('<th scope="col" title="{0}"><div{1}>{0}</div></th>').format(
            name, Markup(' class="turned"') if turn else ""
        )
        for name in classes
    )
    rows = []
    for i, name in enumerate(classes):
        cells = [_cell(counts[i, j], rows_sum[i], name, classes[j]) for j in range(len(classes))]
        side = Markup('<td class="side">{}</td>').format(_share(counts[i, i], rows_sum[i]))
        rows.append(
            Markup('<tr><th scope="row" title="{0}">{0}</th>{1}{2}</tr>').format(name, Markup("").join(cells), side)
        )
    last = [
        Markup('<td class="side foot">{}</td>').format(_share(counts[j, j], columns_sum[j]))
        for j in range(len(classes))
    ]
    table = (
        '<div class="scroll"><table class="confusion"><thead><tr><th class="corner">true ↓ predicted →</th>{}'
        '<th class="corner">recall</th></tr></thead><tbody>{}<tr><th scope="row">precision</th>{}'
        '<td class="side"></td></tr></tbody></table></div>'
    )
    return Markup(table).format(head, Markup("").join(rows), Markup("").join(last))


def _cell(count: float, total: float, true: str, predicted: str) -> Markup:
    share = float(count) / float(total) if total else 0.0
    kind = "zero" if not count else "dark" if share > 0.55 else ""
    hover = f"true {true}, predicted {predicted}: {short(float(count))} of {short(float(total))} ({share:.1%})"
    cell = '<td class="{}" style="--p:{:.3f}" title="{}">{}</td>'
    return Markup(cell).format(kind, share, hover, short(float(count)) if count else "·")


def _large_confusion(counts: np.ndarray, classes: Sequence[str]) -> Markup:
    """The matrix as a picture of one pixel a cell, and the pairs that are confused most."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    low, high = np.array([255, 255, 255.0]), np.array([20, 66, 120.0])
    pixels = (
        (low + (high - low) * np.sqrt(share)[..., None]).round().astype(np.uint8)
    )  # roots: rare confusions are seen
    off = counts.astype(float) * (1 - np.eye(len(classes)))
    order = [k for k in np.argsort(-off, axis=None, kind="stable")[:15] if off.flat[k] > 0]
    rows = []
    for k in order:
        i, j = divmod(int(k), len(classes))
        rows.append([classes[i], classes[j], float(counts[i, j]), _share(counts[i, j], counts[i].sum())])
    picture = Markup('<img class="heatmap" src="{}" alt="{}">').format(
        data_uri(png(pixels)), f"confusion matrix of {len(classes)} classes, rows true, columns predicted"
    )
    table = data_table(["true class", "taken for", "images", "share of the true class"], rows)
    return (
        picture
        + Markup('<p class="note">Rows are true classes, columns predicted ones, in the order of the classes; ')
        + Markup("darker is a larger share of the row. The most frequent confusions:</p>")
        + table
    )


def _share(part: float, whole: float) -> str:
    return f"{float(part) / float(whole):.1%}" if whole else "–"


def _num(numeric: bool) -> Markup:
    return Markup(' class="num"') if numeric else Markup("")


def _column(cells: Sequence[Any], best: str | None) -> tuple[bool, list[Markup]]:
    """Whether a column is numeric, and its cells as td elements."""
    values = [_value(cell) for cell in cells]
    there = [value for value in values if value is not None]
    numeric = bool(there) and all(
        value is not None or cell in (None, "", "–") or _missing(cell)
        for value, cell in zip(values, cells, strict=True)
    )
    if not numeric:
        return False, [Markup("<td>{}</td>").format(_text(cell)) for cell in cells]
    limits = [_limits(cell) for cell in cells]
    style = number_style(there + [limit for pair in limits for limit in pair])
    target = {"max": max, "min": min}[best](there) if best else None
    intervals = [f"{style(pair[0])} to {style(pair[1])}" if pair else "" for pair in limits]
    room = max(map(len, intervals))
    return True, [
        _number_cell(value, style, target, interval, room) for value, interval in zip(values, intervals, strict=True)
    ]


def _limits(cell: Any) -> tuple[float, ...]:
    """Both ends of a cell's interval, or nothing."""
    low, high = _finite(getattr(cell, "low", None)), _finite(getattr(cell, "high", None))
    return (low, high) if low is not None and high is not None else ()


def _number_cell(
    value: float | None, style: Callable[[float], str], target: float | None, interval: str, room: int
) -> Markup:
    """`room` keeps the space of the longest interval of the column, so that values stay under each other."""
    text: Markup | str = "–" if value is None else style(value)
    if target is not None and value == target:
        text = Markup("<b>{}</b>").format(text)
    if room:
        text += Markup('<small style="min-width:{:.1f}ch">{}</small>').format(room * 0.92, interval)
    if value is None:
        return Markup('<td class="num">{}</td>').format(text)
    return Markup('<td class="num" data-v="{!r}">{}</td>').format(value, text)


def number_style(values: Sequence[float]) -> Callable[[float], str]:
    """One way to write all `values` of a column: whole numbers, shared decimals, or four figures where sizes differ widely."""
    if all(value == int(value) for value in values):
        return lambda value: f"{value:,.0f}".replace("-", MINUS) if value == int(value) else short(value)
    sizes = [abs(value) for value in values if value]
    if max(sizes) >= 1e6 or min(sizes) < 1e-4 or max(sizes) / min(sizes) >= 1e5:
        return short
    decimals = min(4, max(1, 3 - math.floor(math.log10(max(sizes)))))
    while decimals > 1 and all(round(value, decimals - 1) == value for value in values):
        decimals -= 1
    return lambda value: f"{value:,.{decimals}f}".replace("-", MINUS)


def _value(cell: Any) -> float | None:
    """The number in a cell, if that is what it holds."""
    if isinstance(cell, bool | np.bool_ | str) or cell is None:
        return None
    return _finite(getattr(cell, "value", cell))


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _missing(cell: Any) -> bool:
    inner = getattr(cell, "value", cell)
    return inner is None or (isinstance(inner, float) and math.isnan(inner))


def _text(cell: Any) -> str:
    if cell is None or _missing(cell):
        return "–"
    if isinstance(cell, bool | np.bool_):
        return "yes" if cell else "no"
    value = _value(cell)
    return short(value) if value is not None else str(cell)
