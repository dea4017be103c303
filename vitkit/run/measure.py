"""Measuring a model: `vitkit evaluate` (protocols with intervals) and `vitkit embed` (features with a gallery).

Nothing is chosen on the images that are scored: hyper-parameters come from the validation split, or from within the
training images where the validation split is what is scored. The protocols themselves are in `vitkit.run.protocols`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError
from vitkit.run.batches import Data, open_data, open_model, speaker, worker_count
from vitkit.run.config import Config, main_line
from vitkit.run.files import atomic, atomic_write
from vitkit.run.folder import RunFolder
from vitkit.run.outcomes import Outcome, entry, known, labels_of, varies
from vitkit.settings import Machine

# Settings that do not change what is measured (beyond rounding), so that the same folder may be written again with others.
FREE = frozenset({"workers", "quiet", "batch_size", "accelerator", "precision", "devices"})
__all__ = ["compare_job", "device_of", "embed_job", "evaluate_job", "known", "labels_of", "run_protocol", "scored_part"]


def evaluate_job(config: Config) -> dict[str, dict[str, Any]]:
    """Score the model of `config` by every protocol asked for: {protocol: {"name": main metric, "value", "low", "high",
    "n", "chosen", "seconds", "trained", every other metric}}. With `out`, files and a report are written there.

    Raises DataError where there is nothing to train on or to score, and ConfigError on settings that do not apply.
    """
    from vitkit.run import cleanliness, metadata, outcomes, protocols, protocols_masks

    if cleanliness.asked(config):
        return cleanliness.cleanliness_job(config)
    if metadata.asked(config):
        return metadata.metadata_job(config)
    device = device_of(config.machine, "evaluate")
    say = speaker(config.machine.quiet)
    with torch.random.fork_rng(devices=[]):
        images = open_data(config.inputs, say)
        config = protocols.resolved(config, images)
        say(f"protocols: {', '.join(config.own.protocols)}")
        with _home(config, "evaluate") as folder:
            job = protocols_masks.segment if images.task == "mask" else protocols.classify
            measured = job(config, images, device, folder, say)
            outcomes.compare_outcomes(measured.outcomes, measured.part, str(images.task))
            if folder is not None:
                from vitkit.run.measured import write_evaluation

                report = write_evaluation(folder, measured, config)
                say(f"report: {report}")
    return {outcome.protocol: entry(outcome, measured) for outcome in measured.outcomes}


def embed_job(config: Config) -> Any:
    """Features (N, D) of every image, written with names, splits and labels and a gallery to `out`; returns the array.

    In Parquet or with Ray: what `vitkit.run.sharded.embed_sharded` writes and returns.
    """
    from vitkit.run import gallery, sharded

    if sharded.asked(config):
        return sharded.embed_sharded(config)
    if config.own.window_stride is not None:
        from vitkit.run.video_windows import window_job

        return window_job(config)

    device = device_of(config.machine, "embed")
    say = speaker(config.machine.quiet)
    with torch.random.fork_rng(devices=[]), _home(config, "embed") as folder:
        if folder is None:
            raise ConfigError("out is empty, and vitkit embed writes its features", fix="--out embeddings")
        images = open_data(config.inputs, say)
        vit: Any = open_model(config.inputs, seed=config.machine.seed, say=say).eval()
        found, speed = _features(vit, {"all": images}, config.machine, device, None)
        x = np.ascontiguousarray(found["all"])
        with atomic(folder.path / "features.npy") as file:
            np.save(file, x, allow_pickle=False)
        write_images(folder.path / "images.csv", images)
        vit.passport.save(folder.path)
        facts = {"images": f"{len(x):,}", "feature": f"{x.shape[1]} values"}
        facts["splits"] = ", ".join(f"{name} {count:,}" for name, count in images.counts.items())
        seen = gallery.write(
            folder.path / "gallery.html",
            images,
            x,
            title=f"{images.name} as {short_name(config.inputs.model)} sees it",
            facts=facts,
        )
        folder.finish(
            {"verb": "embed", "metrics": [], "images": len(x), "feature_dim": x.shape[1], "img_per_s": speed, **seen}
        )
        say(f"gallery: {folder.path / 'gallery.html'}")
    return x


def compare_job(paths: Sequence[Path], out: str | None = None) -> dict[str, Any]:
    """Finished runs side by side with paired differences; see `vitkit.run.comparing.compare_job`."""
    from vitkit.run.comparing import compare_job as compare

    return compare(paths, out)


# ---------------------------------------------------------------- what is measured


def scored_part(data: Data) -> tuple[Images, str]:
    """The test images; the validation images where there are none."""
    for part, split in ((data.test, "test"), (data.val, "val")):
        if len(part):
            return part, split
    raise DataError(
        f"{data.all.name}: no labelled test or validation images to score",
        fix="--test_fraction 0.2 cuts some off, or label some images of the test split",
    )


def run_protocol(
    name: str,
    x: dict[str, np.ndarray],
    data: Data,
    split: str,
    k: int | Literal["auto"],
    device: torch.device,
    *,
    refit: bool = False,
) -> Outcome:
    """Fit protocol `name` (knn or linear) on the training features, choose on validation, score the split.

    Where the validation images are the scored ones, the choice is made within the training images. Labels of the scored
    images are not passed to anything here.
    """
    from vitkit.evaluate import knn, linear

    began = time.perf_counter()
    train, classes = data.train, len(data.all.classes)
    held = (x["val"], labels_of(data.val)) if split != "val" and "val" in x and varies(data.val) else (None, None)
    where = "cpu" if device.type == "mps" else str(device)  # both fit in float64, which MPS lacks
    kwargs: dict[str, Any] = {"n_classes": classes, "groups": train.group, "device": where}
    if name == "knn":
        fitted: Any = knn.fit(x["train"], labels_of(train), *held, settings=knn.Settings(k=k), **kwargs)
        auto = "validation" if held[0] is not None else "the training images, each by the others"
        chosen, picked_on, note = f"k={fitted.chosen}", auto if k == "auto" else "nothing: it was given", ""
        if refit and held[0] is not None:
            both = np.concatenate([x["train"], held[0]]), np.concatenate([labels_of(train), held[1]])
            again = knn.fit(*both, settings=knn.Settings(k=fitted.chosen), n_classes=classes, device=where)
            fitted = replace(again, curve=fitted.curve)
    else:
        settings = linear.Settings(refit=refit)
        fitted = linear.fit(x["train"], labels_of(train), *held, settings=settings, **kwargs)
        chosen, picked_on = f"penalty={fitted.chosen:.2g}", fitted.picked_on
        note = (
            "" if fitted.converged else f"the optimiser stopped after {fitted.iterations} steps, short of its tolerance"
        )
    scores, trained = fitted.scores(x[split]), 0 if name == "knn" else classes * (x["train"].shape[1] + 1)
    seconds = time.perf_counter() - began
    return Outcome(name, scores, chosen, picked_on, fitted.curve, seconds, note=note, trained=trained)


def overlap_with_training(vit: Any, images: Images) -> list[str]:
    """Cautions where the model's own history says that it was trained on other splits of these data."""
    found = []
    for step in vit.passport.lineage:
        data = step.get("data") or {}
        if data.get("name") == images.name and data.get("fingerprint") not in (None, images.fingerprint):
            found.append(
                f"{step.get('method', 'an earlier run')} trained this model on other splits or another version of "
                f"{images.name}; images scored here may be among those it was trained on"
            )
    return list(dict.fromkeys(found))


def straddling(images: Images) -> list[str]:
    """A caution where groups (patients) lie in several of the splits that the data brought."""
    from vitkit.data.splits import leaks

    torn = leaks(images)
    if not torn:
        return []
    group, parts = next(iter(torn.items()))
    what = "group (patient, slide) is" if len(torn) == 1 else "groups (patients, slides) are"
    return [f"{len(torn)} {what} in several splits, e.g. {group} in {' and '.join(parts)}: scores flatter the model"]


def device_of(machine: Machine, verb: str) -> torch.device:
    """Where to compute. Measurements run in one process and in float32, so that they do not depend on the machine."""
    if machine.devices != 1:
        raise ConfigError(
            f"devices is {machine.devices}, and vitkit {verb} runs in one process", fix="leave devices out"
        )
    if machine.precision == "bf16":
        raise ConfigError(
            f"precision is bf16, and vitkit {verb} computes features in float32", fix="leave precision out"
        )
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if machine.accelerator == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if here[name]))
    if not here[machine.accelerator]:
        raise ConfigError(
            f"accelerator is {machine.accelerator}, but torch finds no such device",
            fix="vitkit doctor says what it finds",
        )
    return torch.device(machine.accelerator)


def short_name(model: str) -> str:
    """A model's name without the folders before it."""
    return model if model.startswith(("hf-hub:", "timm/")) else Path(model.rstrip("/\\")).name or model


# ---------------------------------------------------------------- features and files


def _features(
    vit: Any, parts: dict[str, Images], machine: Machine, device: torch.device, cache: Path | None, blocks: int = 0
) -> tuple[dict[str, np.ndarray], float | None]:
    """Features of every part, and images a second (None when all came from the cache)."""
    from vitkit.evaluate.features import features

    found = {}
    with Counter(sum(map(len, parts.values())), quiet=machine.quiet) as counter:
        for name, part in parts.items():
            found[name] = features(
                vit,
                part,
                batch_size=machine.batch_size,
                workers=worker_count(machine, part),
                device=device,
                progress=counter.at(name),
                cache=cache,
                blocks=blocks,
            )
    return found, counter.speed


def feature_parts(
    vit: Any,
    parts: dict[str, Images],
    machine: Machine,
    device: torch.device,
    cache: Path | None,
    *,
    blocks: int = 0,
    whole: Any = None,
) -> tuple[dict[str, np.ndarray], float | None]:
    """`_features`; with `whole` (`protocols_volumes.Volumes`) the parts are volumes, and a row is the mean of its slices."""
    if whole is None:
        return _features(vit, parts, machine, device, cache, blocks)
    slices = {name: whole.slices_of(part) for name, part in parts.items()}
    found, speed = _features(vit, {name: one for name, (one, _) in slices.items()}, machine, device, cache, blocks)
    return {name: whole.pooled(x, slices[name][1]) for name, x in found.items()}, speed


class Counter:
    """Says how extraction goes: a line that is redrawn on a terminal, one every ten seconds elsewhere."""

    def __init__(self, total: int, *, quiet: bool = False, every: float = 10.0):
        self.total, self.quiet = total, quiet
        self.live = not quiet and sys.stderr.isatty()
        self.every = 0.2 if self.live else every
        self.done, self.before, self.name = 0, 0, ""
        self.speed: float | None = None

    def __enter__(self) -> Counter:
        self.began = time.perf_counter()
        self.next = self.began + min(self.every, 2.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.done and not self.quiet:
            end = f"features of {self.done:,} images at {self.speed:,.0f} images/s"
            print(f"\r\033[K{end}" if self.live else end, file=sys.stderr, flush=True)

    def at(self, name: str) -> Any:
        """The progress callback of one part."""
        self.name, self.before = name, self.done
        return self._step

    def _step(self, done: int, total: int) -> None:
        now = time.perf_counter()
        self.done = self.before + done
        self.speed = self.done / max(now - self.began, 1e-9)
        if self.quiet or now < self.next:
            return
        left = (self.total - self.done) / self.speed
        pace = f"{self.speed:,.0f} images/s, {left:.0f} s left"
        line = f"features of {self.name} images: {self.done:,} of {self.total:,}, {pace}"
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)
        self.next = now + self.every


@contextmanager
def _home(config: Config, verb: str) -> Iterator[RunFolder | None]:
    """The folder that `out` names, claimed for these settings; None where nothing is to be written.

    The same settings write it again: features of unchanged data and weights come from its cache.
    """
    if not config.own.out:
        yield None
        return
    from vitkit.run import protocols

    folder, measures = RunFolder(config.own.out), verb == "evaluate"
    free = protocols.free(config) if measures else FREE
    called = sys.argv[1:2] == [verb] and Path(sys.argv[0]).stem in ("vitkit", "__main__")
    with folder:
        command = main_line() if called else f"vitkit.{verb}(...)"
        more = measures and protocols.grown(folder, config)
        state = folder.claim(config.values, verb, free=free | ({"protocols"} if more else set()), command=command)
        if more and state == "finished":  # protocols are added: no longer what the summary says
            (folder.path / "summary.json").unlink()
            folder.claim(config.values, verb, free=free | {"protocols"}, command=command)
        yield folder


def write_images(path: Path, images: Images) -> None:
    """`name,split,label,group`, one row an image in the order of features.npy."""
    import pandas as pd

    from vitkit.run.gallery import label_text

    frame = pd.DataFrame({"name": images.names, "split": images.split})
    frame["label"] = [label_text(images, i) for i in range(len(images))]
    frame["group"] = "" if images.group is None else images.group
    atomic_write(path, frame.to_csv(index=False))


def write_results(path: Path, content: dict[str, Any]) -> None:
    """JSON in one step; numbers that JSON lacks become null."""
    from vitkit.run.values import plain

    atomic_write(path, json.dumps(plain(content, finite=True), indent=1, ensure_ascii=False) + "\n")
