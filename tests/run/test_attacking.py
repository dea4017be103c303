"""`vitkit attack`: the model is only counted, never asked while crafting; files agree with each other; errors name the fix."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vitkit
from vitkit import tokens, weights
from vitkit.errors import ConfigError, DataError, MissingExtra, WeightsError
from vitkit.run import attacking, cli

from .test_measure import outside

CONFIG = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
QUIET = {"quiet": True, "accelerator": "cpu", "workers": 0}
TRAIN = {**QUIET, "epochs": 3, "batch_size": 12, "augment": False, "lr": 5e-3, "optimizer": "adamw", "head": "linear"}
SMALL = {**QUIET, "steps": 3, "calibration": 8, "curve": (2, 8), "eps": 8 / 255, "batch_size": 10}


def stripes(path: Path) -> str:
    """Coloured stripes in three directions under noise, 16 px, with splits."""
    rng, content = np.random.default_rng(0), {}
    rows, columns = np.mgrid[:16, :16]
    wave = np.stack([rows // 2 % 2, columns // 2 % 2, (rows + columns) // 2 % 2])
    for split, n in (("train", 36), ("val", 12), ("test", 21)):
        y = np.arange(n) % 3
        x = 110 + 40 * wave[y][..., None] + rng.normal(0, 20, (n, 16, 16, 3))
        content |= {f"x_{split}": x.clip(0, 255).astype(np.uint8), f"y_{split}": y}
    np.savez(path, **content, classes=np.array(["across", "down", "slanted"]))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A public trunk in a file, data, and three runs adapted from it."""
    folder = tmp_path_factory.mktemp("attack")
    vit = weights.load("VisionTransformer", pretrained=False, arch_kwargs=CONFIG, say=None)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.mul_(1.5)
    public = folder / "public"
    public.mkdir()
    weights.save_state(public / "model.safetensors", vit.state_dict(), {})
    (public / "config.json").write_text(json.dumps(CONFIG))
    data = stripes(folder / "stripes.npz")
    model = str(public / "model.safetensors")
    for name in ("linear", "full", "adaptformer"):
        more = {"bottleneck": 4} if name == "adaptformer" else {}
        vitkit.adapt(name, model=model, data=data, out=str(folder / name), **{**TRAIN, **more})
    return folder


@pytest.fixture(scope="module")
def attacked(home) -> tuple[Path, dict]:
    out = home / "attacked"
    baselines = ("l4a", "ssp", "std", "fff", "pgd", "mifgsm")
    return out, vitkit.attack(
        str(home / "full"), data=str(home / "stripes.npz"), out=str(out), baselines=baselines, **SMALL
    )


def test_rates_and_intervals(attacked):
    _, found = attacked
    assert list(found["attacks"]) == ["dta", "dta_8bit", "noise", "l4a", "ssp", "std", "fff", "pgd", "mifgsm"]
    for entry in found["attacks"].values():
        assert entry["asr_all"]["n"] == 21 and entry["eps"] == 8 / 255 and entry["largest_change"] <= 8 / 255 + 1e-6
        for rate in (entry["asr_all"], entry["asr_flip"]):
            assert rate["low"] is None or 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    clean = found["clean_accuracy"]["value"]
    assert clean > 0.6 and found["attacks"]["dta"]["asr_flip"]["n"] == round(clean * 21)
    assert found["attacks"]["pgd"]["asr_all"]["value"] >= found["attacks"]["noise"]["asr_all"]["value"]
    assert [row[0] for row in found["curve"]["dta"]] == pytest.approx([2, 8])
    assert len(found["profile"][0]["footprint"]) == 3 and found["layers"] == [list(found["profile"][0]["chosen"])]
    assert re.search(
        r"Knowing only public/model.safetensors, DTA at 8/255 turns .* random noise of the same size", found["verdict"]
    )


def test_files_agree(attacked, home):
    out, found = attacked
    results = json.loads((out / "results.json").read_text())
    assert results["attacks"]["dta"]["asr_all"]["value"] == found["attacks"]["dta"]["asr_all"]["value"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["verdict"] == found["verdict"] and summary["metrics"][0]["name"] == "clean accuracy"
    page = (out / "report.html").read_text()
    assert (
        outside(page) == [] and "Which block is vulnerable" in page and "difference" in page and "random noise" in page
    )
    with np.load(out / "adversarial.npz") as saved, np.load(home / "stripes.npz") as clean:
        assert saved["x_test"].dtype == np.uint8
        assert np.abs(saved["x_test"].astype(int) - clean["x_test"]).max() <= 8  # the budget holds after rounding
        wrong = (saved["prediction"] != saved["y_test"]).mean()
    assert wrong == pytest.approx(found["attacks"]["dta_8bit"]["asr_all"]["value"])


def test_the_saved_images_are_read_and_fool_the_model_as_counted(attacked, home):
    out, _ = attacked
    model = vitkit.load(home / "full", say=None)
    found = model.predict(str(out / "adversarial.npz"))
    with np.load(out / "adversarial.npz") as saved:
        assert (found.scores.argmax(1) == saved["prediction"]).all()


def test_the_model_is_called_only_to_count(home, monkeypatch, tmp_path):
    """Forwards of the downstream model: one a batch for clean images, each attack and the rounded one; none inside."""
    seen, inside = [], []
    plain_make, plain_logits = attacking.maker, tokens.logits

    def make(attack, vit, seed):
        inner = plain_make(attack, vit, seed)

        def counted(*args):
            before = len(seen)
            out = inner(*args)
            inside.append(len(seen) - before)
            return out

        vit.register_forward_hook(lambda *a: seen.append("forward"))
        for block in vit.blocks:
            block.register_forward_hook(lambda *a: seen.append("block"))
        return counted

    monkeypatch.setattr(attacking, "maker", make)
    calls = []
    monkeypatch.setattr(tokens, "logits", lambda vit, x: calls.append(len(x)) or plain_logits(vit, x))
    vitkit.attack(
        str(home / "adaptformer"), data=str(home / "stripes.npz"), out=str(tmp_path / "a"), **{**SMALL, "curve": (8,)}
    )
    assert inside and not any(inside)  # 3 batches x (DTA, noise, L4A, SSP)
    assert len(inside) == 3 * 4 and len(calls) == 3 * (1 + 4 + 1)


def test_no_budget_is_no_attack(home, tmp_path):
    found = vitkit.attack(
        str(home / "linear"),
        data=str(home / "stripes.npz"),
        out=str(tmp_path / "a"),
        **{**SMALL, "eps": 0, "layer": 1, "curve": ()},
    )
    wrong = 1 - found["clean_accuracy"]["value"]
    for name in ("dta", "noise", "l4a", "ssp"):
        assert found["attacks"][name]["asr_all"]["value"] == pytest.approx(wrong)
        assert found["attacks"][name]["asr_flip"]["value"] == 0 and found["attacks"][name]["largest_change"] == 0
    assert found["profile"] is None


def test_batch_size_does_not_matter(home, tmp_path):
    rates = []
    for size in (21, 8):
        given = {**SMALL, "batch_size": size, "layer": 2, "curve": ()}
        found = vitkit.attack(
            str(home / "linear"), data=str(home / "stripes.npz"), out=str(tmp_path / f"{size}"), **given
        )
        with np.load(tmp_path / f"{size}" / "adversarial.npz") as saved:
            rates.append((found["attacks"]["dta"]["asr_all"]["value"], saved["x_test"].astype(int)))
    assert rates[0][0] == pytest.approx(rates[1][0], abs=1 / 21 + 1e-9)
    assert (np.abs(rates[0][1] - rates[1][1]) <= 1).mean() > 0.999


def test_another_encoder_and_an_ensemble(home, tmp_path):
    given = {**SMALL, "curve": (), "baselines": ()}
    named = str(home / "public" / "model.safetensors")
    found = vitkit.attack(
        str(home / "full"),
        data=str(home / "stripes.npz"),
        out=str(tmp_path / "a"),
        encoder=(named, str(home / "linear")),
        **given,
    )
    assert len(found["layers"]) == 2 and found["encoders"] == ["public/model.safetensors", "linear"]


def test_the_command_line(home, tmp_path, capsys):
    words = ["attack", str(home / "full"), str(home / "stripes.npz"), "--out", str(tmp_path / "a"), "--eps", "8/255"]
    words += ["--steps", "2", "--layer", "1,2", "--curve", "8", "--baselines", "l4a", "--quiet", "--accelerator", "cpu"]
    assert cli.main(words) == 0
    assert "DTA at 8/255" in capsys.readouterr().out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["layers"] == [[1, 2]]


WRONG = {
    "eps below 0": ({"eps": -0.1}, ConfigError, "eps is -0.1, and pixels are in"),
    "eps in 255ths": ({"eps": 8}, ConfigError, "a share of it, e.g. 8/255"),
    "no such layer": ({"layer": 9}, ConfigError, "layer 9 does not exist.*\n.*blocks 0..2"),
    "no such baseline": ({"baselines": ("l4",)}, ConfigError, "there is no baseline 'l4'\n  fix: did you mean l4a"),
    "curve": ({"curve": (300,)}, ConfigError, "curve holds 300\n  fix: budgets in 255ths"),
    "curve in shares": ({"curve": (2 / 255,)}, ConfigError, "curve counts 255ths: 2 instead of 0.00784"),
    "no steps": ({"steps": 0}, ConfigError, "steps is 0\n  fix: 1 or more"),
    "jpeg": ({"jpeg": 101}, ConfigError, "jpeg is 101"),
    "layer word": ({"layer": "best"}, ConfigError, "layer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_name_the_fix(case, home, tmp_path):
    more, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        vitkit.attack(str(home / "full"), data=str(home / "stripes.npz"), out=str(tmp_path / "a"), **{**SMALL, **more})


def test_a_model_that_cannot_be_attacked_so(home, tmp_path):
    given = {"data": str(home / "stripes.npz"), "out": str(tmp_path / "a"), **SMALL}
    public = str(home / "public" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the model has no classes.*\n  fix: an adapted run"):
        vitkit.attack(public, **given)
    with pytest.raises(WeightsError, match="is the model under attack: that would be a white-box attack"):
        vitkit.attack(str(home / "full"), encoder=(str(home / "full"),), **{**given, "out": str(tmp_path / "b")})


def test_an_encoder_of_another_size_is_refused(home, tmp_path):
    vitkit.adapt(
        "linear", model=str(home / "public" / "model.safetensors"), data=str(home / "stripes.npz"),
        out=str(tmp_path / "large"), **{**TRAIN, "epochs": 1, "image_size": 24},
    )  # fmt: skip
    with pytest.raises(WeightsError, match=r"different crops of an image: image_size \(24, 24\) against \(16, 16\)"):
        vitkit.attack(
            str(home / "full"), data=str(home / "stripes.npz"), out=str(tmp_path / "a"),
            encoder=(str(tmp_path / "large"),), **SMALL,
        )  # fmt: skip


def test_a_run_from_random_weights_has_no_public_trunk(home, tmp_path):
    vitkit.adapt(
        "full", model="VisionTransformer", arch_kwargs=CONFIG, pretrained=False, data=str(home / "stripes.npz"),
        out=str(tmp_path / "r"), **{**TRAIN, "epochs": 1},
    )  # fmt: skip
    with pytest.raises(WeightsError, match="no public trunk stands behind it\n  fix: name the trunk"):
        vitkit.attack(str(tmp_path / "r"), data=str(home / "stripes.npz"), out=str(tmp_path / "a"), **SMALL)


def test_data_with_other_classes_is_refused(home, tmp_path):
    with np.load(home / "stripes.npz") as content:
        other = {**content, "classes": np.array(["across", "downs", "slanted"])}
    np.savez(tmp_path / "other.npz", **other)
    with pytest.raises(DataError, match="'downs', which the model does not know\n  fix: did you mean 'down'"):
        vitkit.attack(str(home / "full"), data=str(tmp_path / "other.npz"), out=str(tmp_path / "a"), **SMALL)


def test_white_box_without_torchattacks_names_the_extra(home, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vitkit\[attack\]'"):
        vitkit.attack(
            str(home / "full"),
            data=str(home / "stripes.npz"),
            out=str(tmp_path / "a"),
            **{**SMALL, "baselines": ("pgd",)},
        )


def test_a_hardened_run_is_attacked_through_the_first_public_trunk(home, tmp_path):
    run = vitkit.attack(
        "harden", model=str(home / "adaptformer"), data=str(home / "stripes.npz"), out=str(tmp_path / "h"),
        eps=8 / 255, steps=2, calibration=8, **{**TRAIN, "epochs": 2},
    )  # fmt: skip
    passport = json.loads((run.path / "passport.json").read_text())
    assert [step["method"] for step in passport["steps"]] == ["adapt.adaptformer", "attack.harden"]
    assert passport["steps"][-1]["settings"]["layer"] in (0, 1, 2)  # the block that was searched
    before, after = vitkit.load(home / "adaptformer", say=None).vit, vitkit.load(run.path, say=None).vit
    kept, moved = before.state_dict(), after.state_dict()
    changed = {name for name in kept if not torch.equal(kept[name], moved[name])}
    assert changed and all(".adaptmlp." in name or name.startswith("head.") for name in changed)
    found = vitkit.attack(str(run.path), data=str(home / "stripes.npz"), out=str(tmp_path / "a"), **SMALL)
    assert found["encoders"] == ["public/model.safetensors"]
