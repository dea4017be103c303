"""From settings to data and a model, and from images to batches: what jobs and measurements share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkit import weights
from vitkit.data import read
from vitkit.data.images import Images
from vitkit.data.loader import loader
from vitkit.errors import ConfigError, DataError
from vitkit.passport import Preprocess
from vitkit.settings import Inputs, Machine

Say = Callable[[str], None]


@dataclass
class Data:
    """The parts of a data set that a run uses, and how their pictures become batches."""

    all: Images
    train: Images
    val: Images
    test: Images


def open_data(inputs: Inputs, say: Say, kind: str | None = None, keep: Sequence[str] = ()) -> Images:
    """Read the data, cut missing splits, and say aloud what was understood. `kind`: what one entry is, see `read`; by
    default what the model takes. `keep`: columns of a table whose text stays with the images."""
    if kind is None:
        kind = weights.kind(inputs.model, arch=inputs.arch, arch_kwargs=inputs.arch_kwargs) if inputs.model else "image"
    images = read(
        inputs.data,
        image_column=inputs.image_column,
        label_columns=inputs.label_columns,
        group_column=inputs.group_column,
        split_seed=inputs.split_seed,
        val_fraction=inputs.val_fraction,
        test_fraction=inputs.test_fraction,
        kind=kind,
        keep_columns=keep,
        say=say,
    )
    return images


def require_images(kind: str, verb: str) -> None:
    """Raise ConfigError where a verb that only knows pictures is given a model of volumes or videos."""
    if kind != "image":
        raise ConfigError(
            f"vitkit {verb} works on images, and this model takes {kind}s",
            fix="vitkit evaluate, embed, adapt and predict take such models",
        )


def open_model(inputs: Inputs, *, seed: int, say: Say, **more: Any) -> nn.Module:
    """The ViT that the settings name, for images of their size and channels."""
    vit = weights.load(
        inputs.model,
        arch=inputs.arch,
        arch_kwargs=inputs.arch_kwargs,
        pretrained=inputs.pretrained,
        patch_size=inputs.patch_size,
        image_size=inputs.image_size,
        in_chans=inputs.in_chans,
        seed=seed,
        say=say,
        **more,
    )
    if inputs.frame_stride is not None:  # another pace is no other kind of picture: a trained model may be given it
        vit.passport.preprocess = replace(vit.passport.preprocess, frame_stride=inputs.frame_stride)
    names = ("mean", "std", "window", "spacing")
    asked = {name: getattr(inputs, name) for name in names if getattr(inputs, name) is not None}
    if asked:
        passport = vit.passport
        wanted = replace(passport.preprocess, **asked)
        differences = passport.preprocess.differences(wanted)
        if differences and passport.base.get("kind") != "random":
            raise ConfigError(
                f"{inputs.model} was trained on images prepared otherwise: {'; '.join(differences)}",
                fix=f"leave {' and '.join(asked)} out; they are for models that start from random weights",
            )
        passport.preprocess = wanted
    return vit


def worker_count(machine: Machine, images: Images) -> int:
    """auto: none for pictures that already are arrays in memory, else the cores that training leaves."""
    if machine.workers != "auto":
        return machine.workers
    return 0 if images.in_memory else max(1, (os.cpu_count() or 2) - 1)


def batches_of(
    images: Images, view: Any, machine: Machine, *, max_bad: float, rank: int, world: int, drop_last: bool
) -> Callable[[int, int], Any]:
    """batches(epoch, start) for the loop."""
    workers = worker_count(machine, images)

    def batches(epoch: int, start: int) -> Any:
        return loader(
            images,
            view,
            batch_size=machine.batch_size,
            seed=machine.seed,
            epoch=epoch,
            start=start,
            drop_last=drop_last,
            workers=workers,
            rank=rank,
            world=world,
            max_bad=max_bad,
        )

    return batches


def epoch_steps(count: int, machine: Machine, world: int) -> tuple[int, bool]:
    """Batches an epoch, and whether the last short one is dropped (it is, unless it is the only one)."""
    whole = count // (machine.batch_size * world)
    return (whole, True) if whole else (1, False)


def labelled_parts(images: Images, inputs: Inputs, machine: Machine, say: Say) -> Data:
    """Train, validation and test parts of labelled data; refuses data that cannot be learnt from."""
    if images.task == "mask":
        raise DataError(
            f"{images.name} has masks, and this method learns classes of whole images",
            fix="vitkit.dense.dvpt_segformer trains on masks in Python; for classes give class folders or a CSV with "
            "path,label",
        )
    if images.task not in ("single", "multi") or images.labels is None:
        raise DataError(
            f"{images.name}: no labels were found, and this needs them",
            fix="class folders, or a CSV with path,label; vitkit pretrain mae needs none",
        )
    train, val, test = (_labelled(images.part(split)) for split in ("train", "val", "test"))
    if inputs.labels_per_class is not None:
        if inputs.labels_per_class < 1:
            raise ConfigError(f"labels_per_class is {inputs.labels_per_class}", fix="at least 1 image a class")
        train = train.few(inputs.labels_per_class, machine.seed)
        say(f"training on {len(train)} images: {inputs.labels_per_class} a class")
    if not len(train):
        raise DataError(f"{images.name}: no labelled training images", fix="vitkit check --data ... shows the splits")
    if images.task == "single":
        present = len(np.unique(train.labels))
        if present < 2:
            raise DataError(
                f"{images.name}: all {len(train)} training images are of one class",
                fix="at least two classes; vitkit check --data ... shows the splits",
            )
        if len(images.classes) > len(train):
            raise DataError(
                f"{images.name}: {len(images.classes)} classes, but only {len(train)} training images",
                fix="more images, fewer classes, or smaller val_fraction and test_fraction",
            )
        if present < len(images.classes):
            say(f"WARNING: {len(images.classes) - present} classes have no training image and cannot be predicted")
    return Data(images, train, val, test)


def _labelled(images: Images) -> Images:
    known = images.labels >= 0 if images.task == "single" else ~np.isnan(images.labels).all(1)
    return images.subset(known)


@torch.inference_mode()
def predict_scores(
    method: nn.Module, images: Images, view: Any, prepare: Callable[[Tensor], Tensor], machine: Machine
) -> np.ndarray:
    """Class probabilities (N, C) in image order."""
    rows = []
    for batch in evaluation_batches(images, view, machine):
        rows.append(method.predict(prepare(batch["image"])).cpu().numpy())
    return np.concatenate(rows) if rows else np.zeros((0, len(images.classes)), np.float32)


def evaluation_batches(images: Images, view: Any, machine: Machine) -> Any:
    """Every image once, in order; a file that cannot be decoded is an error here: a score must not be of another file."""
    workers = worker_count(machine, images)
    yield from loader(images, view, batch_size=machine.batch_size, seed=0, shuffle=False, workers=workers, max_bad=0)


@torch.inference_mode()
def held_out_loss(method: nn.Module, images: Images, view: Any, prepare: Any, machine: Machine) -> float:
    """Mean loss over `images` with each sample's own fixed mask."""
    total, count = 0.0, 0
    for batch in evaluation_batches(images, view, machine):
        size = len(batch["image"])
        prepare_all(batch, prepare)
        total += float(method(batch)["loss"]) * size
        count += size
    return total / max(count, 1)


def prepare_all(batch: dict[str, Any], prepare: Callable[[Tensor], Tensor]) -> None:
    """Normalise in place everything in a batch that is pixels: "image" and what begins with "image_"."""
    for key in batch:
        if key == "image" or key.startswith("image_"):
            batch[key] = prepare(batch[key])


def prepare_for(preprocess: Preprocess, device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda images: preprocess.normalise(images.to(device, non_blocking=True))


def speaker(quiet: bool) -> Say:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
