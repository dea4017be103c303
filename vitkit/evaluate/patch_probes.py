"""What patch features of held-out images give away to simple read-outs: their position, and the classes of a mask.

Pure functions on arrays, for `vitkit.evaluate.cleanliness`. Shapes: F images to fit on, T images to score, N patches an
image on `grid` (h, w), D width of a patch feature, C classes. Nothing here sees the scored images before they are scored.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.data.images import UNKNOWN
from vitkit.evaluate.logistic import solve
from vitkit.evaluate.masks import confusions
from vitkit.evaluate.ridge import ridge

PENALTIES = tuple(10.0**power for power in range(-5, 4))  # of the ridge on standardised features
WEIGHT_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # of the logistic regression in principal axes
ROWS = 16_000  # patches that a read-out is fitted on at most
NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's kNN (eval_knn.py)


def coordinates(grid: tuple[int, ...]) -> np.ndarray:
    """(N, 2) row and column of every patch, each from -1 to 1 (0 along an axis with one patch)."""
    axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in grid]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


def position_errors(fit: np.ndarray, test: np.ndarray, grid: tuple[int, ...], seed: int) -> np.ndarray:
    """(T, 2): squared error of each scored image when a ridge regression reads (row, column) from single patches, and what
    the mean position would leave. 1 - sum of the first / sum of the second is R².

    fit (F, N, D), test (T, N, D). The penalty is chosen on every fourth fitted image; the regression is then made again
    on all of them.
    """
    target = coordinates(grid)
    rows = drawn(len(fit) * len(target), seed)
    image, patch = rows // len(target), rows % len(target)
    x, y, held = fit[image, patch], target[patch], image % 4 == 3
    flat = test.reshape(-1, test.shape[-1])
    said = ridge(x[~held], y[~held], x[held], y[held], flat, PENALTIES, refit=True)[0].reshape(len(test), *target.shape)
    error = np.square(said - target).sum((1, 2))
    return np.stack([error, np.full(len(test), np.square(target - target.mean(0)).sum())], 1)


def r2_of(rows: np.ndarray) -> float:
    """R² from the rows of `position_errors`, of any selection of images."""
    total = rows.sum(0)
    return float(1 - total[0] / total[1]) if total[1] > 0 else float("nan")


def patch_labels(masks: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """(n, N) the class that most known pixels of a patch have; -1 where fewer than half of its pixels are known.

    masks (n, H, W) uint8, 255 = unknown; H and W multiples of the grid.
    """
    n, height, width = masks.shape
    ph, pw = height // grid[0], width // grid[1]
    cells = masks.reshape(n, grid[0], ph, grid[1], pw).transpose(0, 1, 3, 2, 4).reshape(n, grid[0] * grid[1], ph * pw)
    classes = [int(value) for value in np.unique(cells) if value != UNKNOWN]
    counts = (
        np.stack([(cells == value).sum(-1) for value in classes], -1) if classes else np.zeros((*cells.shape[:2], 1))
    )
    winner = np.array(classes or [0])[counts.argmax(-1)]
    return np.where(2 * counts.sum(-1) >= ph * pw, winner, -1)


def linear_tables(
    fit: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    masks: np.ndarray,
    grid: tuple[int, ...],
    classes: int,
    seed: int,
) -> np.ndarray | None:
    """Pixel confusions (T, C, C) of a logistic regression from single patches to classes, its scores interpolated to the
    pixels of `masks` (T, H, W); None where the fitted patches (F, N) show fewer than two classes."""
    rows = np.flatnonzero(labels.reshape(-1) >= 0)
    rows = rows[drawn(len(rows), seed)]
    x, y, image = fit.reshape(-1, fit.shape[-1])[rows], labels.reshape(-1)[rows], rows // labels.shape[1]
    names, y = np.unique(y, return_inverse=True)
    if len(names) < 2:
        return None
    mean, axes = _axes(x)
    z, goal = torch.from_numpy((x - mean) @ axes), torch.from_numpy(y)
    held = torch.from_numpy(image % 4 == 3)
    best = WEIGHT_PENALTIES[1]
    if len(np.unique(y[~held.numpy()])) == len(names) and held.any():
        tried = solve(z[~held], goal[~held], list(WEIGHT_PENALTIES), tolerance=1e-3, max_iter=200)
        hits = [float((_scores(z[held], w, b).argmax(1) == goal[held]).double().mean())
                for w, b in zip(tried.weight, tried.bias, strict=True)]  # fmt: skip
        best = WEIGHT_PENALTIES[len(hits) - 1 - int(np.argmax(hits[::-1]))]
    found = solve(z, goal, [best], tolerance=1e-4, max_iter=400)
    flat = torch.from_numpy((test.reshape(-1, test.shape[-1]) - mean) @ axes)
    scores = _scores(flat, found.weight[0], found.bias[0]).view(len(test), -1, len(names))
    return _tables(scores, names, masks, grid, classes)


def neighbour_tables(
    fit: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    masks: np.ndarray,
    grid: tuple[int, ...],
    classes: int,
    seed: int,
) -> np.ndarray | None:
    """As `linear_tables`, with the votes of the 20 fitted patches most like it, weighted by exp(cosine / 0.07)."""
    rows = np.flatnonzero(labels.reshape(-1) >= 0)
    rows = rows[drawn(len(rows), seed)]
    names, y = np.unique(labels.reshape(-1)[rows], return_inverse=True)
    if len(names) < 2:
        return None
    bank = F.normalize(torch.from_numpy(fit.reshape(-1, fit.shape[-1])[rows]).float(), dim=-1)
    goal = F.one_hot(torch.from_numpy(y), len(names)).float()
    votes = []
    for image in torch.from_numpy(test).float():
        like, index = (F.normalize(image, dim=-1) @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        votes.append((goal[index] * ((like - 1) / TEMPERATURE).exp().unsqueeze(-1)).sum(1))
    scores = torch.stack(votes)
    return _tables(scores / scores.sum(-1, keepdim=True), names, masks, grid, classes)


def iou_of(tables: np.ndarray) -> float:
    """Mean IoU over all classes, background included, from confusions (n, C, C): what dense-feature tables report."""
    table = np.asarray(tables).sum(0, dtype=float)
    hit, union = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
    each = hit[union > 0] / union[union > 0]
    return float(each.mean()) if len(each) else float("nan")


def drawn(count: int, seed: int) -> np.ndarray:
    """`ROWS` of `count` rows at most, drawn without replacement, in order."""
    if count <= ROWS:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, ROWS, replace=False))


def _axes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and principal axes (D, D), scaled so that the mean variance along them is 1."""
    mean = x.mean(0, dtype=float)
    values, axes = np.linalg.eigh(np.cov(x.T.astype(float)).reshape(x.shape[1], x.shape[1]))
    return mean, axes / max(float(np.sqrt(values.clip(0).mean())), 1e-12)


def _scores(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return z @ weight.T + bias


def _tables(scores: Tensor, names: np.ndarray, masks: np.ndarray, grid: tuple[int, ...], classes: int) -> np.ndarray:
    """Scores (T, N, c) of the classes `names`, interpolated to the masks (T, H, W) and counted, (T, classes, classes)."""
    maps = scores.float().transpose(1, 2).unflatten(2, grid)
    said = [F.interpolate(one[None], size=masks.shape[1:], mode="bilinear").argmax(1)[0].numpy() for one in maps]
    return confusions(masks, names[np.stack(said)].astype(np.uint8), classes)
