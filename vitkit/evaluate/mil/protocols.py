"""Slide-level protocols: cross-validated ensembles, nested cross-validation, external test cohorts, one-shot retraining.

Folds are stratified by label and grouped by patient (scikit-learn's `StratifiedGroupKFold`). Every choice (epoch, recipe) is
made on validation folds; scores that a choice has seen are never reported as a test result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vitkit.data.found import some
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.statistics import Difference, Interval, bootstrap, combine, holm

from .bags import Bags
from .ensemble import Ensemble, ensemble_of
from .inference import compare_scores, fisher, score, slide_metric
from .train import Job, Recipe, Trained, fit

Folds = list[tuple[np.ndarray, np.ndarray]]
Progress = Callable[[int, int], None]


def folds(bags: Bags, k: int = 5, seed: int = 0) -> Folds:
    """[(train rows, held-out rows)] x k: every patient on one side, classes (or events) spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    strata = (bags.labels > 0).astype(int) if bags.survival else bags.labels
    names = ["censored", "event"] if bags.survival else bags.classes
    for value in np.unique(np.arange(len(names)) if not bags.survival else [1]).tolist():
        patients = len(np.unique(bags.patients[strata == value]))
        if patients < k:
            raise DataError(
                f"'{names[value]}' has slides of {patients} patients, too few for {k} folds",
                fix=f"at most {patients} folds" if patients > 1 else "more patients of this class",
            )
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    out = []
    for train, held in splitter.split(np.zeros(len(bags)), strata, bags.patients):
        for part, where in ((train, "training"), (held, "held-out")):
            if len(np.unique(strata[part])) < len(np.unique(strata)) and not bags.survival:
                fix = "fewer folds, or another seed"
                raise DataError(f"a {where} fold of {len(part)} slides lacks a class: {k} folds", fix=fix)
        assert not set(bags.patients[train]) & set(bags.patients[held])
        out.append((train, held))
    return out


@dataclass
class CrossValidated:
    """`ensemble` of folds x seeds models; `curve` (epochs,) their mean validation score after each epoch; `best_epochs`
    where it is highest, as a number of epochs; `validation` of each member at its own epoch (optimistic where that was
    picked)."""

    ensemble: Ensemble
    curve: np.ndarray
    best_epochs: int
    validation: list[float]


def cross_validate(
    bags: Bags,
    recipe: Recipe | None = None,
    *,
    k: int = 5,
    seeds: Sequence[int] = range(5),
    pick: str = "best",
    together: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> CrossValidated:
    """Phikon-v2's 25 models: k folds x seeds, each fold's model of its best epoch (`pick="last"`: all epochs), as an
    ensemble. A seed decides folds, initial weights and order; it must be scored on slides that are not in `bags`."""
    recipe = recipe or Recipe()
    jobs = _jobs(bags, recipe, k, seeds)
    trained = fit(bags, jobs, keep=pick, together=together, device=device, progress=progress)
    curve = _mean([t.curve for t in trained])
    return CrossValidated(
        ensemble_of(bags, trained), curve, int(np.argmax(curve)) + 1, [float(t.curve[t.epochs - 1]) for t in trained]
    )


def _jobs(bags: Bags, recipe: Recipe, k: int, seeds: Sequence[int], rows: np.ndarray | None = None) -> list[Job]:
    """One job per seed and fold of `rows` (all when None)."""
    rows = np.arange(len(bags)) if rows is None else rows
    out = []
    for seed in seeds:
        for number, (train, val) in enumerate(folds(bags.subset(rows), k, seed)):
            out.append(Job(rows[train], 1000 * seed + number, recipe, rows[val]))
    return out


@dataclass
class Nested:
    """Scores (N, C) of every slide by models that never saw its patient; `fold` (N,) whose models; `chosen` (recipe, epochs)
    of each outer fold; `each` the score of each outer fold; `interval` of their mean by redrawing patients; `trained` the
    models, those of an outer fold one after the other."""

    scores: np.ndarray
    fold: np.ndarray
    chosen: list[tuple[Recipe, int]]
    each: list[float]
    interval: Interval
    trained: list[Trained]

    @property
    def mean(self) -> float:
        return float(np.mean(self.each))

    def members_of(self, fold: int) -> list[Trained]:
        """The models of an outer fold."""
        width = len(self.trained) // len(self.chosen)
        return self.trained[fold * width : (fold + 1) * width]


def nested(
    bags: Bags,
    recipes: Sequence[Recipe] | None = None,
    *,
    outer: int = 5,
    inner: int | None = 5,
    seeds: Sequence[int] = (0,),
    together: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Nested:
    """Nested cross-validation: recipe and number of epochs by mean inner score, retraining on the whole outer training part.

    An inner curve that is best at index e means e + 1 epochs (the original trains e). With several seeds the retrained
    models of an outer fold are averaged. inner=None: plain cross-validation, nothing is chosen: the only recipe, all its
    epochs.
    """
    recipes = list(recipes) if recipes else [Recipe()]
    if inner is None and len(recipes) > 1:
        raise ConfigError(f"{len(recipes)} recipes to choose from without inner folds", fix="inner=5, or one recipe")
    rounds = folds(bags, outer, seeds[0])
    chosen = [(recipes[0], recipes[0].epochs)] * outer
    finals = outer * len(seeds) * max(recipe.epochs for recipe in recipes)
    work = 0 if inner is None else outer * inner * len(seeds) * sum(recipe.epochs for recipe in recipes)
    if inner is not None:
        tell = None if progress is None else lambda done, total: progress(done, work + finals)
        chosen = _choose(bags, recipes, rounds, inner, seeds, together, device, tell)
    jobs = [
        Job(train, 1000 * seed + 500 + number, chosen[number][0], epochs=chosen[number][1])
        for number, (train, _) in enumerate(rounds)
        for seed in seeds
    ]
    tell = None if progress is None else lambda done, total: progress(work + done, work + total)
    found = Nested(
        np.empty((len(bags), bags.outputs), np.float32),
        np.empty(len(bags), np.int64),
        chosen,
        [],
        Interval(np.nan, np.nan, np.nan, 0),
        fit(bags, jobs, together=together, device=device, progress=tell),
    )
    for number, (_, held) in enumerate(rounds):
        part = ensemble_of(bags, found.members_of(number))
        found.scores[held], found.fold[held] = part.scores(bags.subset(held), device=device), number
        found.each.append(score(bags.labels[held], found.scores[held]))
    found.interval = interval(bags, found.scores, fold=found.fold)
    return found


def _choose(
    bags: Bags,
    recipes: list[Recipe],
    rounds: Folds,
    inner: int,
    seeds: Sequence[int],
    together: bool,
    device: str | torch.device,
    progress: Progress | None,
) -> list[tuple[Recipe, int]]:
    """(recipe, epochs) of each outer fold, by inner cross-validation of its training part."""
    jobs, owners = [], []
    for number, (train, _) in enumerate(rounds):
        for r, recipe in enumerate(recipes):
            made = _jobs(bags, recipe, inner, seeds, train)
            jobs += made
            owners += [(number, r)] * len(made)
    curves: dict[tuple[int, int], list[np.ndarray]] = {}
    trained = fit(bags, jobs, together=together, device=device, progress=progress)
    for owner, one in zip(owners, trained, strict=True):
        curves.setdefault(owner, []).append(one.curve)
    chosen = []
    for number in range(len(rounds)):
        means = [_mean(curves[number, r]) for r in range(len(recipes))]
        r = int(np.argmax([m.max() for m in means]))
        chosen.append((recipes[r], int(np.argmax(means[r])) + 1))
    return chosen


def _mean(curves: list[np.ndarray]) -> np.ndarray:
    """Mean curve (epochs,) over folds; those in which the score is undefined (no event) do not count."""
    known = [curve for curve in curves if np.isfinite(curve).all()]
    if not known:
        raise DataError("no validation fold has a score: no event in any", fix="fewer folds, or more events")
    return np.mean(known, axis=0)


def one_shot(bags: Bags, recipe: Recipe, epochs: int, *, seed: int = 0, device: str | torch.device = "cpu") -> Ensemble:
    """One model on all slides for a number of epochs that cross-validation found: what ensembles are compared with."""
    return ensemble_of(bags, fit(bags, [Job(np.arange(len(bags)), seed, recipe, epochs=epochs)], device=device))


def interval(
    bags: Bags,
    scores: np.ndarray,
    *,
    fold: np.ndarray | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """AUC or C-index of `scores` with its bootstrap interval; patients are what is redrawn. fold: see `slide_metric`."""
    metric, y, columns = slide_metric(bags.labels, scores, fold)
    found = bootstrap(metric, y, columns, groups=bags.patients, n=n, seed=seed, level=level)
    assert isinstance(found, Interval)
    return found


@dataclass
class External:
    """An external cohort's result: the ensemble, its members' mean, one-shot retraining, and the paired difference between
    ensemble and one shot."""

    ensemble: Interval
    members: float
    one_shot: Interval
    gain: Difference
    scores: np.ndarray


def external(
    development: Bags,
    test: Bags,
    recipe: Recipe | None = None,
    *,
    k: int = 5,
    seeds: Sequence[int] = range(5),
    device: str | torch.device = "cpu",
) -> External:
    """Phikon-v2's protocol: everything is chosen on the development slides, the test cohort is scored once."""
    require_apart(development, test)
    recipe = recipe or Recipe()
    found = cross_validate(development, recipe, k=k, seeds=seeds, device=device)
    single = one_shot(development, recipe, found.best_epochs, seed=seeds[0], device=device).scores(test, device=device)
    members = found.ensemble.member_scores(test, device=device)
    scores = members.mean(0)
    return External(
        interval(test, scores),
        float(np.mean([score(test.labels, member) for member in members])),
        interval(test, single),
        compare_scores(test.labels, scores, single, patients=test.patients),
        scores,
    )


def require_apart(development: Bags, test: Bags) -> None:
    """DataError where a patient or slide is in both."""
    for what, ours, theirs in (
        ("patients", development.patients, test.patients),
        ("slides", development.names, test.names),
    ):
        both = sorted({*map(str, ours)} & {*map(str, theirs)})
        if both:
            raise DataError(
                f"{len(both)} {what} are in the development and in the test slides: {some(both)}",
                fix="remove them from one of the two; if names only happen to be equal, give them a prefix",
            )
    if development.classes != test.classes:
        raise DataError(
            f"the development classes are {some(development.classes)}, the test classes {some(test.classes)}",
            fix="the same classes in both tables",
        )


@dataclass(frozen=True)
class Cohort:
    """Scored slides: `fold` (N,) where the scores are of a cross-validation; `scores` (N, C) of every arm."""

    bags: Bags
    scores: Mapping[str, np.ndarray]
    fold: np.ndarray | None = None


@dataclass
class Compared:
    """Arm a against b: the paired difference in each cohort, one p over all cohorts, and that p corrected for the number of
    pairs (Holm)."""

    cohorts: dict[str, Difference]
    p: float
    a: str = "a"
    b: str = "b"
    corrected: float = float("nan")


def compare_arms(
    cohorts: Mapping[str, Cohort], pairs: Sequence[tuple[str, str]], *, n: int = 2000, seed: int = 0
) -> list[Compared]:
    """Every pair of arms (heads, encoders) on the same slides of each cohort.

    The p-values of several cohorts are combined with their directions (Stouffer), so that cohorts that disagree speak
    against each other; Fisher's method, as in `compare_encoders`, would count both as evidence.
    """
    out = []
    for a, b in pairs:
        found = {
            name: compare_scores(
                one.bags.labels, one.scores[a], one.scores[b], patients=one.bags.patients, fold=one.fold, n=n, seed=seed
            )
            for name, one in cohorts.items()
        }
        known = [d for d in found.values() if not np.isnan(d.p)]
        signs = [1.0 if d.value >= 0 else -1.0 for d in known]
        p = known[0].p if len(known) == 1 else combine([d.p for d in known], signs=signs) if known else np.nan
        out.append(Compared(found, float(p), a, b))
    for one, p in zip(out, holm([one.p for one in out]), strict=True):
        one.corrected = float(p)
    return out


def compare_encoders(
    a: Bags,
    b: Bags,
    cohorts: Mapping[str, tuple[Bags, Bags]],
    recipe: Recipe | None = None,
    *,
    k: int = 5,
    seeds: Sequence[int] = range(5),
    device: str | torch.device = "cpu",
) -> Compared:
    """Train the same ensembles on two encoders' features of the same development slides; compare them on external cohorts.

    cohorts: {name: (a's features, b's features)} of the same slides.
    """
    b = b.matching(a)
    ensembles = [cross_validate(x, recipe, k=k, seeds=seeds, device=device).ensemble for x in (a, b)]
    found = {}
    for name, (test_a, test_b) in cohorts.items():
        test_b = test_b.matching(test_a)
        require_apart(a, test_a)
        first, second = (e.scores(t, device=device) for e, t in zip(ensembles, (test_a, test_b), strict=True))
        found[name] = compare_scores(test_a.labels, first, second, patients=test_a.patients)
    return Compared(found, fisher(list(found.values())))
