"""Cells of a scaling study: one backbone at one input size under every protocol, computed once and kept.

A cell is kept in `cells/` under a hash of everything it depends on: features (weights, structure, preprocessing at that size,
data, package versions), protocol, labels used. Other weights or data are another name, so that a stale cell cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitkit.data.images import Images
from vitkit.errors import DataError, VitkitError
from vitkit.evaluate import metrics, scaling
from vitkit.evaluate.scaling import Cost
from vitkit.evaluate.statistics import Interval, bootstrap
from vitkit.run.batches import Data, worker_count
from vitkit.run.config import Config
from vitkit.run.files import atomic
from vitkit.run.measure import Counter, labels_of, run_protocol
from vitkit.run.scaling_models import Backbone, misfit, open_at

RATES = (1e-3, 3e-3, 1e-2)  # of a decoder for masks, picked on validation
metrics.WEIGHTED[scaling.pooled_iou] = scaling.weighted_iou  # so that a bootstrap is one matrix product
_FORMAT = 1  # of kept cells: raise it when scores change for the same settings


UNKNOWN = Interval(math.nan, math.nan, math.nan, 0)


@dataclass
class Cell:
    """Scores of the test images by one backbone at one size: probabilities (N, C), or pixel counts (N, C * C) of masks."""

    model: str
    size: int
    fraction: float
    protocol: str
    scores: np.ndarray
    chosen: str
    trained_on: int
    seconds: float
    interval: Interval = UNKNOWN
    note: str = ""
    kept: bool = False  # read from an earlier run

    @property
    def value(self) -> float:
        return self.interval.value


@dataclass
class Study:
    """Everything that was measured. `missing`: (model, size) -> why there is nothing."""

    images: Images
    scored: Images
    split: str
    metric: str
    backbones: list[Backbone]
    sizes: list[int]
    fractions: list[float]
    protocols: list[str]
    cells: dict[tuple[str, int, float, str], Cell] = field(default_factory=dict)
    costs: dict[tuple[str, int], Cost] = field(default_factory=dict)
    missing: dict[tuple[str, int], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def measure(self) -> Callable[[np.ndarray, np.ndarray], float]:
        """The metric as a function of (y, scores)."""
        return scaling.pooled_iou if self.metric == "iou" else getattr(metrics, self.metric)

    @property
    def truth(self) -> np.ndarray:
        """What the metric compares with; for masks it is within the scores."""
        return np.zeros(len(self.scored)) if self.metric == "iou" else labels_of(self.scored)

    def main(self, fraction: float | None = None, protocol: str | None = None) -> dict[tuple[str, int], Cell]:
        """(model, size) -> cell, under the first protocol and with the most labels unless asked otherwise."""
        wanted = (max(self.fractions) if fraction is None else fraction, protocol or self.protocols[0])
        return {(m, s): cell for (m, s, f, p), cell in self.cells.items() if (f, p) == wanted}


# ---------------------------------------------------------------- one backbone at one size


@dataclass
class Job:
    """What all cells share."""

    study: Study
    data: Data
    config: Config
    device: torch.device
    home: Path
    say: Callable[[str], None]
    volumes: Any = None  # vitkit.run.protocols_volumes.Volumes where images are slices: features are means over slices

    def run(self, backbone: Backbone, size: int) -> None:
        """Every cell of a backbone at one size, and its cost; what cannot be done is written down and the study goes on."""
        study, key = self.study, (backbone.name, size)
        why = misfit(backbone, size)
        try:
            if not why:
                self._measure(backbone, size)
        except VitkitError as error:
            why = str(error)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
                raise
            why = (
                f"not enough memory for {size} px in batches of {self.config.machine.batch_size}: smaller --batch_size"
            )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if why:
            study.missing[key] = why
            study.cells = {k: cell for k, cell in study.cells.items() if k[:2] != key}
            self.say(f"{backbone.name} at {size} px: left empty, {why}")

    def _measure(self, backbone: Backbone, size: int) -> None:
        vit = open_at(backbone.ref, size, self.config)
        base = features_key(vit, self.data.all if self.volumes is None else self.volumes.slices)
        found = {}
        for fraction in self.study.fractions:
            for protocol in self.study.protocols:
                key = self._key(base, fraction, protocol)
                found[fraction, protocol] = (key, read_cell(self.home / "cells" / f"{key}.npz"))
        cost = self._cost(vit, size, base)
        todo = [pair for pair, (_, cell) in found.items() if cell is None]
        if todo:
            masks = self.study.metric == "iou"
            made = self._decoders(vit, size, todo) if masks else self._protocols(vit, todo)
            for pair, cell in made:
                write_cell(self.home / "cells" / f"{found[pair][0]}.npz", cell)
                found[pair] = (found[pair][0], cell)
        else:
            self.say(f"{backbone.name} at {size} px: finished before")
        self.study.costs[backbone.name, size] = cost
        for (fraction, protocol), (_, cell) in found.items():
            assert cell is not None
            cell.model, cell.size, cell.fraction, cell.protocol = backbone.name, size, fraction, protocol
            self._judge(cell)
            self.study.cells[backbone.name, size, fraction, protocol] = cell

    def _judge(self, cell: Cell) -> None:
        """The metric with its interval over redrawn test images (patients whole)."""
        study = self.study
        if len(cell.scores) != len(study.scored):
            raise DataError(f"{len(cell.scores)} scores for {len(study.scored)} images", fix="delete the folder cells/")
        found = bootstrap(study.measure, study.truth, cell.scores, groups=study.scored.group, seed=0)
        assert isinstance(found, Interval)
        cell.interval = found

    def _key(self, base: str, fraction: float, protocol: str) -> str:
        """A name that changes with everything that the scores depend on."""
        own, machine, groups = self.config.own, self.config.machine, self.data.all.group
        content = {
            "format": _FORMAT,
            "features": base,
            "fraction": fraction,
            "protocol": protocol,
            "seed": machine.seed,
        }
        content["few"] = self.config.inputs.labels_per_class
        content["groups"] = "" if groups is None else hashlib.sha256("\0".join(map(str, groups)).encode()).hexdigest()
        if self.study.metric == "iou":
            content |= {"epochs": own.epochs, "rates": RATES}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def _cost(self, vit: Any, size: int, base: str) -> Cost:
        """Counted and measured once for these weights on this device with as many threads."""
        batch = min(self.config.machine.batch_size, 16)
        here = [base, str(self.device), torch.get_num_threads(), torch.__version__, batch, size]
        path = self.home / "cells" / f"cost-{hashlib.sha256(json.dumps(here).encode()).hexdigest()[:32]}.json"
        try:
            return Cost(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            pass
        vit.to(self.device)
        cost = scaling.cost_of(vit, size, batch=batch, device=self.device)
        with atomic(path) as file:
            file.write(json.dumps(asdict(cost)).encode())
        return cost

    # ---- labels ------------------------------------------------------------------------------------------------------

    def _protocols(self, vit: Any, todo: Sequence[tuple[float, str]]) -> Iterator[tuple[tuple[float, str], Cell]]:
        """Features once, then every protocol on every share of the training labels."""
        data, x = self.data, self._features(vit)
        for fraction, protocol in todo:
            rows = scaling.share(labels_of(data.train), fraction, self.config.machine.seed)
            part = replace(data, train=data.train.subset(rows))
            some = {**x, "train": np.asarray(x["train"][rows])}
            done = run_protocol(protocol, some, part, self.study.split, "auto", self.device)
            yield (fraction, protocol), Cell("", 0, fraction, protocol, done.scores, done.chosen, len(rows), done.seconds,
                                             note=done.note)  # fmt: skip

    def _features(self, vit: Any) -> dict[str, np.ndarray]:
        from vitkit.evaluate.features import features

        machine = self.config.machine
        parts = {name: getattr(self.data, name) for name in ("train", "val", "test")}
        whole = {name: one for name, one in parts.items() if len(one)}
        owners: dict[str, np.ndarray] = {}
        if self.volumes is not None:
            pairs = {name: self.volumes.slices_of(one) for name, one in whole.items()}
            whole, owners = (
                {name: pair[0] for name, pair in pairs.items()},
                {name: pair[1] for name, pair in pairs.items()},
            )
        found = {}
        with Counter(sum(map(len, whole.values())), quiet=machine.quiet) as counter:
            for name, part in whole.items():
                found[name] = features(
                    vit,
                    part,
                    batch_size=machine.batch_size,
                    workers=0 if self.device.type == "cpu" else worker_count(machine, part),
                    device=self.device,
                    progress=counter.at(name),
                    cache=self.home / "cache",
                )
                if owners:
                    found[name] = self.volumes.pooled(found[name], owners[name])
        return found

    # ---- masks -------------------------------------------------------------------------------------------------------

    def _decoders(
        self, vit: Any, size: int, todo: Sequence[tuple[float, str]]
    ) -> Iterator[tuple[tuple[float, str], Cell]]:
        """Feature maps once, then a decoder on every share of the training images; scored at the masks' own size."""
        from vitkit.dense.decoders import DECODERS
        from vitkit.evaluate import feature_maps, segment

        images, machine, own, split = self.data.all, self.config.machine, self.config.own, self.study.split
        needs = DECODERS[own.decoder].needs
        feature_maps.require_depth(vit, needs, f"--decoder {own.decoder}")
        rows = {name: np.flatnonzero(images.split == name) for name in ("train", "val", split)}
        vit.to(self.device)
        maps = {
            name: feature_maps.cache(vit, images, index, needs, (size, size), batch_size=min(machine.batch_size, 16))
            for name, index in rows.items()
            if len(index)
        }
        classes = max(len(images.classes), feature_maps.highest_class(*maps.values()) + 1)
        val = maps.get("val") if split != "val" else None
        rates = RATES if val is not None else RATES[1:2]
        settings = segment.Settings(
            rates=rates, epochs=own.epochs, loss="dice_ce", optimizer="adamw", seed=machine.seed
        )
        for fraction, protocol in todo:
            started = time.perf_counter()
            some = scaling.share(np.zeros(len(rows["train"]), int), fraction, machine.seed)
            fitted = segment.fit_maps(
                maps["train"].rows(some),
                val,
                make=own.decoder,
                n_classes=classes,
                settings=settings,
                device=self.device,
            )
            tables = _tables(images.subset(rows[split]), segment.predict_maps(fitted.decoder, maps[split]), classes)
            seconds = time.perf_counter() - started
            yield (
                (fraction, protocol),
                Cell("", 0, fraction, protocol, tables, f"rate={fitted.rate:g}", len(some), seconds),
            )


def _tables(images: Images, said: np.ndarray, classes: int) -> np.ndarray:
    """Pixel counts (N, C * C) at each mask's own size, so that inputs of all sizes are judged by the same pixels."""
    from vitkit.evaluate import masks

    out = []
    for i in range(len(images)):
        truth = images.mask(i)
        guess = torch.nn.functional.interpolate(
            torch.from_numpy(said[i])[None, None].float(), size=tuple(truth.shape), mode="nearest-exact"
        )
        out.append(masks.confusion(truth.numpy(), guess[0, 0].to(torch.uint8).numpy(), classes).reshape(-1))
    return np.stack(out)


# ---------------------------------------------------------------- keeping


def features_key(vit: Any, images: Images) -> str:
    """Hash of weights, structure, preprocessing (with the size) and data."""
    from vitkit.evaluate.features import cache_key

    return cache_key(vit, images)


def read_cell(path: Path) -> Cell | None:
    """A finished cell; None where there is none or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about, scores = json.loads(bytes(file["about"]).decode()), file["scores"]
        return Cell(scores=scores, kept=True, **about)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None


def write_cell(path: Path, cell: Cell) -> None:
    """In one step, so that a killed study leaves whole cells only."""
    about = {name: getattr(cell, name) for name in ("chosen", "trained_on", "seconds", "note")}
    about |= {"model": cell.model, "size": cell.size, "fraction": cell.fraction, "protocol": cell.protocol}
    with atomic(path) as file:
        np.savez(file, scores=cell.scores, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
