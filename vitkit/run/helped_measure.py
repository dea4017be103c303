"""What `vitkit compare A B --data D` measures on a data set: features once, then whatever labels allow, then the rest.

Everything takes any number of models, in the order of `sides`: lists hold one entry a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vitkit.errors import DataError
from vitkit.run.helped_gain import Gain, gain, gain_of_auc, gain_of_means
from vitkit.settings import Inputs, Machine

if TYPE_CHECKING:
    from vitkit.data.images import Images
    from vitkit.run.helped_models import Side

LEAST = 20  # scored images: with fewer, even an exact test of very different models shows nothing
PROTOCOLS = ("linear", "knn")  # the first decides
VIEW: Literal["view"] = "view"
DUPLICATE: Literal["duplicate"] = "duplicate"
VIEWS: tuple[tuple[str, Literal["view", "duplicate"], int], ...] = (
    ("one", VIEW, 1),
    ("two", VIEW, 2),
    ("copy", DUPLICATE, 3),
)
AGREE = 1500  # images that CKA and neighbours are computed on


@dataclass
class Bench:
    """Models, and how their features are computed."""

    sides: Sequence[Side]
    inputs: Inputs
    machine: Machine
    device: Any
    cache: Path | None
    say: Callable[[str], None]
    view_images: int
    hflip: bool

    def features(self, images: Images, what: str) -> list[np.ndarray]:
        """Of every model, NaN where a file cannot be read."""
        from vitkit.evaluate.features import features
        from vitkit.run.batches import worker_count
        from vitkit.run.measure import Counter

        machine, found = self.machine, {}
        different = {id(side.vit) for side in self.sides}
        with Counter(len(different) * len(images), quiet=machine.quiet) as counter:
            for side in self.sides:
                if id(side.vit) in found:
                    continue
                extracted = features(
                    side.vit,
                    images,
                    batch_size=machine.batch_size,
                    workers=worker_count(machine, images),
                    device=self.device,
                    progress=counter.at(f"model {side.letter}, {what}"),
                    cache=self.cache,
                    on_bad="skip",
                )
                found[id(side.vit)] = extracted.x
        return [found[id(side.vit)] for side in self.sides]

    def readable(self, images: Images, what: str) -> Readable:
        """Features of the images that can be read and count: with labels, those of the labelled splits."""
        labelled = images.task in ("single", "multi") and images.labels is not None
        if labelled:
            images = images.subset(images.split != "unlabelled")
        if len(images) < LEAST:
            raise DataError(f"{images.name}: {len(images)} images to compare on", fix=f"at least {LEAST}; 200 or more")
        xs, notes = self.features(images, what), []
        good = ~np.any([np.isnan(x[:, 0]) for x in xs], axis=0)
        if not good.all():
            notes.append(f"{(~good).sum()} of {len(good)} images could not be read and are left out")
            self.say(f"{images.name}: {notes[-1]} (vitkit check names them)")
            images, xs = images.subset(good), [x[good] for x in xs]
        return Readable(images, xs, labelled, notes)

    def probed(self, seen: Readable, protocols: Sequence[str]) -> Probed:
        """Probes of every model on the same training images, and their scores on the same test images."""
        from vitkit.run.batches import labelled_parts
        from vitkit.run.measure import run_protocol, scored_part

        images = seen.images
        numbered = replace(images, names=[str(i) for i in range(len(images))])
        data = labelled_parts(numbered, self.inputs, self.machine, self.say)
        part, split = scored_part(data)
        if len(part) < LEAST:
            raise DataError(
                f"{images.name}: {len(part)} labelled {split} images to compare on",
                fix=f"at least {LEAST} (200 or more to see small differences); --test_fraction cuts more off",
            )
        rows = {name: numbers(getattr(data, name)) for name in ("train", "val", "test")}
        used = {name: index for name, index in rows.items() if len(index)}
        scores = {}
        for protocol in protocols:
            parts = [{name: np.asarray(x[index]) for name, index in used.items()} for x in seen.xs]
            answers = [run_protocol(protocol, here, data, split, "auto", self.device).scores for here in parts]
            scores[protocol] = [np.asarray(one, dtype=float) for one in answers]
        scored = images.subset(rows[split])
        return Probed(scored, split, data.train, rows[split], np.asarray(part.labels), part.group, scores)

    def viewed(self, seen: Readable, pool: np.ndarray, what: str) -> Viewed:
        """Is a picture found again in another view, and as a re-saved copy, on at most `view_images` of `pool`?"""
        from vitkit.evaluate import label_free

        index = np.flatnonzero(pool)
        index = np.sort(np.random.default_rng(self.machine.seed).permutation(index)[: self.view_images])
        some = seen.images.subset(index)
        here = [np.asarray(x[index], dtype=np.float64) for x in seen.xs]
        changed = {
            name: self.features(label_free.views(some, kind, seed=seed, hflip=self.hflip), f"{what} changed")
            for name, kind, seed in VIEWS
        }
        found = Viewed(some)
        for i, x in enumerate(here):
            one, two, copy = (changed[name][i] for name in ("one", "two", "copy"))
            there, back = label_free.found_again(one, two), label_free.found_again(two, one)
            again = label_free.found_again(copy, x)
            found.hits[VIEW].append((there[0] + back[0].astype(float)) / 2)
            found.others[VIEW].append(there[2])
            found.hits[DUPLICATE].append(again[0].astype(float))
            found.others[DUPLICATE].append(again[2])
            found.rank.append(label_free.effective_rank(x))
            found.uniformity.append(label_free.uniformity(x))
            found.alignment.append(label_free.alignment(one, two))
        return found


@dataclass
class Readable:
    """Images that every model could read, and their features a model."""

    images: Images
    xs: list[np.ndarray]
    labelled: bool
    notes: list[str]


@dataclass
class Probed:
    """What probes answered on the scored images: {protocol: one array a model}."""

    scored: Images
    split: str
    train: Images
    rows: np.ndarray  # of the scored images among the readable ones
    y: np.ndarray
    groups: np.ndarray | None
    scores: dict[str, list[np.ndarray]]


@dataclass
class Viewed:
    """What needs no labels, a model each: hits and the nearest other picture of every image, and figures of the features."""

    images: Images
    hits: dict[str, list[np.ndarray]] = field(default_factory=lambda: {VIEW: [], DUPLICATE: []})
    others: dict[str, list[np.ndarray]] = field(default_factory=lambda: {VIEW: [], DUPLICATE: []})
    rank: list[float] = field(default_factory=list)
    uniformity: list[float] = field(default_factory=list)
    alignment: list[float] = field(default_factory=list)


@dataclass
class Found:
    """Everything that was measured about two models on one data set."""

    images: Images
    scored: Images  # the images that measures with labels are of (empty without labels)
    split: str = ""
    trained_on: int = 0
    same: bool = False  # both models gave the same features
    gains: list[Gain] = field(default_factory=list)
    predicted: tuple[np.ndarray, np.ndarray] | None = None  # classes by the linear probe of A and B
    few: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    few_gains: list[dict[str, Any]] = field(default_factory=list)
    viewed: Viewed | None = None
    dims: tuple[int, ...] = ()
    agreement: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def main(self) -> Gain:
        """The measure that decides."""
        return self.gains[0]

    def gain(self, measure: str) -> Gain | None:
        return next((one for one in self.gains if one.measure == measure), None)


def measure_two(bench: Bench, images: Images, what: str, *, full: bool, shots: int) -> Found:
    """Everything that these images can tell about two models; with `full` also what decides nothing (curves, agreement,
    views of labelled images)."""
    seen = bench.readable(images, what)
    found = Found(seen.images, seen.images.subset([]), notes=seen.notes, dims=tuple(x.shape[1] for x in seen.xs))
    first, second = seen.xs
    found.same = first.shape == second.shape and bool(np.array_equal(first, second))
    pool = np.ones(len(seen.images), bool)
    if seen.labelled:
        probed = bench.probed(seen, PROTOCOLS if full else PROTOCOLS[:1])
        found.scored, found.split, found.trained_on = probed.scored, probed.split, len(probed.train)
        _judge(found, probed, str(seen.images.task))
        pool = seen.images.split == probed.split
        if full and shots:
            _few_shot(found, seen, probed, [side.letter for side in bench.sides], shots)
    if full or not seen.labelled:
        found.viewed = viewed = bench.viewed(seen, pool, what)
        for kind in (VIEW, DUPLICATE):
            a, b = viewed.hits[kind]
            found.gains.append(gain_of_means(kind, "found again", a, b, viewed.images.group))
    if full:
        found.agreement = _agreement(seen.xs, bench.machine.seed)
    return found


def _judge(found: Found, probed: Probed, task: str) -> None:
    """Paired differences of every protocol."""
    for protocol, scores in probed.scores.items():
        a, b = scores
        found.gains.append(gain(protocol, probed.y, a, b, task, probed.groups))
        area = gain_of_auc(protocol, probed.y, a, b, task, probed.groups)
        if area is not None:
            found.gains.append(area)
    if task == "single":
        a, b = probed.scores["linear"]
        found.predicted = (a.argmax(1), b.argmax(1))


def _few_shot(found: Found, seen: Readable, probed: Probed, letters: Sequence[str], shots: int) -> None:
    """Linear probes on k images a class: the same draws for both models, one penalty (1 / N), nothing chosen."""
    from vitkit.evaluate import linear, metrics, statistics

    task, classes = str(seen.images.task), len(seen.images.classes)
    measure = getattr(metrics, metrics.main_metric(task))
    found.few = {letter: [] for letter in letters}
    for k in [k for k in (1, 2, 5, 10, 20, 50, 100) if k < _commonest(probed.train)]:
        values: list[list[float]] = [[], []]
        for draw in range(shots):
            some = probed.train.few(k, draw)
            index, labels = numbers(some), np.asarray(some.labels)
            if task == "single" and len(np.unique(labels)) < 2:
                continue
            settings = linear.Settings(penalties=(1 / len(index),))
            for x, into in zip(seen.xs, values, strict=True):
                probe = linear.fit(x[index], labels, n_classes=classes, settings=settings)
                into.append(measure(probed.y, probe.scores(x[probed.rows])))
        pairs = np.array(values).T
        pairs = pairs[np.isfinite(pairs).all(1)]
        if not len(pairs):
            continue
        for letter, column in zip(letters, pairs.T, strict=True):
            mean = statistics.mean_interval(column)
            found.few[letter].append((k, mean.value, mean.low, mean.high))
        gap = statistics.mean_interval(pairs[:, 1] - pairs[:, 0])
        found.few_gains.append({"k": k, "a": pairs[:, 0].mean(), "b": pairs[:, 1].mean(), "gain": gap})


def _agreement(xs: Sequence[np.ndarray], seed: int) -> dict[str, float]:
    """CKA and shared neighbours of two models."""
    from vitkit.evaluate import label_free

    index = np.sort(np.random.default_rng(seed).permutation(len(xs[0]))[:AGREE])
    a, b = (np.asarray(x[index]) for x in xs)
    k = min(10, len(a) - 1)
    overlap = label_free.neighbour_overlap(a, b, k)
    found = {"cka": label_free.cka(a, b), "neighbours_shared": float(overlap.mean()), "k": k}
    return {**found, "neighbours_by_chance": k / (len(a) - 1), "images": len(a)}


def numbers(images: Images) -> np.ndarray:
    """Positions among the readable images, from the names that `Bench.probed` gave."""
    return np.array([int(name) for name in images.names], dtype=np.int64)


def _commonest(train: Images) -> int:
    """Training images of the most frequent class: the few-shot curve ends where all of them are used."""
    assert train.labels is not None
    return int(np.bincount(train.labels).max() if train.labels.ndim == 1 else (train.labels == 1).sum(0).max())
