"""Measures without labels: known values, invariances, and views that are the same for every model."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from vitkit.data import read
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import label_free as lf


def rows(n=60, d=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def turned(d, seed=5):
    return np.linalg.qr(rows(d, d, seed))[0]


# ---- rank and spread -------------------------------------------------------------------------------------------------


def test_rank_of_known_spectra():
    assert lf.effective_rank(np.eye(8)) == pytest.approx(8, rel=1e-4)
    assert lf.effective_rank(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1, abs=1e-4)
    share = np.array([0.5, 0.25, 0.25])
    wanted = math.exp(-(share * np.log(share)).sum())
    assert lf.effective_rank(np.diag([2.0, 1.0, 1.0])) == pytest.approx(wanted, rel=1e-5)
    assert lf.effective_rank(np.zeros((4, 3))) == 1


def test_rank_does_not_change_with_scale_and_rotation():
    x = rows()
    assert lf.effective_rank(3 * x @ turned(12)) == pytest.approx(lf.effective_rank(x))
    collapsed = x * np.array([1.0] * 2 + [1e-3] * 10)
    assert lf.effective_rank(collapsed) < 0.4 * lf.effective_rank(x)


def test_alignment_and_uniformity():
    x = rows()
    assert lf.alignment(x, 2 * x) == pytest.approx(0, abs=1e-12) and lf.alignment(x, -x) == pytest.approx(4)
    assert lf.uniformity(np.ones((5, 3))) == pytest.approx(0, abs=1e-9)
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert lf.uniformity(opposite) == pytest.approx(-8)  # distance 2: exp(-2 * 4)
    wide = rows(2500, 16)
    near = wide[:, None, :3][:50, 0]  # blocks and a plain double loop agree
    unit = near / np.linalg.norm(near, axis=1, keepdims=True)
    pairs = [math.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(50) for j in range(50) if i != j]
    assert lf.uniformity(near) == pytest.approx(math.log(np.mean(pairs)))
    assert lf.uniformity(wide) < -3


# ---- found again -----------------------------------------------------------------------------------------------------


def test_own_views_are_found_and_strangers_are_not():
    x = rows(200, 32)
    hit, margin, _ = lf.found_again(x, x + 0.1 * rows(200, 32, 1))
    assert hit.all() and margin.min() > 0
    hit, margin, _ = lf.found_again(x, rows(200, 32, 2))
    assert hit.mean() < 0.03 and margin.mean() < 0


def test_what_is_taken_for_it_is_named_and_ties_are_no_hits():
    x = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    hit, _, other = lf.found_again(x, x[[1, 1, 2]])
    assert hit.tolist() == [False, False, True] and other.tolist() == [2, 0, 0]
    assert not lf.found_again(np.ones((6, 3)), np.ones((6, 3)))[0].any()  # a collapsed model finds nothing


def test_blocks_do_not_matter(monkeypatch):
    x, y = rows(70), rows(70) + 0.5 * rows(70, seed=3)
    whole, overlap, spread = lf.found_again(x, y), lf.neighbour_overlap(x, y), lf.uniformity(x)
    monkeypatch.setattr(lf, "_BLOCK", 16)
    for one, other in zip(whole, lf.found_again(x, y), strict=True):
        assert np.allclose(one, other)
    assert np.array_equal(overlap, lf.neighbour_overlap(x, y)) and lf.uniformity(x) == pytest.approx(spread)


# ---- two models ------------------------------------------------------------------------------------------------------


def test_cka_of_the_same_up_to_rotation_scale_and_shift():
    x = rows()
    assert lf.cka(x, 3 * x @ turned(12) + 5) == pytest.approx(1)
    assert abs(lf.cka(x, rows(seed=9))) < 0.15


def test_cka_is_unbiased_in_many_dimensions():
    """The plain estimate is near 1 for unrelated features of 30 images in 400 dimensions; this one is near 0."""
    found = [lf.cka(rows(30, 400, seed), rows(30, 300, 100 + seed)) for seed in range(20)]
    assert abs(np.mean(found)) < 0.02
    assert math.isnan(lf.cka(np.ones((9, 3)), rows(9, 3)))


def test_shared_neighbours():
    x = rows(100, 8)
    assert (lf.neighbour_overlap(x, 2 * x @ turned(8)) == 1).all()
    assert lf.neighbour_overlap(x, rows(100, 8, 4), k=10).mean() == pytest.approx(10 / 99, abs=0.03)


# ---- views -----------------------------------------------------------------------------------------------------------


def test_views_are_the_same_each_time_and_differ_by_seed():
    images = read("digits").part("test").subset(np.arange(12))
    one, again, other = (lf.views(images, "view", seed=seed) for seed in (1, 1, 2))
    for i in range(12):
        assert np.array_equal(one.decode(i), again.decode(i))
    assert any(one.decode(i).shape != other.decode(i).shape for i in range(12))
    part = one.subset([5])
    assert np.array_equal(part.decode(0), one.decode(5))  # a picture changes in its own way, wherever it stands
    assert len({images.fingerprint, one.fingerprint, other.fingerprint, lf.views(images, "duplicate").fingerprint}) == 4
    assert np.array_equal(pickle.loads(pickle.dumps(one)).decode(3), one.decode(3))


@pytest.mark.parametrize("kind", ["view", "duplicate"])
@pytest.mark.parametrize("shape", [(1, 1), (9, 40), (40, 9, 3), (300, 200, 3)])
def test_views_of_any_shape(kind, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for seed in range(5):
        seen = lf.change(picture, lf.CHANGES[kind], np.random.default_rng(seed))
        assert seen.dtype == np.uint8 and seen.ndim == picture.ndim and min(seen.shape) >= 1


def test_mirroring_can_be_left_out():
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    how = lf.CHANGES["view"]
    mirrored = [(np.diff(lf.change(ramp, how, np.random.default_rng(s)).astype(int)).sum() < 0) for s in range(30)]
    assert 5 < sum(mirrored) < 25
    still = lf.Changes(area=how.area, light=how.light, hflip=False)
    assert not any(np.diff(lf.change(ramp, still, np.random.default_rng(s)).astype(int)).sum() < 0 for s in range(30))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(DataError, match="features are not finite"):
        lf.effective_rank(np.array([[1.0, np.nan], [0, 1]]))
    with pytest.raises(DataError, match=r"features of shape \(3,\)"):
        lf.uniformity(np.zeros(3))
    with pytest.raises(DataError, match="same model"):
        lf.found_again(rows(5), rows(6))
    with pytest.raises(DataError, match="features of 5 and 6 images"):
        lf.cka(rows(5), rows(6))
    with pytest.raises(DataError, match="k is 5 for 5 images"):
        lf.neighbour_overlap(rows(5), rows(5), k=5)
    with pytest.raises(ConfigError, match="no views called 'blur'"):
        lf.views(read("digits"), "blur")
