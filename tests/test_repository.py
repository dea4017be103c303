"""The repository itself: commands, versions, licence, citation, documentation. What a newcomer reads must be true."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import vitkit

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", "site", "build", "dist", "runs", "embeddings", "__pycache__", "shared"}
TEXT = {
    ".py",
    ".md",
    ".yml",
    ".yaml",
    ".toml",
    ".txt",
    ".cff",
    ".sh",
    ".json",
    ".svg",
    ".css",
    ".html",
    ".js",
    ".cfg",
    "",
}


def tracked() -> list[Path]:
    """Files of the repository: git's list where there is git, else everything that is not built."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        if found.returncode == 0:
            return [ROOT / name for name in found.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(p in SKIPPED or p.endswith(".egg-info") for p in path.relative_to(ROOT).parts)
    ]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", text("Makefile"), re.MULTILINE))


def shell_lines(markdown: str) -> list[str]:
    """Lines of bash code blocks, without prompts, comments and continuations."""
    lines: list[str] = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        lines += [line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# ---- commands --------------------------------------------------------------------------------------------------------

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_make_commands_of_the_pages_exist(page):
    named = {word for line in shell_lines(text(page)) for word in _make_words(line)}
    named |= {word for code in re.findall(r"`make ([^`]*)`", text(page)) for word in _make_words(f"make {code}")}
    assert named <= make_targets(), f"{page} names {sorted(named - make_targets())}"


def _make_words(line: str) -> list[str]:
    if not line.startswith("make "):
        return []
    line = re.sub(r'[A-Z]+=("[^"]*"|\S*)', "", line.partition("#")[0])
    return [word for word in line.split()[1:] if re.fullmatch(r"[a-z-]+", word)]


@pytest.mark.parametrize("page", PAGES)
def test_vitkit_commands_of_the_pages_are_understood(page):
    """Every `vitkit ...` line of a code block names a verb, a method and settings that exist."""
    import shlex

    from vitkit.run import cli, discover, playing, verbs

    for line in shell_lines(text(page)):
        words = shlex.split(line, comments=True)
        if words[:1] != ["vitkit"] or "METHOD" in words or "VERB" in words or words[1].startswith("-"):
            continue
        verb, rest = words[1], words[2:]
        assert verb in cli.VERBS, line
        if verb in ("explain", "attack") and rest and rest[0] not in [m.name for m in discover.trainable(verb)]:
            assert verbs.settings_for(verb, None, cli.flagged(verb, rest)), line
        elif verb in discover.VERBS and rest and not rest[0].startswith("-"):
            method = rest.pop(0)
            if method == "norm_tuning":  # the example of adding_a_method.md
                continue
            configured = rest[1] if rest[:1] == ["--config"] else None
            if configured and not (ROOT / configured).is_file():
                assert configured.startswith("runs/"), line
                rest = rest[2:]
            needed = playing.REQUIRED[method] if verb == "rl" else ("model", "data", "out")
            given = [*rest, *(w for key in needed if f"--{key}" not in rest for w in (f"--{key}", "x"))]
            assert verbs.settings_for(verb, method, given), line


def test_readme_says_how_to_demo_and_test():
    readme = text("README.md")
    assert "make demo" in readme and "make test" in readme


def test_ci_runs_the_readmes_test_command_and_the_checks():
    lines = [line.strip() for line in text(".ci/run").splitlines() if line.strip() and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test", "make check"]
    assert "bash .ci/run" in text(".github/workflows/ci.yml")


def test_workflow_covers_the_supported_versions():
    matrix = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]["ci"]["strategy"]["matrix"]["python"]
    classifiers = tomllib.loads(text("pyproject.toml"))["project"]["classifiers"]
    supported = [
        c.rpartition(" ")[2] for c in classifiers if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", c)
    ]
    assert sorted(matrix) == sorted(supported)


def test_scripts_are_executable():
    for name in (".ci/run", "tools/setup.sh", "tools/bench.sh"):
        assert os.access(ROOT / name, os.X_OK), name
        subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_setup_names_the_fix_when_no_python_fits(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup.sh", tmp_path / "tools")
    found = subprocess.run(
        ["bash", "tools/setup.sh", "/nowhere/python3.9"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode != 0 and not (tmp_path / ".venv").exists()
    assert "PYTHON=/nowhere/python3.9 is not a Python 3.11, 3.12 or 3.13" in found.stderr
    assert "fix: " in found.stderr


def test_a_benchmark_that_does_not_exist_names_those_that_do(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "benchmarks" / "quality").mkdir(parents=True)
    (tmp_path / "benchmarks" / "quality" / "one.py").touch()
    shutil.copy(ROOT / "tools" / "bench.sh", tmp_path / "tools")
    found = subprocess.run(
        ["bash", "tools/bench.sh", "quality", "two"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2 and "no benchmark of 'two'" in found.stderr and "one" in found.stderr


# ---- versions and metadata -------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line for line in text("constraints.txt").splitlines() if line and not line.startswith("#")]
    return {line.partition("==")[0]: line.partition("==")[2].partition(";")[0].strip() for line in lines}


def test_constraints_are_exact_plain_versions():
    for line in text("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*( ; sys_platform == "linux")?', line), line


def test_constraints_name_no_index_and_no_path():
    content = text("constraints.txt").lower()
    for word in ("://", "index", "find-links", "@", "file:", "--", "+c"):
        assert word not in content.replace("sys_platform", ""), word


def test_constraints_lie_within_the_bounds():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads(text("pyproject.toml"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    found = pins()
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            continue
        version = found.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), (
            f"{requirement.name} {version} is outside {requirement.specifier}"
        )


def test_malicious_releases_are_excluded():
    """lightning 2.6.2 and 2.6.3, GHSA-w37p-236h-pfx3."""
    project = tomllib.loads(text("pyproject.toml"))["project"]
    line = next(line for line in project["dependencies"] if line.startswith("lightning"))
    assert "!=2.6.2" in line and "!=2.6.3" in line
    assert not {"2.6.2", "2.6.3"} & {v for name, v in pins().items() if "lightning" in name and "util" not in name}


def test_one_version():
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    assert vitkit.__version__ == version
    assert str(yaml.safe_load(text("CITATION.cff"))["version"]) == version
    assert f"## {version}" in text("CHANGELOG.md")


def test_citation():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    cited = {one["value"].removeprefix("arXiv:") for ref in citation["references"] for one in ref["identifiers"]}
    assert {"2205.13535", "2111.06377", "2210.12843"} <= cited


def test_licence_is_the_whole_apache_2():
    licence = text("LICENSE")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence and len(licence) > 11_000
    assert tomllib.loads(text("pyproject.toml"))["project"]["license"] == "Apache-2.0"


def test_no_absolute_machine_paths():
    """Home folders, temporary folders and mounts of whoever wrote a file have no place in it."""
    pattern = re.compile(r"(?<![\w.>-])/(?:root|work|home/\w+|Users/\w+|opt/\w+|mnt/\w+|workspace)/[\w.]")
    found = []
    for path in tracked():
        if path.suffix in TEXT and path.name != Path(__file__).name:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_no_large_or_built_files():
    for path in tracked():
        assert path.stat().st_size < 8 << 20, f"{path.relative_to(ROOT)} is {path.stat().st_size >> 20} MiB"
        assert path.suffix not in (".pyc", ".ckpt", ".whl"), path


# ---- documentation ---------------------------------------------------------------------------------------------------


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return tool("docs_hooks")


RESULT = {
    "system": "adaptformer",
    "kind": "quality",
    "claim": "adapters beat the linear probe",
    "holds": True,
    "measured": "2026-01-31",
    "command": "make quality SYSTEM=adaptformer",
    "machine": {"cpu": "a processor", "cores": 2, "threads": 1},
    "versions": {"torch": "2.0"},
    "seconds": 300.0,
    "tables": [
        {"title": "Accuracy", "columns": ["arm", "a|b"], "rows": [["linear", 0.51234], ["full", None]], "note": "3 seeds"}
    ],
    "notes": ["one note"],
}  # fmt: skip


def result_file(hooks, monkeypatch, tmp_path, **changes) -> None:
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    (tmp_path / "quality").mkdir()
    (tmp_path / "quality" / "adaptformer.json").write_text(json.dumps({**RESULT, **changes}), encoding="utf-8")


def test_a_result_file_becomes_text_and_tables(hooks, monkeypatch, tmp_path):
    result_file(hooks, monkeypatch, tmp_path)
    page = hooks.fill("results", "quality adaptformer")
    assert "**Claim.** adapters beat the linear probe" in page and "It holds." in page
    assert "| arm | a\\|b |\n| --- | ---: |\n| linear | 0.5123 |\n| full | – |" in page
    assert "*3 seeds*" in page and "- one note" in page
    assert (
        "Measured 2026-01-31 in 5 min by `make quality SYSTEM=adaptformer` on a processor (2 cores, 1 thread)" in page
    )


@pytest.mark.parametrize(("holds", "words"), [(False, "It does not hold"), (None, "Not decided")])
def test_negative_and_open_outcomes_are_said(hooks, monkeypatch, tmp_path, holds, words):
    result_file(hooks, monkeypatch, tmp_path, holds=holds)
    assert words in hooks.fill("results", "quality adaptformer")


def test_a_missing_result_is_said(hooks, monkeypatch, tmp_path):
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    assert hooks.fill("results", "speed adaptformer").startswith("*Not measured yet.*")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "other"}, "says that it is quality/other.json"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [[1, 2]]}]}, "not one cell a column"),
    ],
)
def test_wrong_result_files_stop_the_build(hooks, monkeypatch, tmp_path, changes, message):
    result_file(hooks, monkeypatch, tmp_path, **changes)
    with pytest.raises(Exception, match=message):
        hooks.fill("results", "quality adaptformer")


@pytest.mark.parametrize(
    "marker", ["results: taste adaptformer", "doc: adapt nothing", "recipe: nothing", "doc: adapt"]
)
def test_markers_that_name_nothing_stop_the_build(hooks, marker):
    name, _, words = marker.partition(": ")
    with pytest.raises(Exception, match=r"marker|there are"):
        hooks.fill(name, words)


def test_pictures_are_shown_where_they_exist(hooks):
    assert hooks.fill("picture", "img/overview.svg | the whole", depth=1) == "![the whole](../img/overview.svg)"
    assert hooks.fill("picture", "img/nothing.png | not there") == ""


def test_committed_results_can_be_read(hooks):
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        assert hooks.read_result(path)["tables"], path


def test_every_method_is_in_the_documentation(hooks):
    from vitkit.run import discover

    whole, sections = hooks.methods_table(), hooks.method_sections()
    for method in discover.methods():
        assert f"[`{method.name}`]" in whole
        assert hooks.page_of(method) or f"#{method.verb}-{method.name}" in sections
        assert hooks.method_settings(method.verb, method.name) is not None


def test_settings_show_meaning_default_and_source(hooks):
    page = hooks.fill("settings", "adapt adaptformer", depth=1)
    assert re.search(r"\| `bottleneck` \| a whole number \| `64` \| width r", page)
    assert re.search(r"\| `epochs` \| `100` \| \S", page) and "(../settings.md)" in page
    shared = hooks.fill("settings", "shared")
    assert "`batch_size`" in shared and "{" not in re.sub("`[^`]*`", "", shared)


def test_markers_inside_code_blocks_stay(hooks):
    class Page:
        class file:
            src_uri = "index.md"

    markdown = "```text\n<!-- methods -->\n```\n\n<!-- methods -->\n"
    out = hooks.on_page_markdown(markdown, Page)
    assert out.count("<!-- methods -->") == 1 and "| verb |" in out


def test_pages_that_load_from_outside_are_refused(hooks):
    class Page:
        class file:
            src_uri = "index.md"

    assert hooks.on_post_page('<a href="https://arxiv.org">x</a>', Page)
    for tag in (
        '<script src="https://x/y.js">',
        '<link rel="x" href="https://x/y.css">',
        '<img alt="" src="//x/y.png">',
    ):
        with pytest.raises(Exception, match="from outside"):
            hooks.on_post_page(tag, Page)


def test_parameter_lines_become_lists():
    listed = tool("griffe_arguments").listed
    found = listed(
        "What it does.\n\nkeep: these\n    and more\nmask, size: those\nRaises nothing: ever.", {"keep", "mask", "size"}
    )
    assert found == "What it does.\n\n\n- `keep`: these\n  and more\n- `mask`, `size`: those\n\nRaises nothing: ever."


@pytest.mark.parametrize("page", [page for page in PAGES if "tests/" in text(page)])
def test_tests_that_pages_name_exist(page):
    for path, _, test in re.findall(r"`(tests/[\w/]+\.py)(::(\w+))?`", text(page)):
        if "<" in path:
            continue
        assert (ROOT / path).is_file(), f"{page} names {path}"
        assert not test or re.search(rf"^ *def {test}\(", text(path), re.MULTILINE), f"{page} names {path}::{test}"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_of_the_pages_compile(page):
    for block in re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        compile(block, page, "exec")


def test_freeze_writes_plain_versions():
    freeze = tool("freeze")
    rendered = freeze.render({"nvidia-cublas": "1.0", "torch": "2.14.1"})
    assert 'nvidia-cublas==1.0 ; sys_platform == "linux"\n' in rendered and rendered.endswith("torch==2.14.1\n")
    assert freeze.read(text("constraints.txt")) == pins()
