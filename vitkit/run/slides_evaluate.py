"""`vitkit slides evaluate`: heads on tile features, tested on patients that they never saw, compared, and kept.

An arm is one head on one encoder's features. Without external cohorts an arm's scores are those of (nested) cross-validation:
every slide is scored by the models of the fold that held its patient out. With external cohorts the folds x seeds models are
trained on all labelled slides, each of its best epoch on its own validation fold, and test the cohorts once.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitkit.errors import ConfigError
from vitkit.evaluate.mil import inference, protocols
from vitkit.evaluate.mil.bags import Bags, feature_files, load_bags, without_labels
from vitkit.evaluate.mil.ensemble import Ensemble, ensemble_of
from vitkit.evaluate.mil.train import Recipe
from vitkit.evaluate.statistics import Interval
from vitkit.run.batches import speaker
from vitkit.run.config import Config, main_line
from vitkit.run.files import atomic, atomic_write
from vitkit.run.folder import RunFolder
from vitkit.run.measure import device_of
from vitkit.run.progress import clock
from vitkit.settings import Machine

KIND = "slides.evaluate"
FREE = frozenset({"quiet", "accelerator", "heatmaps"})
INTERNAL = "cross-validation"


@dataclass
class Arm:
    """A head on an encoder: its `ensemble`, `scores` (N, C) by cohort, what was `chosen` as (recipe, epochs) of each fold,
    the mean validation `curve` by epoch (external cohorts only), the mean score of single `members` by cohort, the scores of
    each fold."""

    encoder: str
    head: str
    name: str
    file: str
    ensemble: Ensemble
    scores: dict[str, np.ndarray]
    chosen: list[tuple[Recipe, int]]
    fold: np.ndarray | None = None
    curve: np.ndarray | None = None
    members: dict[str, float] = field(default_factory=dict)
    each: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Found:
    """Everything that was measured. `development` and `tested` hold bags by encoder; the first encoder's name the slides."""

    development: dict[str, Bags]
    tested: dict[str, dict[str, Bags]]
    folders: dict[str, dict[str, str]]
    arms: list[Arm]
    cohorts: dict[str, protocols.Cohort]
    intervals: dict[tuple[str, str], Interval]
    pairs: list[protocols.Compared]
    cautions: list[str]

    @property
    def bags(self) -> Bags:
        return next(iter(self.development.values()))

    @property
    def metric(self) -> str:
        one = self.bags
        return "C-index" if one.survival else "AUC" if one.outputs == 1 else "mean AUC"


def evaluate_job(config: Config) -> dict[str, Any]:
    """Train, test, compare and write everything into the run folder; returns what results.json holds, and its place."""
    from vitkit.run import slides_page

    own, say = config.own, speaker(config.own.quiet)
    device = device_of(Machine(accelerator=own.accelerator), "slides evaluate")
    encoders = _encoders(own.features)
    mark = _fingerprint([*own.features, *(own.external_features or ())], [own.labels, *(own.external or ())])
    folder = RunFolder(own.out)
    _refuse_changed(folder, mark)
    called = sys.argv[1:3] == ["slides", "evaluate"]
    with folder:
        line = main_line() if called else "vitkit.slides.evaluate(...)"
        values, free = {**config.values, "fingerprint": mark}, FREE | {"fingerprint"}
        drawn = folder.read_config().get("heatmaps") if folder.is_run() else None
        state = folder.claim(values, KIND, free=free, command=line)
        if state == "finished" and drawn == own.heatmaps:
            say(f"{folder.path} is finished; nothing to do")
            return _result(folder.path)
        if state == "finished":  # the page is written again, from the heads that are there
            (folder.path / "summary.json").unlink()
            folder.claim(values, KIND, free=free, command=line)
        development, tested, folders, cautions = _load(config, encoders)
        for text in cautions:
            say(f"note: {text}")
        say(_told(next(iter(development.values())), own.labels))
        arms, each = [], list(product(development, config.method.heads))
        files = _files([head if len(development) == 1 else f"{encoder} {head}" for encoder, head in each])
        with torch.random.fork_rng(devices=[]):
            for (encoder, head), (name, file) in zip(each, files.items(), strict=True):
                arms.append(_arm(config, folder.path, name, file, encoder, head, development[encoder], tested, device))
        found = _judge(development, tested, folders, arms, cautions, config)
        slides_page.write(folder.path, found, config)
        folder.finish(_summary(found))
    say(f"report: {folder.path / 'report.html'}")
    return _result(folder.path)


def _result(path: Path) -> dict[str, Any]:
    return {**json.loads((path / "results.json").read_text(encoding="utf-8")), "report": str(path / "report.html")}


# ---------------------------------------------------------------- slides and labels


def _encoders(features: tuple[str, ...]) -> dict[str, str]:
    """{name of an encoder: its folder}: the last part of the path where these differ."""
    tails = [Path(one).name for one in features]
    names = tails if len(set(tails)) == len(tails) else list(features)
    if len(set(names)) < len(names):
        raise ConfigError(f"the same features twice: {', '.join(features)}", fix="each folder once")
    return dict(zip(names, features, strict=True))


def _load(config: Config, encoders: dict[str, str]) -> tuple[dict, dict, dict, list[str]]:
    """Development bags by encoder, external ones by cohort and encoder, folders by cohort and encoder, and cautions."""
    own = config.own
    columns = {name: getattr(own, name) for name in ("slide", "label", "patient", "event", "positive", "missing")}
    columns |= {"max_tiles": own.max_tiles, "seed": own.seed}

    def read(folders: dict[str, str], table: str) -> dict[str, Bags]:
        made: dict[str, Bags] = {}
        for name, folder in folders.items():
            bags = load_bags(folder, table, **columns)
            made[name] = bags.matching(next(iter(made.values()))) if made else bags
        return made

    development, cautions = read(encoders, own.labels), []
    first = next(iter(development.values()))
    if len(np.unique(first.patients)) == len(first):
        cautions.append("every slide is a patient of its own; a column `patient` keeps several slides of one together")
    elsewhere = dict(zip(encoders, own.external_features, strict=True)) if own.external_features else encoders
    tables = {Path(one).stem: one for one in own.external or ()}
    if len(tables) < len(own.external or ()):
        raise ConfigError(f"two external tables have one name: {', '.join(own.external)}", fix="rename one")
    if INTERNAL in tables:
        raise ConfigError(f"{tables[INTERNAL]} has the name of vitkit's own scores, {INTERNAL}", fix="rename the table")
    tested = {name: read(elsewhere, table) for name, table in tables.items()}
    for name in tested:
        for encoder, bags in development.items():
            protocols.require_apart(bags, tested[name][encoder])
            _same_key(encoder, bags, tested[name][encoder])
    used = {*first.names, *(name for cohort in tested.values() for name in next(iter(cohort.values())).names)}
    left = [name for name in without_labels(next(iter(encoders.values())), first) if name not in used]
    if left:
        cautions.append(f"{len(left)} slides have features but no label and are left out")
    folders = {INTERNAL: encoders, **dict.fromkeys(tested, elsewhere)}
    return development, tested, folders, cautions


def _same_key(encoder: str, a: Bags, b: Bags) -> None:
    if a.key != b.key:
        raise ConfigError(
            f"{encoder}: the external features are of another model or tiling than the development ones",
            fix="embed both with one model and one tiling",
        )


def _told(bags: Bags, table: str) -> str:
    kinds = "signed times" if bags.survival else ", ".join(
        f"{name} {int((bags.labels == i).sum())}" for i, name in enumerate(bags.classes)
    )  # fmt: skip
    size = bags.features.numel() * bags.features.element_size() / 2**20
    return (
        f"{table}: {len(bags)} slides of {len(np.unique(bags.patients))} patients ({kinds}), "
        f"{int(bags.lengths.sum()):,} tiles of {bags.dim} values, {size:,.0f} MiB"
    )


def _fingerprint(folders: list[str], tables: list[str]) -> str:
    """Changes with a label, or with any slide's features."""
    from vitkit.evaluate.mil.store import _facts

    found = hashlib.sha256()
    for folder in folders:
        for name, file in feature_files(folder).items():
            facts = _facts(file)
            found.update(json.dumps([name, file.stat().st_size, facts.get("key"), facts.get("stamp")]).encode())
    for table in tables:
        found.update(Path(table).read_bytes() if Path(table).is_file() else b"")
    return found.hexdigest()[:16]


def _refuse_changed(folder: RunFolder, mark: str) -> None:
    before = folder.read_config().get("fingerprint") if folder.is_run() else None
    if before not in (None, mark):
        raise ConfigError(
            f"{folder.path} holds results of other labels or features than are there now",
            fix="choose another --out, or delete the folder",
        )


# ---------------------------------------------------------------- one arm


def _files(names: list[str]) -> dict[str, str]:
    """{name of an arm: what its files are called}: letters, digits and _; a number behind those that would be alike."""
    plain = ["".join(c if c.isalnum() else "_" for c in name) for name in names]
    low = [one.lower() for one in plain]  # some file systems take A for a
    return {
        name: file if low.count(file.lower()) == 1 else f"{file}-{low[: i + 1].count(file.lower())}"
        for i, (name, file) in enumerate(zip(names, plain, strict=True))
    }


def _arm(
    config: Config,
    out: Path,
    name: str,
    file: str,
    encoder: str,
    head: str,
    bags: Bags,
    tested: dict[str, dict[str, Bags]],
    device: torch.device,
) -> Arm:
    """Train and score an arm, or read it where an earlier, unfinished run has done so."""
    method, own = config.method, config.own
    kept = _read(out, file, encoder, head, name)
    if kept is not None:
        speaker(own.quiet)(f"{name}: found finished")
        return kept
    grid = product(method.lr, method.weight_decay)
    shared = {"batch_size": method.batch_size, "epochs": method.epochs, "n_tiles": method.n_tiles}
    recipes = [Recipe(head=head, lr=lr, weight_decay=decay, **shared) for lr, decay in grid]
    seeds = range(own.seed, own.seed + method.seeds)
    began = time.perf_counter()
    with Meter(name, quiet=own.quiet) as meter:
        if tested:
            arm = _external(recipes, name, encoder, head, file, bags, tested, method.folds, seeds, device, meter)
        else:
            inner = method.inner if method.nested else None
            done = protocols.nested(
                bags, recipes, outer=method.folds, inner=inner, seeds=seeds, device=device, progress=meter
            )
            whole = ensemble_of(bags, done.trained)
            arm = Arm(encoder, head, name, file, whole, {INTERNAL: done.scores}, done.chosen, done.fold, each=done.each)
    arm.seconds = time.perf_counter() - began
    _keep(out, arm)
    return arm


def _external(
    recipes: list[Recipe],
    name: str,
    encoder: str,
    head: str,
    file: str,
    bags: Bags,
    tested: dict[str, dict[str, Bags]],
    k: int,
    seeds: range,
    device: torch.device,
    meter: Meter,
) -> Arm:
    """Folds x seeds models of the recipe with the best mean validation curve, scored on every cohort."""
    made = []
    for recipe in recipes:
        found = protocols.cross_validate(bags, recipe, k=k, seeds=seeds, device=device, progress=meter)
        made.append((float(np.max(found.curve)), recipe, found))
    _, recipe, best = max(made, key=lambda one: one[0])
    arm = Arm(encoder, head, name, file, best.ensemble, {}, [(recipe, best.best_epochs)], curve=best.curve)
    for cohort, by_encoder in tested.items():
        test = by_encoder[encoder]
        members = best.ensemble.member_scores(test, device=device)
        arm.scores[cohort] = members.mean(0)
        arm.members[cohort] = float(np.nanmean([inference.score(test.labels, member) for member in members]))
    return arm


def _keep(out: Path, arm: Arm) -> None:
    """The heads, and beside them everything else that the report needs."""
    arm.ensemble.save(out / "heads" / f"{arm.file}.safetensors")
    arrays = {f"scores.{name}": value for name, value in arm.scores.items()}
    arrays |= {name: getattr(arm, name) for name in ("fold", "curve") if getattr(arm, name) is not None}
    chosen = [[asdict(recipe), epochs] for recipe, epochs in arm.chosen]
    rest = {"chosen": chosen, "members": arm.members, "each": arm.each, "seconds": arm.seconds, "name": arm.name}
    with atomic(out / "heads" / f"{arm.file}.npz") as handle:
        np.savez(handle, rest=np.array(json.dumps(rest)), **arrays)


def _read(out: Path, file: str, encoder: str, head: str, name: str) -> Arm | None:
    path = out / "heads" / f"{file}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    rest = json.loads(str(arrays.pop("rest")))
    chosen = [(Recipe(**recipe), epochs) for recipe, epochs in rest.pop("chosen")]
    scores = {key.removeprefix("scores."): value for key, value in arrays.items() if key.startswith("scores.")}
    ensemble = Ensemble.load(out / "heads" / f"{file}.safetensors")
    more = {**{key: arrays.get(key) for key in ("fold", "curve")}, **{k: v for k, v in rest.items() if k != "name"}}
    return Arm(encoder, head, name, file, ensemble, scores, chosen, **more)


# ---------------------------------------------------------------- what it means


def _judge(
    development: dict, tested: dict, folders: dict, arms: list[Arm], cautions: list[str], config: Config
) -> Found:
    first = next(iter(development.values()))
    sets = {name: next(iter(by_encoder.values())) for name, by_encoder in tested.items()} or {INTERNAL: first}
    cohorts = {
        name: protocols.Cohort(bags, {arm.name: arm.scores[name] for arm in arms}, arms[0].fold)
        for name, bags in sets.items()
    }
    intervals = {
        (arm.name, name): protocols.interval(one.bags, one.scores[arm.name], fold=one.fold)
        for name, one in cohorts.items()
        for arm in arms
    }
    alike = [(a.name, b.name) for a, b in combinations(arms, 2) if (a.encoder == b.encoder) != (a.head == b.head)]
    pairs = protocols.compare_arms(cohorts, alike)
    return Found(development, tested, folders, arms, cohorts, intervals, pairs, cautions)


def _summary(found: Found) -> dict[str, Any]:
    from vitkit.run.slides_page import verdict

    rows = []
    for (arm, cohort), interval in found.intervals.items():
        row = {"name": f"{arm} {found.metric}", "value": interval.value, "low": interval.low, "high": interval.high}
        rows.append({**row, "n": interval.n, "split": cohort})
    seconds = round(sum(arm.seconds for arm in found.arms), 1)
    return {"verb": "slides evaluate", "verdict": verdict(found), "metrics": rows, "seconds": seconds}


class Meter:
    """How far the training of an arm is."""

    def __init__(self, name: str, *, quiet: bool, every: float = 10.0):
        self.name, self.quiet = name, quiet
        self.live = not quiet and sys.stderr.isatty()
        self.every = 0.2 if self.live else every

    def __enter__(self) -> Meter:
        self.began = time.perf_counter()
        self.next = self.began + min(self.every, 2.0)
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.quiet or now < self.next:
            return
        self.next = now + self.every
        left = clock((total - done) / max(done, 1) * (now - self.began))
        line = f"{self.name}: {done:,} of {total:,} epochs of its models, about {left} left"
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if not self.quiet:
            line = f"{self.name}: trained in {clock(time.perf_counter() - self.began)}"
            print(f"\r\033[K{line}" if self.live else line, file=sys.stderr, flush=True)


def write_predictions(path: Path, bags: Bags, scores: np.ndarray, more: dict[str, Any] | None = None) -> Any:
    """A row a slide: its label, and the probability of each class, or its risk."""
    import pandas as pd

    frame = pd.DataFrame({"slide": bags.names, "patient": bags.patients, **(more or {})})
    frame["label"] = bags.labels if bags.survival else [bags.classes[i] for i in bags.labels]
    for name, column in columns(bags.classes, scores).items():
        frame[name] = column
    atomic_write(path, frame.to_csv(index=False))
    return frame


def columns(classes: list[str], scores: np.ndarray) -> dict[str, np.ndarray]:
    """Named columns of scores (N, C): `risk`, or the probability of every class."""
    if not classes:
        return {"risk": scores[:, 0]}
    if scores.shape[1] == 1:
        scores = np.concatenate([1 - scores, scores], axis=1)
    return {f"p_{name}": scores[:, i] for i, name in enumerate(classes)}
