"""The grid of linear heads and ML-kNN against loops in the official style, on the same cached features, at equal results.

The straightforward way trains every head as a module of its own under autograd; the official loss for several labels is a
Python loop over images and labels. ML-kNN is counted image by image and label by label, with scikit-learn's neighbours. Both
get features that are there already, although the official code runs the backbone again in every epoch. A third contestant
has separate heads with a vectorised loss. Weights and scores are compared before the race.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from benchmarks.common import Result, arguments, race
from vitkit.evaluate import linear_grid, mlknn
from vitkit.evaluate.linear_grid import Grid
from vitkit.evaluate.pooling import columns

DIM, STORED, LABELS = 384, 4, 14
K, SMOOTHING = 5, 1.0


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "At equal results the grid of 16 linear heads and ML-kNN are at least 20 times as fast as the official style."
    )
    result = Result("dinov2_radiology", "speed", claim, options.quick)
    rows = [grid_race(result, options.quick), neighbour_race(result, options.quick)]
    columns_ = [
        "what",
        "size",
        "ms",
        "official style, ms",
        "times as fast",
        "vectorised, ms",
        "times as fast",
        "largest difference",
    ]
    result.table("One CPU thread, cached features", columns_, rows, "vectorised: separate heads with a vectorised loss")
    return result.finish(options.quick or all(row[4] >= 20 for row in rows))


def sample(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM * (STORED + 1))).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(x.shape[1], LABELS)) / math.sqrt(x.shape[1])
    return x, ((x @ weight + rng.normal(size=(n, LABELS))) > 1).astype(np.float32)


# ---------------------------------------------------------------- the grid


def grid_race(result: Result, quick: bool) -> list:
    n = 128 if quick else 256
    x, y = sample(n)
    grid = Grid(epochs=1, sum_over_batch=True, rates=linear_grid.RATES)
    ours = lambda: linear_grid.train(x, y, grid.heads(), grid, dim=DIM, stored=STORED, classes=LABELS)  # noqa: E731
    start = time.perf_counter()
    looped = separate(x, y, grid, official_loss)
    slow = time.perf_counter() - start
    error = max(float((a[0] - b[0]).abs().max() / b[0].abs().max()) for a, b in zip(ours(), looped, strict=True))
    assert error < 1e-4, f"the heads differ by {error}"
    plain = lambda: separate(x, y, grid, lambda z, t: linear_grid.loss(z, t, sum_over_batch=True))  # noqa: E731
    medians, _ = race({"ours": ours, "plain": plain}, rounds=3 if quick else 9, warmup=1)
    result.note(f"The official style ran once ({slow:.1f} s for {n} images and 16 heads); the other two are medians")
    mine = medians["ours"]
    size = f"16 heads, {n} x {LABELS}, 1 epoch"
    return [
        "linear grid",
        size,
        1e3 * mine,
        1e3 * slow,
        slow / mine,
        1e3 * medians["plain"],
        medians["plain"] / mine,
        error,
    ]


def separate(x: np.ndarray, y: np.ndarray, grid: Grid, loss) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every head a module, all in one optimiser, losses summed."""
    heads, layers = grid.heads(), []
    for head in heads:
        where = columns(DIM, STORED, head.blocks, head.avgpool)
        layer = torch.nn.Linear(where.stop - where.start, LABELS)
        with torch.no_grad():
            draw = torch.Generator().manual_seed(grid.seed)
            layer.weight.copy_(0.01 * torch.randn(layer.weight.shape, generator=draw))
            layer.bias.zero_()
        layers.append((where, layer))
    groups = [{"params": layer.parameters(), "lr": h.rate} for h, (_, layer) in zip(heads, layers, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=grid.momentum)
    features, target = torch.from_numpy(x), torch.from_numpy(y)
    order = torch.Generator().manual_seed(grid.seed)
    total, step = grid.epochs * math.ceil(len(x) / grid.batch_size), 0
    for _ in range(grid.epochs):
        for rows in torch.randperm(len(x), generator=order).split(grid.batch_size):
            for group, head in zip(optimizer.param_groups, heads, strict=True):
                group["lr"] = head.rate * 0.5 * (1 + math.cos(math.pi * step / total))
            value = sum(loss(layer(features[rows, where]), target[rows]) for where, layer in layers)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            step += 1
    return [(layer.weight.detach(), layer.bias.detach()) for _, layer in layers]


def official_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over labels, summed over images, one at a time."""
    total = torch.zeros(())
    for b in range(len(logits)):
        each = torch.zeros(())
        for c in range(logits.shape[1]):
            each = each + F.binary_cross_entropy_with_logits(logits[b, c], target[b, c])
        total = total + each / logits.shape[1]
    return total


# ---------------------------------------------------------------- ML-kNN


def neighbour_race(result: Result, quick: bool) -> list:
    n, m = (1000, 300) if quick else (4000, 1000)
    (x, y), (test, _) = sample(n), sample(m, seed=2)
    x, test = x[:, :DIM], test[:, :DIM]
    ours = lambda: mlknn.fit(x, y, k=K, smoothing=SMOOTHING).scores(test)  # noqa: E731
    loops = lambda: looped_mlknn(x, y, test)  # noqa: E731
    error = float(np.abs(ours() - loops()).max())
    assert error < 1e-9, f"the scores differ by {error}"
    medians, spreads = race({"ours": ours, "loops": loops}, rounds=3 if quick else 5, warmup=1)
    spread = spreads["loops"]
    result.note(f"ML-kNN: quartiles of the ratio {spread[0]:.0f} to {spread[1]:.0f}; the search itself is part of both")
    size = f"{n} x {LABELS}, {m} queries, k = {K}"
    ratio = medians["loops"] / medians["ours"]
    return ["ML-kNN", size, 1e3 * medians["ours"], 1e3 * medians["loops"], ratio, "", "", error]


def looped_mlknn(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The paper's counts in loops; neighbours by scikit-learn."""
    y = y.astype(float)
    classes = y.shape[1]
    search = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(x)
    near = search.kneighbors(x, return_distance=False)
    carrying, lacking = np.zeros((classes, K + 1)), np.zeros((classes, K + 1))
    for i in range(len(x)):
        for c in range(classes):
            found = int(sum(y[j, c] for j in near[i]))
            (carrying if y[i, c] else lacking)[c, found] += 1
    prior = (SMOOTHING + y.sum(0)) / (2 * SMOOTHING + len(x))
    given = (SMOOTHING + carrying) / (SMOOTHING * (K + 1) + carrying.sum(1, keepdims=True))
    without = (SMOOTHING + lacking) / (SMOOTHING * (K + 1) + lacking.sum(1, keepdims=True))
    query = search.kneighbors(test, return_distance=False)
    out = np.zeros((len(test), classes))
    for i in range(len(test)):
        for c in range(classes):
            found = int(sum(y[j, c] for j in query[i]))
            a, b = prior[c] * given[c, found], (1 - prior[c]) * without[c, found]
            out[i, c] = a / (a + b)
    return out


if __name__ == "__main__":
    sys.exit(main())
