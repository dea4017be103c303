"""Linear probe on frozen features: logistic regression for a whole grid of penalties at once, validation picks one.

For features standardised with the training mean and deviation, weights w (C, D), biases b (C,) and penalty lambda it
minimises

    mean over images of loss  +  lambda / 2 * |w|^2          (the bias is not penalised)

with the softmax cross-entropy (one label per image) or, for each class on its own, the sigmoid cross-entropy over the
images whose label is known (several labels). scikit-learn's C is 1 / (lambda * N); thanks to the mean, lambda means
the same for 30 images and 30 000. The default grid has 17 values from 10^-6 to 10^2, two a decade.

How it is fast and still that convex problem's optimum:

* the features are rotated to their principal axes, min(N, D) of them. With fewer images than features the optimum lies
  in the span of the images, so nothing is lost; a rotation leaves |w| alone, and the Hessian becomes nearly diagonal;
* `vitkit.evaluate.logistic` runs all penalties (and, for several labels, all classes) as one batch;
* penalties are compared at a relative gap of about 1e-3, mostly in float32; what is picked is solved to the tolerance.

Standardisation and rotation are folded back, so that the weights returned apply to raw features.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import metrics
from vitkit.evaluate.logistic import COARSE, solve

_NEVER = -1e4  # bias of a class that has no training image: probability 0 without infinities in the weights


@dataclass(frozen=True)
class Settings:
    """Logistic regression on frozen features."""

    penalties: tuple[float, ...] = (
        1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0,
    )  # fmt: skip
    """lambda on the mean loss; one value switches validation off"""
    folds: int = 5
    """parts of cross-validation where there is no validation set"""
    refit: bool = False
    """train on train + validation after choosing; off, so that "100 labels" means 100 labels"""
    tolerance: float = 1e-6
    """stop when the loss can fall by about this fraction of itself"""
    max_iter: int = 1000
    """most steps of the optimiser, in float32 and in float64 each"""
    seed: int = 0
    """which images share a fold"""

    def __post_init__(self):
        if not self.penalties or min(self.penalties) <= 0:
            raise ConfigError(f"penalties {self.penalties} must be positive", fix="use for example (1e-4, 1e-2, 1)")
        if self.folds < 2:
            raise ConfigError(f"folds is {self.folds}", fix="use at least 2")


@dataclass
class Probe:
    """A linear classifier of raw features: `weight` (C, D) and `bias` (C,), float64.

    chosen: the penalty in use. curve: (penalty, main metric on validation data) for every penalty, empty if only one
    was given. picked_on: "validation", "cross-validation", or why neither was possible. converged: whether the
    optimiser met its tolerance for the chosen penalty, after `iterations` steps.
    """

    weight: np.ndarray
    bias: np.ndarray
    task: str
    chosen: float
    curve: list[tuple[float, float]] = field(default_factory=list)
    picked_on: str = ""
    converged: bool = True
    iterations: int = 0

    def logits(self, x: np.ndarray) -> np.ndarray:
        """(M, D) -> (M, C)."""
        return _features(x, "test").numpy() @ self.weight.T + self.bias

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (M, C): softmax over classes for one label per image, a sigmoid each for several."""
        logits = torch.from_numpy(self.logits(x))
        return (logits.softmax(1) if self.task == "single" else logits.sigmoid()).numpy()

    def linear(self) -> torch.nn.Linear:
        """The same classifier as a float32 layer, to be set as the head of the ViT that gave the features."""
        layer = torch.nn.Linear(self.weight.shape[1], self.weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.weight))
            layer.bias.copy_(torch.from_numpy(self.bias))
        return layer


def fit(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray | None = None,
    val_y: np.ndarray | None = None,
    *,
    n_classes: int | None = None,
    groups: np.ndarray | None = None,
    settings: Settings | None = None,
    device: str = "cpu",
) -> Probe:
    """Train for every penalty, pick one by accuracy or mean AUC (of equal ones the strongest), return its classifier.

    Labels are (N,) integers with -1 = unlabelled, or (N, C) of 0, 1, NaN. Without validation data the penalty is
    picked by cross-validation within the training data: folds keep class frequencies and never split a group
    (patient) of `groups` (N,). Where that is impossible too (one image per class) the penalty nearest to 1 / N is
    taken, scikit-learn's C = 1. A class without training images always gets probability 0; a label that never varies
    gets its smoothed frequency.
    """
    settings = settings or Settings()
    data = _Data.of(train_x, train_y, n_classes, groups, "training", device)
    held = None
    if val_x is not None and len(val_x):
        held = _Data.of(val_x, val_y, data.classes, None, "validation", device, like=data)
    penalties, picked_on = list(settings.penalties), "the only penalty given"
    curve: list[tuple[float, float]] = []
    if len(penalties) > 1 and held is not None:
        found, chosen, curve = _validate(data, held, penalties, settings)
        if chosen is not None and not settings.refit:
            return found.probe(0, data.task, chosen, curve, "validation")
        picked_on = "validation"
    elif len(penalties) > 1:
        curve, picked_on = _cross_validate(data, penalties, settings)
    chosen = _best(curve)
    if chosen is None:  # nothing to go by
        chosen = min(penalties, key=lambda p: abs(np.log(p * len(data.x))))
        picked_on = picked_on if len(penalties) == 1 else f"no {picked_on} possible: the penalty nearest to 1 / N"
    data = data.joined(held) if settings.refit and held is not None else data
    return _train(data, [chosen], settings).probe(0, data.task, chosen, curve, picked_on)


def path(
    train_x: np.ndarray,
    train_y: np.ndarray,
    *,
    n_classes: int | None = None,
    settings: Settings | None = None,
    device: str = "cpu",
) -> list[Probe]:
    """One classifier for every penalty of the settings, in their order, each solved to the tolerance."""
    settings = settings or Settings()
    data = _Data.of(train_x, train_y, n_classes, None, "training", device)
    found = _train(data, list(settings.penalties), settings)
    return [found.probe(i, data.task, p, [], "not picked") for i, p in enumerate(settings.penalties)]


# ---------------------------------------------------------------- data


@dataclass
class _Data:
    x: Tensor  # (N, D) float64, labelled rows only
    y: np.ndarray  # (N,) int64, or (N, C) of 0, 1, NaN
    classes: int
    task: str
    groups: np.ndarray | None

    @classmethod
    def of(cls, x, y, classes, groups, what, device, like: _Data | None = None) -> _Data:
        x, y = _features(x, what), np.asarray(y)
        if len(x) != len(y):
            raise DataError(f"{len(x)} {what} features but {len(y)} labels", fix="give one label (or -1) per image")
        if groups is not None and len(groups) != len(x):
            raise DataError(f"{len(groups)} groups for {len(x)} {what} images", fix="give one group per image")
        if like is not None and (x.shape[1] != like.x.shape[1] or y.ndim != like.y.ndim):
            raise DataError(
                f"{what} data (features {tuple(x.shape)}, labels {y.shape}) do not fit the training data "
                f"(features {tuple(like.x.shape)}, labels {like.y.shape})",
                fix="extract both with the same model and read both with the same label columns",
            )
        keep = y >= 0 if y.ndim == 1 else ~np.isnan(y).all(1)
        if not keep.any():
            raise DataError(f"no {what} image has a label", fix="name a labelled split, or the label column of the CSV")
        groups = None if groups is None else np.asarray(groups)[keep]
        x, y = x[torch.from_numpy(keep)].to(device), y[keep]
        if y.ndim == 2:
            return cls(x, y.astype(np.float64), y.shape[1], "multi", groups)
        classes = int(y.max()) + 1 if classes is None else classes
        if y.max() >= classes:
            raise DataError(
                f"{what} label {y.max()} but only {classes} classes", fix="pass the number of classes as n_classes"
            )
        return cls(x, y.astype(np.int64), classes, "single", groups)

    @cached_property
    def turned(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean (D,), deviation (D,), principal axes (D, d) of the standardised features, coordinates on them (N, d)."""
        mean, scale = self.x.mean(0), self.x.std(0, correction=0)
        scale = torch.where(scale > 1e-7 * self.x.abs().amax(0), scale, 1.0)  # less than float32 resolves: constant
        return mean, scale, *_axes((self.x - mean) / scale)

    def rows(self, index: np.ndarray) -> _Data:
        groups = None if self.groups is None else self.groups[index]
        return _Data(self.x[torch.from_numpy(index).to(self.x.device)], self.y[index], self.classes, self.task, groups)

    def joined(self, other: _Data) -> _Data:
        return _Data(torch.cat([self.x, other.x]), np.concatenate([self.y, other.y]), self.classes, self.task, None)


def _features(x: np.ndarray, what: str) -> Tensor:
    rows = torch.tensor(np.asarray(x), dtype=torch.float64)
    if rows.ndim != 2 or len(rows) == 0:
        raise DataError(
            f"{what} features have shape {tuple(rows.shape)}", fix="give one row of features per image: (N, D)"
        )
    bad = torch.nonzero(~torch.isfinite(rows).all(1))
    if len(bad):
        raise DataError(
            f"{len(bad)} rows of the {what} features are not finite (first: row {int(bad[0])})",
            fix="leave out images that could not be read, and check the model's weights",
        )
    return rows


# ---------------------------------------------------------------- choosing the penalty


def _curve(penalties: list[float], scores: list[np.ndarray], y: np.ndarray, task: str) -> list[tuple[float, float]]:
    measure = getattr(metrics, metrics.main_metric(task))
    return [(p, measure(y, s)) for p, s in zip(penalties, scores, strict=True)]


def _best(curve: list[tuple[float, float]]) -> float | None:
    """The penalty with the highest value, of equal ones the strongest; None when no value is defined."""
    known = [point for point in curve if not np.isnan(point[1])]
    return max(known, key=lambda point: (point[1], point[0]))[0] if known else None


def _validate(
    data: _Data, held: _Data, penalties: list[float], settings: Settings
) -> tuple[_Path, float | None, list[tuple[float, float]]]:
    """Compare coarse solutions; solve the best to the tolerance, until the best of the curve is one that is solved."""
    coarse = _train(data, penalties, settings, coarse=True)
    curve = _curve(penalties, coarse.scores(held.x, data.task), held.y, data.task)
    solved: dict[float, _Path] = {}
    while (chosen := _best(curve)) is not None and chosen not in solved:
        at = penalties.index(chosen)
        solved[chosen] = _train(data, [chosen], settings, start=coarse.only(at))
        curve[at] = _curve([chosen], solved[chosen].scores(held.x, data.task), held.y, data.task)[0]
    return coarse if chosen is None else solved[chosen], chosen, curve


def _cross_validate(data: _Data, penalties: list[float], settings: Settings) -> tuple[list[tuple[float, float]], str]:
    """The curve over held-out scores of all folds pooled; empty where no class can be both trained on and held out."""
    fold = folds(data.y, data.groups, k=settings.folds, seed=settings.seed)
    if fold.max() < 1:
        return [], "cross-validation (no class occurs twice)"
    held = [np.zeros((len(data.y), data.classes)) for _ in penalties]
    for k in range(fold.max() + 1):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        part = data.rows(outside)
        for whole, scores in zip(
            held, _train(data.rows(inside), penalties, settings, coarse=True).scores(part.x, data.task), strict=True
        ):
            whole[outside] = scores
    return _curve(penalties, held, data.y, data.task), "cross-validation"


def folds(y: np.ndarray, groups: np.ndarray | None = None, *, k: int = 5, seed: int = 0) -> np.ndarray:
    """Fold number (N,) of every image: at most `k` folds, classes spread evenly, groups whole, the same for the same
    seed.

    An image with several labels counts for the rarest of its positive ones. No more folds than the most frequent
    class has independent units; a single fold means that nothing can be held out.
    """
    y = np.asarray(y)
    if y.ndim == 2:
        rarity = np.argsort(np.argsort(np.nansum(y, axis=0), kind="stable"))
        first = np.where(y == 1, rarity, y.shape[1]).min(1)  # the rarest positive, or "none"
        y = first
    unit = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    stratum = np.full(unit.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(stratum, unit, np.unique(y, return_inverse=True)[1].reshape(-1))
    size = np.bincount(unit)
    k = min(k, int(np.bincount(stratum).max()))
    order = np.random.default_rng(seed).permutation(len(stratum))
    order = order[np.lexsort((-size[order], stratum[order]))]  # class by class, large groups first
    where, filled = np.zeros(len(stratum), dtype=np.int64), np.zeros(k)
    here, last = np.zeros(k), -1
    for u in order:
        if stratum[u] != last:
            here, last = np.zeros(k), stratum[u]
        best = np.lexsort((np.arange(k), filled, here))[0]  # fewest of this class, then fewest at all
        where[u] = best
        here[best] += size[u]
        filled[best] += size[u]
    return where[unit]


# ---------------------------------------------------------------- from features to weights and back


@dataclass
class _Path:
    """Classifiers of raw features for R penalties."""

    weight: Tensor  # (R, C, D)
    bias: Tensor  # (R, C)
    converged: Tensor  # (R,)
    steps: Tensor  # (R,)

    def scores(self, x: Tensor, task: str) -> list[np.ndarray]:
        """Probabilities (M, C) for each penalty."""
        out = []
        for w, b in zip(self.weight, self.bias, strict=True):
            logits = x @ w.T + b
            out.append((logits.softmax(1) if task == "single" else logits.sigmoid()).cpu().numpy())
        return out

    def only(self, at: int) -> _Path:
        return _Path(*(getattr(self, f.name)[at : at + 1] for f in fields(self)))

    def probe(self, at: int, task: str, penalty: float, curve: list[tuple[float, float]], picked_on: str) -> Probe:
        weight, bias = self.weight[at].cpu().numpy(), self.bias[at].cpu().numpy()
        return Probe(weight, bias, task, penalty, curve, picked_on, bool(self.converged[at]), int(self.steps[at]))


def _train(
    data: _Data, penalties: list[float], settings: Settings, *, coarse: bool = False, start: _Path | None = None
) -> _Path:
    """Solve what can be learnt in standardised, rotated features (from `start` if given), fold back into raw ones."""
    x, device, count = data.x, data.x.device, len(penalties)
    mean, scale, axes, z = data.turned
    fixed, live = _fixed(data)
    path = _Path(
        torch.zeros(count, data.classes, x.shape[1], dtype=x.dtype, device=device),
        fixed.to(device).repeat(count, 1),
        torch.ones(count, dtype=torch.bool, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
    )
    if len(live) > (data.task == "single"):  # softmax over one class, or sigmoids over none: nothing to learn
        y = np.searchsorted(live, data.y) if data.task == "single" else data.y[:, live]
        begin = None
        if start is not None:
            begin = (start.weight[:, live] * scale @ axes, (start.bias + start.weight @ mean)[:, live])
        tolerance = max(COARSE, settings.tolerance) if coarse else settings.tolerance
        found = solve(
            z, torch.from_numpy(y).to(device), penalties, tolerance=tolerance, max_iter=settings.max_iter, start=begin
        )
        path.weight[:, live] = found.weight @ axes.T / scale
        path.bias[:, live] = found.bias
        path.converged, path.steps = found.converged, found.steps
    path.bias -= path.weight @ mean
    return path


def _axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Principal axes (D, d) of centred `x` (N, D), d = min(N, D), and the coordinates (N, d)."""
    basis = torch.linalg.qr(x.T).Q if len(x) < x.shape[1] else None  # the rows' span holds the optimum
    z = x if basis is None else x @ basis
    turn = torch.linalg.eigh(z.T @ z).eigenvectors
    return turn if basis is None else basis @ turn, z @ turn


def _fixed(data: _Data) -> tuple[Tensor, np.ndarray]:
    """Biases (C,) for the classes that cannot be learnt, and the numbers of those that can."""
    if data.task == "single":
        count = np.bincount(data.y, minlength=data.classes)
        return torch.from_numpy(np.where(count > 0, 0.0, _NEVER)), np.flatnonzero(count)
    ones, known = np.nansum(data.y, axis=0), (~np.isnan(data.y)).sum(0)
    smoothed = np.log(ones + 0.5) - np.log(known - ones + 0.5)
    return torch.from_numpy(smoothed), np.flatnonzero((ones > 0) & (ones < known))
