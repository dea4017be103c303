"""Affinities of objects, their loss, and the two scores, against definitions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix

from vitkit.dense import affinity
from vitkit.errors import ConfigError, DataError


def test_targets_by_a_loop():
    objects = torch.randint(0, 3, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    offsets = ((1, 0, 0), (0, 2, 0), (0, 0, -1), (1, -1, 2))
    target, known = affinity.affinities(objects, offsets)
    assert target.shape == known.shape == (2, 4, 3, 4, 5)
    for b in range(2):
        for k, offset in enumerate(offsets):
            for place in np.ndindex(3, 4, 5):
                other = tuple(p + d for p, d in zip(place, offset, strict=True))
                inside = all(0 <= p < n for p, n in zip(other, (3, 4, 5), strict=True))
                assert bool(known[(b, k, *place)]) == inside
                a = objects[(b, *place)]
                want = inside and bool(a == objects[(b, *other)]) and bool(a != 0)
                assert bool(target[(b, k, *place)]) == want


def test_loss_weighs_both_kinds_alike_and_ignores_what_leaves_the_volume():
    objects = torch.ones(6, 6, dtype=torch.long)
    objects[:, 5] = 2
    target, known = affinity.affinities(objects, affinity.PLANE)
    guess = torch.full_like(target, 0.25)
    assert affinity.weighted_mse(guess, target, known) == pytest.approx((0.75**2 + 0.25**2) / 2)
    changed = torch.where(known, guess, torch.rand(guess.shape))
    assert torch.equal(affinity.weighted_mse(changed, target, known), affinity.weighted_mse(guess, target, known))
    with pytest.raises(DataError, match="no pair"):
        affinity.weighted_mse(guess, target, torch.zeros_like(known))


def test_objects_come_back_from_their_affinities():
    truth = np.zeros((12, 12), int)
    truth[1:6, 1:6], truth[6:11, 1:6], truth[2:9, 7:11] = 1, 2, 3  # two of them touch
    target, _ = affinity.affinities(torch.from_numpy(truth), affinity.PLANE)
    said = affinity.objects(target.numpy(), affinity.PLANE)
    assert np.array_equal(said > 0, truth > 0) and len(np.unique(said)) == 4
    assert affinity.voi(truth, said) == (0.0, 0.0) and affinity.arand_error(truth, said) == pytest.approx(0)
    assert len(np.unique(affinity.objects(target.numpy(), affinity.PLANE, smallest=26))) == 2
    assert not affinity.objects(np.zeros((2, 4, 4)), affinity.PLANE).any()
    with pytest.raises(ConfigError, match="2 affinities for 3 offsets"):
        affinity.objects(target.numpy(), affinity.VOLUME)


def test_scores_are_their_definitions():
    rng = np.random.default_rng(0)
    y, said = rng.integers(0, 4, 500), rng.integers(0, 6, 500)
    a, b = y[y > 0], said[y > 0]
    split, merge = affinity.voi(y, said)
    entropy = lambda v: mutual_info_score(v, v) / np.log(2)  # noqa: E731
    shared = mutual_info_score(a, b) / np.log(2)
    assert split == pytest.approx(entropy(b) - shared) and merge == pytest.approx(entropy(a) - shared)
    (_, extra), (missed, both) = pair_confusion_matrix(a, b) + np.diag([0, len(a)])  # a voxel is a pair with itself
    assert affinity.arand_error(y, said) == pytest.approx(1 - 2 * both / (2 * both + extra + missed))
    one = np.ones(8, int)
    assert affinity.voi(one, np.arange(8)) == (3.0, 0.0) and affinity.voi(np.arange(1, 9), one) == (0.0, 3.0)
    with pytest.raises(DataError, match="holds no object"):
        affinity.voi(np.zeros(3), np.ones(3))
