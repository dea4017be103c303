"""`vitkit compare A B C --data D1,D2`: the order where it is known, pairs corrected for their number, and the picture."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vitkit
from tests.run.test_helped import blind, tiny
from vitkit.data import read
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import statistics
from vitkit.run import cli, helped_ranks

QUIET = {"workers": 0, "quiet": True}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Four parts of the digits as data sets, the last without labels."""
    folder, images = tmp_path_factory.mktemp("sets"), read("digits", say=lambda text: None)
    pixels = np.stack([images.decode(i)[0].numpy() for i in range(len(images))])
    for n in range(3):
        parts = {}
        for name, count in (("train", 150), ("val", 40), ("test", 100)):
            index = np.flatnonzero(images.split == name)[n * count : (n + 1) * count]
            parts |= {f"x_{name}": pixels[index], f"y_{name}": images.labels[index]}
        np.savez(folder / f"d{n}.npz", **parts)
    np.savez(folder / "plain.npz", x=pixels[:120])
    return folder


@pytest.fixture(scope="module")
def ranked(sets, tmp_path_factory):
    data = [sets / name for name in ("d0.npz", "d1.npz", "d2.npz", "plain.npz")]
    out = tmp_path_factory.mktemp("ranked") / "c"
    models = blind(), tiny(), tiny(scale=1)
    return vitkit.compare(*models, data=data, out=out, view_images=100, **QUIET), out


def test_models_are_scored_on_every_data_set(ranked):
    found, _ = ranked
    assert [one["name"] for one in found["data"]] == ["d0", "d1", "d2", "plain"]
    assert [one["metric"] for one in found["data"]] == ["accuracy"] * 3 + ["found again"]
    assert [one["cases"] for one in found["data"]] == ["100 test images"] * 3 + ["100 images without labels"]
    for one in found["data"][:3]:
        assert one["scores"]["B"]["value"] > one["scores"]["A"]["value"] + 0.1
        assert one["scores"]["A"]["low"] < one["scores"]["A"]["value"] < one["scores"]["A"]["high"]
    assert {found["best"][name] for name in ("d0", "d1", "d2")} <= {"B", "C"}


def test_pairs_are_corrected_for_their_number(ranked):
    found, _ = ranked
    for one in found["data"]:
        assert [(pair["first"], pair["second"]) for pair in one["pairs"]] == [("A", "B"), ("A", "C"), ("B", "C")]
        corrected = statistics.holm([pair["p"] for pair in one["pairs"]])
        assert [pair["p_corrected"] for pair in one["pairs"]] == corrected.tolist()
        for pair in one["pairs"]:
            gap = one["scores"][pair["second"]]["value"] - one["scores"][pair["first"]]["value"]
            assert pair["gain"] == pytest.approx(gap) and pair["p_corrected"] >= pair["p"]


def test_the_order_and_its_picture(ranked):
    found, out = ranked
    order = found["ranking"]["order"]
    assert found["ranking"]["data_sets"] == 4 and {one["model"][0] for one in order} == {"A", "B", "C"}
    assert sum(one["rank"] for one in order) == pytest.approx(6) and order[0]["rank"] < order[-1]["rank"]
    page = (out / "compare.html").read_text()
    for words in ("Which is best?", "critical difference", "Average ranks", "Every pair", "Bars join models"):
        assert words in page
    assert "over 4 data sets" in found["verdict"] and "On d0" not in found["verdict"]  # of many, the table says it
    assert "better than A" in page
    written = json.loads((out / "results.json").read_text())
    assert written["verdict"] == found["verdict"] and written["ranking"] == found["ranking"]


def test_three_models_on_one_data_set_have_no_ranks(sets, tmp_path):
    found = vitkit.compare(blind(), tiny(), tiny(scale=1), data=sets / "d0.npz", out=tmp_path / "c.html", **QUIET)
    assert found["ranking"] is None and found["verdict"].startswith("On d0 ")
    assert "% accuracy by linear probe (100 test images)" in found["verdict"] and "is better than" in found["verdict"]
    assert "critical difference" not in (tmp_path / "c.html").read_text() and (tmp_path / "c.json").is_file()


def test_two_models_over_several_data_sets_are_combined(sets, tmp_path):
    data = f"{sets / 'd0.npz'},{sets / 'd1.npz'},{sets / 'd2.npz'}"
    found = vitkit.compare(blind(), tiny(), data=data, out=tmp_path / "c", measure="knn", **QUIET)
    assert found["verdict"].startswith(
        "B is better than A over 3 data sets: higher on 3, lower on 0 of 3 data sets (combined"
    )
    assert found["ranking"]["p_combined"] < 0.001 and {one["measure"] for one in found["data"]} == {"knn"}
    vit = tiny()
    same = vitkit.compare(vit, vit, data=data, out=tmp_path / "same", **QUIET)
    assert "No difference between A and B could be shown over 3 data sets" in same["verdict"]
    assert same["ranking"]["p_combined"] == 1


def test_the_command_line_and_random(sets, tmp_path, capsys):
    tiny_model = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    options = [
        "--arch_kwargs",
        json.dumps(tiny_model),
        "--pretrained",
        "false",
        "--image_size",
        "32",
        "--patch_size",
        "8",
    ]
    data = f"{sets / 'd0.npz'},{sets / 'd1.npz'}"
    words = ["compare", "random", "vit_tiny_patch16_224", "vit_tiny_patch16_224", "--data", data, *options]
    assert cli.main([*words, "--workers", "0", "--out", str(tmp_path / "c")]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1] == str(tmp_path / "c" / "compare.html")
    assert "random: the architecture of vit_tiny_patch16_224 with random weights" in said.err
    assert "d0: A " in said.err and "report: " in said.err


def test_names_with_commas_and_lists_of_data():
    assert helped_ranks.data_sets(["--out", "x", "--data", "a,b"]) == ["a", "b"]
    assert helped_ranks.data_sets(["--data=a,b,", "--out", "x"]) == ["a", "b"]
    assert helped_ranks.data_sets({"data": ["a", "b"]}) == ["a", "b"] and helped_ranks.data_sets({"data": "a"}) == ["a"]


def test_a_folder_with_a_comma_in_its_name_is_one_data_set(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert helped_ranks.data_sets({"data": str(tmp_path / "a,b")}) == [str(tmp_path / "a,b")]


def test_what_does_not_fit_is_refused(sets, tmp_path):
    one = sets / "d0.npz"
    for models, given, message in (
        ("abc", {"data": "digits", "shots": 3}, "shots is for two models on one data set"),
        ("ab", {"data": "digits,digits"}, "a data set is named twice: digits, digits"),
        ("ab" * 7, {"data": "digits"}, "14 models to compare"),
        ("abc", {"data": "digits", "view_images": 3}, "view_images is 3"),
        (["random", "random", "random"], {"data": one}, "every model is random"),
    ):
        with pytest.raises(ConfigError, match=message):
            vitkit.compare(*models, out=tmp_path / "c", quiet=True, **given)
    with pytest.raises(ConfigError, match="random stands for the architecture of a model that is named"):
        vitkit.compare("random", tiny(), data=one, out=tmp_path / "c", **QUIET)
    (tmp_path / "run").mkdir()
    with pytest.raises(
        ConfigError, match=r"(?s)random stands for the architecture of .*run, which is a run.*name the base"
    ):
        vitkit.compare("random", tmp_path / "run", data=one, out=tmp_path / "c", **QUIET)
    with pytest.raises(DataError, match="no such file"):
        vitkit.compare("a", "b", data=f"{one},{tmp_path / 'none.npz'}", out=tmp_path / "c", quiet=True)
