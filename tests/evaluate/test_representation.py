"""Analysis of representations: known spectra, similarities, sparsity and attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit import weights
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import representation as r


@pytest.fixture(scope="module")
def vit():
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    return weights.load(
        "vit_tiny_patch16_224", pretrained=False, arch_kwargs=kwargs, image_size=24, patch_size=8, say=None
    ).eval()


def test_rank_of_known_spectra():
    random = np.random.default_rng(0)
    even = np.linalg.qr(random.normal(size=(400, 8)) - 0.0)[0]
    even -= even.mean(0)
    assert r.effective_rank(even) == pytest.approx(8, abs=0.1) and r.in_use(even) == 8
    line = random.normal(size=(100, 1)) @ random.normal(size=(1, 8))
    assert r.effective_rank(line) == pytest.approx(1, abs=1e-6) and r.in_use(line) == 1
    assert r.effective_rank(np.ones((10, 4))) == 1.0 and r.in_use(np.ones((10, 4))) == 0
    x = random.normal(size=(50, 6))
    assert np.allclose(r.singular_values(x), np.linalg.eigvalsh(np.cov(x.T))[::-1])
    with pytest.raises(DataError, match=r"features of shape \(1, 4\)"):
        r.effective_rank(np.ones((1, 4)))


def test_similarity_within_and_across_streams():
    x = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    found = r.similarity(x, np.array([0, 0, 1, 1, 1]))
    assert found == {"consecutive": 1.0, "within a stream": 1.0, "across streams": 0.0}
    assert np.isnan(r.similarity(x, np.zeros(5, int))["across streams"])


def test_sparsity_grows_with_the_threshold(vit):
    pixels = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8)
    low, high = r.sparsity(vit, pixels, threshold=0.01), r.sparsity(vit, pixels, threshold=1.0)
    assert len(low) == 2 and all(a["near zero"] < b["near zero"] for a, b in zip(low, high, strict=True))
    assert all(0 <= one["hoyer"] <= 1 and one["hoyer"] == other["hoyer"] for one, other in zip(low, high, strict=True))
    with pytest.raises(ConfigError, match="threshold is 0"):
        r.sparsity(vit, pixels, threshold=0)


def test_attention_is_a_share_of_each_head(vit):
    found = r.attention(vit, torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8))
    assert found.shape == (2, 2, 3, 3) and bool((found.sum((2, 3)) < 1).all()) and bool((found > 0).all())


def test_map_has_a_point_a_row():
    assert r.tsne(np.random.default_rng(0).normal(size=(20, 5))).shape == (20, 2)
