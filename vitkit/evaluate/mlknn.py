"""Neighbour protocols of the radiology benchmark: ML-kNN for several labels an image, and DINO's votes for several k.

Paper: Zhang and Zhou, "ML-KNN: A lazy learning approach to multi-label learning", Pattern Recognition 2007; used with
cosine neighbours by Baharoon et al. (arXiv 2312.02366), code MohammedSB/DINOv2ForRadiology.

ML-kNN asks, label by label: given that j of the k nearest training images carry it, how likely does this one? With
smoothing s and n training images of which n_c carry label c, by Bayes

    P(c) = (s + n_c) / (2 s + n)        a = P(c) P(j | c)        b = (1 - P(c)) P(j | not c)        score = a / (a + b)

where P(j | c) is the smoothed histogram, over the training images that carry c, of how many of their own k neighbours
do. In the official code an image is one of its own neighbours (`itself`), which makes the training histograms look
better than those of new images; it is the default here for equal numbers, and can be switched off.

Neighbours come from `vitkit.evaluate.knn.neighbours` (exact, blocked, ties by row); counting is one gather, no loop
over images and labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import knn

_ROWS = 4096  # queries whose neighbours' labels are held at once


@dataclass(frozen=True)
class MLkNN:
    """A fitted ML-kNN. `carrying` and `lacking` (C, k + 1): P(j | label), P(j | no label); `prior` (C,)."""

    x: np.ndarray
    y: np.ndarray
    k: int
    prior: np.ndarray
    carrying: np.ndarray
    lacking: np.ndarray

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (M, C) of features (M, D)."""
        _, index = knn.neighbours(self.x, x, self.k)
        count = _count(self.y, index)  # (M, C)
        label = np.arange(self.y.shape[1])
        a = self.prior * self.carrying[label, count]
        b = (1 - self.prior) * self.lacking[label, count]
        return a / (a + b)


def fit(train_x: np.ndarray, train_y: np.ndarray, *, k: int = 5, smoothing: float = 1.0, itself: bool = True) -> MLkNN:
    """Fit to features (N, D) and labels (N, C) of 0, 1, NaN. `k` beyond the training set means all of it.

    itself: a training image counts among its own k neighbours, as in the official code. An unknown label (NaN) leaves
    the image out of that label's prior and histograms, and counts as absent where the image is somebody's neighbour.
    """
    y = np.asarray(train_y, dtype=float)
    if y.ndim != 2 or len(y) != len(train_x):
        raise DataError(
            f"ML-kNN is for labels (N, C), got {y.shape} for {len(train_x)} features",
            fix="use vitkit.evaluate.knn for one label an image",
        )
    if k < 1 or smoothing <= 0:
        raise ConfigError(f"k is {k} and smoothing {smoothing}", fix="k from 1, a positive smoothing, usually 5 and 1")
    known = ~np.isnan(y)
    if not known.any():
        raise DataError("no training image has a label", fix="name a labelled split")
    k = min(k, len(y) if itself else len(y) - 1)
    if k < 1:
        raise DataError("a single training image has no neighbour", fix="itself=True, or more images")
    count = _count(y, _own_neighbours(train_x, k, itself))
    carried, lacked = (y == 1), known & (y == 0)
    prior = (smoothing + carried.sum(0)) / (2 * smoothing + known.sum(0))
    histograms = []
    for rows in (carried, lacked):
        bins = np.bincount((count + (k + 1) * np.arange(y.shape[1]))[rows], minlength=y.shape[1] * (k + 1))
        bins = bins.reshape(-1, k + 1)
        histograms.append((smoothing + bins) / (smoothing * (k + 1) + bins.sum(1, keepdims=True)))
    return MLkNN(np.asarray(train_x), y, k, prior, *histograms)


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
