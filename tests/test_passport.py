"""What travels with weights: preprocessing that is applied and compared exactly, and a strict file format."""

import copy
import json

import pytest
import torch

from vitkit.errors import WeightsError
from vitkit.passport import Feature, Passport, Preprocess

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def passport(**changes):
    given = {
        "arch": "VisionTransformer",
        "arch_kwargs": {"img_size": [32, 48]},
        "preprocess": Preprocess(MEAN, STD, (32, 48)),
        "feature": Feature("avg", "fc_norm", "mae"),
        "licence": "cc-by-nc-4.0",
        "classes": ["cat", "dog"],
        "task": "single",
        "base": {"kind": "timm", "ref": "vit_tiny_patch16_224", "sha256": "ab", "seed": None},
        "steps": [{"method": "adapt.adaptformer", "settings": {"ffn_num": 8}}],
        "lineage": [{"method": "pretrain.mae", "settings": {}, "data": "x", "sha256": "y"}],
    }
    return Passport(**{**given, **changes})


def test_normalise_equals_torchvision():
    from torchvision.transforms import functional as tv

    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    prepared = Preprocess(MEAN, STD)
    images = [tv.to_tensor(image.permute(1, 2, 0).numpy()) for image in pixels]  # what authors' scripts do
    theirs = torch.stack([tv.normalize(image, MEAN, STD) for image in images])
    assert torch.equal(prepared.normalise(pixels), theirs)
    torch.testing.assert_close(prepared.normalise(pixels / 255), theirs)
    torch.testing.assert_close(prepared.denormalise(theirs), pixels / 255)
    assert prepared.normalise(pixels.half()).dtype == torch.float32


def test_normalise_inside_and_outside_inference_mode_trains_alike():
    prepared = Preprocess((0.123, 0.4, 0.5), STD)
    with torch.inference_mode():
        prepared.normalise(torch.zeros(1, 3, 2, 2))
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    prepared.normalise(x).sum().backward()
    assert x.grad is not None


def test_channels_follow_the_mean():
    assert Preprocess().channels == "rgb" and Preprocess((0.5,), (0.2,)).channels == "grey"
    assert Preprocess((0.5,) * 4, (0.2,) * 4).channels == "multi" and Preprocess((0.5,), (0.2,)).in_chans == 1
    with pytest.raises(WeightsError, match="channels is 'rgb' with 1 means"):
        Preprocess((0.5,), (0.2,), channels="rgb")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"std": (0.2, 0.2)}, "do not fit"),
        ({"std": (0.2, 0.0, 0.2)}, "one positive std a channel"),
        ({"image_size": (224,)}, "image_size is"),
        ({"crop_pct": 1.5}, "crop_pct is 1.5"),
    ],
)
def test_impossible_preprocessing_is_refused(changes, words):
    with pytest.raises(WeightsError, match=words):
        Preprocess(**changes)


def test_wrong_channel_count_is_refused():
    with pytest.raises(WeightsError, match=r"\(2, 1, 4, 4\) for a model of 3 channels \(rgb\)"):
        Preprocess().normalise(torch.zeros(2, 1, 4, 4))


def test_differences_in_words():
    one, two = Preprocess(MEAN, STD, (224, 224)), Preprocess((0.5, 0.4, 0.31), STD, (224, 192), crop_pct=0.9)
    assert one.differences(Preprocess(tuple(m + 1e-9 for m in MEAN), STD)) == []
    assert one.differences(two) == [
        "mean (0.5, 0.4, 0.3) against (0.5, 0.4, 0.31)",
        "image_size (224, 224) against (224, 192)",
        "crop_pct 1 against 0.9",
    ]


def test_require_same_preprocessing():
    one = passport()
    one.require_same_preprocessing(passport(licence=None), "features against probe")
    with pytest.raises(WeightsError, match=r"features against probe: .*std \(0\.2, 0\.25, 0\.3\) against .*\n  fix: "):
        one.require_same_preprocessing(passport(preprocess=Preprocess(MEAN, MEAN, (32, 48))), "features against probe")


def test_round_trip_and_deepcopy():
    one = passport()
    content = one.to_dict()
    assert Passport.from_dict(json.loads(json.dumps(content))) == one
    twin = copy.deepcopy(one)
    twin.steps.append({})
    assert one.steps != twin.steps


def test_save_and_read(tmp_path):
    path = passport().save(tmp_path / "run")
    assert path.name == "passport.json" and Passport.read(tmp_path / "run") == passport() == Passport.read(path)


def test_a_base_on_disk_is_also_noted_relative_to_the_run(tmp_path):
    base = {"kind": "file", "ref": str((tmp_path / "w" / "x.pth").resolve()), "sha256": "ab"}
    passport(base=base).save(tmp_path / "runs" / "a")
    assert Passport.read(tmp_path / "runs" / "a").base["relative"] == "../../w/x.pth"
    assert "relative" not in base


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c | {"format": 2}, "format 2; this version of vitkit reads format 1"),
        (lambda c: {k: v for k, v in c.items() if k != "format"}, "is not a vitkit passport"),
        (lambda c: c | {"licens": "x"}, r"unknown key 'licens'\n  fix: did you mean 'licence'"),
        (lambda c: {k: v for k, v in c.items() if k != "feature"}, "lacks feature"),
        (lambda c: c | {"preprocess": c["preprocess"] | {"meen": 1}}, "preprocess, has an unknown key 'meen'"),
        (lambda c: c | {"feature": c["feature"] | {"positions": "clip"}}, "feature.positions is 'clip'"),
        (lambda c: c | {"feature": []}, "feature, is list, not a mapping"),
        (lambda c: c | {"task": "many"}, "has task 'many'"),
    ],
)
def test_strict_format(change, words):
    with pytest.raises(WeightsError, match=words):
        Passport.from_dict(change(passport().to_dict()))


def test_reading_nothing_or_rubbish(tmp_path):
    with pytest.raises(WeightsError, match=r"passport\.json does not exist"):
        Passport.read(tmp_path)
    (tmp_path / "passport.json").write_text("{half")
    with pytest.raises(WeightsError, match="is not valid JSON"):
        Passport.read(tmp_path)
