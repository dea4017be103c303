"""Draws of few labels: which rows, and intervals over draws; LoRA and BitFit change exactly what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit import weights
from vitkit.adapt import bitfit, linear, lora
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import few_shot
from vitkit.settings import Classify, Task


def test_draws_per_class_have_k_of_each_and_follow_the_seed():
    y = np.repeat([0, 1, 2, -1], (20, 3, 9, 4))
    rows = few_shot.per_class(y, 5, 7)
    assert np.bincount(y[rows]).tolist() == [5, 3, 5] and len(set(rows.tolist())) == 13
    assert np.array_equal(rows, few_shot.per_class(y, 5, 7))
    assert not np.array_equal(rows, few_shot.per_class(y, 5, 8))
    more = few_shot.per_class(y, 8, 7)
    assert len(more) > len(rows)
    torch.manual_seed(7)
    assert np.array_equal(rows[:5], torch.randperm(20)[:5].numpy())  # the official rule


def test_several_labels_an_image():
    y = np.array([[1, 0], [1, 1], [0, 1], [np.nan, 1], [1, np.nan]])
    rows = few_shot.per_class(y, 2, 0)
    assert len(set(rows.tolist())) == len(rows)
    assert (y[rows] == 1).sum(0).min() >= 2


def test_scores_grow_with_shots_and_intervals_cover_the_draws():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = 1.2 * np.eye(3)[y] @ rng.normal(size=(3, 12)) + rng.normal(size=(300, 12))
    for head in ("linear", "knn"):
        found = few_shot.fit(x[:200], y[:200], x[200:], y[200:], settings=few_shot.Settings((1, 20), 6), head=head)
        assert [f.shots for f in found] == [1, 20]
        assert found[1].interval.value > found[0].interval.value
        assert found[0].interval.low < np.mean(found[0].scores) < found[0].interval.high
        assert len(set(found[0].scores)) > 1
    again = few_shot.fit(x[:200], y[:200], x[200:], y[200:], settings=few_shot.Settings((20,), 6), head="knn")
    assert again[0].scores == found[1].scores


def test_what_is_wrong_is_said():
    with pytest.raises(ConfigError, match="16 shots of 10 images"):
        few_shot.systematic(10, 16)
    with pytest.raises(ConfigError, match="k is 0"):
        few_shot.per_class(np.array([0, 1]), 0)
    with pytest.raises(DataError, match="no image has a label"):
        few_shot.per_class(np.array([-1, -1]), 1)
    with pytest.raises(ConfigError, match="draws is 0"):
        few_shot.Settings(draws=0)
    with pytest.raises(ConfigError, match=r"shots is \(0,\)"):
        few_shot.Settings(shots=(0,))
    with pytest.raises(ConfigError, match="head is 'tree'"):
        few_shot.fit(np.eye(2), np.array([0, 1]), np.eye(2), np.array([0, 1]), head="tree")


# ---------------------------------------------------------------- adaptation that really adapts

SETTINGS = {
    "bitfit": (bitfit.BitFit, bitfit.Settings()),
    "lora": (lora.LoRA, lora.Settings(rank=4, targets=("qkv", "fc1", "fc2"))),
}


def step_method(name, x, y, steps=100):
    torch.manual_seed(0)
    vit = weights.load("vit_tiny_patch16_224", pretrained=False, image_size=16, patch_size=8, say=None,
                       arch_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})  # fmt: skip
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    kind, settings = SETTINGS.get(name, (linear.Linear, linear.Settings()))
    method = kind(vit, settings, task=Task("single", ("a", "b", "c")), classify=Classify(head="linear")).train()
    wanted = {n for n, p in method.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        out = method({"image": x, "label": y})["loss"]
        out.backward()
        optimizer.step()
    return method, before, wanted, float(out.detach())


@pytest.mark.parametrize("name", SETTINGS)
def test_adaptation_changes_exactly_its_own_parameters_and_learns_more_than_a_head(name):
    """In the released benchmark code neither ever trained the backbone."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, 16, 16, generator=generator), torch.arange(24) % 3
    method, before, wanted, loss = step_method(name, x, y)
    after = {k.removeprefix("vit."): v for k, v in method.state_dict().items()}
    for key, value in before.items():
        wrapped = (
            key if key in after else key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        changed = not torch.equal(after[wrapped], value)
        should = name == "bitfit" and key.endswith("bias")
        assert changed == should, key
    own = {n for n in wanted if not n.startswith("vit.head")}
    assert own and all(n.endswith("bias") if name == "bitfit" else "lora_" in n for n in own)
    if name == "lora":
        assert all(bool(p.any()) for n, p in method.named_parameters() if "lora_B" in n)  # each moved away from zero
    assert loss < step_method("linear", x, y)[3]
