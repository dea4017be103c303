"""ML-kNN against its definition in loops; votes against the kNN that there is."""

from __future__ import annotations

import numpy as np
import pytest

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import knn, metrics, mlknn
from vitkit.evaluate.mlknn import Settings


def data(n=60, m=20, dim=6, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)), (rng.random((n, classes)) < 0.4).astype(float), rng.normal(size=(m, dim))


def definition(x, y, test, k, s, itself):
    """The paper's counting rule, one image and one label at a time."""
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    near = np.argsort(-(unit(x) @ unit(x).T), axis=1, kind="stable")
    near = [[j for j in row if itself or j != i][:k] for i, row in enumerate(near)]
    query = np.argsort(-(unit(test) @ unit(x).T), axis=1, kind="stable")[:, :k]
    out = np.zeros((len(test), y.shape[1]))
    for c in range(y.shape[1]):
        known = [i for i in range(len(x)) if not np.isnan(y[i, c])]
        prior = (s + sum(y[i, c] == 1 for i in known)) / (2 * s + len(known))
        bins = {1: np.zeros(k + 1), 0: np.zeros(k + 1)}
        for i in known:
            bins[int(y[i, c])][sum(y[j, c] == 1 for j in near[i])] += 1
        for t in range(len(test)):
            j = sum(y[i, c] == 1 for i in query[t])
            a = prior * (s + bins[1][j]) / (s * (k + 1) + bins[1].sum())
            b = (1 - prior) * (s + bins[0][j]) / (s * (k + 1) + bins[0].sum())
            out[t, c] = a / (a + b)
    return out


@pytest.mark.parametrize("itself", (True, False))
@pytest.mark.parametrize("k", (1, 5, 59))
@pytest.mark.parametrize("unknown", (False, True))
def test_equals_the_definition(k, itself, unknown):
    x, y, test = data()
    if unknown:
        y[::7, 1] = np.nan
    found = mlknn.fit(x, y, settings=Settings(k, 0.5, itself)).scores(test)
    assert np.allclose(found, definition(x, y, test, k, 0.5, itself), rtol=1e-12)


def test_equal_images_are_not_their_own_neighbours_either():
    x, y, test = np.ones((9, 3)), np.eye(3)[np.arange(9) % 3], np.ones((2, 3))
    model = mlknn.fit(x, y, settings=Settings(4, itself=False))
    assert np.isfinite(model.scores(test)).all()
    assert mlknn.fit(x, y, settings=Settings(100, itself=False)).k == 8


def test_k_is_chosen_on_validation():
    x, y, val = data(n=80, m=40)
    truth = np.random.default_rng(3).integers(0, 2, (40, 4)).astype(float)
    model = mlknn.fit(x, y, val, truth)
    assert [k for k, _ in model.curve] == [1, 3, 5, 10, 20, 50]
    for k, value in model.curve:
        alone = mlknn.fit(x, y, settings=Settings(k))
        assert value == metrics.mean_auc(truth, alone.scores(val))
        if k == model.k:
            assert np.array_equal(alone.scores(val), model.scores(val))
    assert dict(model.curve)[model.k] == max(value for _, value in model.curve)
    assert mlknn.fit(x, y).k == 5 and mlknn.fit(x, y).curve == []


def test_it_says_what_is_wrong():
    x, y, _ = data()
    with pytest.raises(DataError, match=r"use vitkit\.evaluate\.knn"):
        mlknn.fit(x, y[:, 0])
    with pytest.raises(ConfigError, match="k is 0"):
        Settings(k=0)
    with pytest.raises(ConfigError, match="smoothing is 0"):
        Settings(smoothing=0)
    with pytest.raises(DataError, match="no training image has a label"):
        mlknn.fit(x, np.full_like(y, np.nan))
    with pytest.raises(DataError, match="has no neighbour"):
        mlknn.fit(x[:1], y[:1], settings=Settings(itself=False))
    with pytest.raises(DataError, match="leave unlabelled"):
        mlknn.votes(x, np.full(len(x), -1), x)


def test_votes_are_those_of_knn_at_every_k():
    x, y, test = data(n=120, m=30)
    label = y.argmax(1)
    for k, found in mlknn.votes(x, label, test, ks=(1, 7, 20), n_classes=4).items():
        theirs = knn.scores(x, label, test, n_classes=4, settings=knn.Settings(k=k))
        assert np.allclose(found, theirs, atol=1e-12)
    raw = mlknn.votes(x, label, test, ks=(1, 20), n_classes=4, normalise=False)
    assert (raw[1].sum(1) < 1).all() and np.allclose(raw[20].sum(1), 1)
