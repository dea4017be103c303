"""The grid of heads against separate torch.optim.SGD runs; selection by validation alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import linear_grid
from vitkit.evaluate.linear_grid import Head, Settings
from vitkit.evaluate.pooling import columns

DIM, STORED = 6, 4


def data(n=50, classes=3, seed=0, multi=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM * (STORED + 1))).astype(np.float32)
    weight = np.random.default_rng(5).normal(size=(x.shape[1], classes))
    logits = x @ weight + rng.normal(size=(n, classes))
    return x, (logits > 1).astype(float) if multi else logits.argmax(1)


def separately(x, y, head, grid, classes):
    """One head by autograd and torch's own SGD, in the order and from the weights that the grid uses."""
    where = columns(DIM, STORED, head.blocks, head.avgpool)
    draw = torch.Generator().manual_seed(grid.seed)
    layer = torch.nn.Linear(where.stop - where.start, classes)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(layer.weight.shape, generator=draw))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=head.rate, momentum=grid.momentum)
    features, target = torch.from_numpy(x), torch.from_numpy(y if y.ndim == 1 else y.astype(np.float32))
    order = torch.Generator().manual_seed(grid.seed)
    total, step = grid.epochs * math.ceil(len(x) / grid.batch_size), 0
    for _ in range(grid.epochs):
        for rows in torch.randperm(len(x), generator=order).split(grid.batch_size):
            optimizer.param_groups[0]["lr"] = head.rate * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            value = linear_grid.loss(layer(features[rows, where]), target[rows], sum_over_batch=grid.sum_over_batch)
            value.backward()
            optimizer.step()
            step += 1
    return layer.weight.detach(), layer.bias.detach()


@pytest.mark.parametrize("kind", ("single", "multi", "multi, official scale", "unknown labels"))
def test_equals_separate_runs(kind):
    x, y = data(multi=kind != "single")
    if kind == "unknown labels":
        y[::3, 1] = np.nan
        y[5] = np.nan
    grid = Settings(
        rates=(1e-2, 5e-2), epochs=3, batch_size=16, sum_over_batch="official" in kind or "unknown" in kind, seed=3
    )
    heads = grid.heads()
    found = linear_grid.train(x, y, heads, grid, dim=DIM, stored=STORED, classes=3)
    assert len(found) == 8
    for head, (weight, bias) in zip(heads, found, strict=True):
        theirs = separately(x, y, head, grid, 3)
        assert torch.allclose(weight, theirs[0], atol=1e-6), head
        assert torch.allclose(bias, theirs[1], atol=1e-6), head


def test_the_official_loss_is_its_double_loop():
    logits, y = torch.randn(7, 4), torch.randint(2, (7, 4)).float()
    looped = 0.0
    for b in range(7):
        terms = [torch.nn.functional.binary_cross_entropy_with_logits(logits[b, c], y[b, c]) for c in range(4)]
        looped = looped + sum(terms) / 4
    assert torch.allclose(linear_grid.loss(logits, y, sum_over_batch=True), looped)
    assert torch.allclose(7 * linear_grid.loss(logits, y), looped)


def test_selection_by_validation_and_refit_on_both():
    (x, y), (vx, vy) = data(80), data(40, seed=1)
    grid = Settings(epochs=4)
    found = linear_grid.fit(x, y, vx, vy, dim=DIM, grid=grid)
    best = max(value for _, value in found.table)
    assert found.head == next(head for head, value in found.table if value == best)  # the first of equal ones
    both = np.concatenate([x, vx]), np.concatenate([y, vy])
    ((weight, _),) = linear_grid.train(*both, [found.head], grid, dim=DIM, stored=STORED, classes=3)
    assert torch.equal(found.weight, weight)
    scores = found.scores(vx)
    assert scores.shape == (40, 3) and np.allclose(scores.sum(1), 1)
    assert linear_grid.fit(x, y, vx, vy, dim=DIM, grid=grid, refit=False).head == found.head


def test_heads_do_not_depend_on_what_else_is_in_the_grid():
    x, y = data()
    wide, narrow = Settings(epochs=2), Settings(rates=(1e-2,), blocks=(4,), avgpool=(False,), epochs=2)
    (alone,) = linear_grid.train(x, y, narrow.heads(), narrow, dim=DIM, stored=STORED, classes=3)
    among = dict(
        zip(wide.heads(), linear_grid.train(x, y, wide.heads(), wide, dim=DIM, stored=STORED, classes=3), strict=True)
    )
    assert torch.allclose(among[Head(4, False, 1e-2)][0], alone[0], atol=1e-7)


def test_it_says_what_is_wrong():
    x, y = data()
    with pytest.raises(DataError, match="do not fit together"):
        linear_grid.fit(x[:, :-1], y, x, y, dim=DIM)
    with pytest.raises(ConfigError, match="asks for 4 blocks, features hold 2"):
        linear_grid.fit(x[:, : DIM * 3], y, x[:, : DIM * 3], y, dim=DIM, stored=2)
    with pytest.raises(ConfigError, match="must be positive"):
        Settings(rates=(0.0,))
    with pytest.raises(ConfigError, match="metric is 'auc'"):
        Settings(metric="auc")
    with pytest.raises(DataError, match="leave unlabelled out"):
        linear_grid.train(x, np.where(y == 0, -1, y), Settings().heads(), Settings(), dim=DIM, classes=3)
