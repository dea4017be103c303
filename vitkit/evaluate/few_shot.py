"""Few-shot: a head on k labelled images a class, drawn many times, with the mean and its interval over draws.

Paper: the drawing rules `per_class` (k random images of each class) and `systematic` (every n / shots-th image) are
those of Baharoon et al., arXiv 2312.02366, code MohammedSB/DINOv2ForRadiology.

What happens, and where: a single draw of k images says little, since the score depends on which ones were drawn. `fit`
repeats the draw, trains a head on each (cached features, so a draw costs milliseconds) and scores the same test images
every time.

Differs from the paper: many draws instead of one, so that there is an interval; the penalty is chosen by
cross-validation within the drawn images, never on others.

Cost: shots x draws small heads; the trunk is not run again.

    vitkit evaluate --model vit_small_patch14_dinov2.lvd142m --data scans/ --protocols few_shot --shots 1,5,20 --draws 50
    vitkit.evaluate(model="vit_small_patch14_dinov2.lvd142m", data="scans/", protocols="few_shot", shots=(1, 5, 20), draws=50)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import knn, linear, metrics
from vitkit.evaluate.statistics import Interval, mean_interval

# One penalty a decade: a handful of images cannot tell finer steps apart, and weak penalties take longest to solve.
PROBE = linear.Settings(penalties=(1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0), tolerance=1e-4)
Head = Literal["linear", "knn"] | Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Heads on few labelled images."""

    shots: tuple[int, ...] = (1, 2, 5, 10, 20)
    """labelled images a class; numbers that hardly any class reaches are left out"""
    draws: int = 20
    """random draws for each number of shots"""

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1:
            raise ConfigError(f"shots is {self.shots}", fix="whole numbers from 1, e.g. 1,5,20")
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}", fix="at least 1, better 20")


@dataclass(frozen=True)
class Draws:
    """Scores of one number of shots: of every draw, and their mean with its Student interval over draws.

    The interval is about the drawing of labels; the test images are the same in every draw."""

    shots: int
    scores: list[float]
    interval: Interval


def systematic(n: int, shots: int) -> np.ndarray:
    """`shots` of `n` images at equal steps: i * (n / shots) for i = 0, 1, ..., rounded half to even.

    The official rule, without its extra index n that floating-point steps sometimes add."""
    if not 1 <= shots <= n:
        raise ConfigError(f"{shots} shots of {n} images", fix=f"between 1 and {n}")
    return np.round(np.arange(shots) * (n / shots)).astype(np.int64)


def per_class(y: np.ndarray, k: int, seed: int = 0, *, n_classes: int | None = None) -> np.ndarray:
    """Row numbers of `k` random images of every class (all of a rarer class), classes in order.

    One label an image, (N,) with -1 = unlabelled: torch.randperm within each class from one seed, as the official code.
    Several, (N, C) of 0, 1, NaN: per label k of the images that carry it, each image listed once.
    """
    y = np.asarray(y)
    if k < 1:
        raise ConfigError(f"k is {k}", fix="at least 1 image a class")
    draw = torch.Generator().manual_seed(seed)
    classes = y.shape[1] if y.ndim == 2 else int(y.max(initial=-1)) + 1 if n_classes is None else n_classes
    found = []
    for c in range(classes):
        rows = np.flatnonzero(y[:, c] == 1 if y.ndim == 2 else y == c)
        found.append(rows[torch.randperm(len(rows), generator=draw)[:k].numpy()])
    rows = np.concatenate(found) if found else np.empty(0, np.int64)
    if not len(rows):
        raise DataError("no image has a label to draw by", fix="name a labelled split")
    return rows if y.ndim == 1 else rows[np.sort(np.unique(rows, return_index=True)[1])]


def fit(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    settings: Settings = Settings(),
    head: Head = "linear",
    metric: Callable[[np.ndarray, np.ndarray], float] | None = None,
    n_classes: int | None = None,
    seed: int = 0,
    on_draw: Callable[[], object] | None = None,
) -> list[Draws]:
    """Test scores for every number of shots a class, each drawn many times from the training features (N, D).

    head: "linear" (logistic regression, penalty by cross-validation within the drawn images), "knn" (k = the shots), or
        a function (x, y, test_x, n_classes) -> scores (M, C). Nothing is chosen on the test images.
    metric: of (y, scores); by default accuracy, or the mean AUC for several labels an image.
    """
    train_x, train_y = np.asarray(train_x), np.asarray(train_y)
    multi = train_y.ndim == 2
    classes = train_y.shape[1] if multi else n_classes or int(max(train_y.max(), np.max(test_y))) + 1
    measure = metric or getattr(metrics, metrics.main_metric("multi" if multi else "single"))
    score = _HEADS[head] if isinstance(head, str) and head in _HEADS else head
    if not callable(score):
        raise ConfigError(f"head is {head!r}", fix=f"one of {', '.join(_HEADS)}, or a function")
    found = []
    for k in settings.shots:
        values = []
        for draw in range(settings.draws):
            rows = per_class(train_y, k, seed + draw, n_classes=None if multi else classes)
            values.append(float(measure(test_y, score(train_x[rows], train_y[rows], test_x, classes))))
            if on_draw is not None:
                on_draw()
        found.append(Draws(k, values, mean_interval(values)))
    return found


def _linear(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, classes: int) -> np.ndarray:
    return linear.fit(x, y, n_classes=classes, settings=PROBE).scores(test_x)


def _knn(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, classes: int) -> np.ndarray:
    k = max(1, len(x) // classes)
    return knn.scores(x, y, test_x, n_classes=classes, settings=knn.Settings(k=k))


_HEADS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]] = {"linear": _linear, "knn": _knn}
