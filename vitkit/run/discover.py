"""Which methods there are, found by their file names; their help read without importing torch.

A method is a module of a verb's package with a `Settings` dataclass. Adding one needs no registration.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vitkit.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent.parent
VERBS = (
    "pretrain",
    "adapt",
    "clean",
    "anomaly",
    "explain",
    "attack",
    "evaluate",
    "rl",
)  # packages whose modules are methods
LIGHT = (
    "__future__",
    "dataclasses",
    "typing",
    "vitkit.errors",
    "vitkit.settings",
    "math",
    "collections.abc",
    "functools",
)


@dataclass(frozen=True)
class Method:
    """A method as its source describes it: `summary` is the first sentence of the docstring, `paper` its reference;
    `trains` when it has a class to train, `labels` when that needs labelled images."""

    verb: str
    name: str
    path: Path
    doc: str
    trains: bool = False
    labels: bool = False

    @property
    def module(self) -> str:
        return f"vitkit.{self.verb}.{self.name}"

    @property
    def summary(self) -> str:
        return self.doc.strip().split("\n\n")[0].replace("\n", " ")

    @property
    def title(self) -> str:
        return self.summary.partition(":")[0]

    @property
    def paper(self) -> str:
        """The reference paragraph of the docstring ("Paper: ..." or "Recipe: ...")."""
        for paragraph in self.doc.split("\n\n"):
            if paragraph.startswith(("Paper:", "Recipe:", "Source:", "The baseline of")):
                return " ".join(paragraph.split())
        return ""


@cache
def methods(verb: str | None = None) -> tuple[Method, ...]:
    """Every method (of `verb`), in alphabetical order, read from source: nothing is imported."""
    found = []
    for package in (verb,) if verb else VERBS:
        for path in sorted((PACKAGE / package).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if any(isinstance(node, ast.ClassDef) and node.name == "Settings" for node in tree.body):
                needs = _needs_labels(tree)
                doc = ast.get_docstring(tree) or ""
                found.append(Method(package, path.stem, path, doc, needs is not None, bool(needs)))
    return tuple(found)


def _needs_labels(tree: ast.Module) -> bool | None:
    """`needs_labels` of the method class in a module's source; None where nothing is trained."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        if any(ast.unparse(base) == "Adaptation" for base in node.bases):
            return True
        for item in node.body:
            if isinstance(item, ast.Assign) and any(ast.unparse(t) == "needs_labels" for t in item.targets):
                return bool(ast.literal_eval(item.value))
    return None


def trainable(verb: str) -> tuple[Method, ...]:
    """The methods of `verb` that train a model."""
    return tuple(method for method in methods(verb) if method.trains)


def find(verb: str, name: str) -> Method:
    """The method `name` of `verb` (`-` accepted for `_`), or an error with the nearest names."""
    wanted = name.replace("-", "_")
    known = {method.name: method for method in methods(verb)}
    if wanted not in known:
        close = nearest(wanted, known)
        elsewhere = [f"vitkit {m.verb} {m.name}" for m in methods() if m.name == wanted]
        fix = f"did you mean {elsewhere[0]}?" if elsewhere else f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"vitkit {verb} has no method '{name}'", fix=f"{fix} methods: {', '.join(known)}".strip())
    return known[wanted]


def load(verb: str, name: str) -> types.ModuleType:
    """Import the method's module, torch and all."""
    return importlib.import_module(find(verb, name).module)


def method_class(module: types.ModuleType) -> type:
    """The one class of a method's module that is the method: it says whether it `needs_labels`."""
    found = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    found = [c for c in found if hasattr(c, "needs_labels")]
    assert len(found) == 1, f"{module.__name__} must define exactly one method class, not {len(found)}"
    return found[0]


def light(verb: str, name: str) -> tuple[type, dict[str, Any]]:
    """The method's `Settings` class and its `RECIPE` without importing torch.

    Only standard-library imports, dataclasses and the RECIPE literal of the source are run, in a module of their own
    whose `__file__` is the real file, so that attribute docstrings are found.
    """
    method = find(verb, name)
    real = sys.modules.get(method.module)
    if real is not None:
        return real.Settings, dict(getattr(real, "RECIPE", {}))
    stub = f"_vitkit_{verb}_{method.name}"
    if stub not in sys.modules:
        tree = ast.parse(method.path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if _is_light(node)]
        module = types.ModuleType(stub)
        module.__file__ = str(method.path)
        sys.modules[stub] = module
        exec(compile(tree, str(method.path), "exec"), module.__dict__)
    module = sys.modules[stub]
    return module.Settings, dict(module.__dict__.get("RECIPE", {}))


def _is_light(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name in LIGHT for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module in LIGHT
    if isinstance(node, ast.ClassDef):
        return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "RECIPE" for t in node.targets)
