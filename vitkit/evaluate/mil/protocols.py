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
from vitkit.errors import DataError
from vitkit.evaluate.statistics import Difference, Interval, bootstrap

from .bags import Bags
from .ensemble import Ensemble, ensemble_of
from .inference import compare_scores, fisher, score, slide_metric
from .train import Job, Recipe, fit

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
    curve = np.mean([t.curve for t in trained], axis=0)
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
    """Scores (N, C) of every slide by models that never saw its patient; `chosen` (recipe, epochs) of each outer fold;
    `each` the score of each outer fold, `mean` over them, `interval` by redrawing patients over all slides."""

    scores: np.ndarray
    chosen: list[tuple[Recipe, int]]
    each: list[float]
    interval: Interval

    @property
    def mean(self) -> float:
        return float(np.mean(self.each))


def nested(
    bags: Bags,
    recipes: Sequence[Recipe] | None = None,
    *,
    outer: int = 5,
    inner: int = 5,
    seeds: Sequence[int] = (0,),
    together: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Nested:
    """Nested cross-validation: recipe and number of epochs by mean inner score, retraining on the whole outer training part.

    An inner curve that is best at index e means e + 1 epochs (the original trains e). With several seeds the retrained
    models of an outer fold are averaged.
    """
    recipes = list(recipes) if recipes else [Recipe()]
    rounds = folds(bags, outer, seeds[0])
    jobs, owners = [], []
    for number, (train, _) in enumerate(rounds):
        for r, recipe in enumerate(recipes):
            made = _jobs(bags, recipe, inner, seeds, train)
            jobs += made
            owners += [(number, r)] * len(made)
    curves: dict[tuple[int, int], list[np.ndarray]] = {}
    for owner, trained in zip(
        owners, fit(bags, jobs, together=together, device=device, progress=progress), strict=True
    ):
        curves.setdefault(owner, []).append(trained.curve)
    chosen = []
    for number in range(outer):
        means = [np.mean(curves[number, r], axis=0) for r in range(len(recipes))]
        r = int(np.argmax([m.max() for m in means]))
        chosen.append((recipes[r], int(np.argmax(means[r])) + 1))
    finals = [
        Job(train, 1000 * seed + 500 + number, chosen[number][0], epochs=chosen[number][1])
        for number, (train, _) in enumerate(rounds)
        for seed in seeds
    ]
    retrained = fit(bags, finals, together=together, device=device)
    scores, each = np.empty((len(bags), bags.outputs), np.float32), []
    for number, (_, held) in enumerate(rounds):
        part = ensemble_of(bags, retrained[number * len(seeds) : (number + 1) * len(seeds)])
        scores[held] = part.scores(bags.subset(held), device=device)
        each.append(score(bags.labels[held], scores[held]))
    return Nested(scores, chosen, each, interval(bags, scores))


def one_shot(bags: Bags, recipe: Recipe, epochs: int, *, seed: int = 0, device: str | torch.device = "cpu") -> Ensemble:
    """One model on all slides for a number of epochs that cross-validation found: what ensembles are compared with."""
    return ensemble_of(bags, fit(bags, [Job(np.arange(len(bags)), seed, recipe, epochs=epochs)], device=device))


def interval(bags: Bags, scores: np.ndarray, *, n: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """AUC or C-index of `scores` with its bootstrap interval; patients are what is redrawn."""
    metric, y, columns = slide_metric(bags.labels, scores)
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


@dataclass
class Compared:
    """Encoder a against b: the paired difference in each cohort, and one p over all cohorts (Fisher)."""

    cohorts: dict[str, Difference]
    p: float


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
