"""Protocols that train: each is a run of `vitkit adapt` in OUT/PROTOCOL, on the same splits, epochs and batches.

A run scores its test split once, at its end; what is used here is what it wrote. The same command resumes unfinished runs
and reads finished ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError
from vitkit.run.config import Config
from vitkit.run.folder import RunFolder
from vitkit.run.outcomes import Outcome
from vitkit.settings import TRAINED, Inputs, Machine

if TYPE_CHECKING:
    from vitkit.run.protocols_volumes import Volumes

_EQUAL = {"epochs", "out", *(f.name for f in fields(Inputs)), *(f.name for f in fields(Machine))}
_LEAST = 5e-7  # probabilities are written to six digits


def settings_of(names: Sequence[str], config: Config, out: str | Path = "") -> dict[str, Config]:
    """Resolved settings of every run. Raises ConfigError on settings that a method does not have, or that must be equal."""
    from vitkit.run import verbs

    own = config.own
    shared, special = _divided(own.training or {})
    for name in special:
        if name not in own.protocols:
            raise ConfigError(
                f"training has settings for {name}, which is not asked for", fix=f"--protocols {name},..."
            )
    found = {}
    for name in names:
        given = {key: value for key, value in vars(config.inputs).items() if value is not None}
        given |= vars(config.machine)
        given |= {"epochs": own.epochs, "out": str(Path(out or own.out) / name), **shared, **special.get(name, {})}
        found[name] = verbs.settings_for("adapt", name, given)
    return found


def _divided(training: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings for all trained protocols, and those for one each."""
    shared = {key: value for key, value in training.items() if key not in TRAINED}
    special = {key: value for key, value in training.items() if key in TRAINED}
    for name, value in special.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"training.{name} is {value!r}", fix=f"a mapping, e.g. {{{name}: {{blr: 1e-3}}}}")
    for key in [*shared, *(key for value in special.values() for key in value)]:
        if str(key).replace("-", "_") in _EQUAL:
            raise ConfigError(f"training sets {key}, which is the same for every protocol", fix=f"--{key} beside it")
    return shared, {name: dict(value) for name, value in special.items()}


def run(name: str, config: Config, folder: RunFolder, part: Images, split: str, whole: Volumes | None) -> Outcome:
    """Train (or resume, or read) one method, and its scores of the scored images; for volumes, mean over slices."""
    from vitkit.run import verbs

    settings = settings_of([name], config, folder.path)[name]
    if whole is not None and config.inputs.labels_per_class:
        raise ConfigError(
            f"labels_per_class draws slices for {name} and volumes for the others",
            fix="leave labels_per_class or the trained protocols out",
        )
    values = {key: value for key, value in settings.values.items() if value is not None}
    if split == "val":  # the validation images are scored: they must not pick an epoch
        values["select"] = "last"
    finished = verbs.train("adapt", name, values)
    summary, home = finished.summary, RunFolder(finished.path)
    slices, owner = (part, None) if whole is None else whole.slices_of(part)
    scores = _read_scores(finished.path / "predictions.csv", slices)
    if owner is not None:
        assert whole is not None
        scores = whole.pooled(scores, owner)
    used = home.read_config()
    main = summary["metrics"][0]["name"]
    records = [(r["epoch"], r[f"val_{main}"]) for r in home.records() if r.get(f"val_{main}") is not None]
    curve: list[Any] = records if split != "val" else []
    at = f"{max(curve, key=lambda point: point[1])[0]:g}" if curve else "the last"
    return Outcome(
        name,
        scores,
        f"epoch {at} of {used['epochs']}, lr={float(used['lr']):.3g}",
        "validation" if curve else "nothing",
        curve,
        float(summary["seconds"]),
        note="slice probabilities averaged over each volume" if owner is not None else "",
        trained=int(summary["trained_parameters"]),
        lines={name: curve},
        detail={"run": name},
    )


def _read_scores(path: Path, part: Images) -> np.ndarray:
    """Probabilities (N, C) of exactly these images, in their order."""
    import pandas as pd

    frame = pd.read_csv(path, dtype={"image": str, "label": str, "predicted": str})
    if list(frame["image"]) != list(part.names):
        raise DataError(
            f"{path} is not about the {len(part)} images that the other protocols are scored on",
            fix="choose another --out; the data have changed since this run",
        )
    columns = [f"p({name})" for name in part.classes]
    return np.clip(frame[columns].to_numpy(dtype=float), _LEAST, 1.0)
