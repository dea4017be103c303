"""One config, three spellings: Python keywords = command-line flags = the YAML that a run wrote.

Built on jsonargparse over plain dataclasses. Strict: an unknown key names its nearest match and the valid ones, in all
three spellings, and `-` is accepted for `_`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vitkit.errors import ConfigError, nearest

NUMBER = r"[0-9]+(?:\.[0-9]*)?"
RATIO = re.compile(rf"({NUMBER})(?:/({NUMBER}))?")


@dataclass(frozen=True)
class Config:
    """Resolved settings: one dataclass instance a group, and all of them flat in `values`."""

    groups: dict[str, Any]
    values: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["groups"][name]
        except KeyError:
            raise AttributeError(name) from None


def parser(
    groups: Mapping[str, type], *, prog: str, description: str, defaults: Mapping[str, Any] | None = None
) -> Any:
    """A jsonargparse parser with the fields of every dataclass in `groups` as flat options, grouped in the help."""
    import argparse

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Defaults and types beside each setting; the method's docstring as it is written."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"{prog} [--setting value ...] [--config FILE.yaml]"
    made = ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        exit_on_error=False,
        add_help=False,
        formatter_class=Formatter,
        print_config=None,
    )
    made.add_argument("-h", "--help", action="help", help="show this help and exit")
    made.add_argument("--config", metavar="FILE", help="YAML file of settings, as a run writes it; flags win over it")
    done: list[type] = []
    for name in ("method", "own", *groups):  # the method's own settings first in the help
        if name in groups and groups[name] not in done:
            done.append(groups[name])
            made.add_class_arguments(groups[name], as_group=True)
    if defaults:
        made.set_defaults(dict(defaults))
    return made


def build(
    groups: Mapping[str, type],
    given: Mapping[str, Any] | Sequence[str],
    *,
    prog: str,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
    required: Iterable[str] = (),
) -> Config:
    """Settings from keywords (a mapping, which may hold `config`: a YAML path) or command-line words (a sequence).

    Raises ConfigError on unknown keys, wrong types, values that a dataclass refuses, and missing `required` ones.
    """
    valid = field_names(groups)
    hints = {name: hint for kind in groups.values() for name, hint in get_type_hints(kind).items()}
    made = parser(groups, prog=prog, description=description, defaults=defaults)
    if isinstance(given, Mapping):
        given = {str(key).replace("-", "_"): value for key, value in given.items()}
        file = given.pop("config", None)
        _check_keys(given, valid, "")
        values = {**(read_yaml(file, valid, made) if file else {}), **{k: plain(v) for k, v in given.items()}}
        for key, value in values.items():  # "knn,linear" is as good as ("knn", "linear")
            if isinstance(value, str) and _is_tuple(hints[key]) and _needs_brackets(value, hints[key]):
                values[key] = _parts(value)
        values = {key: _ratio(value, hints[key]) if key in hints else value for key, value in values.items()}
        namespace = _quietly(lambda: made.parse_object(values), hints)
    else:
        words, files = _without_config([_dash(word) for word in given])
        _check_words(words, valid)
        words = _brackets(_ratios(_switches(words, hints), hints), hints)
        for file in files:  # flags win over files, later files over earlier ones
            content = read_yaml(file, valid, made)
            _quietly(lambda content=content: _take_defaults(made, content), hints)
        namespace = _quietly(lambda: made.parse_args(words), hints)
    flat = {key: value for key, value in namespace.as_dict().items() if key in valid}
    missing = [key for key in required if flat.get(key) in (None, "")]
    if missing:
        flags = " ".join(f"--{key} ..." for key in missing)
        raise ConfigError(f"{prog} needs {', '.join(missing)}", fix=f"give {flags}")
    return assemble(groups, flat)


def assemble(groups: Mapping[str, type], flat: Mapping[str, Any]) -> Config:
    """Dataclass instances from flat values (lists become the tuples that their fields declare)."""
    made = {}
    for name, kind in groups.items():
        hints = get_type_hints(kind)
        made[name] = kind(**{f.name: _to_tuple(flat[f.name], hints[f.name]) for f in fields(kind) if f.name in flat})
    values: dict[str, Any] = {}
    for group in made.values():
        values.update(asdict(group))
    return Config(made, values)


def field_names(groups: Mapping[str, type]) -> list[str]:
    names = [f.name for kind in groups.values() for f in fields(kind)]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"two groups declare {sorted(twice)}"
    return names


def read_yaml(path: str | Path, valid: Sequence[str], made: Any) -> dict[str, Any]:
    """Flat settings of a YAML file. Keys that describe the run itself (verb, method, version) are passed over."""
    from jsonargparse._loaders_dumpers import load_value

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}", fix="give the path of a YAML file")
    with _loader(made):
        content = load_value(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a YAML mapping of settings", fix="one 'key: value' a line")
    content = {key.replace("-", "_"): v for key, v in content.items() if key not in ("verb", "method", "vitkit")}
    _check_keys(content, valid, f" in {path}")
    hints = {action.dest: getattr(action, "_typehint", None) for action in made._actions}
    return {key: _ratio(value, hints.get(key)) for key, value in content.items()}


def plain(value: Any) -> Any:
    """Values as YAML holds them: paths to text, tuples to lists, dataclasses to mappings."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value


def defaults_of(kind: type) -> dict[str, Any]:
    """Default values of a dataclass."""
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING}


@contextlib.contextmanager
def _loader(made: Any):
    from jsonargparse._common import parser_context

    with parser_context(load_value_mode=made.parser_mode):
        yield


def _take_defaults(made: Any, content: dict[str, Any]) -> None:
    made.parse_object(content)  # refuses wrong types in the words of one setting
    made.set_defaults(content)


def _without_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--config FILE`, and the files."""
    rest: list[str] = []
    files: list[str] = []
    waiting = False
    for word in words:
        if waiting:
            files.append(word)
            waiting = False
        elif word == "--config":
            waiting = True
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    if waiting:
        raise ConfigError("--config needs a file", fix="--config settings.yaml")
    return rest, files


def _dash(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equal, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equal + value


def _check_words(words: Sequence[str], valid: Sequence[str]) -> None:
    flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    _check_keys([flag for flag in flags if flag not in ("help", "config")], valid, "", flag="--")


def _check_keys(keys: Iterable[str], valid: Sequence[str], where: str, flag: str = "") -> None:
    for key in keys:
        if key in valid or ("." in key and key.partition(".")[0] in valid):
            continue
        close = nearest(key, valid)
        hint = f"did you mean {flag}{close[0]}? " if close else ""
        raise ConfigError(f"there is no setting {flag}{key}{where}", fix=f"{hint}valid: {', '.join(sorted(valid))}")


def _quietly(parse: Any, hints: Mapping[str, Any]) -> Any:
    """Run a jsonargparse call and turn what it raises into one clear line."""
    from jsonargparse import ArgumentError

    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            return parse()
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_plain_words(str(error), hints)) from None
    except SystemExit as leave:
        if leave.code:  # some errors still exit
            raise ConfigError(_plain_words(noise.getvalue(), hints)) from None
        raise


def _plain_words(message: str, hints: Mapping[str, Any]) -> str:
    """jsonargparse's message without its nesting: the key, what was expected, what was given."""
    key = re.search(r'(?:Parser key "|argument --|Key ")([\w.]+)', message)
    given = re.search(r"(?:Got value|value): (.+?)(?:\n|$)", message)
    if key and key.group(1) in hints:
        got = f", got {given.group(1).strip()}" if given else ""
        return f"{key.group(1)}: expected {type_words(hints[key.group(1)])}{got}"
    return message.strip().splitlines()[-1] if message.strip() else "the settings could not be read"


def type_words(hint: Any) -> str:
    """A type annotation in words: "a whole number or auto"."""
    simple = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in simple:
        return simple[hint]
    inner = get_args(hint)
    if get_origin(hint) is dict:
        return "a mapping, e.g. {depth: 4}"
    if get_origin(hint) is Literal:
        return " or ".join(str(one) for one in inner)
    if get_origin(hint) is tuple:
        many = "several" if inner[-1] is Ellipsis else str(len(inner))
        kind = {int: "whole numbers", float: "numbers", str: "words"}.get(inner[0], "values")
        return f"{many} {kind} with commas between"
    return " or ".join(type_words(one) for one in inner) if inner else str(hint)


def _switches(words: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Let a bare `--quiet` stand for `--quiet true`."""
    out: list[str] = []
    for index, word in enumerate(words):
        out.append(word)
        last = index + 1 == len(words) or words[index + 1].startswith("--")
        if word.startswith("--") and hints.get(word[2:]) is bool and last:
            out.append("true")
    return out


def _ratios(words: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Let `--eps 8/255` stand for its decimal form."""
    out: list[str] = []
    key = ""
    for word in words:
        name, equal, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if word.startswith("--"):
            key = name[2:]
        if name and not equal:
            out.append(word)
        else:
            out.append(name + equal + str(_ratio(value, hints.get(key))))
    return out


def _ratio(value: Any, hint: Any) -> Any:
    """ "8/255" as a number where the setting is one; also inside lists and texts with commas."""
    if isinstance(value, list):
        return [_ratio(one, hint) for one in value]
    if not isinstance(value, str) or "/" not in value or not _has(float, hint):
        return value
    parts = [RATIO.fullmatch(part.strip()) for part in value.strip("[]").split(",")]
    if not all(parts) or any(part[2] and float(part[2]) == 0 for part in parts if part):
        return value
    numbers = [repr(float(part[1]) / float(part[2])) if part[2] else part[1] for part in parts if part]
    return ",".join(numbers)


def _has(kind: type, hint: Any) -> bool:
    return hint is kind or any(_has(kind, one) for one in get_args(hint))


def _brackets(words: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Let `--protocols knn,linear` and `--crop_scale 0.1,0.5` stand for their bracketed forms."""
    out: list[str] = []
    pending = ""
    for word in words:
        name, equal, value = word.partition("=") if word.startswith("--") else (pending, "", word)
        key = name.removeprefix("--")
        if (equal or not word.startswith("--")) and _is_tuple(hints.get(key)) and _needs_brackets(value, hints[key]):
            # Words are quoted, or YAML would make numbers and switches of classes called 3, 1e5, yes or no.
            value = json.dumps(_parts(value), ensure_ascii=False) if _of_words(hints[key]) else f"[{value}]"
        pending = word if word.startswith("--") and not equal else ""
        out.append(f"{name}={value}" if equal else value if not word.startswith("--") else word)
    return out


def _parts(value: str) -> list[str]:
    """What stands between commas."""
    return [part for one in value.split(",") if (part := one.strip())]


def _of_words(hint: Any) -> bool:
    """Whether a hint of several values is one of several words."""
    if get_origin(hint) is tuple:
        return get_args(hint)[0] is str
    return any(_of_words(one) for one in get_args(hint) if one is not Ellipsis)


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(_is_tuple(one) for one in get_args(hint) if one is not Ellipsis)


def _needs_brackets(value: str, hint: Any) -> bool:
    choices = [one for part in (hint, *get_args(hint)) if get_origin(part) is Literal for one in get_args(part)]
    if value.startswith("[") or value in choices or value in ("null", "None"):
        return False
    return "," in value or not any(one in (int, float, str) for one in get_args(hint) if get_origin(hint) is not tuple)


def _to_tuple(value: Any, hint: Any) -> Any:
    if isinstance(value, list) and "tuple" in str(hint):
        inner = next((a for a in (hint, *get_args(hint)) if "tuple" in str(a) and not isinstance(a, str)), None)
        kinds = get_args(inner) if inner is not None else ()
        return tuple(float(v) if kinds and kinds[0] is float else v for v in value)
    return value


def show(config: Config, changed_from: Mapping[str, Any]) -> str:
    """The settings that differ from the method's defaults, one line."""
    parts = [f"{key}={value}" for key, value in config.values.items() if changed_from.get(key, value) != value]
    return ", ".join(parts)


def main_line(argv: Sequence[str] | None = None) -> str:
    """The command line of this process, for the header of config.yaml."""
    import shlex

    return shlex.join(["vitkit", *(sys.argv[1:] if argv is None else argv)])
