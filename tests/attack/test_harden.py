"""Hardening: the loss is clean plus adversarial, examples come from the public trunk, and a run goes on as it was adapted."""

from __future__ import annotations

import copy

import pytest
import torch

from vitkit import tokens, weights
from vitkit.adapt import adaptformer
from vitkit.attack.dta import DTA
from vitkit.attack.dta import Settings as AttackSettings
from vitkit.attack.harden import Harden, Settings
from vitkit.errors import ConfigError
from vitkit.run.trained import load_trained, trained_state
from vitkit.settings import Classify, Task

from .test_dta import pixels

TASK = Task("single", ("a", "b", "c"))
SMALL = Settings(eps=8 / 255, steps=2, calibration=2)


def model(**more):
    return weights.load(
        "vit_tiny_patch16_224", pretrained=False, image_size=32, arch_kwargs={"depth": 2, **more}, say=None
    )


def batch(vit, count: int = 4) -> dict[str, torch.Tensor]:
    clean = (pixels(count, (32, 32)) * 255).round() / 255
    images = vit.passport.preprocess.normalise(clean)
    return {
        "image": images,
        "label": torch.arange(count) % 3,
        "seed": torch.arange(count),
        "index": torch.arange(count),
    }


def test_the_loss_is_clean_plus_adversarial():
    torch.manual_seed(0)
    vit = model()
    method = Harden(vit, Settings(eps=8 / 255, steps=2, layer=1, weight=0.5), task=TASK).train()
    data = batch(vit)
    normalise = vit.passport.preprocess.normalise
    attack = DTA(model(), AttackSettings(eps=8 / 255, steps=2, step_size=8 / 255, layer=1))  # the same public weights
    changed = attack(vit.passport.preprocess.denormalise(data["image"]), data["seed"])
    assert torch.allclose(method.examples(data["image"], data["seed"]), normalise(changed), atol=1e-5)
    loss = torch.nn.functional.cross_entropy
    want = loss(tokens.logits(vit, data["image"]), data["label"])
    want = want + 0.5 * loss(tokens.logits(vit, normalise(changed)), data["label"])
    assert torch.allclose(method(data)["loss"], want, atol=1e-5)
    clean = method.eval()(data)
    assert torch.allclose(clean["loss"], loss(clean["logits"], data["label"]))


def test_examples_do_not_follow_the_model_that_is_trained():
    vit = model()
    method = Harden(vit, SMALL, task=TASK).train()
    data = batch(vit)
    before = method.examples(data["image"], data["seed"])
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.3)
    assert torch.equal(method.examples(data["image"], data["seed"]), before)
    assert not torch.equal(method.examples(data["image"], data["seed"] + 1), before)  # fresh starts by seed
    assert (
        vit.passport.preprocess.denormalise(before) - vit.passport.preprocess.denormalise(data["image"])
    ).abs().max() < (8 / 255 + 1e-5)


def test_a_new_head_and_everything_trains_where_nothing_was_adapted():
    vit = model()
    method = Harden(vit, SMALL, task=TASK, classify=Classify(head="bn_linear")).train()
    assert isinstance(vit.head, torch.nn.Sequential)
    assert all(p.requires_grad for p in vit.parameters())
    assert not any(key.startswith("_attack") for key in method.state_dict())
    method(batch(vit))["loss"].backward()
    assert all(p.grad is not None for p in vit.parameters())


def test_an_adapted_model_goes_on_with_its_own_parts_and_head():
    vit = adaptformer.inject(model(), adaptformer.Settings(bottleneck=4))
    vit.reset_classifier(3)
    vit.passport.classes, vit.passport.task = ["a", "b", "c"], "single"
    vit.passport.steps = [
        {"method": "adapt.adaptformer", "settings": {"bottleneck": 4}},
        {"method": "attack.harden", "settings": {}},
    ]
    head = vit.head.weight.clone()
    Harden(vit, SMALL, task=TASK)
    assert torch.equal(vit.head.weight, head)
    trained = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert trained and all(".adaptmlp." in name or name.startswith("head.") for name in trained)
    with pytest.raises(ConfigError, match="the model knows the classes a, b, c, the data x, y"):
        Harden(vit, SMALL, task=Task("single", ("x", "y")))


def test_the_searched_block_is_a_setting_and_survives_a_checkpoint():
    vit = model()
    method = Harden(vit, SMALL, task=TASK).train()
    assert method.settings.layer == "auto"
    method(batch(vit))
    block = method.settings.layer
    assert block in (0, 1)
    other = Harden(model(), SMALL, task=TASK)
    load_trained(other, trained_state(method))
    assert other.settings.layer == block
    searched = []
    other._attack[0].search = lambda *a: searched.append(a)
    other.train()(batch(vit))
    assert not searched and other._attack[0].layers == [(block,)]


def test_cached_examples_are_made_once_and_notice_augmentation():
    vit = model()
    method = Harden(vit, Settings(eps=8 / 255, steps=2, layer=1, examples="cached"), task=TASK).train()
    data, calls = batch(vit), []
    inner = method._attack[0].crafted
    method._attack[0].crafted = lambda *a, **k: calls.append(len(a[0])) or inner(*a, **k)
    one = method.examples(data["image"], None, data["index"])
    two = method.examples(data["image"][[2, 0]], None, data["index"][[2, 0]])
    assert calls == [4] and torch.equal(one[[2, 0]], two)
    pixels_of = vit.passport.preprocess.denormalise
    assert (pixels_of(one) - pixels_of(data["image"])).abs().max() <= 8 / 255 + 1e-5
    method.examples(data["image"].flip(-1), None, data["index"])
    with pytest.raises(ConfigError, match=r"augmentation changes the images.*\n  fix: --augment false"):
        method.examples(data["image"].flip(-2), None, data["index"])


def test_copies_share_the_public_trunk():
    method = Harden(model(), SMALL, task=TASK)
    twin = copy.deepcopy(method)
    assert twin._attack[0] is method._attack[0]
    assert twin.vit is not method.vit and torch.equal(twin.vit.norm.weight, method.vit.norm.weight)


def test_soft_labels_and_many_labels():
    vit = model()
    method = Harden(vit, SMALL, task=TASK, classify=Classify(mixup=0.8, smoothing=0.1)).train()
    assert torch.isfinite(method(batch(vit))["loss"])
    vit = model()
    method = Harden(vit, SMALL, task=Task("multi", ("a", "b", "c"))).train()
    data = {**batch(vit), "label": torch.tensor([[1.0, 0.0, float("nan")]] * 4)}
    assert torch.isfinite(method(data)["loss"]) and (method.predict(data["image"]) <= 1).all()


@pytest.mark.parametrize(
    "more,text",
    [
        ({"eps": 0.0}, "eps is 0, and pixels are in"),
        ({"eps": 10}, "e.g. 10/255"),
        ({"steps": 0}, "steps is 0"),
        ({"weight": 0.0}, "weight is 0"),
    ],
)
def test_settings_that_make_no_sense(more, text):
    with pytest.raises(ConfigError, match=text):
        Settings(**more)


def test_a_layer_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"layer 7 does not exist\n  fix: the encoder has blocks 0..1"):
        Harden(model(), Settings(layer=7), task=TASK)
