"""MkDocs hooks: fill the documentation's markers from source and result files when it is built.

    <!-- methods -->                          every method, with its paper
    <!-- method sections -->                  docstring and settings of every method without a page of its own
    <!-- doc: adapt adaptformer -->           a method's module docstring
    <!-- settings: adapt adaptformer -->      a method's settings and its own defaults of shared ones
    <!-- settings: shared -->                 the settings that methods share
    <!-- results: quality adaptformer -->     benchmarks/results/quality/adaptformer.json as tables
    <!-- recipe: mae_pretrain_vit_b -->       recipes/mae_pretrain_vit_b.yaml
    <!-- picture: img/adaptformer.png | what it shows -->   the picture, where the file exists

Nothing that is generated is committed, so it cannot go stale. A marker that names something that does not exist stops
the build; a result that was not measured yet is said to be so.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from mkdocs.exceptions import PluginError

from vitkit import settings as shared
from vitkit.run import discover
from vitkit.run.config import type_words

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RECIPES, DOCS = ROOT / "benchmarks" / "results", ROOT / "recipes", ROOT / "docs"
MARKER = re.compile(
    r"^<!-- (methods|method sections|doc|settings|results|recipe|picture)(?:: (.*?))? -->$", re.MULTILINE
)
KINDS = ("quality", "speed", "composition")
WIDTH = 88  # characters of a code line that fit a page
RESULT_KEYS = ("system", "kind", "claim", "holds", "measured", "command", "machine", "versions", "seconds", "tables")
# A page must be readable offline: nothing may be loaded from elsewhere. Plain <a> links are fine.
FOREIGN = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?https?://"
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace every marker that stands on a line of its own, outside code blocks."""
    depth = page.file.src_uri.count("/")
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else MARKER.sub(lambda found: fill(found[1], found[2] or "", depth), part)
        for part in parts
    )


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse pages that would load anything over the network."""
    found = FOREIGN.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads something from outside: {output[found.start() :][:120]!r}")
    return output


def fill(name: str, words: str, depth: int = 0) -> str:
    """What stands in the place of a marker, on a page `depth` folders below docs/."""
    if name == "methods":
        return methods_table(depth)
    if name == "method sections":
        return method_sections(depth)
    if name == "settings" and words == "shared":
        return shared_settings()
    if name == "recipe":
        return recipe(words)
    if name == "picture":
        file, _, caption = words.partition("|")
        return picture(file.strip(), caption.strip(), depth)
    first, _, second = words.partition(" ")
    if not second:
        raise PluginError(f"the marker '{name}: {words}' needs two words")
    if name == "settings":
        return method_settings(first, second, depth)
    return {"doc": method_doc, "results": results}[name](first, second)


# ---- methods ---------------------------------------------------------------------------------------------------------


def methods_table(depth: int = 0) -> str:
    rows = []
    for method in discover.methods():
        what = method.summary.partition(": ")[2] or method.summary
        target = page_of(method)
        link = f"{'../' * depth}{target}" if target else f"#{method.verb}-{method.name}"
        paper = re.sub(r"^(Paper|Recipe|Source): ", "", method.paper)
        rows.append([f"`{method.verb}`", f"[`{method.name}`]({link})", what[0].upper() + what[1:], paper])
    return table(["verb", "method", "what it does", "source"], rows)


def method_sections(depth: int = 0) -> str:
    out = []
    for method in discover.methods():
        if page_of(method) is None:
            heading = f"## {method.verb} {method.name} {{ #{method.verb}-{method.name} }}"
            settings = method_settings(method.verb, method.name, depth)
            out += [heading, method_doc(method.verb, method.name), settings]
    return "\n\n".join(part for part in out if part)


def page_of(method: discover.Method) -> str | None:
    """The page (below docs/) that shows the method's docstring."""
    marker = f"<!-- doc: {method.verb} {method.name} -->"
    for page in sorted((DOCS / "systems").glob("*.md")):
        if marker in page.read_text(encoding="utf-8"):
            return f"systems/{page.name}"
    return None


def method_doc(verb: str, name: str) -> str:
    """The module docstring: paragraphs with their first words bold, command lines as code."""
    out = []
    for paragraph in find(verb, name).doc.strip().split("\n\n"):
        lines = paragraph.splitlines()
        if all(re.match(r"    vitkit[ .]", line) for line in lines):
            out += [code(line.strip()) for line in lines]
            continue
        head = re.match(r"(What happens, and where|Differs from the paper|Paper|Recipe|Source|Cost): ", paragraph)
        out.append(f"**{head[1]}:** {paragraph[head.end() :]}" if head else paragraph)
    return "\n\n".join(out)


def code(line: str) -> str:
    """A command line or call as a code block, broken where it is long."""
    if line.startswith("vitkit."):
        if len(line) > WIDTH:
            line = line.replace("(", "(\n    ", 1).removesuffix(")") + "\n)"
        return f"```python\n{line}\n```"
    out = [""]
    for word in line.replace(" --", "\n--").split("\n"):
        if len(out[-1]) + len(word) > WIDTH:
            out.append("   ")
        out[-1] += f" {word}" if out[-1] else word
    return "```bash\n" + " \\\n".join(out) + "\n```"


def method_settings(verb: str, name: str, depth: int = 0) -> str:
    method = find(verb, name)
    kind, recipe_values = discover.light(verb, method.name)
    out = []
    if fields(kind):
        out += ["Settings of its own:", settings_table(kind, method.path)]
    comments = recipe_comments(method.path)
    rows = [[f"`{key}`", f"`{show(value)}`", comments.get(key, "")] for key, value in recipe_values.items()]
    if not any(row[2] for row in rows):
        rows = [row[:2] for row in rows]
    if rows:
        out += [f"[Shared settings]({'../' * depth}settings.md) for which it has its own default:"]
        out += [table(["setting", "default", "source"][: len(rows[0])], rows)]
    return "\n\n".join(out)


def shared_settings() -> str:
    out = []
    titles = {"Inputs": "Model and data", "Train": "Training", "Classify": "Classification", "Machine": "Machine"}
    titles |= {"Evaluate": "vitkit evaluate", "Explain": "vitkit explain", "Attack": "vitkit attack"}
    for name, title in titles.items():
        kind = getattr(shared, name)
        out += [f"## {title}", settings_table(kind, Path(str(shared.__file__)))]
    return "\n\n".join(out)


def settings_table(kind: type, path: Path) -> str:
    meanings, hints = field_docs(path, kind.__name__), get_type_hints(kind)
    rows = []
    for field in fields(kind):
        default = "required" if field.default in (MISSING, "") else f"`{show(field.default)}`"
        rows.append([f"`{field.name}`", type_words(hints[field.name]), default, meanings.get(field.name, "")])
    return table(["setting", "value", "default", "meaning"], rows)


def field_docs(path: Path, kind: str) -> dict[str, str]:
    """The string under each field of a dataclass."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == kind:
            found = {}
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[field.target.id] = " ".join(str(text.value.value).split())
            return found
    return {}


def recipe_comments(path: Path) -> dict[str, str]:
    """The comment behind each line of a method's RECIPE, which cites its source."""
    source = path.read_text(encoding="utf-8")
    block = re.search(r"^RECIPE\b.*?^\}", source, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r'^\s+"(\w+)":.*?,\s+# (.*)$', block[0], re.MULTILINE)) if block else {}


def find(verb: str, name: str) -> discover.Method:
    found = [method for method in discover.methods(verb) if method.name == name]
    if not found:
        raise PluginError(f"a marker names the method '{verb} {name}', which does not exist")
    return found[0]


# ---- results, recipes, pictures --------------------------------------------------------------------------------------


def results(kind: str, system: str) -> str:
    """A committed result file as text and tables."""
    if kind not in KINDS:
        raise PluginError(f"a marker asks for '{kind}' results; there are {', '.join(KINDS)}")
    path = RESULTS / kind / f"{system}.json"
    if not path.is_file():
        return (
            f"*Not measured yet.* There is no `benchmarks/results/{kind}/{system}.json`; "
            f"`{'make composition' if kind == 'composition' else f'make {kind} SYSTEM={system}'}` measures it."
        )
    content = read_result(path)
    out = [f"**Claim.** {content['claim']}", f"**Outcome.** {outcome(content['holds'])}"]
    for one in content["tables"]:
        out += [f"**{one['title']}**", table(one["columns"], one["rows"])]
        out += [f"*{one['note']}*"] if one.get("note") else []
    out += [f"- {note}" for note in content.get("notes", [])]
    out.append(provenance(content))
    return "\n\n".join(out)


def read_result(path: Path) -> dict[str, Any]:
    where = f"benchmarks/results/{path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PluginError(f"{where} is not JSON: {error}") from None
    missing = [key for key in RESULT_KEYS if key not in content]
    if missing:
        raise PluginError(f"{where} lacks {', '.join(missing)}")
    if (content["kind"], content["system"]) != (path.parent.name, path.stem):
        raise PluginError(f"{where} says that it is {content['kind']}/{content['system']}.json")
    for one in content["tables"]:
        if any(len(row) != len(one["columns"]) for row in one["rows"]):
            raise PluginError(f"{where}: a row of '{one['title']}' has not one cell a column")
    return content


def outcome(holds: bool | None) -> str:
    if holds is None:
        return "Not decided by this run."
    return "It holds." if holds else "It does not hold; see the tables and notes."


def provenance(content: dict[str, Any]) -> str:
    machine = content["machine"]
    minutes = content["seconds"] / 60
    took = f"{content['seconds']:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    threads = f"{machine.get('threads')} thread{'' if machine.get('threads') == 1 else 's'}"
    return (
        f"Measured {content['measured']} in {took} by `{content['command']}` on {machine.get('cpu', 'an unnamed CPU')} "
        f"({machine.get('cores')} cores, {threads}); {versions}."
    )


def recipe(name: str) -> str:
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise PluginError(f"a marker names the recipe {name}.yaml, which does not exist")
    return f'```yaml title="recipes/{name}.yaml"\n{path.read_text(encoding="utf-8").rstrip()}\n```'


def picture(file: str, caption: str, depth: int = 0) -> str:
    if not (DOCS / file).is_file():
        return ""
    return f"![{caption}]({'../' * depth}{file})"


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; columns of numbers are set flush right."""
    rows = [list(row) for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        for i in range(len(columns))
    ]
    lines = [
        [cell(one) for one in columns],
        ["---:" if right else "---" for right in numeric],
        *([cell(one) for one in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A table cell: numbers short, bars escaped, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    text = str(value).replace("|", "\\|").replace("\n", " ")
    spans = re.split(r"(`[^`]*`)", text)  # braces outside code would be read as attributes
    return "".join(part if part.startswith("`") else part.replace("{", "&#123;") for part in spans)


def show(value: Any) -> str:
    """A setting's value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(show(one) for one in value)
    return str(value)
