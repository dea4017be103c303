"""The public trunk behind a run: exactly what was downloaded, never anything that fine-tuning trained."""

from __future__ import annotations

import json

import pytest
import torch

from vitkit import weights
from vitkit.adapt import adaptformer, lora
from vitkit.attack.encoder import encoder_of, named_encoder, public_trunk, require_same_view
from vitkit.errors import WeightsError
from vitkit.passport import Preprocess

CONFIG = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


@pytest.fixture
def public(tmp_path):
    """A weight file that everybody has."""
    vit = weights.load("VisionTransformer", pretrained=False, arch_kwargs=CONFIG, say=None)
    folder = tmp_path / "public"
    folder.mkdir()
    weights.save_state(folder / "model.safetensors", vit.state_dict(), {})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / "model.safetensors"


def tuned(base, folder, module=adaptformer, settings=None, name="adapt.adaptformer", *, whole=False, **load):
    """A run that fine-tuned `base`, every weight of it moved."""
    vit = weights.load(str(base), say=None, **load)
    vit = module.inject(
        vit, settings or module.Settings(**({"bottleneck": 4} if module is adaptformer else {"rank": 2}))
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1)
    names = None if whole else [n for n in vit.state_dict() if "adaptmlp" in n or "lora_" in n]
    if not whole:  # a delta leaves the trunk as it was
        clean = weights.load(str(base), say=None, **load).state_dict()
        vit.load_state_dict(clean, strict=False)
    passport = vit.passport
    values = vars(settings) if settings else ({"bottleneck": 4} if module is adaptformer else {"rank": 2})
    passport.steps = [*passport.steps, {"method": name, "settings": dict(values)}]
    passport.classes, passport.task = ["a", "b"], "single"
    folder.mkdir()
    weights.save_run(folder, vit, trained=names)
    return folder


def state(vit):
    return vit.state_dict()


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("module,name", [(adaptformer, "adapt.adaptformer"), (lora, "adapt.lora")])
def test_the_base_comes_back_bit_for_bit(public, tmp_path, module, name, whole):
    run = tuned(public, tmp_path / "run", module, name=name, whole=whole)
    encoder = encoder_of(run)
    assert same(state(encoder), state(weights.load(str(public), say=None)))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_through_runs_made_from_runs(public, tmp_path):
    first = tuned(public, tmp_path / "first")
    second = tuned(first, tmp_path / "second", lora, name="adapt.lora")
    assert same(state(encoder_of(second)), state(weights.load(str(public), say=None)))


def test_at_the_image_size_of_the_run(public, tmp_path):
    run = tuned(public, tmp_path / "run", image_size=24)
    encoder = encoder_of(run)
    assert encoder.passport.preprocess.image_size == (24, 24)
    assert same(state(encoder), state(weights.load(str(public), image_size=24, say=None)))


def test_a_self_supervised_run_is_a_base(public, tmp_path):
    vit = weights.load(str(public), say=None)
    with torch.no_grad():
        vit.norm.bias.add_(1)
    (tmp_path / "mae").mkdir()
    weights.save_run(tmp_path / "mae", vit)
    run = tuned(tmp_path / "mae", tmp_path / "run")
    assert same(state(encoder_of(run)), state(vit))


def test_a_loaded_model_leads_to_the_same_trunk(public, tmp_path):
    run = tuned(public, tmp_path / "run")
    want = state(weights.load(str(public), say=None))
    assert same(state(public_trunk(weights.load(str(run), num_classes=None, say=None))), want)
    plain = weights.load(str(public), num_classes=2, say=None)
    trunk = public_trunk(plain)
    assert same(state(trunk), want)
    with torch.no_grad():
        plain.norm.bias.add_(1)
    assert same(state(trunk), want)  # a copy


def test_errors(public, tmp_path):
    with pytest.raises(WeightsError, match="is not a run, so nothing says which public trunk"):
        encoder_of(public)
    run = tuned(public, tmp_path / "run")
    content = json.loads((run / "passport.json").read_text())
    content["base"]["sha256"] = "0" * 64
    (run / "passport.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"the base of .* has changed"):
        encoder_of(run)
    content["base"] = {"kind": "random", "ref": "VisionTransformer"}
    (run / "passport.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="was trained from random weights: no public trunk stands behind it"):
        encoder_of(run)
    with pytest.raises(WeightsError, match="would be a white-box attack"):
        named_encoder(str(run), run / "model.safetensors", Preprocess())


def test_views_must_agree():
    one = Preprocess(image_size=(32, 32))
    require_same_view(
        Preprocess(image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3), one, "x"
    )  # each normalises itself
    for other in (Preprocess(image_size=(48, 32)), Preprocess(image_size=(32, 32), crop_pct=0.9)):
        with pytest.raises(WeightsError, match="the encoder x and the model see different crops of an image"):
            require_same_view(other, one, "x")
