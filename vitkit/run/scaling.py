"""`vitkit scaling --models A,B --sizes 96,160 --data D`: backbones x input sizes, quality beside cost, on the same images."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.scaling import Settings
from vitkit.run import config as configs
from vitkit.settings import Inputs, Machine

if TYPE_CHECKING:
    from vitkit.run.scaling_cells import Job, Study

# What may change in a folder that holds a study: more models, sizes, shares and protocols are added to the cells there.
PROTOCOLS = ("linear", "knn")
GROWS = frozenset({"models", "sizes", "fractions", "protocols"})


def settings_for(given: Mapping[str, Any] | Sequence[str]) -> configs.Config:
    """Resolved settings from keywords or command-line words."""
    from vitkit.run.verbs import verb_doc

    config = configs.build(
        {"own": Settings, "inputs": Inputs, "machine": Machine},
        given,
        prog="vitkit scaling",
        description=verb_doc("scaling"),
        required=("models", "data"),
    )
    if not config.own.models:
        raise ConfigError(
            "models is empty", fix="backbones with commas between, e.g. --models deit_tiny_patch16_224,runs/a"
        )
    if config.inputs.model:
        raise ConfigError(f"model is {config.inputs.model}, but a study has several", fix="--models A,B,C")
    if config.inputs.image_size is not None:
        raise ConfigError(
            f"image_size is {config.inputs.image_size}, but a study has several", fix="--sizes 96,160,224"
        )
    if not config.own.out:
        raise ConfigError("out is empty, and a study is a page with its cells", fix="--out scaling")
    unknown = [name for name in config.own.protocols if name not in PROTOCOLS]
    if unknown or not config.own.protocols:
        wrong = f"a study has no protocol '{unknown[0]}'" if unknown else "no protocol was named"
        raise ConfigError(wrong, fix=f"{', '.join(PROTOCOLS)}; vitkit evaluate has more")
    return config


def scaling_job(config: configs.Config) -> dict[str, Any]:
    """Run or resume a study. Returns {"verdict", "report", "results", "csv", "cells": [...], "trends": [...], "best",
    "enough", "missing", ...}.

    Raises DataError where there is nothing to train on or to score, and WeightsError on a model that cannot be opened; a
    size that a model cannot take leaves its cells empty.
    """
    import torch

    from vitkit.run import scaling_page
    from vitkit.run.batches import speaker
    from vitkit.run.folder import RunFolder
    from vitkit.run.measure import FREE, device_of
    from vitkit.run.scaling_found import find

    device, say = device_of(config.machine, "scaling"), speaker(config.machine.quiet)
    called = sys.argv[1:2] == ["scaling"] and Path(sys.argv[0]).stem in ("vitkit", "__main__")
    with torch.random.fork_rng(devices=[]), RunFolder(config.own.out) as folder:
        command = configs.main_line() if called else "vitkit.scaling(...)"
        folder.claim(config.values, "scaling", free=FREE | GROWS, command=command)
        job = prepare(config, device, folder.path, say)
        _run(job)
        if not job.study.cells:
            reasons = "; ".join(f"{m} at {s} px: {why}" for (m, s), why in list(job.study.missing.items())[:3])
            raise ConfigError(f"no cell could be computed ({reasons})", fix="other --sizes, or a smaller --batch_size")
        result = scaling_page.write(folder.path, job.study, find(job.study), config)
        say(f"report: {result['report']}")
    return result


def prepare(config: configs.Config, device: Any, home: Path, say: Any) -> Job:
    """Data, split, models and sizes of a study; says what they are."""
    from vitkit.evaluate import metrics
    from vitkit.run.batches import Data, labelled_parts, open_data
    from vitkit.run.measure import scored_part
    from vitkit.run.protocols_masks import refuse_few
    from vitkit.run.protocols_volumes import volumes_of
    from vitkit.run.scaling_cells import Job, Study
    from vitkit.run.scaling_models import open_backbones, remember, sizes_for

    own = config.own
    images, whole = open_data(config.inputs, say), None
    if images.task == "mask":
        refuse_few(config)
        images = remember(images)
        parts = [images.part(name) for name in ("train", "val", "test")]
        data = Data(images, *parts)
        if not len(data.train):
            raise DataError(f"{images.name}: no training images", fix="vitkit check --data ... shows the splits")
        if not len(data.val):
            raise DataError(
                f"{images.name}: no validation images, and a decoder's rate is picked on them", fix="val_fraction=0.15"
            )
        metric, protocols = "iou", [f"{own.decoder} decoder"]
    else:
        whole = volumes_of(images, say)
        if whole is None:
            images = remember(images)
        else:  # what lies in a scan is asked of its own store, so that pictures are remembered after it
            whole = replace(whole, slices=remember(whole.slices))
        data = labelled_parts(images if whole is None else whole.units, config.inputs, config.machine, say)
        metric, protocols = metrics.main_metric(str(images.task)), list(own.protocols)
    scored, split = scored_part(data)
    backbones = open_backbones(own.models, config, say)
    sizes = sizes_for(backbones) if own.sizes == "auto" else sorted(own.sizes)
    what = "images" if whole is None else "volumes"
    say(f"{len(backbones)} backbones x sizes {', '.join(map(str, sizes))} px, scored on {len(scored):,} {split} {what}")
    study = Study(images, scored, split, metric, backbones, sizes, sorted(own.fractions), protocols)
    study.notes = _notes(study)
    return Job(study, data, config, device, home, say, whole)


def _notes(study: Study) -> list[str]:
    """What a reader must know: models that saw these data, and preparation that differs between models."""
    from vitkit.run.measure import overlap_with_training, straddling

    found, ways = straddling(study.images), {}
    for one in study.backbones:
        found += [f"{one.name}: {text}" for text in overlap_with_training(one.shell, study.images)]
        ways[one.name] = replace(one.shell.passport.preprocess, image_size=(1, 1))
    first = study.backbones[0].name
    for name, way in ways.items():
        if different := ways[first].differences(way):
            found.append(f"{name} sees images otherwise than {first}, as it was trained to: {'; '.join(different)}")
    return found


def _run(job: Job) -> None:
    """Cheap cells first; what is left is estimated from FLOPs per second so far."""
    import time

    from vitkit.evaluate import scaling
    from vitkit.run.scaling_models import misfit

    study = job.study
    places = [(one, size) for one in study.backbones for size in study.sizes]
    todo = [(0.0 if misfit(one, size) else scaling.flops(one.shell, size), one, size) for one, size in places]
    todo.sort(key=lambda cell: (cell[0], cell[2]))
    done = spent = 0.0
    for number, (work, one, size) in enumerate(todo, start=1):
        left = sum(cell[0] for cell in todo[number - 1 :])
        guess = f", about {_minutes(left / done * spent)} left" if done else ""
        job.say(f"{number} of {len(todo)}: {one.name} at {size} px{guess}")
        began = time.perf_counter()
        job.run(one, size)
        fresh = any(not cell.kept for (m, s, *_), cell in study.cells.items() if (m, s) == (one.name, size))
        if fresh:
            done, spent = done + work, spent + time.perf_counter() - began


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
