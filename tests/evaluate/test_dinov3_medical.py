"""The benchmark's linear head: unknown labels count for nothing, and it comes near the exact optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit.errors import ConfigError
from vitkit.evaluate import dinov3_medical, linear, metrics
from vitkit.evaluate.dinov3_medical import Settings
from vitkit.run import discover


def sample(n=400, dim=12, labels=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(2, 3, (n, dim)).astype(np.float32)
    weight = np.random.default_rng(9).normal(size=(dim, labels))
    return x, ((x - 2) @ weight + rng.normal(0, 3, (n, labels)) > 0).astype(np.float32)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_comes_near_the_exact_probe(optimizer):
    x, y = sample()
    test, truth = sample(seed=1)
    settings = Settings(batch_size=64, optimizer=optimizer, lr=5e-3 if optimizer == "adamw" else 0.1)
    found = metrics.mean_auc(truth, dinov3_medical.fit(x, y, settings=settings).scores(test))
    exact = linear.fit(x, y, settings=linear.Settings(penalties=(1e-3,)))
    assert found == pytest.approx(metrics.mean_auc(truth, exact.scores(test)), abs=0.01) and found > 0.9


def test_unknown_labels_and_repeats():
    x, y = sample()
    y[::3, 1] = np.nan
    a, b = (dinov3_medical.fit(x, y) for _ in range(2))
    assert np.array_equal(a.weight, b.weight)
    known = ~np.isnan(y[:, 1])
    whole, part = Settings(standardise=False, batch_size=400), Settings(standardise=False, batch_size=400)
    with_gaps = dinov3_medical.fit(x, y[:, [1]], settings=whole)
    without = dinov3_medical.fit(x[known], y[known][:, [1]], settings=part)
    assert np.allclose(with_gaps.weight, without.weight, atol=1e-5)
    assert not dinov3_medical.fit(x, np.full_like(y, np.nan)).weight.any()


def test_one_label_an_image():
    x, y = sample(labels=1)
    classes = y[:, 0].astype(int)
    classes[:5] = -1
    found = dinov3_medical.fit(x, classes, n_classes=3).scores(x)
    assert found.shape == (400, 3) and np.allclose(found.sum(1), 1) and metrics.accuracy(classes[5:], found[5:]) > 0.8
    raw = dinov3_medical.fit(x, classes, settings=Settings(standardise=False, epochs=5))
    assert raw.scores(x).shape == (400, 2)
    with pytest.raises(ConfigError, match="features"):
        dinov3_medical.fit(x[:5], classes)
    with pytest.raises(ConfigError, match="0 epochs"):
        Settings(epochs=0)


def test_it_is_listed_without_importing_torch():
    method = discover.find("evaluate", "dinov3-medical")
    assert method.title == "DINOv3 medical benchmark" and "2509.06467" in method.paper and not method.trains
    assert discover.find("evaluate", "scaling").title == "Scaling study"
    for name in ("dinov3_medical", "scaling"):
        kind, _ = discover.light("evaluate", name)
        assert kind.__dataclass_fields__
    assert torch.is_grad_enabled()
