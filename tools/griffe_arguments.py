"""Griffe extension: lines `name: text` of a docstring that explain a function's parameters become a list.

The docstrings are plain text; without this, Markdown would run such lines together into one paragraph.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMES = re.compile(r"^(\w+(?:, \w+)*)(?=: )")


class Arguments(griffe.Extension):
    """Looks at every function's docstring once it is loaded."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            names = {parameter.name for parameter in func.parameters}
            func.docstring.value = listed(func.docstring.value, names)


def listed(text: str, names: set[str]) -> str:
    """`text` with the lines about `names` as list items, continuation lines kept in them."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        found = _NAMES.match(line)
        if found and set(found[1].split(", ")) <= names:
            if not inside:
                out.append("")
            quoted = ", ".join(f"`{name}`" for name in found[1].split(", "))
            out.append(f"- {quoted}{line[found.end() :]}")
            inside = True
        elif inside and line.startswith("    "):
            out.append("  " + line.strip())
        else:
            if inside and line.strip():
                out.append("")
            inside = False
            out.append(line)
    return "\n".join(out)
