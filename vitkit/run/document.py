"""HTML files that need nothing else: a template of this folder, filled in, that runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from vitkit.run.environment import vitkit_version


def document(template: str, *, script: str | None = None, trim: bool = False, **values: Any) -> str:
    """`template` (report.html, gallery.html, explain.html) with `values`, everything escaped.

    script: the only one that the page's Content-Security-Policy allows; by default the last in the template. trim: leave
    out the white space around template tags.
    """
    from jinja2 import DictLoader, Environment

    folder = files("vitkit.run")
    sources = {name: folder.joinpath(name).read_text("utf-8") for name in (template, "head.html")}
    if script is None:
        script = sources[template].rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, trim_blocks=trim, lstrip_blocks=trim, loader=DictLoader(sources))
    page = environment.get_template(template)
    return page.render(script=Markup(script), script_hash=f"sha256-{digest}", version=vitkit_version(), **values)


def embedded(data: Any) -> Markup:
    """JSON that no name or label can break out of; pages set it as text only."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), default=str)
    return Markup(text.replace("<", "\\u003c"))
