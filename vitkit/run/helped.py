"""`vitkit compare A B --data D`: did it help? Before and after a change of backbone or weights, on the user's own images.

With labels: kNN and a linear probe on frozen features, scored on the same test images; each image counts for both models,
so what is hard for both cancels. The linear probe decides, kNN stands beside it. Without labels: whether a picture is
found again in another view, rank and spread of the features, found near-duplicates; the first decides, as a hint. Either
way: how far the two models agree, and whether B forgot what A knew of a general set.

Nothing is chosen on scored images. A difference counts when its 95 % interval excludes 0 *and* an exact test agrees, since
a bootstrap is too sure where a handful of images decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.errors import ConfigError, DataError
from vitkit.run import config as configs
from vitkit.settings import Inputs, Machine

if TYPE_CHECKING:
    import numpy as np

    from vitkit.data.images import Images
    from vitkit.evaluate.statistics import Difference

LEVEL = 0.05
LEAST = 20  # scored images: with fewer, even an exact test of very different models shows nothing
DRAWS = 5000
PROTOCOLS = ("linear", "knn")  # the first decides
VIEW, DUPLICATE = "view", "duplicate"
WEAK_GENERAL = "digits"


@dataclass(frozen=True)
class Helped:
    """What is compared beside the two models and the data, and where it goes."""

    general: str = WEAK_GENERAL
    """images of another kind, on which B may have forgotten something; "none" = not asked"""
    out: str = "compare"
    """folder for compare.html, results.json and cached features, or the page's own name (.html)"""
    general_images: int = 1000
    """use at most this many of the general images, drawn with `seed`"""
    view_images: int = 400
    """use at most this many images for what needs no labels, drawn with `seed`"""
    hflip: bool = True
    """views may be mirrored; switch off where left and right matter"""
    shots: int = 5
    """random draws of the training images for each point of the few-shot curve; 0 = no curve"""
    margin: float = 2.0
    """points that may be lost on the general set before it is called forgetting"""

    def __post_init__(self) -> None:
        if self.margin <= 0:
            raise ConfigError(f"margin is {self.margin:g}", fix="points of accuracy above 0, e.g. 2")
        for name in ("general_images", "view_images"):
            if getattr(self, name) < LEAST:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"at least {LEAST} images")
        if self.shots < 0:
            raise ConfigError(f"shots is {self.shots}", fix="0 for no few-shot curve, or a number of draws such as 5")


@dataclass
class Side:
    """One of the two models."""

    letter: str
    name: str
    vit: Any
    ref: str

    def __str__(self) -> str:
        return f"{self.letter} ({self.name})" if self.name else self.letter


@dataclass
class Gain:
    """B minus A in one measure on the same images. `p` is the larger of the bootstrap's and of the exact test's."""

    measure: str
    metric: str
    difference: Difference
    test: str
    exact: float

    @property
    def p(self) -> float:
        known = [p for p in (self.difference.p, self.exact) if not math.isnan(p)]
        return max(known, default=math.nan)

    @property
    def proven(self) -> bool:
        """Whether chance is an unlikely explanation."""
        return self.p < LEVEL and not self.difference.low <= 0 <= self.difference.high

    def row(self) -> dict[str, Any]:
        """Plain values for files and callers."""
        d = self.difference
        found = {"measure": self.measure, "metric": self.metric, "a": d.a, "b": d.b, "gain": d.value, "low": d.low}
        found |= {"high": d.high, "p": self.p, "p_bootstrap": d.p, "p_exact": self.exact, "test": self.test}
        found |= {"independent": d.n, "note": d.note}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}


@dataclass
class Found:
    """Everything that was measured on one data set."""

    images: Images
    scored: Images  # the images that measures with labels are of (empty without labels)
    split: str = ""
    trained_on: int = 0
    same: bool = False  # both models gave the same features
    gains: list[Gain] = field(default_factory=list)
    predicted: tuple[np.ndarray, np.ndarray] | None = None  # classes by the linear probe of A and B
    few: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    few_gains: list[dict[str, Any]] = field(default_factory=list)
    spread: list[tuple[str, float, float]] = field(default_factory=list)  # (name, A, B), numbers without an interval
    agreement: dict[str, float] = field(default_factory=dict)
    viewed: Images | None = None
    again: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)  # (hit by A, by B, nearest other of A, of B)
    notes: list[str] = field(default_factory=list)

    @property
    def main(self) -> Gain:
        """The measure that decides."""
        return self.gains[0]

    def gain(self, measure: str) -> Gain | None:
        return next((one for one in self.gains if one.measure == measure), None)


def settings_for(given: Mapping[str, Any] | Sequence[str]) -> configs.Config:
    """Resolved settings of `vitkit compare A B --data D` from keywords or command-line words."""
    from vitkit.run.verbs import verb_doc

    config = configs.build(
        {"own": Helped, "inputs": Inputs, "machine": Machine},
        given,
        prog="vitkit compare A B",
        description=verb_doc("compare"),
        required=("data",),
    )
    if config.inputs.model:
        raise ConfigError(f"model is {config.inputs.model}, but compare takes two", fix="vitkit compare A B --data D")
    return config


def helped_job(a: Any, b: Any, config: configs.Config) -> dict[str, Any]:
    """Compare models `a` and `b` (timm name, hub id, weights file, run folder; in Python also a ViT or a `vitkit.Model`).

    Returns {"verdict", "outcome": "better", "worse", "unclear" or "same", "forgot": True, False or None, "rows", "report",
    "results", ...}. Raises DataError on too few images.
    """
    import torch

    from vitkit.run import helped_page
    from vitkit.run.batches import open_data, speaker
    from vitkit.run.measure import device_of, overlap_with_training

    device, say = device_of(config.machine, "compare"), speaker(config.machine.quiet)
    page, cache = _places(config.own.out)
    with torch.random.fork_rng(devices=[]):
        images = open_data(config.inputs, say)
        general = _general(config, images, say)
        sides = _open(a, b, config, say)
        cautions = _prepared_alike(sides)
        for side in sides:
            cautions += [f"{side.letter}: {text}" for text in overlap_with_training(side.vit, images)]
        for text in cautions:
            say(f"note: {text}")
        job = Job(sides, config, device, cache, say)
        found = job.measure(images, "your", full=True)
        kept = None if general is None else job.measure(general, "general", full=False)
    result = helped_page.write(page, sides, found, kept, cautions, config)
    say(f"report: {result['report']}")
    return result


@dataclass
class Job:
    """Two models, and how their features are computed."""

    sides: tuple[Side, Side]
    config: configs.Config
    device: Any
    cache: Path | None
    say: Callable[[str], None]

    def measure(self, images: Images, what: str, *, full: bool) -> Found:
        """Everything that these images can tell; with `full` also what decides nothing (curves, agreement, views of
        labelled images)."""
        import numpy as np

        labelled = images.task in ("single", "multi") and images.labels is not None
        if labelled:
            images = images.subset(images.split != "unlabelled")
        if len(images) < LEAST:
            raise DataError(f"{images.name}: {len(images)} images to compare on", fix=f"at least {LEAST}; 200 or more")
        xs = self.features(images, what)
        good = ~np.isnan(xs[0][:, 0]) & ~np.isnan(xs[1][:, 0])
        found = Found(images, images.subset([]))
        if not good.all():
            found.notes.append(f"{(~good).sum()} of {len(good)} images could not be read and are left out")
            self.say(f"{images.name}: {found.notes[-1]} (vitkit check names them)")
            images, xs = images.subset(good), tuple(x[good] for x in xs)
            found.images = images
        found.same = xs[0].shape == xs[1].shape and bool(np.array_equal(*xs))
        if labelled:
            self.with_labels(found, xs, full)
        if full or not labelled:
            self.without_labels(found, xs, what)
        if full:
            self.agree(found, xs)
        if not labelled:  # the view decides
            found.gains.sort(key=lambda one: one.measure != VIEW)
        return found

    def features(self, images: Images, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Of both models, NaN where a file cannot be read."""
        from vitkit.evaluate.features import features
        from vitkit.run.batches import worker_count
        from vitkit.run.measure import Counter

        machine, found = self.config.machine, []
        with Counter(2 * len(images), quiet=machine.quiet) as counter:
            for side in self.sides:
                again = counter.at(f"model {side.letter}, {what}")
                if found and side.vit is self.sides[0].vit:
                    found.append(found[0])
                    continue
                extracted = features(
                    side.vit,
                    images,
                    batch_size=machine.batch_size,
                    workers=worker_count(machine, images),
                    device=self.device,
                    progress=again,
                    cache=self.cache,
                    on_bad="skip",
                )
                found.append(extracted.x)
        return found[0], found[1]

    # ---- with labels -------------------------------------------------------------------------------------------------

    def with_labels(self, found: Found, xs: tuple[np.ndarray, ...], full: bool) -> None:
        """Probes of both models on the same training images, and their paired differences on the same test images."""
        import numpy as np

        from vitkit.run.batches import labelled_parts
        from vitkit.run.measure import labels_of, run_protocol, scored_part

        machine, images = self.config.machine, found.images
        numbered = replace(images, names=[str(i) for i in range(len(images))])
        data = labelled_parts(numbered, self.config.inputs, machine, self.say)
        part, split = scored_part(data)
        if len(part) < LEAST:
            raise DataError(
                f"{images.name}: {len(part)} labelled {split} images to compare on",
                fix=f"at least {LEAST} (200 or more to see small differences); --test_fraction cuts more off",
            )
        rows = {name: _numbers(getattr(data, name)) for name in ("train", "val", "test")}
        found.scored, found.split, found.trained_on = images.subset(rows[split]), split, len(data.train)
        used = {name: index for name, index in rows.items() if len(index)}
        for protocol in PROTOCOLS if full else PROTOCOLS[:1]:
            scores = []
            for x in xs:
                here = {name: np.asarray(x[index]) for name, index in used.items()}
                scores.append(run_protocol(protocol, here, data, split, "auto", self.device).scores)
            found.gains += gains(protocol, labels_of(part), *scores, images.task, part.group)
            if protocol == "linear" and images.task == "single":
                found.predicted = (scores[0].argmax(1), scores[1].argmax(1))
        if full and self.config.own.shots:
            self.few_shot(found, xs, data.train, rows[split], labels_of(part))

    def few_shot(self, found: Found, xs: Any, train: Images, scored: np.ndarray, y: np.ndarray) -> None:
        """Linear probes on k images a class: the same draws for both models, one penalty (1 / N), nothing chosen."""
        import numpy as np

        from vitkit.evaluate import linear, metrics, statistics

        task, classes = str(found.images.task), len(found.images.classes)
        measure = getattr(metrics, metrics.main_metric(task))
        most = _commonest(train)
        found.few = {side.letter: [] for side in self.sides}
        for k in [k for k in (1, 2, 5, 10, 20, 50, 100) if k < most]:
            values: list[list[float]] = [[], []]
            for draw in range(self.config.own.shots):
                some = train.few(k, draw)
                index = _numbers(some)
                if task == "single" and len(np.unique(some.labels)) < 2:
                    continue
                settings = linear.Settings(penalties=(1 / len(index),))
                for x, into in zip(xs, values, strict=True):
                    probe = linear.fit(x[index], some.labels, n_classes=classes, settings=settings)
                    into.append(measure(y, probe.scores(x[scored])))
            pairs = np.array(values).T
            pairs = pairs[np.isfinite(pairs).all(1)]
            if not len(pairs):
                continue
            for side, column in zip(self.sides, pairs.T, strict=True):
                mean = statistics.mean_interval(column)
                found.few[side.letter].append((k, mean.value, mean.low, mean.high))
            gap = statistics.mean_interval(pairs[:, 1] - pairs[:, 0])
            found.few_gains.append({"k": k, "a": pairs[:, 0].mean(), "b": pairs[:, 1].mean(), "gain": gap})

    # ---- without labels ----------------------------------------------------------------------------------------------

    def without_labels(self, found: Found, xs: tuple[np.ndarray, ...], what: str) -> None:
        """Rank, spread and being found again, on at most `view_images` of the scored images (of all without labels)."""
        import numpy as np

        from vitkit.evaluate import label_free

        own, machine = self.config.own, self.config.machine
        pool = found.images.split == found.split if len(found.scored) else np.ones(len(found.images), bool)
        index = np.flatnonzero(pool)
        rng = np.random.default_rng(machine.seed)
        index = np.sort(rng.permutation(index)[: own.view_images])
        some = found.images.subset(index)
        here = [np.asarray(x[index], dtype=np.float64) for x in xs]
        seen = {
            name: self.features(label_free.views(some, kind, seed=seed, hflip=own.hflip), f"{what} changed")
            for name, kind, seed in (("one", VIEW, 1), ("two", VIEW, 2), ("copy", DUPLICATE, 3))
        }
        hits: dict[str, list[np.ndarray]] = {VIEW: [], DUPLICATE: []}
        others: dict[str, list[np.ndarray]] = {VIEW: [], DUPLICATE: []}
        aligned = []
        for i, x in enumerate(here):
            one, two, copy = (seen[name][i] for name in ("one", "two", "copy"))
            there, back = label_free.found_again(one, two), label_free.found_again(two, one)
            hits[VIEW].append((there[0] + back[0].astype(float)) / 2)
            others[VIEW].append(there[2])
            again = label_free.found_again(copy, x)
            hits[DUPLICATE].append(again[0].astype(float))
            others[DUPLICATE].append(again[2])
            aligned.append((label_free.alignment(one, two), label_free.uniformity(x)))
        for kind in (VIEW, DUPLICATE):
            found.gains.append(gain_of_means(kind, "found again", *hits[kind], some.group))
            found.again[kind] = (*hits[kind], *others[kind])
        found.viewed = some
        found.spread = [
            ("effective rank (RankMe)", *(label_free.effective_rank(x) for x in here)),
            ("values in a feature", *(float(x.shape[1]) for x in here)),
            ("uniformity (lower is more evenly spread)", *(pair[1] for pair in aligned)),
            ("alignment of views (lower is closer)", *(pair[0] for pair in aligned)),
        ]

    def agree(self, found: Found, xs: tuple[np.ndarray, ...]) -> None:
        """CKA and shared neighbours on at most 1,500 images."""
        import numpy as np

        from vitkit.evaluate import label_free

        index = np.sort(np.random.default_rng(self.config.machine.seed).permutation(len(xs[0]))[:1500])
        a, b = (np.asarray(x[index]) for x in xs)
        k = min(10, len(a) - 1)
        overlap = label_free.neighbour_overlap(a, b, k)
        found.agreement = {"cka": label_free.cka(a, b), "neighbours_shared": float(overlap.mean()), "k": k}
        found.agreement |= {"neighbours_by_chance": k / (len(a) - 1), "images": len(a)}


# ---------------------------------------------------------------- paired differences


def gains(
    protocol: str, y: np.ndarray, a: np.ndarray, b: np.ndarray, task: str | None, groups: np.ndarray | None
) -> list[Gain]:
    """B minus A in the task's main metric; for a binary label also in AUC by DeLong's test."""
    from vitkit.evaluate import metrics, statistics

    main = metrics.main_metric(str(task))
    measure = getattr(metrics, main)
    difference = _named(statistics.paired_bootstrap(measure, y, b, a, groups=groups, n=DRAWS))
    if task == "single" and groups is None:
        test, exact = "McNemar", statistics.mcnemar(y, b, a).p
    else:
        draws = 10_000 if task == "single" else 1000
        test, exact = "permutation", statistics.permutation(measure, y, b, a, groups=groups, n=draws).p
    found = [Gain(protocol, main, difference, test, exact)]
    if a.shape[1] == (2 if task == "single" else 1):
        label = y if task == "single" else y[:, 0]
        area = _named(statistics.delong(label, b, a, groups=groups))
        found.append(Gain(protocol, "auc", area, "DeLong", area.p))
    return found


def gain_of_means(measure: str, metric: str, a: np.ndarray, b: np.ndarray, groups: np.ndarray | None) -> Gain:
    """B minus A in the mean of one number an image."""
    from vitkit.evaluate import statistics

    difference = _named(statistics.paired_bootstrap(statistics.case_mean, a, b, a, groups=groups, n=DRAWS))
    exact = statistics.permutation(statistics.case_mean, a, b, a, groups=groups).p
    return Gain(measure, metric, difference, "permutation", exact)


def _named(difference: Difference) -> Difference:
    """B minus A was asked for, so what came first is B's value."""
    return replace(difference, a=difference.b, b=difference.a)


# ---------------------------------------------------------------- what is opened


def _places(out: str) -> tuple[Path, Path | None]:
    """The page, and the folder of cached features: none beside a page that was named."""
    if not out:
        raise ConfigError("out is empty, and the comparison is a page", fix="--out compare")
    path = Path(out)
    if path.suffix.lower() in (".html", ".htm"):
        return path, None
    if path.is_file():
        raise ConfigError(f"{out} is a file", fix="give a folder, or a page that ends in .html")
    return path / "compare.html", path / "cache"


def _open(a: Any, b: Any, config: configs.Config, say: Callable[[str], None]) -> tuple[Side, Side]:
    """Both models; the same name twice is opened once."""
    from vitkit.run.batches import open_model

    vits, refs, names = [], [], []
    for letter, model in (("A", a), ("B", b)):
        vit = getattr(model, "vit", model)
        if hasattr(vit, "passport"):
            ref = str(vit.passport.base.get("ref") or vit.passport.arch)
        else:
            ref = str(model)
            say(f"{letter}: {ref}")
            same = vits and ref == str(a)
            inputs = replace(config.inputs, model=ref)
            vit = vits[0] if same else open_model(inputs, seed=config.machine.seed, say=say)
        vits.append(vit.eval())
        refs.append(ref)
        names.append(_name(ref, vit))
    if names[0] == names[1]:  # whole paths where these differ, else the letters must do
        names = refs if refs[0] != refs[1] else ["", ""]
    return Side("A", names[0], vits[0], refs[0]), Side("B", names[1], vits[1], refs[1])


def _name(ref: str, vit: Any) -> str:
    """What a person would call the model: without folders, or by its folder where the file is called model.safetensors."""
    from vitkit.run.measure import short_name

    if vit.passport.base.get("kind") == "random":
        return f"{short_name(ref)}, random weights"
    path = Path(ref)
    plain = path.suffix and path.name.partition(".")[0] in ("model", "pytorch_model", "checkpoint", "weights", "last")
    return path.parent.name if plain and path.parent.name else short_name(ref)


def _prepared_alike(sides: tuple[Side, Side]) -> list[str]:
    """What differs in how the two models see a picture, said aloud."""
    first, second = (side.vit.passport.preprocess for side in sides)
    different = first.differences(second)
    if not different:
        return []
    return [f"each model sees the images as it was trained to, and that differs (A, then B): {'; '.join(different)}"]


def _general(config: configs.Config, images: Images, say: Callable[[str], None]) -> Images | None:
    """The general set, at most `general_images` of it; None where it is not asked for or is the data itself."""
    import numpy as np

    from vitkit.data import read

    name = config.own.general
    if name.lower() in ("none", ""):
        return None
    if name == config.inputs.data:
        say(f"forgetting is not asked: the general set {name} is what is compared on (--general FOLDER names another)")
        return None
    general = read(name, split_seed=config.inputs.split_seed)
    if name == WEAK_GENERAL:
        say(
            "general set for forgetting: digits, bundled handwriting, a narrow check; --general FOLDER names a better one"
        )
    if len(general) > config.own.general_images:
        rng = np.random.default_rng(config.machine.seed)
        general = general.subset(np.sort(rng.permutation(len(general))[: config.own.general_images]))
    return general


def _numbers(images: Images) -> np.ndarray:
    """Positions in the whole set, from the names that `with_labels` gave."""
    import numpy as np

    return np.array([int(name) for name in images.names], dtype=np.int64)


def _commonest(train: Images) -> int:
    """Training images of the most frequent class: the few-shot curve ends where all of them are used."""
    import numpy as np

    assert train.labels is not None
    return int(np.bincount(train.labels).max() if train.labels.ndim == 1 else (train.labels == 1).sum(0).max())
