"""Writes constraints.txt: the exact version of everything that `pip install -e '.[dev]'` brings, as found in .venv.

    make freeze

Only what vitkit and its extras require, directly or through others, is written, so packages that somebody added to the
environment by hand stay out. Local version suffixes (+cpu, +cu130) are dropped: they name one package index's build.
Packages that only other Python versions or systems need are not installed here; their present pins are kept.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = Path(__file__).resolve().parent.parent / "constraints.txt"
HEADER = """\
# The exact versions that `make setup` installs, tested with Python 3.11 on Linux; they install on 3.12 and 3.13 too.
# A constraint installs nothing by itself: pyproject.toml says what is needed, this file says which version of it.
# Lines marked linux belong to torch's CUDA build and are passed over elsewhere. Written by `make freeze`.
"""
# Installed by torch on Linux only.
LINUX = re.compile(r"^(nvidia-|cuda-|triton$)")
ENVIRONMENTS = [{"python_full_version": f"{v}.0", "python_version": v} for v in ("3.11", "3.12", "3.13")]


def needed(root: str) -> set[str]:
    """Names of all distributions that `root` with all its extras requires, on any tested Python version."""
    todo: list[tuple[str, frozenset[str]]] = [(canonicalize_name(root), frozenset(_extras(root)))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        for requirement in _requirements(*here):
            todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen} - {canonicalize_name(root)}


def _requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or any(
            requirement.marker.evaluate({**default_environment(), **python, "extra": extra})
            for python in ENVIRONMENTS
            for extra in extras or {""}
        ):
            yield requirement


def _extras(name: str) -> list[str]:
    return metadata.metadata(name).get_all("Provides-Extra") or [""]


def pins(names: set[str], kept: Mapping[str, str]) -> dict[str, str]:
    """Version of every name: the installed one without local suffix, or the one that constraints.txt had."""
    found = {}
    for name in sorted(names):
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            if name in kept:
                found[name] = kept[name]
            else:
                print(f"freeze: {name} is not installed here and has no pin yet", file=sys.stderr)
    return found


def read(text: str) -> dict[str, str]:
    """name -> version of a constraints file."""
    lines = (line.partition(";")[0].strip() for line in text.splitlines() if not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def render(found: Mapping[str, str]) -> str:
    """The file's text."""
    mark = ' ; sys_platform == "linux"'
    return HEADER + "".join(
        f"{name}=={version}{mark if LINUX.match(name) else ''}\n" for name, version in found.items()
    )


def main() -> None:
    kept = read(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    found = pins(needed("vitkit"), kept)
    FILE.write_text(render(found), encoding="utf-8")
    print(f"{len(found)} versions written to {FILE.name}")


if __name__ == "__main__":
    main()
