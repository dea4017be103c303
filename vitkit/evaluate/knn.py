"""k nearest neighbours on frozen features: what a backbone knows without training anything.

Neighbours are by cosine similarity s; each votes for its labels with weight exp(s / temperature), as DINO evaluates
(Caron et al. 2021, arXiv 2104.14294, appendix; weights of Wu et al. 2018, arXiv 1805.01978), or with weight 1
(`vote`). Scores are shares of the total weight: probabilities over classes for one label per image, and per class the
weighted mean of the known labels (NaN = unknown) for several.

Similarities are computed block by block with a running best list: memory is one block, never (queries x train). The
search runs in float32 with a few spare candidates, the candidates are then ordered by their float64 similarity, and
queries for which float32 cannot prove that no neighbour was missed are searched again in float64. The result is
therefore the same for every block size: similarities that agree to 2^-28 are ties, and of ties the earlier training
row is nearer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import metrics

AUTO = (1, 5, 10, 20, 50, 100, 200)  # what k="auto" tries, as far as the training set reaches

_SPARE = 12  # candidates kept beyond k in the float32 search
_GATHER = 16  # ordering a gathered candidate costs about as much as this many products of a float64 search
_STEP = 2.0**28  # similarities are compared in steps of 1 / _STEP ...
_ROWS = 2.0**24  # ... which leaves 24 of float64's 52 bits to break ties by row number


@dataclass(frozen=True)
class Settings:
    """k nearest neighbours."""

    k: int | Literal["auto"] = 20
    """neighbours (DINO reports 10, 20, 100 and 200, of which 20 is best); auto = chosen on validation"""
    temperature: float = 0.07
    """DINO's value; smaller trusts the nearest more"""
    vote: bool = False
    """every neighbour counts the same"""
    block: int = 4096
    """training rows and queries held at once"""

    def __post_init__(self):
        if self.k != "auto" and (not isinstance(self.k, int) or self.k < 1):
            raise ConfigError(f"k is {self.k!r}", fix='use a whole number from 1, or "auto"')
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}", fix="use a positive number, usually 0.07")


@dataclass
class Neighbours:
    """A fitted neighbour classifier. `chosen` is the k in use; `curve` holds (k, main metric) for every k tried."""

    x: Tensor  # (N, D) unit rows, float64
    y: Tensor  # (N,) classes, or (N, C) of 0, 1, NaN
    n_classes: int
    chosen: int
    settings: Settings
    curve: list[tuple[int, float]] = field(default_factory=list)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (M, C) for features (M, D)."""
        near = _search(self.x, _unit(x, "test").to(self.x.device), self.chosen, self.settings.block)
        return _shares(self.y, self.n_classes, *near, self.settings, [self.chosen])[0]


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
) -> Neighbours:
    """Index the training features (N, D); with k="auto" also pick k by the task's main metric, of equal ones the
    larger.

    Labels are (N,) integers with -1 = unlabelled, or (N, C) of 0, 1, NaN. Without validation data "auto" classifies
    every training row by the others, leaving out rows of its own group (patient) when `groups` (N,) is given.
    """
    settings = settings or Settings()
    x, y, classes, groups = _training(train_x, train_y, n_classes, groups, device)
    if settings.k != "auto":
        return Neighbours(x, y, classes, min(settings.k, len(x)), settings)
    tried = [k for k in AUTO if k <= len(x)]
    if val_x is not None and len(val_x):
        near = _search(x, _unit(val_x, "validation").to(x.device), tried[-1], settings.block)
        truth = np.asarray(val_y)
    else:
        near = _search(x, x, tried[-1], settings.block, _codes(groups, len(x), x.device))
        truth = y.cpu().numpy()
    measure = getattr(metrics, metrics.main_metric("single" if y.ndim == 1 else "multi"))
    tables = _shares(y, classes, *near, settings, tried)
    curve = [(k, measure(truth, table)) for k, table in zip(tried, tables, strict=True)]
    best = max(curve, key=lambda point: (-np.inf if np.isnan(point[1]) else point[1], point[0]))[0]
    return Neighbours(x, y, classes, best, settings, curve)


def scores(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray | None = None,
    *,
    n_classes: int | None = None,
    groups: np.ndarray | None = None,
    settings: Settings | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """Probabilities (M, C) of the test features, without validation. k larger than the training set means all of it.

    With `test_x=None` every training row is scored by the others (leave-one-out, or leave-one-group-out with
    `groups`); rows without a label are scored too, but vote for nothing.
    """
    settings = settings or Settings()
    model = fit(train_x, train_y, n_classes=n_classes, groups=groups, settings=settings, device=device)
    if test_x is not None:
        return model.scores(test_x)
    labelled = torch.from_numpy(_labelled(np.asarray(train_y))).to(device)
    owner = _codes(groups, len(labelled), labelled.device)
    every = _unit(train_x, "training").to(device)
    near = _search(model.x, every, model.chosen, settings.block, owner[labelled], owner)
    return _shares(model.y, model.n_classes, *near, settings, [model.chosen])[0]


def neighbours(
    train_x: np.ndarray, test_x: np.ndarray, k: int, *, block: int = 4096, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest training rows of each test row, nearest first: cosine similarities (M, k), row numbers (M, k)."""
    x = _unit(train_x, "training").to(device)
    similarity, index = _search(x, _unit(test_x, "test").to(device), min(k, len(x)), block)
    return similarity.cpu().numpy(), index.cpu().numpy()


# ---------------------------------------------------------------- the search


def _search(
    train: Tensor, test: Tensor, k: int, block: int, mine: Tensor | None = None, theirs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Similarities (M, k) float64 and rows (M, k) of the nearest training rows.

    `mine` (N,) and `theirs` (M,) are owners: a training row is never a neighbour of a query with the same owner.
    Where fewer than k rows remain, the similarity is -inf.
    """
    if len(train) >= _ROWS:
        raise DataError(
            f"{len(train)} training rows are more than this search can number", fix="use fewer than 16 million"
        )
    theirs = mine if theirs is None else theirs
    kept = k + _SPARE
    found = []
    for start in range(0, len(test), block):
        query = test[start : start + block]
        owner = None if theirs is None else theirs[start : start + block]
        if kept * _GATHER >= len(train):
            found.append(_exact(train, query, k, block, mine, owner))
            continue
        similarity, index, unsure = _quick(train, query, k, block, mine, owner)
        if unsure.any():
            again = _exact(train, query[unsure], k, block, mine, None if owner is None else owner[unsure])
            similarity[unsure], index[unsure] = again
        found.append((similarity, index))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def _exact(train: Tensor, query: Tensor, k: int, block: int, mine: Tensor | None, owner: Tensor | None):
    """Search in float64. A key holds the similarity in whole steps and the row number: no two keys are equal."""
    best = query.new_empty(len(query), 0)
    rows = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(train), block):
        part = train[start : start + block]
        row = torch.arange(start, start + len(part), device=query.device)
        key = _key(query @ part.T, row.to(query))
        if owner is not None and mine is not None:
            key.masked_fill_(owner[:, None] == mine[start : start + block], -torch.inf)
        best, rows = _merge(best, rows, key, start, k)
    return (best + rows) / (_STEP * _ROWS), rows


def _quick(train: Tensor, query: Tensor, k: int, block: int, mine: Tensor | None, owner: Tensor | None):
    """Search in float32, order candidates in float64; -> similarities, rows, which queries this did not settle."""
    single = query.float()
    best = single.new_empty(len(query), 0)
    rows = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(train), block):
        near = single @ train[start : start + block].float().T
        if owner is not None and mine is not None:
            near.masked_fill_(owner[:, None] == mine[start : start + block], -torch.inf)
        best, rows = _merge(best, rows, near, start, k + _SPARE)
    key = torch.empty_like(best, dtype=torch.float64)
    for start in range(0, len(query), 256):  # gathered candidates are (256, k, D)
        part = slice(start, start + 256)
        key[part] = _key((train[rows[part]] * query[part, None]).sum(-1), rows[part].double())
    key.masked_fill_(best == -torch.inf, -torch.inf)
    top, place = key.topk(k, dim=1)
    similarity = (top + rows.gather(1, place)) / (_STEP * _ROWS)
    doubt = 2.0**-24 * (train.shape[1] + 8)  # bound on the float32 error of a dot product of unit vectors
    return similarity, rows.gather(1, place), best[:, -1] >= similarity[:, -1] - doubt - 2 / _STEP


def _key(similarity: Tensor, row: Tensor) -> Tensor:
    return similarity.mul_(_STEP).round_().mul_(_ROWS).sub_(row)


def _merge(best: Tensor, rows: Tensor, block: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """Join a block's best `k` to the best so far."""
    top, place = block.topk(min(k, block.shape[1]), dim=1)
    best, rows = torch.cat([best, top], 1), torch.cat([rows, place + start], 1)
    if best.shape[1] <= k:
        return best, rows
    best, place = best.topk(k, dim=1)
    return best, rows.gather(1, place)


# ---------------------------------------------------------------- the vote


def _shares(
    y: Tensor, classes: int, similarity: Tensor, index: Tensor, settings: Settings, ks: list[int]
) -> list[np.ndarray]:
    """Scores (M, C) for every k of `ks`, from one neighbour list."""
    if settings.vote:
        weight = torch.isfinite(similarity).double()
    else:  # relative to the nearest, so that no temperature overflows
        weight = torch.nan_to_num(((similarity - similarity[:, :1]) / settings.temperature).exp())
    share = _share_single if y.ndim == 1 else _share_multi
    return [share(y, classes, index[:, :k], weight[:, :k]).cpu().numpy() for k in ks]


def _share_single(y: Tensor, classes: int, index: Tensor, weight: Tensor) -> Tensor:
    prior = torch.bincount(y, minlength=classes).double() / len(y)
    scores = torch.zeros(len(index), classes, dtype=torch.float64, device=y.device)
    scores.scatter_add_(1, y[index], weight)
    total = weight.sum(1, keepdim=True)
    return torch.where(total > 0, scores / total, prior)  # no neighbour at all when every row has the same owner


def _share_multi(y: Tensor, classes: int, index: Tensor, weight: Tensor) -> Tensor:
    known, value = (~torch.isnan(y)).double(), torch.nan_to_num(y)
    prior = value.sum(0) / known.sum(0).clamp(min=1)  # where no neighbour's label is known
    scores = torch.empty(len(index), classes, dtype=torch.float64, device=y.device)
    step = max(1, (1 << 22) // (index.shape[1] * classes))
    for start in range(0, len(index), step):
        near, w = index[start : start + step], weight[start : start + step, :, None]
        total = (w * known[near]).sum(1)
        scores[start : start + step] = torch.where(total > 0, (w * value[near]).sum(1) / total, prior)
    return scores


# ---------------------------------------------------------------- what came in


def _training(x: np.ndarray, y: np.ndarray, n_classes: int | None, groups: np.ndarray | None, device: str):
    """-> unit features (N, D), labels, number of classes, groups; rows without any label are left out."""
    y = np.asarray(y)
    if len(x) != len(y):
        raise DataError(f"{len(x)} features but {len(y)} labels", fix="give one label (or -1) per image")
    if groups is not None and len(groups) != len(x):
        raise DataError(f"{len(groups)} groups for {len(x)} images", fix="give one group per image")
    keep = _labelled(y)
    if not keep.any():
        raise DataError("no training image has a label", fix="name a labelled split, or the label column of the CSV")
    unit = _unit(x, "training")[torch.from_numpy(keep)].to(device)
    groups = None if groups is None else np.asarray(groups)[keep]
    if y.ndim == 2:
        return unit, torch.from_numpy(y[keep].astype(np.float64)).to(device), y.shape[1], groups
    classes = int(y.max()) + 1 if n_classes is None else n_classes
    if y.max() >= classes:
        raise DataError(
            f"label {y.max()} but only {classes} classes", fix="pass the data set's number of classes as n_classes"
        )
    return unit, torch.from_numpy(y[keep].astype(np.int64)).to(device), classes, groups


def _labelled(y: np.ndarray) -> np.ndarray:
    return y >= 0 if y.ndim == 1 else ~np.isnan(y).all(1)


def _codes(groups: np.ndarray | None, n: int, device: torch.device) -> Tensor:
    """Who owns each row: its group, or nobody but itself."""
    if groups is None:
        return torch.arange(n, device=device)
    return torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)).to(device)


def _unit(x: np.ndarray, what: str) -> Tensor:
    """Rows of length one in float64 (a row of zeros stays)."""
    rows = torch.tensor(np.asarray(x), dtype=torch.float64)
    if rows.ndim != 2:
        raise DataError(
            f"{what} features have shape {tuple(rows.shape)}", fix="give one row of features per image: (N, D)"
        )
    bad = torch.nonzero(~torch.isfinite(rows).all(1))
    if len(bad):
        raise DataError(
            f"{len(bad)} rows of the {what} features are not finite (first: row {int(bad[0])})",
            fix="leave out images that could not be read, and check the model's weights",
        )
    return torch.nn.functional.normalize(rows, dim=1)
