"""Neighbours equal brute force for every block size, ties included; votes, unknown labels, k, leave-one-out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import knn
from vitkit.evaluate.knn import Settings


def brute(train, test, k):
    """All similarities at once; of equal ones the earlier row first."""
    train, test = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, test))
    similarity = np.round(test @ train.T * 2**28) / 2**28
    index = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, index, 1), index


def clouds(n, dim=16, classes=4, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    y = rng.integers(0, classes, n)
    return (centres[y] + spread * rng.normal(size=(n, dim))).astype(np.float32), y


@pytest.mark.parametrize("block", (7, 64, 4096))
@pytest.mark.parametrize("k", (1, 20, 150))
@pytest.mark.parametrize("kind", ("random", "lattice", "collapsed", "duplicates"))
def test_neighbours_equal_brute_force(kind, k, block):
    rng = np.random.default_rng(0)
    if kind == "random":
        train, test = rng.normal(size=(700, 24)), rng.normal(size=(60, 24))
    elif kind == "lattice":  # many exact ties
        train, test = rng.integers(0, 2, (700, 6)), rng.integers(0, 2, (60, 6))
    elif kind == "collapsed":  # every similarity is 1 up to rounding
        train, test = 1 + 1e-10 * rng.normal(size=(700, 8)), np.ones((60, 8))
    else:
        train = np.repeat(rng.normal(size=(10, 8)), 70, axis=0)
        test = rng.normal(size=(60, 8))
    train, test = train.astype(float), test.astype(float)
    similarity, index = knn.neighbours(train, test, k, block=block)
    expected, rows = brute(train, test, k)
    assert (index == rows).all()
    assert np.abs(similarity - expected).max() < 1e-8


def test_memory_is_a_block(monkeypatch):
    train, test = clouds(900)[0], clouds(300, seed=1)[0]
    largest = 0
    original = torch.Tensor.topk

    def spy(self, *args, **kwargs):
        nonlocal largest
        largest = max(largest, self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    knn.neighbours(train, test, 10, block=64)
    assert 0 < largest <= 64 * 64


def test_weights_are_dinos():
    train, y = clouds(200)
    test = clouds(20, seed=1)[0]
    similarity, index = brute(train, test, 10)
    weight = np.exp(similarity / 0.07)
    expected = np.stack([(weight * (y[index] == c)).sum(1) for c in range(4)], 1) / weight.sum(1, keepdims=True)
    assert np.allclose(knn.scores(train, y, test, settings=Settings(k=10)), expected)
    votes = np.stack([(y[index] == c).mean(1) for c in range(4)], 1)
    assert np.allclose(knn.scores(train, y, test, settings=Settings(k=10, vote=True)), votes)


def test_vote_equals_sklearn():
    from sklearn.neighbors import KNeighborsClassifier

    train, y = clouds(300)
    test = clouds(80, seed=1)[0]
    theirs = KNeighborsClassifier(7, metric="cosine", algorithm="brute").fit(train, y).predict_proba(test)
    assert np.allclose(knn.scores(train, y, test, settings=Settings(k=7, vote=True)), theirs)


def test_a_tiny_temperature_neither_overflows_nor_changes_the_nearest():
    train, y = clouds(100)
    test = clouds(30, seed=1)[0]
    scores = knn.scores(train, y, test, settings=Settings(k=50, temperature=1e-6))
    assert np.allclose(scores, knn.scores(train, y, test, settings=Settings(k=1)))


def test_multi_label_scores_average_known_labels():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(80, 6)), rng.normal(size=(9, 6))
    y = (rng.random((80, 3)) < 0.4).astype(np.float32)
    y[rng.random(y.shape) < 0.3] = np.nan
    similarity, index = brute(train, test, 5)
    weight = np.exp(similarity / 0.07)[..., None] * ~np.isnan(y[index])
    with np.errstate(invalid="ignore"):
        expected = np.nansum(weight * np.nan_to_num(y[index]), 1) / weight.sum(1)
    expected = np.where(weight.sum(1) > 0, expected, np.nanmean(y, 0))  # nobody near knows: the prevalence
    assert np.allclose(knn.scores(train, y, test, settings=Settings(k=5)), expected)


def test_unlabelled_rows_do_not_vote():
    train, y = clouds(60)
    test = clouds(10, seed=1)[0]
    more, labels = np.concatenate([test, train]), np.concatenate([np.full(10, -1), y])  # the test rows themselves
    assert np.array_equal(knn.scores(more, labels, test), knn.scores(train, y, test))


def test_k_beyond_the_training_set_is_all_of_it():
    train, y = clouds(6)
    test = clouds(5, seed=1)[0]
    model = knn.fit(train, y, settings=Settings(k=200), n_classes=4)
    assert model.chosen == 6
    votes = knn.scores(train, y, test, settings=Settings(k=200, vote=True), n_classes=4)
    assert np.allclose(votes, np.bincount(y, minlength=4) / 6)
    assert knn.scores(train[:1], y[:1], test, n_classes=4).argmax(1).tolist() == [y[0]] * 5


def test_auto_picks_k_on_validation():
    train, y = clouds(150, spread=2.5)
    val, val_y = clouds(200, seed=1, spread=2.5)
    model = knn.fit(train, y, val, val_y, settings=Settings(k="auto"))
    assert [k for k, _ in model.curve] == [1, 5, 10, 20, 50, 100]
    for k, value in model.curve:
        found = knn.scores(train, y, val, settings=Settings(k=k)).argmax(1)
        assert value == (found == val_y).mean()
    best = max(value for _, value in model.curve)
    assert model.chosen == max(k for k, value in model.curve if value == best)
    assert np.array_equal(model.scores(val), knn.scores(train, y, val, settings=Settings(k=model.chosen)))


def test_auto_works_with_one_training_image_and_multi_labels():
    rng = np.random.default_rng(0)
    assert knn.fit(np.ones((1, 3)), np.array([0]), settings=Settings(k="auto")).chosen == 1
    x, y = rng.normal(size=(40, 5)), (rng.random((40, 2)) < 0.5).astype(np.float32)
    model = knn.fit(x[:30], y[:30], x[30:], y[30:], settings=Settings(k="auto"))
    assert [k for k, _ in model.curve] == [1, 5, 10, 20] and dict(model.curve)[model.chosen] == max(
        dict(model.curve).values()
    )


def test_leave_one_out_never_sees_itself():
    train, y = clouds(120, spread=2.0)
    found = knn.scores(train, y, settings=Settings(k=5))
    for i in (0, 57, 119):
        others = np.arange(120) != i
        assert np.allclose(found[i], knn.scores(train[others], y[others], train[i : i + 1], settings=Settings(k=5)))
    assert (knn.scores(train, y, settings=Settings(k=1)).argmax(1) == y).mean() < 1


def test_leave_one_group_out():
    x = np.random.default_rng(0).normal(size=(20, 8))
    train = np.repeat(x, 3, axis=0)  # three identical pictures of each patient
    y, patient = np.repeat(np.arange(20) % 2, 3), np.repeat([f"p{i}" for i in range(20)], 3)
    assert (knn.scores(train, y, settings=Settings(k=1)).argmax(1) == y).all()
    honest = knn.scores(train, y, groups=patient, settings=Settings(k=1))
    alone = knn.scores(x, y[::3], settings=Settings(k=1))
    assert np.allclose(honest[::3], alone)
    one = knn.scores(train, y, groups=np.zeros(60), settings=Settings(k=3))
    assert np.allclose(one, 0.5)  # nobody else: the class frequencies


def test_unlabelled_rows_are_scored_in_leave_one_out():
    train, y = clouds(50)
    hidden = y.copy()
    hidden[:5] = -1
    found = knn.scores(train, hidden, settings=Settings(k=3), n_classes=4)
    assert np.allclose(found[:5], knn.scores(train[5:], y[5:], train[:5], settings=Settings(k=3), n_classes=4))


def test_errors():
    x, y = clouds(10)
    with pytest.raises(ConfigError, match="k is 0"):
        Settings(k=0)
    with pytest.raises(ConfigError, match="temperature is 0"):
        Settings(temperature=0)
    with pytest.raises(DataError, match=r"1 rows of the training features are not finite \(first: row 3\)"):
        broken = x.copy()
        broken[3, 0] = np.nan
        knn.scores(broken, y, x)
    with pytest.raises(DataError, match="10 features but 9 labels"):
        knn.scores(x, y[1:], x)
    with pytest.raises(DataError, match="no training image has a label"):
        knn.scores(x, np.full(10, -1), x)
    with pytest.raises(DataError, match="but only 2 classes"):
        knn.scores(x, np.arange(10), x, n_classes=2)
    with pytest.raises(DataError, match="2 groups for 10 images"):
        knn.scores(x, y, groups=["a", "b"])
