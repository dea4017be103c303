"""The contract of every method on every ViT family it claims: found by discovery, so a new method is tested unasked."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.run import discover
from vitkit.settings import Task

from . import examples
from .examples import build, model, pixels
from .test_tokens import close, images, make

METHODS = [(m.verb, m.name) for m in discover.methods() if m.trains]
ADAPTATIONS = [(m.verb, m.name) for m in discover.methods() if m.labels]  # of explain and attack, too
CLAIMED = [(verb, name, family) for verb, name in METHODS for family in examples.families(verb, name)]
ADAPTED = [one for one in CLAIMED if one[:2] in ADAPTATIONS]
# Prompts are read from the first step on; the others change no output before they are trained.
IDENTICAL_AT_START = {"adaptformer", "bitfit", "full", "linear", "lora", "harden"}
# One bias on the score of every class: softmax cancels it, so that its gradient is exactly zero.
OWN_HEAD = {"prompt_cam"}  # takes no other head
SHIFTS_ALL_CLASSES = {"prompt_cam": {"vit.head.bias"}}


@pytest.mark.parametrize("verb,name,family", CLAIMED)
def test_gradients_reach_every_trainable_parameter_and_only_those(verb, name, family):
    torch.manual_seed(0)
    method = build(verb, name, model(family)).train()
    for module in method.modules():  # a fresh head starts at (nearly) zero and would hide the trunk's gradients
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            torch.nn.init.normal_(module.weight, std=0.1)
    for size in examples.SIZES[examples.KIND[family]]:
        out = method(examples.batch(name, family, size))
        assert out["loss"].ndim == 0 and torch.isfinite(out["loss"])
        out["loss"].backward()
    trainable = {n for n, p in method.named_parameters() if p.requires_grad}
    reached = {n for n, p in method.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    # A method that reads tokens, not the pooled feature, has no use for what pools them.
    pooling = () if method.needs_labels else ("vit.head", "vit.fc_norm", "vit.attn_pool")
    trainable -= SHIFTS_ALL_CLASSES.get(name, set())
    unreached = {n for n in trainable - reached if not n.startswith(pooling)} if pooling else trainable - reached
    assert not unreached, f"no gradient: {sorted(unreached)}"
    assert all(p.requires_grad for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("verb,name,family", ADAPTED)
def test_adapting_changes_no_loaded_weight_and_no_output(verb, name, family):
    vit, x = model(family), pixels(family, examples.SIZES[examples.KIND[family]][1])
    with torch.no_grad():
        want = tokens.encode(vit, x).all
    before = {key: value.clone() for key, value in vit.state_dict().items() if not key.startswith("head")}
    method = build(verb, name, vit).eval()
    assert method.finish() is vit
    after = dict(vit.state_dict())
    if name != "lora":  # peft renames the layers it wraps
        assert before.keys() <= after.keys() | {"head_dist.weight", "head_dist.bias"}
        assert all(torch.equal(after[key], value) for key, value in before.items() if key in after)
    if name in IDENTICAL_AT_START:
        with torch.no_grad():
            got = tokens.encode(vit, x).all
        # EVA's separate biases are moved into the layer for LoRA: the same sum in another order.
        assert close(got, want, 1e-6 if name == "lora" else 0.0)


@pytest.mark.parametrize("verb,name,family", ADAPTED)
def test_what_trained_is_enough_to_restore(verb, name, family):
    """One real step, then: frozen weights bit-identical; trained tensors alone on a fresh copy give equal logits."""
    from vitkit.run.trained import load_trained, trained_state

    head = "linear" if name in OWN_HEAD else "bn_linear"
    method = build(verb, name, model(family), head=head).train()
    frozen = {n: p.clone() for n, p in method.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method(examples.batch(name, family))["loss"].backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in method.named_parameters() if n in frozen)
    again = build(verb, name, model(family), head=head)
    load_trained(again, trained_state(method))
    x = pixels(family, examples.SIZES[examples.KIND[family]][1])
    assert torch.equal(method.eval().predict(x), again.eval().predict(x))


@pytest.mark.parametrize("verb,name", ADAPTATIONS)
def test_multi_label_loss_ignores_unknown_labels(verb, name):
    module = discover.load(verb, name)
    task = Task("multi", ("a", "b", "c"))
    method = discover.method_class(module)(make("plain"), examples.settings(module), task=task)
    labels = torch.tensor([[1.0, 0.0, float("nan")], [0.0, float("nan"), 1.0]])
    out = method.eval()({"image": images((64, 64)), "label": labels})
    known = ~labels.isnan()
    want = torch.nn.functional.binary_cross_entropy_with_logits(out["logits"][known], labels[known])
    assert torch.allclose(out["loss"], want)
    assert bool((method.predict(images((64, 64))) <= 1).all())


@pytest.mark.parametrize("verb,name", METHODS)
def test_copies_and_grad_checkpointing_give_the_same_numbers(verb, name):
    family = "dinov3" if "dinov3" in examples.families(verb, name) else examples.families(verb, name)[0]
    method = build(verb, name, model(family)).eval()
    twin, batch = copy.deepcopy(method), examples.batch(name, family)
    loss = method(dict(batch))["loss"]
    assert torch.equal(loss, twin(dict(batch))["loss"])
    twin.vit.set_grad_checkpointing()
    again = twin.train(method.training)(dict(batch))["loss"]
    again.backward()
    assert torch.allclose(loss, again)


@pytest.mark.parametrize("family", ["plain", "dinov3", "dinov2_registers", "no_class_token"])
def test_adapters_compose_in_every_order(family):
    """AdaptFormer, prompts and LoRA on one trunk: all orders agree exactly, and all still answer `tokens.encode`."""
    from vitkit.adapt import adaptformer, lora, vpt

    parts = {
        "adapter": (adaptformer, adaptformer.Settings(bottleneck=4, dropout=0.0)),
        "prompts": (vpt, vpt.Settings(prompts=2)),
        "lora": (lora, lora.Settings(rank=2)),
    }
    x, results = images((64, 96)), []
    for order in itertools.permutations(parts):
        vit = make(family)
        for key in order:
            module, settings = parts[key]
            module.inject(vit, settings)
        with torch.no_grad():
            for name, parameter in sorted(vit.named_parameters()):
                if any(mark in name for mark in ("adaptmlp", "prompts", "lora_")):
                    generator = torch.Generator().manual_seed(sum(name.encode()))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            results.append(tokens.encode(vit, x).all)
            maps = tokens.attention_maps(vit, x)[0]
            assert maps.shape[-1] == results[-1].shape[1] + 2  # the prompts stand in front
            half = tokens.encode(vit, x, keep=torch.arange(12).expand(2, -1))
            assert half.patches.shape[1] == 12
    assert all(torch.equal(one, results[0]) for one in results[1:])


def test_the_same_adapter_twice_is_refused():
    from vitkit.adapt import adaptformer, lora

    vit = adaptformer.inject(make("plain"), adaptformer.Settings(bottleneck=4))
    with pytest.raises(ConfigError, match="already carries ParallelAdapter"):
        adaptformer.inject(vit, adaptformer.Settings(bottleneck=4))
    vit = lora.inject(make("plain"), lora.Settings())
    with pytest.raises(ConfigError, match="already carries LoRA"):
        lora.inject(vit, lora.Settings())


def test_lora_merges_exactly():
    from vitkit.adapt import lora

    for family in ("plain", "dinov3_qkvb", "eva02"):
        vit = lora.inject(make(family), lora.Settings(rank=2))
        with torch.no_grad():
            for name, parameter in vit.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
            want = tokens.encode(vit, images((64, 64))).all
            got = tokens.encode(lora.merge(vit), images((64, 64))).all
        assert close(got, want, 1e-5)
        assert not any("lora" in key or "base_layer" in key for key in vit.state_dict())


def test_adaptformer_zero_scale_is_the_linear_probe():
    from vitkit.adapt import adaptformer

    vit, x = make("plain"), images((64, 64))
    with torch.no_grad():
        want = tokens.encode(vit, x).all
        adaptformer.inject(vit, adaptformer.Settings(bottleneck=4, scale=0.0))
        for block in vit.blocks:
            block.adaptmlp.up_proj.weight.normal_()
        assert torch.equal(tokens.encode(vit, x).all, want)


def test_adapters_in_chosen_blocks_only():
    from vitkit.adapt import adaptformer

    vit = adaptformer.inject(make("plain"), adaptformer.Settings(bottleneck=4, layers=(1, -1)))
    assert [hasattr(block, "adaptmlp") for block in vit.blocks] == [False, True, True]
    with pytest.raises(ConfigError, match="layers names block 9"):
        adaptformer.inject(make("plain"), adaptformer.Settings(layers=(9,)))


def test_mixup_targets_are_mixed_like_the_images():
    torch.manual_seed(0)
    method = build("adapt", "full", make("plain"), mixup=0.8, cutmix=1.0).train()
    x, y = images((64, 64), 4), torch.tensor([0, 1, 2, 0])
    mixed, labels = method._mix(x, y)
    assert mixed.shape == x.shape and torch.allclose(labels.sum(1), torch.ones(4))
    assert torch.isfinite(method({"image": x, "label": y})["loss"])
