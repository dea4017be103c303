"""Attention maps and rollout of every ViT family against straightforward implementations of their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.test_tokens import FAMILIES, close, images, make
from tests.volumes import volume_vit
from vitkit import tokens
from vitkit.adapt import vpt
from vitkit.errors import ConfigError
from vitkit.explain import attention
from vitkit.explain.attention import Settings
from vitkit.parts.blocks import Steps, add_prefix_tokens, extend

SIZE = (64, 112)


def plain_rollout(vit, x, fusion="mean", discard=0.0):
    """All maps first, whole matrices, then their product: the definition, word for word."""
    weights = tokens.attention_maps(vit, x, layers=range(len(vit.blocks)))
    count = (x.shape[2] // 16) * (x.shape[3] // 16)
    total = None
    for one in weights:
        one = one[..., -one.shape[2] :]
        one = one / one.sum(-1, keepdim=True)
        fused = {"mean": one.mean(1), "max": one.max(1).values, "min": one.min(1).values}[fusion]
        if discard:
            for sample in fused:
                patches = sample[:, -count:]
                lowest = patches.flatten().sort().values[int(discard * patches.numel()) - 1]
                patches[patches <= lowest] = 0
        mixed = fused + torch.eye(fused.shape[1])
        mixed = mixed / mixed.sum(-1, keepdim=True)
        total = mixed if total is None else mixed @ total
    if attention.reads(vit) == "class token":
        rows = total[:, 0]
    else:
        rows = total[:, -count:].mean(1)
    return rows[:, -count:].unflatten(1, (x.shape[2] // 16, x.shape[3] // 16))


@pytest.mark.parametrize("name", FAMILIES)
def test_rollout_is_the_product_of_all_maps(name):
    vit, x = make(name), images(SIZE)
    with torch.no_grad():
        found, want = attention.rollout(vit, x), plain_rollout(vit, x)
    assert found.shape == (2, 4, 7) and close(found, want, 1e-5)


@pytest.mark.parametrize("settings", [{"fusion": "max"}, {"fusion": "min"}, {"discard": 0.6}], ids=str)
@pytest.mark.parametrize("name", ["plain", "dinov3"])
def test_rollout_with_other_fusions_and_discarded_weights(name, settings):
    vit, x = make(name), images(SIZE)
    with torch.no_grad():
        assert close(attention.rollout(vit, x, None, Settings(**settings)), plain_rollout(vit, x, **settings), 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_of_a_layer_is_the_class_tokens_row(name):
    vit, x = make(name), images(SIZE)
    with torch.no_grad():
        weights = tokens.attention_maps(vit, x, layers=[1])[0]
        heads, mean = attention.by_head(vit, x, Settings(layer=1)), attention.saliency(vit, x, None, Settings(layer=-2))
        one = attention.saliency(vit, x, None, Settings(layer=1, head=2))
    start = vit.num_prefix_tokens
    row = weights[:, :, 0] if attention.reads(vit) == "class token" else weights[:, :, start:].mean(2)
    want = row[:, :, start:].unflatten(2, (4, 7))
    assert close(heads, want, 1e-6) and close(mean, want.mean(1), 1e-6) and close(one, want[:, 2], 1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", "class token"),
        ("dinov2_registers", "class token"),
        ("no_class_token", "mean of all patches"),
        ("avg_fc_norm", "mean of all patches"),
        ("dinov3", "mean of all patches"),
    ],
)
def test_the_row_that_is_read_is_said(name, words):
    assert attention.reads(make(name)) == words
    if name != "no_class_token":  # without a head nothing reads the mean
        assert attention.reads(make(name, num_classes=0)) == "class token"


def test_the_row_can_be_chosen():
    vit, x = make("avg_fc_norm"), images(SIZE)
    assert attention.reads(vit, Settings(query="class")) == "class token"
    classes, patches = (attention.saliency(vit, x, None, Settings(query=query)) for query in ("class", "patches"))
    assert not close(classes, patches, 1e-2)
    with pytest.raises(ConfigError, match=r"no class token\n  fix: query=patches"):
        attention.saliency(make("no_class_token"), x, None, Settings(query="class"))


@pytest.mark.parametrize("name", ["plain", "dinov3", "no_class_token"])
def test_learned_keys_are_dropped_and_rows_sum_to_one_again(name):
    vit, x = make(name), images(SIZE)
    vpt.inject(vit, vpt.Settings(prompts=3))
    with torch.no_grad():
        assert tokens.attention_maps(vit, x)[0].shape[-1] == 3 + tokens.attention_maps(vit, x)[0].shape[-2]
        found = attention.rollout(vit, x)
        assert close(found, plain_rollout(vit, x), 1e-5)
    if not vit.num_prefix_tokens:  # everything that reaches a patch comes from patches
        assert torch.allclose(found.sum((1, 2)), torch.ones(2), atol=1e-5)


class Entering(Steps):
    """Two learned tokens that enter at this block and run along."""

    def entering(self, x):
        x = super().entering(x)
        return torch.cat([self.fresh.expand(len(x), -1, -1), x], dim=1)


@pytest.mark.parametrize("name", ["plain", "dinov3"])
def test_prompts_that_run_along_hold_no_patch_when_they_enter(name):
    vit, x = make(name), images(SIZE)
    extend(vit.blocks[1], Entering)
    vit.blocks[1].fresh = torch.nn.Parameter(torch.randn(1, 2, vit.embed_dim))
    for block in vit.blocks[1:]:
        add_prefix_tokens(vit, block, 2)
    with torch.no_grad():
        weights = tokens.attention_maps(vit, x, layers=[0, 1, 2])
        total = torch.eye(weights[0].shape[-1]).expand(2, -1, -1)
        for one in weights:
            total = torch.nn.functional.pad(total, (0, 0, one.shape[-1] - total.shape[1], 0))
            total = (one.mean(1) + torch.eye(one.shape[-1])) @ total / 2
        chosen = Settings(query="class")
        found = attention.rollout(vit, x, None, chosen)
        assert close(found, total[:, 2, -28:].unflatten(1, (4, 7)), 1e-5)
        last = attention.saliency(vit, x, None, chosen)
    assert close(last, weights[2].mean(1)[:, 2, -28:].unflatten(1, (4, 7)), 1e-6)


def test_maps_do_not_depend_on_how_images_are_batched(monkeypatch):
    vit, x = make("plain"), images(SIZE, 5)
    whole = attention.rollout(vit, x), attention.by_head(vit, x)
    monkeypatch.setattr(attention, "CHUNK", 1)
    assert close(attention.rollout(vit, x), whole[0], 1e-6) and close(attention.by_head(vit, x), whole[1], 1e-6)
    assert close(attention.rollout(vit, x[3:4]), whole[0][3:4], 1e-5)


def test_the_model_is_left_as_it_was():
    vit, x = make("plain", proj_drop_rate=0.5).train(), images(SIZE)
    vit.blocks[1].eval()
    assert torch.equal(attention.rollout(vit, x), attention.rollout(vit, x))
    assert vit.training and vit.blocks[0].training and not vit.blocks[1].training


def test_volumes_give_maps_of_three_axes():
    vit = volume_vit()
    assert attention.rollout(vit, torch.randn(2, 1, 8, 16, 16)).shape == (2, 2, 2, 2)


def test_errors_say_what_to_do():
    vit, x = make("plain"), images(SIZE)
    with pytest.raises(ConfigError, match=r"layer 3 does not exist\n  fix: the ViT has blocks 0..2"):
        attention.saliency(vit, x, None, Settings(layer=3))
    with pytest.raises(ConfigError, match=r"head 4 does not exist\n  fix: the block has heads 0..3"):
        attention.saliency(vit, x, None, Settings(head=4))
    with pytest.raises(ConfigError, match=r"discard is 1\n  fix: a share from 0 to below 1"):
        Settings(discard=1.0)
    with pytest.raises(ConfigError, match=r"fusion is 'median'\n  fix: one of: mean, max, min"):
        Settings(fusion="median")
    with pytest.raises(ConfigError, match=r"query is 'cls'\n  fix: one of: auto, class, patches"):
        Settings(query="cls")
