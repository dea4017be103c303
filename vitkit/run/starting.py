"""From words or keywords to a training run: which settings a verb has, their resolved values, starting and resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitkit.errors import VitkitError
from vitkit.run import config as configs
from vitkit.run import discover, playing
from vitkit.settings import Attack, Classify, Embedding, Evaluate, Explain, Inputs, Machine, Train

if TYPE_CHECKING:
    from vitkit.run.model import Run

# Changing these does not change the result, so a run may be resumed with other values.
FREE = frozenset({"workers", "quiet", "save_every"})
REQUIRED: tuple[str, ...] = ("model", "data", "out")
ATTACK = "dta"  # the method of `vitkit attack MODEL`


def groups_for(verb: str, name: str | None = None) -> tuple[dict[str, type], dict[str, Any]]:
    """The dataclasses whose fields are a verb's settings, and the method's own defaults for shared ones. Light."""
    if name is not None and discover.find(verb, name).trains:
        settings, recipe = discover.light(verb, name)
        made: dict[str, type] = {"inputs": Inputs, "train": Train, "machine": Machine}
        if discover.find(verb, name).labels:
            made["classify"] = Classify
        return {**made, "method": settings}, recipe
    own = {"evaluate": Evaluate, "embed": Embedding, "explain": Explain, "attack": Attack}[verb]
    groups: dict[str, type] = {"inputs": Inputs, "machine": Machine, "own": own}
    if verb == "attack":
        groups["method"] = discover.light("attack", name or ATTACK)[0]
    return groups, {}


def settings_for(verb: str, name: str | None, given: Mapping[str, Any] | Sequence[str]) -> configs.Config:
    """Resolved settings of `vitkit <verb> [name]` from keywords or command-line words."""
    if verb == playing.VERB:
        return playing.settings_for(str(name), given)
    groups, recipe = groups_for(verb, name)
    if name is not None:
        description, required = discover.find(verb, name).doc.strip(), REQUIRED
    else:
        description, required = _doc(verb), REQUIRED[:2]
    prog = f"vitkit {verb} {name}" if name else f"vitkit {verb}"
    return configs.build(groups, given, prog=prog, description=description, defaults=recipe, required=required)


def train(verb: str, method: str, given: Mapping[str, Any] | Sequence[str]) -> Run:
    """Run a training verb; the same settings and folder resume it, and a finished one is returned as it is."""
    from vitkit.run.folder import RunFolder
    from vitkit.run.model import Run

    if isinstance(given, Mapping):
        given = {key: value for key, value in given.items() if value is not None}
    name = discover.find(verb, method).name
    config = settings_for(verb, name, given)
    config = resolve(config)
    folder = RunFolder(config.train.out)
    command = configs.main_line() if not isinstance(given, Mapping) else f"vitkit.{verb}({name!r}, ...)"
    rank = _rank()
    if rank == 0:
        state = folder.claim(config.values, f"{verb}.{name}", free=FREE, command=command)
        if state == "finished":
            if not config.machine.quiet:
                _say(f"{folder.path} is finished; nothing to do (report: {folder.path / 'report.html'})")
            return Run(folder.path)
    try:
        from vitkit.run.jobs import run_job

        if rank == 0 and not config.machine.quiet:
            _say(f"vitkit {verb} {name} -> {folder.path}\n  {configs.show(config, _defaults(verb, name))}")
        run_job(verb, name, config)
    except VitkitError:
        folder.abandon()
        raise
    finally:
        folder.release()
    return Run(folder.path)


def resolve(config: configs.Config) -> configs.Config:
    """Replace the "auto" values that are known before the run starts, so that they are printed and saved."""
    from dataclasses import replace

    import torch

    from vitkit.parts.schedules import scaled_lr
    from vitkit.run.fabric import precision_of, processes

    machine, train = config.machine, config.train
    accelerator = machine.accelerator
    if accelerator == "auto":
        mps = torch.backends.mps.is_available()
        accelerator = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    machine = replace(machine, accelerator=accelerator)
    machine = replace(machine, precision="bf16" if "bf16" in precision_of(machine) else "32")
    world = processes(machine)
    if train.lr == "auto":
        train = replace(train, lr=scaled_lr(train.blr, machine.batch_size * train.accumulate * world, train.lr_rule))
    groups = {**config.groups, "machine": machine, "train": train}
    values: dict[str, Any] = {}
    for group in groups.values():
        values.update(vars(group))
    return configs.Config(groups, values)


def _defaults(verb: str, name: str) -> dict[str, Any]:
    groups, _ = groups_for(verb, name)
    values: dict[str, Any] = {}
    for kind in groups.values():
        values.update(configs.defaults_of(kind))
    return {key: value for key, value in values.items() if key not in ("model", "data", "out")}


def _rank() -> int:
    import os

    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _say(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)


def _doc(verb: str) -> str:
    from vitkit.run.verbs import verb_doc

    return verb_doc(verb)
