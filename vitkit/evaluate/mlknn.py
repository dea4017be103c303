"""ML-kNN: nearest neighbours for several labels an image, each label a Bayesian guess from how many neighbours carry it.

Paper: Zhang and Zhou, "ML-KNN: A lazy learning approach to multi-label learning", Pattern Recognition 2007; used with
cosine neighbours by Baharoon et al. (arXiv 2312.02366), code MohammedSB/DINOv2ForRadiology.

What happens, and where: given that j of the k nearest training images carry a label, how likely does this one
(`MLkNN.scores`)? With smoothing s and n training images of which n_c carry label c, by Bayes

    P(c) = (s + n_c) / (2 s + n)        a = P(c) P(j | c)        b = (1 - P(c)) P(j | not c)        score = a / (a + b)

where P(j | c) is the smoothed histogram, over the training images that carry c, of how many of their own k neighbours
do (`fit`). Neighbours come from `vitkit.evaluate.knn.neighbours` (exact, blocked, ties by row); counting is one gather,
no loop over images and labels.

Differs from the paper: k may be chosen by mean AUC on validation; unknown labels are left out. In the official code an
image is one of its own neighbours (`itself`), which makes the training histograms look better than those of new images;
it is the default here for equal numbers, and can be switched off.

Cost: a neighbour search of the training images among themselves, and of the queries. `votes` gives DINO's scores for
several k from one search.

    vitkit evaluate --model vit_small_patch14_dinov2.lvd142m --data findings.csv --protocols mlknn,linear
    vitkit.evaluate(model="vit_small_patch14_dinov2.lvd142m", data="findings.csv", protocols="mlknn,linear")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import knn, metrics

AUTO = (1, 3, 5, 10, 20, 50)  # what k="auto" tries, as far as the training set reaches
_ROWS = 4096  # queries whose neighbours' labels are held at once


@dataclass(frozen=True)
class Settings:
    """ML-kNN."""

    k: int | Literal["auto"] = "auto"
    """neighbours; auto = chosen on validation, or the published 5 where there is none"""
    smoothing: float = 1.0
    """pseudo-counts of every bin, as published"""
    itself: bool = True
    """a training image counts among its own neighbours, as in the official code"""

    def __post_init__(self) -> None:
        if self.k != "auto" and (not isinstance(self.k, int) or self.k < 1):
            raise ConfigError(f"k is {self.k!r}", fix='a whole number from 1, usually 5, or "auto"')
        if self.smoothing <= 0:
            raise ConfigError(f"smoothing is {self.smoothing}", fix="a positive number, usually 1")


@dataclass(frozen=True)
class MLkNN:
    """A fitted ML-kNN. `carrying` and `lacking` (C, k + 1): P(j | label), P(j | no label); `prior` (C,). `curve`: (k, mean
    AUC on validation) for every k tried."""

    x: np.ndarray
    y: np.ndarray
    k: int
    prior: np.ndarray
    carrying: np.ndarray
    lacking: np.ndarray
    curve: list[tuple[float, float]] = field(default_factory=list)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (M, C) of features (M, D)."""
        return self._scores(knn.neighbours(self.x, x, self.k)[1])

    def _scores(self, index: np.ndarray) -> np.ndarray:
        count = _count(self.y, index)  # (M, C)
        label = np.arange(self.y.shape[1])
        a = self.prior * self.carrying[label, count]
        b = (1 - self.prior) * self.lacking[label, count]
        return a / (a + b)


def fit(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray | None = None,
    val_y: np.ndarray | None = None,
    *,
    settings: Settings = Settings(),
) -> MLkNN:
    """Fit to features (N, D) and labels (N, C) of 0, 1, NaN. `k` beyond the training set means all of it.

    An unknown label (NaN) leaves the image out of that label's prior and histograms, and counts as absent where the image
    is somebody's neighbour. k="auto": of equal mean AUCs on validation the larger k.
    """
    y = np.asarray(train_y, dtype=float)
    if y.ndim != 2 or len(y) != len(train_x):
        raise DataError(
            f"ML-kNN is for labels (N, C), got {y.shape} for {len(train_x)} features",
            fix="use vitkit.evaluate.knn for one label an image",
        )
    if np.isnan(y).all():
        raise DataError("no training image has a label", fix="name a labelled split")
    most = len(y) if settings.itself else len(y) - 1
    if most < 1:
        raise DataError("a single training image has no neighbour", fix="itself=True, or more images")
    if settings.k != "auto" or val_x is None or not len(val_x):
        k = min(5 if settings.k == "auto" else settings.k, most)
        return _fitted(train_x, y, _own_neighbours(train_x, k, settings.itself), settings.smoothing)
    ks = [k for k in AUTO if k <= most]
    own, near = _own_neighbours(train_x, ks[-1], settings.itself), knn.neighbours(train_x, val_x, ks[-1])[1]
    fitted = {k: _fitted(train_x, y, own[:, :k], settings.smoothing) for k in ks}
    truth = np.asarray(val_y, dtype=float)
    curve = [(k, metrics.mean_auc(truth, model._scores(near[:, :k]))) for k, model in fitted.items()]
    best = fitted[max(curve, key=lambda point: (-np.inf if np.isnan(point[1]) else point[1], point[0]))[0]]
    best.curve.extend(curve)
    return best


def _fitted(x: np.ndarray, y: np.ndarray, own: np.ndarray, smoothing: float) -> MLkNN:
    """From the training images' own neighbours (N, k)."""
    k, known = own.shape[1], ~np.isnan(y)
    count = _count(y, own)
    carried, lacked = (y == 1), known & (y == 0)
    prior = (smoothing + carried.sum(0)) / (2 * smoothing + known.sum(0))
    histograms = []
    for rows in (carried, lacked):
        bins = np.bincount((count + (k + 1) * np.arange(y.shape[1]))[rows], minlength=y.shape[1] * (k + 1))
        bins = bins.reshape(-1, k + 1)
        histograms.append((smoothing + bins) / (smoothing * (k + 1) + bins.sum(1, keepdims=True)))
    return MLkNN(np.asarray(x), y, k, prior, *histograms)


def votes(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    *,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    n_classes: int | None = None,
    temperature: float = 0.07,
    normalise: bool = True,
) -> dict[int, np.ndarray]:
    """Class scores (M, C) for every k, from one search: neighbours vote with weight exp(similarity / temperature).

    normalise: scores of every k sum to one, as `vitkit.evaluate.knn` gives them. False is the official code, whose
    weights sum to one over the largest k, so that scores of smaller k do not; the order of classes is the same.
    """
    y = np.asarray(train_y)
    if y.ndim != 1 or (y < 0).any():
        raise DataError("votes are for one known label an image", fix="leave unlabelled images (-1) out")
    if not ks or min(ks) < 1:
        raise ConfigError(f"ks is {ks}", fix="whole numbers from 1, e.g. (10, 20)")
    classes = int(y.max()) + 1 if n_classes is None else n_classes
    similarity, index = knn.neighbours(train_x, test_x, max(ks))
    weight = np.exp((similarity - similarity[:, :1]) / temperature)
    weight /= weight.sum(1, keepdims=True)
    cast = (y[index][:, :, None] == np.arange(classes)) * weight[:, :, None]  # (M, k, C)
    found = {k: cast[:, :k].sum(1) for k in ks}
    return {k: s / s.sum(1, keepdims=True) for k, s in found.items()} if normalise else found


def _own_neighbours(x: np.ndarray, k: int, itself: bool) -> np.ndarray:
    if itself:
        return knn.neighbours(x, x, k)[1]
    index = knn.neighbours(x, x, k + 1)[1]
    other = index != np.arange(len(x))[:, None]
    other[other.all(1), -1] = False  # among many equal images it need not be in the list: drop the last instead
    return index[other].reshape(len(x), k)


def _count(y: np.ndarray, index: np.ndarray) -> np.ndarray:
    """How many of the neighbours `index` (M, k) carry each label: (M, C)."""
    carried = (y == 1).astype(np.int64)
    return np.concatenate([carried[index[i : i + _ROWS]].sum(1) for i in range(0, len(index), _ROWS)])
