"""Protocols for images with masks: decoders on the frozen trunk's feature maps, which are computed once for all of them."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkit.data.images import Images
from vitkit.dense.decoders import DECODERS, WIDE
from vitkit.errors import ConfigError, DataError
from vitkit.run.batches import open_model, speaker
from vitkit.run.config import Config
from vitkit.run.folder import RunFolder
from vitkit.run.measure import Counter, overlap_with_training, straddling
from vitkit.run.outcomes import Measured, Outcome
from vitkit.run.progress import Progress
from vitkit.run.protocols import STAND_IN, Say, at_edge, stand_in

SHOWN = 6  # pictures with truth and predictions
COLOURS = (
    (230, 75, 53),
    (60, 130, 220),
    (240, 180, 40),
    (40, 160, 110),
    (150, 90, 200),
    (0, 170, 190),
    (240, 120, 180),
)


def segment(config: Config, images: Images, device: torch.device, folder: RunFolder | None, say: Say) -> Measured:
    """Every decoder on the same cached maps: rate by validation, IoU and Dice with intervals over images (groups whole)."""
    from vitkit.evaluate.feature_maps import highest_class, require_depth

    refuse_few(config)
    images = _with_volumes(images)
    parts = {name: images.part(name) for name in ("train", "val", "test")}
    split = "test" if len(parts["test"]) else "val"
    part = parts[split]
    if not len(parts["train"]) or not len(part):
        what = "training images" if not len(parts["train"]) else "test or validation images to score"
        raise DataError(f"{images.name}: no {what} with masks", fix="vitkit check --data ... shows the splits")
    vit: Any = open_model(config.inputs, seed=config.machine.seed, say=say).eval()
    cautions = straddling(images) + overlap_with_training(vit, images)
    for text in cautions:
        say(f"caution: {text}")
    names = [name.removeprefix("segment_") for name in config.own.protocols]
    needs = max(DECODERS[name].needs for name in names)
    for name in names:
        require_depth(vit, DECODERS[name].needs, f"segment_{name}")
    cache = None if folder is None else folder.path / "cache"
    maps, speed = _maps(vit, {name: one for name, one in parts.items() if len(one)}, needs, config, device, cache)
    classes = max(len(images.classes), highest_class(maps["train"], *(m for k, m in maps.items() if k == "val")) + 1)
    if int(_known(maps[split].masks).max()) >= classes:
        raise DataError(
            f"{images.name}: {split} masks hold class {int(_known(maps[split].masks).max())}, training masks only up to "
            f"{classes - 1}",
            fix="the same classes in every split, or a classes.txt that names them all",
        )
    for one, what in (("train", "learn from"), (split, "score by")):
        if not _shows_any(maps[one]):
            raise DataError(
                f"{images.name}: all {len(parts[one])} {one} masks show background (class 0) only, nothing to {what}",
                fix="masks of objects too; vitkit check --data ... shows what the masks hold",
            )
    if split != "val" and "val" in maps and not _shows_any(maps["val"]):
        cautions.append(
            f"the {len(parts['val'])} validation masks show background only; choices are made on {STAND_IN}"
        )
        say(f"caution: {cautions[-1]}")
        del maps["val"]
    outcomes, said = [], {}
    for name in names:
        outcome, said[name] = _decode(name, maps, parts, split, classes, config, device)
        say(f"{outcome.protocol}: IoU {outcome.interval.value:.4f}, {outcome.seconds:.1f} s")
        outcomes.append(outcome)
    width = int(maps["train"].maps.shape[2])
    rows = _gallery(vit, part, maps[split].masks.numpy(), said, outcomes)
    trained_on, unit = len(parts["train"]), "images"
    return Measured(images, part, split, trained_on, width, speed, cautions, outcomes, vit.passport, unit, rows)


def refuse_few(config: Config) -> None:
    """ConfigError on a setting that draws images by their class, which masks do not have."""
    if config.inputs.labels_per_class is not None:
        raise ConfigError(
            f"labels_per_class is {config.inputs.labels_per_class}, and images with masks have no class to draw by",
            fix="leave labels_per_class out; a smaller table of images trains on fewer",
        )


def _shows_any(part: Any) -> bool:
    """Whether some mask holds a class beside background."""
    return bool(_known(part.masks).any())


def _with_volumes(images: Images) -> Images:
    """Slices of one volume are one group, where the data name no groups."""
    from dataclasses import replace

    from vitkit.data.scans import volumes

    numbers = volumes(images)
    return replace(images, group=numbers[0].astype(str)) if numbers is not None and images.group is None else images


def _maps(
    vit: Any, parts: dict[str, Images], needs: int, config: Config, device: torch.device, cache: Path | None
) -> tuple[dict[str, Any], float | None]:
    """Feature maps of every part at the model's size, and images a second (None when all came from the cache)."""
    from vitkit.evaluate import feature_maps

    size = tuple(vit.passport.preprocess.image_size)
    home, machine = next(vit.parameters()).device, config.machine
    found = {}
    with Counter(sum(map(len, parts.values())), quiet=machine.quiet) as counter:
        vit.to(device)
        for name, part in parts.items():
            found[name] = feature_maps.cache(
                vit,
                part,
                np.arange(len(part)),
                needs,
                (size[0], size[1]),
                rescale=config.own.rescale,
                batch_size=min(machine.batch_size, 32),
                folder=cache,
                progress=counter.at(name),
            )
        vit.to(home)
    return found, counter.speed


def _decode(
    name: str, maps: dict[str, Any], parts: dict[str, Images], split: str, classes: int, config: Config, device: Any
) -> tuple[Outcome, np.ndarray]:
    """One decoder trained, and its predictions (N, H, W) of the scored images."""
    from vitkit.evaluate import masks, segment, statistics

    own, machine = config.own, config.machine
    needs, began = DECODERS[name].needs, time.perf_counter()
    train = maps["train"].last(needs)
    if split != "val" and "val" in maps:
        val, where, refit = maps["val"].last(needs), "validation", own.refit
    else:
        held = stand_in(parts["train"])
        train, val, where, refit = train.rows(~held), train.rows(held), STAND_IN, True
    settings = segment.Settings(
        rates=own.mask_rates, epochs=own.mask_epochs, loss=own.mask_loss, seed=machine.seed, refit=refit
    )
    steps = segment.steps_an_epoch(len(train), settings) * len(settings.rates)
    steps += segment.steps_an_epoch(len(train) + len(val), settings) if refit else 0
    where = where if len(settings.rates) > 1 else "nothing: one rate was given"
    speaker(machine.quiet)(f"segment_{name}: {len(settings.rates)} rates x {settings.epochs} epochs")
    with Progress(steps * settings.epochs, settings.batch_size, quiet=machine.quiet) as progress:
        found = segment.fit_maps(
            train,
            val,
            make=partial(DECODERS[name], width=own.mask_width) if name in WIDE else name,
            n_classes=classes,
            settings=settings,
            device=device,
            on_step=lambda count, loss: progress.step(images=count, waited=0.0),
        )
    said = segment.predict_maps(found.decoder, maps[split].last(needs))
    tables = masks.confusions(maps[split].masks.numpy(), said, classes)
    groups = parts[split].group
    iou, dice = (statistics.bootstrap(f, tables, groups=groups, seed=0) for f in (masks.table_iou, masks.table_dice))
    return Outcome(
        f"segment_{name}",
        None,
        f"rate={found.rate:g}",
        where,
        [(rate, value) for rate, value in found.table],
        time.perf_counter() - began,
        metrics={"iou": iou.value, "dice": dice.value},
        interval=iou,
        note="; ".join(filter(None, [at_edge(found.rate, settings.rates), _nothing(said)])),
        trained=sum(p.numel() for p in found.decoder.parameters()),
        tables=tables,
        intervals={"dice": dice},
        detail={"iou_each": masks.class_iou_of(tables).tolist()},
    ), said


def _nothing(said: np.ndarray) -> str:
    return "" if said.any() else "it predicts background alone: more --mask_epochs, other --mask_rates, or dice_ce"


def _known(masks: Tensor) -> Tensor:
    return torch.where(masks == 255, 0, masks)


# ---------------------------------------------------------------- pictures


def _gallery(
    vit: Any, part: Images, truth: np.ndarray, said: dict[str, np.ndarray], outcomes: list[Outcome]
) -> list[list[tuple[Any, str]]]:
    """Image, truth and every prediction of a few scored images, from the worst to the best of the best decoder."""
    from vitkit.evaluate import masks
    from vitkit.evaluate.feature_maps import picture

    best = max(outcomes, key=lambda one: one.interval.value)
    assert best.tables is not None
    each = np.array([masks.table_iou(table[None]) for table in best.tables])
    order = np.argsort(np.where(np.isnan(each), np.inf, each), kind="stable")
    order = order[: max(1, int((~np.isnan(each)).sum()))]
    chosen = dict.fromkeys(order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)].tolist())
    size = (truth.shape[1], truth.shape[2])
    rows = []
    for i in chosen:
        pixels = picture(vit, part, i, size).permute(1, 2, 0).numpy()
        pixels = np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels
        row: list[tuple[Any, str]] = [(pixels, "image"), (overlay(pixels, truth[i]), "truth")]
        rows.append([*row, *((overlay(pixels, mask[i]), name) for name, mask in said.items())])
    return rows


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) with each class of the mask (H, W) in its colour; unknown pixels are darkened."""
    out = pixels.astype(float)
    for label in np.unique(mask):
        if label == 0:
            continue
        colour = np.zeros(3) if label == 255 else np.array(COLOURS[(int(label) - 1) % len(COLOURS)], float)
        out[mask == label] = 0.45 * out[mask == label] + 0.55 * colour
    return out.round().clip(0, 255).astype(np.uint8)
