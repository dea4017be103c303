"""`vitkit rl METHOD`: games as streams, an agent on a pre-trained encoder, and two ways to look at one without an agent.

Standard library only until something is to be done: `--help` needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from vitkit.errors import ConfigError
from vitkit.run import config as configs
from vitkit.run import discover

VERB = "rl"
REQUIRED = {
    "collect": ("env", "out"),
    "imitate": ("model", "data"),
    "look": ("model", "data", "out"),
    "rainbow": ("env", "model", "out"),
}
PATHS = ("model", "data", "out", "agent")


def settings_for(name: str, given: Mapping[str, Any] | Sequence[str]) -> configs.Config:
    """Resolved settings of `vitkit rl <name>` from keywords or command-line words."""
    method = discover.find(VERB, name)
    if isinstance(given, Mapping):
        given = {k: str(v) if k in PATHS else v for k, v in given.items() if v is not None}
    groups = {"own": discover.light(VERB, method.name)[0]}
    prog = f"vitkit {VERB} {method.name}"
    return configs.build(groups, given, prog=prog, description=method.doc.strip(), required=REQUIRED[method.name])


def rl_job(name: str, given: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Do it; {"verdict", "report" (what was written), ...}."""
    method = discover.find(VERB, name)
    config = settings_for(method.name, given)
    return importlib.import_module(method.module).run(config.own)


def rl(method: str, **settings: Any) -> dict[str, Any]:
    """Games as streams, an agent on a pre-trained ViT, and probes of one; `vitkit rl <method> --help` lists the settings."""
    return rl_job(method, settings)


def command(words: Sequence[str]) -> int:
    """`vitkit rl ...` from the command line."""
    words = list(words)
    names = [method.name for method in discover.methods(VERB)]
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {m.name:<10}{m.summary.partition(': ')[2] or m.summary}" for m in discover.methods(VERB)]
        print("\n".join(["vitkit rl METHOD [--setting value ...]", "", *lines]))
        print("\n`vitkit rl METHOD --help` lists every setting.")
        return 0
    if words[0].startswith("-"):
        raise ConfigError("vitkit rl needs a method before its settings", fix=f"one of: {', '.join(names)}")
    found = rl_job(words[0], words[1:])
    print(found["verdict"])
    if found["report"]:
        print(found["report"])
    return 0
