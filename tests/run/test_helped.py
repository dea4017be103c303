"""`vitkit compare A B --data D`: verdicts are right where the answer is known, and say what they rest on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import vitkit
from vitkit import weights
from vitkit.data import read
from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.statistics import Difference
from vitkit.run import cli, helped_gain, helped_measure, helped_models, helped_words

QUIET = {"workers": 0, "quiet": True, "general": "none"}


def tiny(seed=0, scale=0.1, **more):
    """An untrained ViT. Patches that are small beside the positions leave much of the picture in its class token: 77 % of
    the digits by a linear probe; large ones saturate it: 52 %."""
    kwargs = {"arch_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2}, "image_size": 32, "patch_size": 8}
    vit = weights.load("vit_tiny_patch16_224", pretrained=False, seed=seed, say=None, **{**kwargs, **more})
    with torch.no_grad():
        vit.patch_embed.proj.weight.mul_(scale)
    return vit


def blind():
    return tiny(scale=50)


@pytest.fixture(scope="module")
def some() -> Images:
    """400 digits: 200 to learn from, 50 to choose on, 150 to score."""
    images = read("digits")
    parts = [np.flatnonzero(images.split == name)[:n] for name, n in (("train", 200), ("val", 50), ("test", 150))]
    return images.subset(np.concatenate(parts))


@pytest.fixture(scope="module")
def as_npz(some, tmp_path_factory):
    """The same as a file that the command line can name, with labels and without."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.stack([some.decode(i)[0].numpy() for i in range(len(some))])
    parts = {}
    for name in ("train", "val", "test"):
        parts |= {f"x_{name}": pixels[some.split == name], f"y_{name}": some.labels[some.split == name]}
    np.savez(folder / "digits.npz", **parts)
    np.savez(folder / "plain.npz", x=pixels)
    return folder


def test_a_better_model_is_called_better(as_npz, tmp_path):
    found = vitkit.compare(blind(), tiny(), data=as_npz / "digits.npz", out=tmp_path / "c", shots=2, **QUIET)
    assert found["outcome"] == "better" and found["decided_by"] == "linear" and found["forgot"] is None
    assert found["verdict"].startswith("B is better than A on your images by ")
    assert "points of accuracy (95 % " in found["verdict"] and "linear probe, 150 test images)" in found["verdict"]
    main = found["rows"][0]
    assert main["b"] - main["a"] == pytest.approx(main["gain"]) and 0 < main["low"] < main["gain"] < main["high"]
    assert main["test"] == "McNemar" and main["p"] == max(main["p_bootstrap"], main["p_exact"]) < 0.001
    assert {row["measure"] for row in found["rows"]} == {"linear", "knn", "view", "duplicate"}
    page = (tmp_path / "c" / "compare.html").read_text()
    for words in ("Did it help?", "B minus A", "Few labels", "Effective rank", "How far A and B agree"):
        assert words in page
    assert "Right with B, wrong with A" in page and "http://" not in page.replace("http://www.w3.org", "")
    written = json.loads((tmp_path / "c" / "results.json").read_text())
    assert written["verdict"] == found["verdict"] and written["rows"][0]["gain"] == pytest.approx(main["gain"])
    assert [one["k"] for one in written["few_shot"]][:3] == [1, 2, 5] and written["settings"]["shots"] == 2


def test_the_other_way_round_it_is_worse_by_the_same(as_npz, tmp_path):
    found = vitkit.compare(tiny(), blind(), data=as_npz / "digits.npz", out=tmp_path / "c.html", shots=0, **QUIET)
    assert found["outcome"] == "worse" and "B is worse than A on your images by" in found["verdict"]
    assert (tmp_path / "c.html").is_file() and (tmp_path / "c.json").is_file() and found["few_shot"] == []
    assert not (tmp_path / "cache").exists()


def test_the_same_model_twice_is_said(as_npz, tmp_path):
    vit = tiny()
    found = vitkit.compare(vit, vit, data=as_npz / "digits.npz", out=tmp_path / "c", shots=0, **QUIET)
    assert found["outcome"] == "same" and found["verdict"].startswith("No difference: A and B give the same features")
    assert "p = 1" in found["verdict"] and all(row["gain"] == 0 and row["p"] == 1 for row in found["rows"])
    assert found["agreement"]["cka"] == pytest.approx(1) and found["agreement"]["neighbours_shared"] == 1


def test_without_labels_there_is_a_hint(as_npz, tmp_path):
    found = vitkit.compare(blind(), tiny(), data=as_npz / "plain.npz", out=tmp_path / "c", view_images=120, **QUIET)
    assert found["decided_by"] == "view" and found["outcome"] in ("better", "unclear")
    assert "ithout labels" in found["verdict"] and "effective rank" in found["verdict"].lower()
    assert "Labels of a hundred images or more would decide." in found["verdict"]
    assert found["data"]["scored"] == 120 and [row["measure"] for row in found["rows"]] == ["view", "duplicate"]


def test_two_untrained_models_cannot_be_told_apart_or_nearly(as_npz, tmp_path):
    found = vitkit.compare(tiny(0), tiny(1), data=as_npz / "digits.npz", out=tmp_path / "c", shots=0, **QUIET)
    row = found["rows"][0]
    proven = row["p"] < 0.05 and not row["low"] <= 0 <= row["high"]
    assert (found["outcome"] == "unclear") == (not proven)
    if not proven:
        assert "No difference could be shown on your images" in found["verdict"] and "is unlikely." in found["verdict"]


def test_forgetting_is_measured_on_the_general_set(as_npz, tmp_path):
    plain = as_npz / "plain.npz"
    given = {**QUIET, "general": str(as_npz / "digits.npz"), "view_images": 60}
    good, bad = tiny(), blind()
    for vit in (good, bad):
        vit.passport.base["kind"] = "file"  # as if they had learnt something
    found = vitkit.compare(good, bad, data=plain, out=tmp_path / "a", **given)
    assert found["forgot"] is True and "B forgot some of what A knew: \N{MINUS SIGN}" in found["verdict"]
    assert found["general"]["rows"][0]["measure"] == "linear" and found["general"]["scored"] == 150
    assert "Forgetting" in (tmp_path / "a" / "compare.html").read_text()
    back = vitkit.compare(bad, good, data=plain, out=tmp_path / "b", **given)
    assert back["forgot"] is False and "B did not forget, it even improved: +" in back["verdict"]


def test_a_general_set_that_is_too_small_loses_nothing_else(as_npz, tmp_path, capsys):
    given = {**QUIET, "general": str(as_npz / "digits.npz"), "general_images": 30, "view_images": 40, "shots": 0}
    good = tiny()
    good.passport.base["kind"] = "file"  # as if it had learnt something
    found = vitkit.compare(good, tiny(1), data=as_npz / "plain.npz", out=tmp_path / "c", **{**given, "quiet": False})
    assert found["forgot"] is None and found["rows"]
    assert "note: forgetting could not be asked: digits" in capsys.readouterr().err
    assert "forgetting could not be asked" in (tmp_path / "c" / "compare.html").read_text()


def test_features_are_cached(as_npz, tmp_path, monkeypatch):
    given = {**QUIET, "data": as_npz / "plain.npz", "out": tmp_path / "c", "view_images": 40}
    first = vitkit.compare(tiny(0), tiny(1), **given)
    files = sorted((tmp_path / "c" / "cache").iterdir())
    assert len(files) == 8  # images, two views and copies, for each model

    def extracted(*args, **kwargs):
        raise AssertionError("features were computed again")

    monkeypatch.setattr("vitkit.evaluate.features._extract", extracted)
    again = vitkit.compare(tiny(0), tiny(1), **given)
    assert again["rows"] == first["rows"] and again["verdict"] == first["verdict"]


def test_models_prepared_otherwise_are_compared_and_it_is_said(as_npz, tmp_path, capsys):
    b = tiny(1, in_chans=1, image_size=16)
    given = {**QUIET, "quiet": False, "data": as_npz / "plain.npz", "view_images": 40}
    found = vitkit.compare(tiny(), b, out=tmp_path / "c", **given)
    assert "each model sees the images as it was trained to, and that differs (A, then B): " in found["cautions"][0]
    assert "image_size" in found["cautions"][0] and "channels" in found["cautions"][0]
    said = capsys.readouterr().err
    assert "each model sees the images" in said and "features of" in said and "report: " in said


def test_unreadable_files_are_left_out_of_both(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_bytes(b"no picture")
    found = vitkit.compare(tiny(0), tiny(1), data=tmp_path, out=tmp_path / "out" / "c", **QUIET)
    assert found["data"]["images"] == 39
    assert "1 of 40 images could not be read and are left out" in found["cautions"]


def test_several_labels_are_compared_by_auc(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["path,round,dark,split"]
    for i in range(120):
        label = rng.integers(0, 2, 2)
        picture = np.full((16, 16), 200 - 120 * label[1], np.uint8)
        picture[4:12, 4:12] += np.uint8(50 * label[0])
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{label[0]},{label[1]},{('train', 'val', 'test')[i % 3]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    found = vitkit.compare(blind(), tiny(), data=tmp_path / "labels.csv", out=tmp_path / "c", shots=2, **QUIET)
    assert found["rows"][0]["metric"] == "mean_auc" and found["rows"][0]["test"] == "permutation"
    assert "mean AUC" in found["verdict"] and found["rows"][0]["independent"] == 40


def test_patients_are_drawn_whole_and_binary_labels_get_delong(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["path,label,split,patient"]
    for i in range(180):
        label = int(rng.integers(0, 2))
        Image.fromarray(rng.integers(0, 120 + 40 * label, (16, 16), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[label]},{('train', 'val', 'test')[i // 60]},p{i // 3}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    found = vitkit.compare(tiny(0), tiny(1), data=tmp_path / "labels.csv", out=tmp_path / "c", shots=0, **QUIET)
    linear, area = found["rows"][:2]
    assert linear["independent"] == 20 and linear["test"] == "permutation"
    assert area["metric"] == "auc" and area["test"] == "DeLong" and area["independent"] == 20


# ---- words -----------------------------------------------------------------------------------------------------------


def gain(value, low, high, p=0.5, exact=0.5, note="", measure="linear"):
    a, b = (0.5, 0.5 + value)
    return helped_gain.Gain(
        measure, "accuracy", Difference(value, low, high, 100, 0.95, note, p, b, a), "McNemar", exact
    )


def kept(one, **more):
    images = read("digits").subset(np.arange(100))
    return helped_measure.Found(images, images, "test", 50, gains=[one], **more)


SIDES = (helped_models.Side("A", "old", None, "old"), helped_models.Side("B", "new", None, "new"))


def test_a_gain_needs_both_the_interval_and_the_exact_test():
    assert gain(0.05, 0.01, 0.09, 0.01, 0.03).proven
    assert not gain(0.05, 0.01, 0.09, 0.01, 0.06).proven  # five images decide: a bootstrap is too sure
    assert not gain(0.05, -0.01, 0.11, 0.08, 0.04).proven
    assert gain(0.05, 0.01, 0.09, 0.01, math.nan).p == 0.01


@pytest.mark.parametrize(
    ("one", "outcome", "words"),
    [
        (gain(0.031, 0.01, 0.052, 0.004, 0.006), "better", "B (new) is better than A (old) on your images by 3.1 points of "
         "accuracy (95 % 1.0 to 5.2, p = 0.006; linear probe, 100 test images)."),
        (gain(-0.031, -0.052, -0.01, 0.004, 0.006), "worse", "B (new) is worse than A (old) on your images by 3.1 points"),
        (gain(0.004, -0.012, 0.02), "unclear", "No difference could be shown on your images: B (new) scores 0.4 points of "
         "accuracy above A (old) (95 % −1.2 to 2.0, p = 0.50; linear probe, 100 test images). A gain of more than 2.0 or a "
         "loss of more than 1.2 points is unlikely."),
        (gain(0.0, math.nan, math.nan, 1.0, 1.0, "no interval: the same in every draw"), "unclear",
         "No difference could be shown on your images: B (new) and A (old) score the same accuracy"),
    ],
)  # fmt: skip
def test_sentences(one, outcome, words):
    found = kept(one)
    assert helped_words.outcome(found) == outcome
    assert " ".join(helped_words.verdict(SIDES, found)).startswith(words)


def test_knn_agrees_differs_or_contradicts():
    better = gain(0.05, 0.02, 0.08, 0.001, 0.001)
    for second, words in (
        (gain(0.04, 0.01, 0.07, 0.01, 0.01, measure="knn"), "kNN agrees (+4.0, 95 % 1.0 to 7.0, p = 0.010)."),
        (gain(0.01, -0.02, 0.04, measure="knn"), "kNN alone does not show it (+1.0"),
        (gain(-0.05, -0.08, -0.02, 0.01, 0.01, measure="knn"), "But kNN says the opposite (\N{MINUS SIGN}5.0"),
    ):
        found = kept(better)
        found.gains.append(second)
        assert helped_words.verdict(SIDES, found)[1].startswith(words)


@pytest.mark.parametrize(
    ("one", "forgot", "words"),
    [
        (gain(-0.003, -0.01, 0.004), False, "B did not forget: −0.3 points on digits (95 % −1.0 to 0.4, p = 0.50); a loss of "
         "more than 2 points can be ruled out."),
        (gain(-0.06, -0.09, -0.03, 0.001, 0.001), True, "B forgot some of what A (old) knew: −6.0 points on digits"),
        (gain(-0.01, -0.015, -0.005, 0.001, 0.001), True, "B forgot some of what A (old) knew: −1.0 points on digits (95 % "
         "−1.5 to −0.5, p = 0.001); more than 2 points can be ruled out."),
        (gain(-0.01, -0.05, 0.03), None, "Whether B forgot something cannot be told: −1.0 points on digits (95 % −5.0 to 3.0, "
         "p = 0.50); a loss up to 5.0 points is possible."),
        (gain(0.04, 0.01, 0.07, 0.01, 0.01), False, "B did not forget, it even improved: +4.0 points on digits"),
    ],
)  # fmt: skip
def test_forgetting_in_words(one, forgot, words):
    said = helped_words.forgetting(SIDES, kept(one), 2.0)
    assert said[0] is forgot and said[1].startswith(words)
    assert helped_words.forgetting(SIDES, None, 2.0) == (None, "")
    assert helped_words.forgetting(SIDES, kept(one, same=True), 2.0)[0] is False


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_too_few_images_are_refused(some, tmp_path):
    pixels = np.stack([some.decode(i)[0].numpy() for i in range(60)])
    np.savez(tmp_path / "few.npz", x=pixels[:9])
    with pytest.raises(DataError, match=r"9 images to compare on\n  fix: at least 20"):
        vitkit.compare(tiny(), tiny(1), data=tmp_path / "few.npz", out=tmp_path / "c", **QUIET)
    np.savez(tmp_path / "some.npz", x=pixels, y=np.arange(60) % 3)
    with pytest.raises(DataError, match=r"12 labelled test images to compare on\n  fix: at least 20"):
        vitkit.compare(tiny(), tiny(1), data=tmp_path / "some.npz", out=tmp_path / "c", **QUIET)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"general is for comparing models on images\n  fix: add data"):
        vitkit.compare("a", "b", general="digits")
    with pytest.raises(ConfigError, match="general is for two models on one data set\n  fix: leave --general out"):
        vitkit.compare("a", "b", "c", data="digits", general="none")
    with pytest.raises(ConfigError, match="view_image"):
        vitkit.compare("a", "b", data="digits", view_image=3)
    with pytest.raises(ConfigError, match="view_images is 3"):
        vitkit.compare("a", "b", data="digits", view_images=3)
    with pytest.raises(ConfigError, match="compare takes two"):
        vitkit.compare("a", "b", data="digits", model="c")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        vitkit.compare("a", "b", data="digits", out=tmp_path / "file", quiet=True)


def test_the_command_line(as_npz, tmp_path, capsys):
    for name, vit in (("one", tiny(0)), ("two", tiny(1))):
        (tmp_path / name).mkdir()
        weights.save_state(tmp_path / name / "model.safetensors", vit.state_dict())
        arch = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": {
            "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}}  # fmt: skip
        (tmp_path / name / "config.json").write_text(json.dumps(arch))
    models = [str(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    options = ["--data", str(as_npz / "plain.npz"), "--general", "none", "--view_images", "40", "--workers", "0"]
    assert cli.main(["compare", *models, *options, "--out", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "ithout labels" in out[0] and out[1] == str(tmp_path / "c" / "compare.html")
    assert "B (two)" in out[0] and "A (one)" in out[0]  # both files are called model.safetensors: their folders tell
    assert cli.main(["compare", models[0], "--data", "digits"]) == 2
    assert "takes 2 models or more before --data, got 1" in capsys.readouterr().err
