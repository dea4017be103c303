"""What a backbone costs, shares of labels, the Pareto front, differences of means, agreement of maps across sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit import weights
from vitkit.errors import ConfigError
from vitkit.evaluate import masks, metrics, scaling, statistics


def make(name="vit_tiny_patch16_224", dim=24, **more):
    kwargs = {"embed_dim": dim, "depth": 2, "num_heads": 2}
    given = {"pretrained": False, "arch_kwargs": kwargs, "image_size": 32, "patch_size": 8, "say": None} | more
    return weights.load(name, **given).eval()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_flops_are_those_of_the_formula(name):
    vit, dim = make(name), 24
    for size in (32, 48):
        patches = (size // 8) ** 2
        n = patches + vit.num_prefix_tokens
        block = 2 * n * dim * 3 * dim + 2 * n * dim * dim + 4 * n * dim * 4 * dim + 2 * 2 * n * n * dim
        assert scaling.flops(vit, size) == 2 * block + 2 * patches * 3 * 64 * dim
    assert next(vit.parameters()).device.type == "cpu"


def test_costs_of_a_large_size_are_larger():
    vit = make()
    small, large = (scaling.cost_of(vit, size, batch=2, seconds=0.01) for size in (16, 64))
    assert small.parameters == large.parameters == sum(p.numel() for p in vit.parameters())
    assert (small.tokens, large.tokens) == (5, 65)
    assert large.flops > small.flops and large.memory > small.memory > 4 * small.parameters
    assert small.images_per_second > 0 and large.images_per_second > 0
    held = torch.zeros(1000)
    assert 4000 <= scaling.peak_memory(lambda: held + 1) < 5000


def test_shares_are_nested_and_keep_every_class():
    y = np.array([0] * 50 + [1] * 10 + [2])
    few, more = scaling.share(y, 0.1), scaling.share(y, 0.5)
    assert set(few) <= set(more) and np.array_equal(scaling.share(y, 1.0), np.arange(61))
    assert np.bincount(y[few]).tolist() == [5, 1, 1] and np.bincount(y[more]).tolist() == [25, 5, 1]
    many = np.zeros((40, 3))
    assert len(scaling.share(many, 0.25)) == 10 and set(scaling.share(many, 0.1)) <= set(scaling.share(many, 0.25))
    with pytest.raises(ConfigError, match="fraction is 0"):
        scaling.share(y, 0)


def test_pareto_front():
    assert scaling.pareto([1, 2, 3, 3], [0.5, 0.4, 0.9, 0.8]) == [True, False, True, False]
    assert scaling.pareto([1, 1], [0.5, 0.5]) == [True, True]
    assert scaling.pareto([1, 2], [float("nan"), 0.1]) == [False, True]


def test_mean_difference_is_the_paired_bootstrap_for_one_pair_and_narrower_for_several():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    scores = [rng.random((120, 3)) + q * np.eye(3)[y] for q in (0.2, 0.6, 0.2, 0.6)]
    want = statistics.paired_bootstrap(metrics.accuracy, y, scores[1], scores[0], n=1000)
    got = scaling.mean_difference(metrics.accuracy, y, [scores[1]], [scores[0]], n=1000)
    assert got == want
    both = scaling.mean_difference(metrics.accuracy, y, scores[1::2], scores[::2], n=1000)
    assert both.high - both.low < want.high - want.low and both.p < 0.05
    same = scaling.mean_difference(metrics.accuracy, y, scores[:1], scores[:1], n=200)
    assert same.value == 0 and same.p == 1.0
    with pytest.raises(ConfigError, match="no pair"):
        scaling.mean_difference(metrics.accuracy, y, [], [])


def test_iou_from_counts_is_the_iou_of_all_pixels():
    rng = np.random.default_rng(0)
    y, said = rng.integers(0, 3, (2, 7, 8, 8))
    tables = np.stack([masks.confusion(a, b, 3).reshape(-1) for a, b in zip(y, said, strict=True)])
    assert scaling.pooled_iou(np.zeros(7), tables) == pytest.approx(masks.mean_iou(y, said, 3))
    assert np.isnan(scaling.pooled_iou(np.zeros(1), np.array([[9, 0, 0, 0]])))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_any_size_gives_finite_repeatable_maps(name):
    """The sheet's demand for random weights; trained ones are measured by the quality benchmark."""
    vit, x = make(name), torch.randn(3, 3, 32, 48)
    found = scaling.map_agreement(vit, x)
    assert found.shape == (3,) and np.isfinite(found).all() and (np.abs(found) <= 1 + 1e-6).all()
    assert np.array_equal(found, scaling.map_agreement(vit, x, batch_size=16))
    assert np.isfinite(scaling.map_agreement(vit, x, centred=True)).all()
    flat = torch.ones(1, 3, 32, 48)
    assert scaling.map_agreement(vit, flat)[0] > 0.5
    with pytest.raises(ConfigError, match="factor is 1"):
        scaling.map_agreement(vit, x, factor=1)
