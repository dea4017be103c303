"""`vitkit clean dvt` from settings to a finished folder: fields of many pictures, then the denoiser, then the measure."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import weights
from vitkit.clean.dvt import DVT, DenoisedViT, table_grid
from vitkit.data.images import Images
from vitkit.data.splits import save
from vitkit.errors import ConfigError, DataError
from vitkit.run.batches import epoch_steps, open_data, open_model, speaker
from vitkit.run.clean_report import add_cleanliness
from vitkit.run.config import Config, plain
from vitkit.run.dvt_distil import distil
from vitkit.run.dvt_stage1 import Pairs, batches, finest, run_stage1, together
from vitkit.run.folder import RunFolder
from vitkit.run.loop import fit
from vitkit.run.progress import Progress
from vitkit.run.results import finish, minutes

LEAST, FEW = 4, 50  # pictures: less is refused, less is warned about
MANY = 1_000_000  # steps of stage 1 that a CPU is busy with for the best part of a day


def dvt_job(fabric: Any, verb: str, name: str, config: Config) -> None:
    """Stage 1 picture by picture (divided between processes), stage 2 by the loop, then the table before and after."""
    from vitkit.run.jobs import _summary, require_kind

    inputs, train, machine, settings = config.inputs, config.train, config.machine, config.method
    first = fabric.is_global_zero
    say = speaker(machine.quiet or not first)
    images = open_data(inputs, say)
    torch.manual_seed(machine.seed)
    vit = open_model(inputs, seed=machine.seed, say=say, num_classes=0, drop_path_rate=train.drop_path)
    require_kind(DVT, vit, f"{verb} {name}")
    table_grid(vit)
    if isinstance(vit, DenoisedViT):
        raise ConfigError("this ViT already carries a denoiser", fix="start from a ViT without it")
    learn, check = chosen_rows(images, settings.images, settings.held_out, machine.seed)
    folder = RunFolder(train.out)
    pairs = all_pairs(fabric, vit, images, np.concatenate([learn, check]), config, folder, say)
    before = copy.deepcopy(vit)
    torch.manual_seed(machine.seed)  # the same start however much of stage 1 was left to do
    method = DVT(vit, settings)
    say(f"stage 2: the denoiser learns from {len(learn)} pictures, {len(check)} are for checking it")
    state = train_denoiser(fabric, method, pairs, learn, check, config, folder)
    student = None
    if settings.distil_epochs:
        student, used = copy.deepcopy(before), images.part("train", "unlabelled")
        say(f"stage 3: the ViT learns from {len(used):,} pictures to give clean patches by itself")
        distil(fabric, student, method.finish(), used, settings.distil_epochs, config, folder)
    if first:
        method.eval()
        summary = _summary(verb, name, method, state)
        judge(summary, cosines(method, pairs, learn, check, fabric.device))
        clean = method.finish() if student is None else student.eval()
        save_cleaned(folder, clean, method, f"{verb}.{name}", config, images)
        words = add_cleanliness(
            folder, summary, before, clean, images, device=fabric.device, seed=machine.seed, say=say
        )
        summary["verdict"] = verdict(summary, len(learn), state.seconds, words)
        finish(folder, summary, state, say)
    fabric.barrier()


def all_pairs(
    fabric: Any, vit: nn.Module, images: Images, rows: np.ndarray, config: Config, folder: RunFolder, say: Any
) -> Pairs:
    """Stage 1: raw and clean maps of every picture of `rows`, those that are already there left alone."""
    settings, machine = config.method, config.machine
    size = together(settings, table_grid(vit), vit.embed_dim, fabric.device)
    pairs = Pairs(folder.path, images, rows, size)
    missing = pairs.missing()
    for sentence in sentences(images, rows, vit, settings, len(missing), size):
        say(sentence)
    if fabric.device.type == "cpu" and len(missing) * size * settings.steps > MANY:
        say("on a CPU this takes long: --images 200 --views 128 --steps 2000 --pixels 1024 is a start")
    fabric.barrier()  # every process has looked before one writes
    shards = missing[fabric.global_rank :: fabric.world_size]
    quiet = machine.quiet or not fabric.is_global_zero
    with Progress(len(shards) * settings.steps, 1, quiet=quiet) as progress:
        run_stage1(vit, pairs, settings, machine, fabric.device, shards, progress)
    fabric.barrier()
    return pairs


def train_denoiser(
    fabric: Any, method: DVT, pairs: Pairs, learn: np.ndarray, check: np.ndarray, config: Config, folder: RunFolder
) -> Any:
    """Stage 2 by the loop, with the official rule of rates; the last weights stay, as there."""
    train, machine = config.train, config.machine
    steps, _ = epoch_steps(len(learn), machine, fabric.world_size)
    updates = -(-steps // train.accumulate)  # optimiser steps an epoch
    lr, warmup = float(train.lr), min(train.warmup_epochs, train.epochs / 5)
    method.rates = {"lr": lr, "min_lr": min(train.min_lr, lr)}
    method.rates |= {"warmup": round(warmup * updates), "total": updates * train.epochs}

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        found = float(np.mean(cosines(model, pairs, learn, check, fabric.device)["denoiser"]))
        return found, {"val_cosine": found}

    quiet = machine.quiet or not fabric.is_global_zero
    with Progress(steps * train.epochs, machine.batch_size, steps_per_epoch=steps, quiet=quiet) as progress:
        return fit(
            method,
            batches(pairs, learn, machine, steps, fabric.global_rank, fabric.world_size),
            train=train,
            machine=machine,
            fabric=fabric,
            steps_per_epoch=steps,
            prepare=lambda x: x,
            folder=folder,
            validate=validate,
            keep_best=False,
            progress=progress,
        )


def chosen_rows(images: Images, most: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pictures that are decomposed: those that stage 2 learns from, and those that check it. Groups stay whole.

    Validation and test pictures are left for the measure, as far as there are others.
    """
    own = np.flatnonzero(np.isin(images.split, ("train", "unlabelled")))
    if len(own) < LEAST:
        raise DataError(
            f"{images.name}: {len(own)} training pictures are too few for DVT's denoiser",
            fix=f"at least {LEAST}; some hundreds are sensible, and they need no labels",
        )
    rng = np.random.RandomState(seed)
    own = own[rng.permutation(len(own))][:most]
    if len(own) < LEAST:
        raise ConfigError(f"images is {most}", fix=f"at least {LEAST} pictures")
    unit = np.arange(len(own)) if images.group is None else np.unique(images.group[own], return_inverse=True)[1]
    apart = np.flatnonzero(rng.permutation(unit.max() + 1) < max(1, round(share * (unit.max() + 1))))
    held = np.isin(unit, apart)
    if held.all() or not held.any():
        raise DataError(
            f"{images.name}: the {len(own)} pictures are all of one group, so none can check the denoiser",
            fix="pictures of at least two groups, or a table without a group column",
        )
    return np.sort(own[~held]), np.sort(own[held])


def sentences(images: Images, rows: np.ndarray, vit: nn.Module, settings: Any, shards: int, size: int) -> list[str]:
    """What a person should know before stage 1 starts."""
    preprocess = vit.passport.preprocess
    grid = table_grid(vit)
    cells = finest(settings, grid)
    found = [
        f"stage 1: {len(rows)} pictures, {settings.views} crops and {settings.steps:,} steps each, {size} at once; "
        f"the finest grid has {cells} cells a side"
    ]
    done = -(-len(rows) // size) - shards
    if done:
        found.append(f"{done} of {done + shards} parts of stage 1 are done already")
    if len(rows) < FEW:
        found.append(f"{len(rows)} pictures are few: the denoiser may learn them by heart; some hundreds are sensible")
    look = rows[np.linspace(0, len(rows) - 1, num=min(32, len(rows))).astype(int)]
    shapes = [images.decode(int(row)).shape[-2:] for row in look]
    small = sum(min(shape) < min(preprocess.image_size) for shape in shapes)
    if small:
        least = min(min(shape) for shape in shapes)
        found.append(
            f"{small} of {len(look)} pictures looked at are smaller than the model's {preprocess.image_size[0]} x "
            f"{preprocess.image_size[1]} pixels (the least: {least}); their crops are enlarged and hold little detail"
        )
    return found


@torch.inference_mode()
def cosines(
    method: nn.Module, pairs: Pairs, learn: np.ndarray, check: np.ndarray, device: torch.device
) -> dict[str, np.ndarray]:
    """Mean cosine to the clean target of each picture of `check`: of raw features ("identity"), of raw features plus the mean
    map that training pictures ask for ("mean map"), and of the denoiser's."""
    offset = _mean_map(pairs, learn).to(device)
    rows: dict[str, list[Tensor]] = {"identity": [], "mean map": [], "denoiser": []}
    for row in check:
        batch = {key: value.to(device) for key, value in pairs.batch([int(row)]).items()}
        raw, target = batch["raw"], batch["target"]
        clean = method.vit.dvt(raw.flatten(1, 2), tuple(raw.shape[1:3])).view_as(raw)
        for name, value in (("identity", raw), ("mean map", raw + offset), ("denoiser", clean)):
            rows[name].append(F.cosine_similarity(value, target, dim=-1).mean().cpu())
    return {name: torch.stack(values).numpy() for name, values in rows.items()}


def _mean_map(pairs: Pairs, learn: np.ndarray, most: int = 500) -> Tensor:
    """Mean of clean - raw over training pictures, (h, w, D): the best map that is the same for every picture."""
    batches_ = [pairs.batch([int(row)]) for row in learn[:most]]
    return torch.stack([(one["target"] - one["raw"])[0] for one in batches_]).mean(0)


def judge(summary: dict, found: dict[str, np.ndarray]) -> None:
    """Figures of stage 2 on pictures that it did not see, with intervals over them."""
    from vitkit.evaluate.resampling import case_mean
    from vitkit.evaluate.statistics import bootstrap

    names = {
        "denoiser": "cosine to the clean target",
        "identity": "the same of raw features",
        "mean map": "the same of raw features and the best fixed map",
    }
    for key, name in names.items():
        values = found[key]
        low, high = None, None
        if len(values) > 2:
            interval: Any = bootstrap(case_mean, np.zeros(len(values)), values.astype(float), seed=0)
            low, high = interval.low, interval.high
        row = {
            "name": name,
            "value": float(values.mean()),
            "low": low,
            "high": high,
            "n": len(values),
            "split": "held out",
        }
        summary["metrics"].append(row)


def save_cleaned(folder: RunFolder, vit: Any, method: DVT, name: str, config: Config, images: Images) -> None:
    """The denoiser beside the base it stands on, or the whole where the base cannot be found again or learnt as well (the
    denoiser then lies beside it, under its official names); passport, splits."""
    passport, distilled = vit.passport, not isinstance(vit, DenoisedViT)
    kept = passport.base.get("kind") in ("timm", "file", "run")
    record = {
        "method": name,
        "settings": {key: value for key, value in config.values.items() if value is not None},
        "data": {"name": images.name, "fingerprint": images.fingerprint, "counts": images.counts},
        "sha256": weights.sha256_of(weights.trunk_state(vit)),
    }
    passport.lineage = [*passport.lineage, plain(record)]
    extras, trained = method.vit.dvt.state_dict() if distilled else None, None
    if not distilled:
        passport.steps = [*passport.steps, {"method": name, "settings": plain(method.settings)}]
        trained = sorted(n for n in vit.state_dict() if n.startswith("dvt.")) if kept else None
    weights.save_run(folder.path, vit, trained=trained, extras=extras)
    save(images, folder.path / "splits.csv")


def verdict(summary: dict, count: int, seconds: float, words: str) -> str:
    """One sentence on stage 2, one on the measure."""
    clean, raw = summary["metrics"][0], summary["metrics"][1]
    better = "nearer to" if clean["value"] > raw["value"] else "NO nearer to"
    text = (
        f"On {clean['n']} unseen pictures the denoiser, trained on {count} in {minutes(seconds)}, comes {better} the clean "
        f"features: cosine {raw['value']:.3f} -> {clean['value']:.3f}."
    )
    return f"{text} Before -> after: {words}." if words else text
