"""A report is one HTML file with everything inside it: no network, no external font, no script but the sorting of tables.

The file's own content policy forbids the rest, so that a class named `<script>` stays a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vitkit.run import charts
from vitkit.run.axes import short
from vitkit.run.document import document
from vitkit.run.files import atomic_write
from vitkit.run.pictures import data_uri, png, size_of
from vitkit.run.tables import confusion_table, data_table, pairs
from vitkit.run.values import flatten, shown

SORT = """
for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0], heads = table.tHead.rows[0].cells;
  if (body.rows.length < 2) continue;
  table.classList.add("sortable");
  const key = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
  const order = (a, b) => isNaN(a) || isNaN(b) ? String(a).localeCompare(b, undefined, {numeric: true}) : a - b;
  [...heads].forEach((head, i) => {
    head.tabIndex = 0;
    head.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const one of heads) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => order(key(a, i), key(b, i)) * (up ? 1 : -1)));
    };
    head.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); head.click(); } };
  });
}
"""


class Report:
    """Pieces in reading order. A titled piece is a section of its own, unless `section` opened one: then it belongs there."""

    def __init__(self, title: str, subtitle: str = "", *, kicker: str = "vitkit"):
        self.title, self.subtitle, self.kicker = title, subtitle, kicker
        self._verdict = ""
        self._facts: list[tuple[str, str, str]] = []
        self._sections: list[dict[str, Any]] = []
        self._open = False

    def sentence(self, text: str) -> None:
        """The first sentence of a report without sections is its verdict, in larger type; any other is a paragraph."""
        if not self._verdict and not self._sections:
            self._verdict = text
        else:
            self._add("", Markup('<p class="prose">{}</p>').format(text))

    def facts(self, items: Sequence[tuple[str, Any] | tuple[str, Any, str]]) -> None:
        """Key figures under the verdict: (name, value) or (name, value, small print)."""
        for name, value, *note in items:
            self._facts.append(
                (name, value if isinstance(value, str) else short(float(value)), note[0] if note else "")
            )

    def section(self, title: str, text: str = "") -> None:
        """Open a section; the titles of the pieces that follow become figure titles in it."""
        self._open = True
        self._sections.append({"title": title, "blocks": []})
        if text:
            self.sentence(text)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        note: str = "",
        *,
        best: Mapping[str, str] | None = None,
    ) -> None:
        """Cells are text, numbers, None, or anything with value, low and high. `best`: {column: "max" or "min"} in bold."""
        self._add(title, data_table(columns, rows, best), note)

    def curves(
        self,
        title: str,
        series: charts.Series,
        x: str = "",
        y: str = "",
        *,
        log_x: bool = False,
        log_y: bool = False,
        smooth: bool = False,
        half: bool = False,
        note: str = "",
    ) -> None:
        """Lines of (x, y) or (x, y, low, high); `half` puts two such charts beside each other where there is room."""
        chart = charts.line_chart(series, title=title, x=x, y=y, log_x=log_x, log_y=log_y, smooth=smooth)
        self._add(title, chart, note, kind="half" if half else "whole")

    def scatter(
        self, title: str, groups: Mapping[str, Sequence[Sequence[Any]]], x: str = "", y: str = "", *, note: str = ""
    ) -> None:
        """Groups of points (x, y) or (x, y, hover text)."""
        self._add(title, charts.scatter_chart(groups, title=title, x=x, y=y), note)

    def bars(
        self,
        title: str,
        items: Sequence[Sequence[Any]],
        note: str = "",
        *,
        unit: str = "",
        reference: tuple[str, float] | None = None,
    ) -> None:
        """Bars of (label, value) or (label, value, low, high); `reference` (name, value) is a dashed line, e.g. chance."""
        self._add(title, charts.bar_chart(items, title=title, unit=unit, reference=reference), note)

    def pictures(
        self, title: str, rows: Sequence[Sequence[tuple[Any, str]]], note: str = "", *, columns: Sequence[str] = ()
    ) -> None:
        """A grid of (uint8 picture (H, W, 3) or (H, W), caption). Raises DataError on other types and shapes."""
        self.gallery(title, [[(png(picture), caption) for picture, caption in row] for row in rows], columns, note)

    def confusion(self, title: str, matrix: Sequence[Sequence[float]], classes: Sequence[str], note: str = "") -> None:
        """Counts with rows = true class. Raises DataError when the matrix is not square over `classes`."""
        self._add(title, confusion_table(matrix, classes), note)

    def details(self, title: str, mapping: Mapping[str, Any]) -> None:
        """A folded list of settings; nested mappings get dotted names."""
        flat = flatten(mapping)
        inside = pairs({key: shown(flat, key) for key in flat})
        if not self._open:
            self._sections.append({"title": "", "blocks": []})
        self._add("", Markup("<details><summary>{}</summary>{}</details>").format(title, inside), kind="fold")

    def write(self, path: str | Path) -> Path:
        """Write the file in one step and return its path."""
        atomic_write(path, self.html())
        return Path(path)

    def html(self) -> str:
        """The whole document."""
        used: set[str] = set()
        sections = [{**section, "id": _slug(section["title"], used)} for section in self._sections if section["blocks"]]
        named = [(section["id"], section["title"]) for section in sections if section["title"]]
        return document(
            "report.html",
            script=SORT,
            title=self.title,
            subtitle=self.subtitle,
            kicker=self.kicker,
            verdict=self._verdict,
            facts=self._facts,
            contents=named if len(named) > 3 else [],
            sections=sections,
        )

    def _add(self, title: str, body: Markup, note: str = "", *, kind: str = "whole") -> None:
        if not self._sections or (title and not self._open):
            self._sections.append({"title": "" if self._open else title, "blocks": []})
        heading = Markup("<h3>{}</h3>").format(title) if title and self._open else ""
        small = Markup('<p class="note">{}</p>').format(note) if note else ""
        block = Markup('<div class="{}">{}{}{}</div>').format(kind, heading, body, small)
        self._sections[-1]["blocks"].append(block)

    def gallery(
        self, title: str, rows: Sequence[Sequence[tuple[bytes, str]]], columns: Sequence[str] = (), note: str = ""
    ) -> None:
        """`pictures` from PNG bytes that already exist."""
        full = [list(row) for row in rows if row]
        if full:
            self._add(title, _gallery(full, list(columns)), note)


def _gallery(rows: list[list[tuple[bytes, str]]], columns: list[str]) -> Markup:
    """Rows of PNG pictures under their column names, in as many blocks side by side as fit a page."""
    count = max(len(row) for row in rows)
    same = len(rows) > 1 and all(len(row) == count for row in rows)
    same = same and all(len({row[c][1] for row in rows}) == 1 for c in range(count))
    if not columns and same:  # captions that every row repeats are names of columns
        columns = [caption for _, caption in rows[0]]
    natural = max(max(size_of(content)) for row in rows for content, _ in row)
    size = natural * max(1, 112 // natural) if natural < 112 else min(natural, 224)
    size = min(size, max(48, 800 // count - 10))
    beside = max(1, min(800 // (count * (size + 10) + 28), math.ceil(len(rows) / 2)))
    each = math.ceil(len(rows) / beside)
    blocks = []
    for start in range(0, len(rows), each):
        cells = [
            Markup('<div class="head">{}</div>').format(name) for name in (columns + [""] * count)[:count] if columns
        ]
        for row in rows[start : start + each]:
            cells += [_picture(content, caption, caption in columns) for content, caption in row]
            cells += [Markup("<div></div>")] * (count - len(row))
        block = Markup('<div class="block" style="--n:{};--size:{}px">{}</div>')
        blocks.append(block.format(count, size, Markup("").join(cells)))
    return Markup('<div class="gallery">{}</div>').format(Markup("").join(blocks))


def _picture(content: bytes, caption: str, told: bool) -> Markup:
    width, height = size_of(content)
    below = Markup("<figcaption>{}</figcaption>").format(caption) if caption and not told else ""
    image = '<figure><img{} src="{}" width="{}" height="{}" alt="{}">{}</figure>'
    crisp = Markup(' class="crisp"') if max(width, height) < 112 else ""
    return Markup(image).format(crisp, data_uri(content), width, height, caption or "picture", below)


def _slug(title: str, used: set[str]) -> str:
    """An anchor that no other section has."""
    base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    name = next(name for name in (base, *(f"{base}-{n}" for n in range(2, len(used) + 3))) if name not in used)
    used.add(name)
    return name
