"""What `vitkit evaluate` does for each protocol: the heads on cached features here, trainings and masks in modules beside.

Every protocol sees the same training, validation and scored images. What is chosen is chosen on validation; where the
validation images are the scored ones, or show one class only, a fifth of the training images stands in (patients whole).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError
from vitkit.run.batches import Data, labelled_parts, open_model
from vitkit.run.config import Config
from vitkit.run.folder import RunFolder
from vitkit.run.measure import FREE, feature_parts, overlap_with_training, run_protocol, scored_part, straddling
from vitkit.run.outcomes import Measured, Outcome, judge, labels_of, varies
from vitkit.settings import FROZEN, SEGMENTING, TRAINED, Evaluate

Say = Callable[[str], None]
BLOCKS = (1, 4)  # class tokens that the published linear grid reads
STAND_IN = "a fifth of the training images"


# ---------------------------------------------------------------- which protocols


def resolved(config: Config, images: Images) -> Config:
    """`config` with the protocols named, each once. Raises where one does not suit the data or the settings."""
    own: Evaluate = config.own
    if own.protocols == "auto":
        names: tuple[str, ...] = SEGMENTING[:2] if images.task == "mask" else FROZEN[:2]
    else:
        names = tuple(dict.fromkeys(own.protocols))
    for name in names:
        _suits(name, own, images)
    _heads(names, own)
    config = Config({**config.groups, "own": replace(own, protocols=names)}, {**config.values, "protocols": names})
    trained = [name for name in names if name in TRAINED]
    if trained or own.training:
        from vitkit.run.protocols_trained import settings_of

        if not trained:
            raise ConfigError(f"training={own.training} is for {', '.join(TRAINED)}", fix="add one to --protocols")
        settings_of(trained, config)  # refuses wrong settings before anything is computed
    return config


def _suits(name: str, own: Evaluate, images: Images) -> None:
    if name in SEGMENTING and images.task != "mask":
        raise DataError(
            f"{name} is for images with masks, and {images.name} has none",
            fix="give images/ and masks/, or mask_column",
        )
    if name not in SEGMENTING and images.task == "mask":
        raise DataError(
            f"{name} is for labels of whole images, and {images.name} has masks",
            fix=f"--protocols {','.join(SEGMENTING)}",
        )
    if name == "mlknn" and images.task == "single":
        raise DataError(
            f"mlknn is for several labels an image, and {images.name} has one", fix="--protocols knn is its counterpart"
        )
    if name in TRAINED and not own.out:
        raise ConfigError(f"{name} trains a model, and there is no out to write it to", fix="--out runs/protocols")


def _heads(names: Sequence[str], own: Evaluate) -> None:
    """ConfigError on wrong settings of heads and decoders, before features are computed."""
    from vitkit.evaluate import few_shot, knn, linear_grid, segment

    if {"knn", "mlknn"} & {*names}:
        knn.Settings(k=own.k)
    if "linear_grid" in names:
        linear_grid.Settings(rates=own.grid_rates, epochs=own.grid_epochs)
    if "few_shot" in names:
        few_shot.Settings(own.shots, own.draws)
    if {*SEGMENTING} & {*names}:
        segment.Settings(rates=own.mask_rates, epochs=own.mask_epochs, loss=own.mask_loss)


def free(config: Config) -> frozenset[str]:
    """Settings that may differ when a folder is written again. Trained protocols depend on batch and device."""
    trained = any(name in TRAINED for name in config.own.protocols)
    return FREE - {"batch_size", "accelerator", "precision"} if trained else FREE


def grown(folder: RunFolder, config: Config) -> bool:
    """Whether `folder` holds an evaluation by fewer protocols; the others are added to it."""
    if not folder.is_run() or folder.kind != "evaluate":
        return False
    return set(folder.read_config().get("protocols") or ()) < set(config.own.protocols)


# ---------------------------------------------------------------- labels


def classify(config: Config, images: Images, device: torch.device, folder: RunFolder | None, say: Say) -> Measured:
    """Every protocol on labelled images, or on volumes where the images are slices with one label a volume."""
    from vitkit.run import protocols_trained
    from vitkit.run.protocols_volumes import volumes_of

    whole = volumes_of(images, say)
    data = labelled_parts(images if whole is None else whole.units, config.inputs, config.machine, say)
    part, split = scored_part(data)
    cautions = _one_class(data, part, split)
    vit: Any = open_model(config.inputs, seed=config.machine.seed, say=say).eval()
    cautions += straddling(images) + overlap_with_training(vit, images)
    for text in cautions:
        say(f"caution: {text}")
    names, frozen, speed = config.own.protocols, None, None
    if any(name in FROZEN for name in names):
        used = {key: one for key, one in (("train", data.train), ("val", data.val), ("test", data.test)) if len(one)}
        depth = len(getattr(vit, "blocks", ()))
        stored = min(BLOCKS[-1], depth) if "linear_grid" in names else 0
        cache = None if folder is None else folder.path / "cache"
        x, speed = feature_parts(vit, used, config.machine, device, cache, blocks=stored, whole=whole)
        frozen = Frozen(config, data, split, x, device, int(vit.embed_dim) if stored else 0, stored, say)
    outcomes = []
    for name in names:
        if name in FROZEN:
            assert frozen is not None
            outcome = frozen.run(name)
        else:
            assert folder is not None
            outcome = protocols_trained.run(name, config, folder, part, split, whole)
        judge(outcome, part, str(images.task))
        say(f"{name}: {outcome.interval.value:.4f}, {outcome.seconds:.1f} s")
        outcomes.append(outcome)
    width = 0 if frozen is None else frozen.width
    unit = "images" if whole is None else "volumes"
    shown = images if whole is None else whole.units
    return Measured(shown, part, split, len(data.train), width, speed, cautions, outcomes, vit.passport, unit)


def _one_class(data: Data, part: Images, split: str) -> list[str]:
    """Refuse to score a single class; caution where validation shows one only."""
    if not varies(part):
        raise DataError(
            f"{data.all.name}: all {len(part)} {split} images have the same labels, so any score of them says nothing",
            fix=f"a {split} split with every class; without one, --test_fraction cuts one off",
        )
    if split != "val" and len(data.val) and not varies(data.val):
        return [f"the {len(data.val)} validation images are of one class; choices are made in the training images"]
    return []


@dataclass
class Frozen:
    """Features of every part (pooled, and behind them the linear input where the grid is asked for), and what to fit."""

    config: Config
    data: Data
    split: str
    x: dict[str, np.ndarray]
    device: torch.device
    dim: int  # of a token
    stored: int  # blocks in the linear input
    say: Say = print

    @property
    def own(self) -> Evaluate:
        return self.config.own

    @property
    def width(self) -> int:
        """Of the pooled feature."""
        return self.x["train"].shape[1] - self.dim * (self.stored + 1) * (self.stored > 0)

    @cached_property
    def pooled(self) -> dict[str, np.ndarray]:
        return {name: x[:, : self.width] for name, x in self.x.items()}

    def run(self, name: str) -> Outcome:
        """Fit, choose, score; seconds are those of the head alone."""
        began = time.perf_counter()
        if name in ("knn", "linear"):
            outcome = run_protocol(
                name, self.pooled, self.data, self.split, self.own.k, self.device, refit=self.own.refit
            )
        else:
            outcome = {"mlknn": self.mlknn, "linear_grid": self.linear_grid, "few_shot": self.few_shot}[name]()
        outcome.seconds = time.perf_counter() - began
        return outcome

    def chosen_on(self, x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]:
        """Features and labels to train and to choose on, and what the latter are."""
        train, val = self.data.train, self.data.val
        y = labels_of(train)
        if self.split != "val" and len(val) and varies(val):
            return x["train"], y, x["val"], labels_of(val), "validation"
        held = stand_in(train)
        return x["train"][~held], y[~held], x["train"][held], y[held], STAND_IN

    def mlknn(self) -> Outcome:
        from vitkit.evaluate import mlknn

        x, y, vx, vy, where = self.chosen_on(self.pooled)
        settings = mlknn.Settings(k=self.own.k)
        model = mlknn.fit(x, y, vx, vy, settings=settings)
        if where == STAND_IN or self.own.refit:  # the chosen k on all images that may be trained on
            both = np.concatenate([x, vx]), np.concatenate([y, vy])
            k, curve = model.k, model.curve
            model = replace(mlknn.fit(*both, settings=replace(settings, k=k)), curve=curve)
        picked = "nothing: it was given" if self.own.k != "auto" else where
        return Outcome("mlknn", model.scores(self.pooled[self.split]), f"k={model.k}", picked, model.curve, 0.0)

    def linear_grid(self) -> Outcome:
        from vitkit.evaluate import linear_grid

        inputs = {name: x[:, self.width :] for name, x in self.x.items()}
        x, y, vx, vy, where = self.chosen_on(inputs)
        grid = linear_grid.Settings(
            rates=self.own.grid_rates,
            blocks=tuple(sorted({min(blocks, self.stored) for blocks in BLOCKS})),
            epochs=self.own.grid_epochs,
            seed=self.config.machine.seed,
        )
        found = linear_grid.fit(
            x,
            y,
            vx,
            vy,
            dim=self.dim,
            stored=self.stored,
            n_classes=len(self.data.all.classes),
            grid=grid,
            refit=self.own.refit or where == STAND_IN,
        )
        lines: dict[str, list[tuple[float, ...]]] = {}
        for head, value in found.table:
            lines.setdefault(str(head).rpartition(",")[0], []).append((head.rate, value))
        curve = [(head.rate, value) for head, value in found.table]
        scores, trained = found.scores(inputs[self.split]), found.weight.numel() + found.bias.numel()
        note = "; ".join(filter(None, ["chosen by mean AUC", at_edge(found.head.rate, grid.rates)]))
        return Outcome(
            "linear_grid", scores, str(found.head), where, curve, 0.0, note=note, trained=trained, lines=lines
        )

    def few_shot(self) -> Outcome:
        from vitkit.evaluate import few_shot, metrics

        train, part = self.data.train, self.data.val if self.split == "val" else self.data.test
        y, task = labels_of(train), str(self.data.all.task)
        sizes = np.bincount(y) if y.ndim == 1 else (y == 1).sum(0)
        shots = tuple(k for k in sorted(set(self.own.shots)) if k <= sizes.max())
        if not shots:
            raise DataError(
                f"few_shot: {min(self.own.shots)} images a class of training classes with at most {int(sizes.max())}",
                fix="smaller --shots, e.g. 1,2,5",
            )
        settings, metric = few_shot.Settings(shots, self.own.draws), metrics.main_metric(task)
        x, held, n = self.pooled["train"], self.pooled[self.split], len(self.data.all.classes)
        tick = _Draws(2 * len(shots) * settings.draws, self.say)
        found = {
            head: few_shot.fit(x, y, held, labels_of(part), settings=settings, head=head, n_classes=n, on_draw=tick)
            for head in ("linear", "knn")
        }
        lines: dict[str, list[tuple[float, ...]]] = {
            head: [(float(d.shots), d.interval.value, d.interval.low, d.interval.high) for d in draws]
            for head, draws in found.items()
        }
        last = found["linear"][-1].interval
        detail = {head: {str(d.shots): d.scores for d in draws} for head, draws in found.items()}
        return Outcome(
            "few_shot",
            None,
            f"linear head on {shots[-1]} images a class",
            "nothing: penalties come from the drawn images",
            [(float(d.shots), d.interval.value) for d in found["linear"]],
            0.0,
            metrics={metric: last.value},
            interval=last,
            note=f"mean of {self.own.draws} draws; the interval is over draws, not over images",
            trained=(self.width + 1) * n,
            lines=lines,
            detail={"scores": detail},
        )


def at_edge(rate: float, rates: Sequence[float]) -> str:
    """A remark where the best learning rate is the last one that was tried."""
    if len(rates) < 2 or min(rates) < rate < max(rates):
        return ""
    return f"the {'largest' if rate == max(rates) else 'smallest'} rate tried won: try further ones"


class _Draws:
    """Says every ten seconds how many draws are done, and how long the rest will take."""

    def __init__(self, total: int, say: Say):
        self.total, self.say, self.done = total, say, 0
        self.began = self.said = time.perf_counter()

    def __call__(self) -> None:
        self.done += 1
        now = time.perf_counter()
        if now - self.said > 10:
            left = (now - self.began) / self.done * (self.total - self.done)
            self.say(f"few_shot: {self.done} of {self.total} heads, {left:.0f} s left")
            self.said = now


def stand_in(train: Images) -> np.ndarray:
    """(N,) which training images take the place of validation: a fifth, by class, groups whole, always the same."""
    held = train.with_splits(0.2, 0.0, seed=0).split == "val"
    if not held.any() or held.all():
        raise DataError(
            f"{train.name}: {len(train)} training images are too few to choose on some of them",
            fix="add a validation split, or more images (groups)",
        )
    return held
