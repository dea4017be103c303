"""`vitkit evaluate --protocols`: one table of many protocols on the same images; nothing is chosen on the scored ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import vitkit
from vitkit.errors import ConfigError, DataError
from vitkit.run import protocols
from vitkit.run.cli import main
from vitkit.settings import FROZEN, SEGMENTING, TRAINED

from .test_measure import blobs, multi, outside

MODEL = {
    "model": "VisionTransformer",
    "arch_kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4},
    "pretrained": False,
    "image_size": 12,
    "quiet": True,
    "accelerator": "cpu",
    "batch_size": 18,
}
SINGLE = (*(name for name in FROZEN if name != "mlknn"), *TRAINED)
QUICK = {
    "shots": (1, 4),
    "draws": 3,
    "epochs": 2,
    "grid_epochs": 2,
    "training": {"hflip": False, "dvpt": {"prompts": 2}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return blobs(tmp_path_factory.mktemp("data") / "blobs.npz", groups=True)


@pytest.fixture(scope="module")
def everything(data, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "all"
    return out, vitkit.evaluate(**MODEL, **QUICK, data=data, protocols=",".join(SINGLE), out=str(out))


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ---------------------------------------------------------------- one table


def test_every_protocol_is_scored_on_the_same_images_with_its_cost(everything):
    out, found = everything
    assert tuple(found) == SINGLE
    for name, entry in found.items():
        assert entry["name"] == "accuracy" and entry["n"] == 24 and entry["split"] == "test", name
        assert entry["seconds"] > 0 and (entry["trained"] > 0) == (name != "knn"), name
        assert entry["low"] <= entry["value"] <= entry["high"]
        if name != "few_shot":
            frame = pd.read_csv(out / f"predictions_{name}.csv", dtype=str)
            assert (frame.label == frame.predicted).mean() == pytest.approx(entry["accuracy"])
    best = max((one for name, one in found.items() if name != "few_shot"), key=lambda one: one["value"])
    behind = [one["behind"] for name, one in found.items() if "behind" in one]
    assert len(behind) == len(SINGLE) - 2 and all(one["value"] <= 0 for one in behind) and "behind" not in best
    assert found["linear"]["trained"] == 3 * 25 and found["bitfit"]["trained"] < found["full"]["trained"]


def test_the_page_shows_table_chart_curve_and_loads_nothing(everything):
    out, _ = everything
    page = (out / "report.html").read_text()
    for text in (
        "Scores and cost",
        "behind the best",
        "parameters that were fitted",
        "Few-shot",
        "LoRA",
        "2 epochs of batches of 18",
    ):
        assert text in page, text
    assert outside(page) == [] and "Best accuracy on 24 test images" in page
    assert page.count("Confusion, ") == 1


def test_few_shot_has_every_draw_and_an_interval_over_draws(everything):
    out, found = everything
    entry = results(out)["protocols"]["few_shot"]
    assert {head: {k: len(v) for k, v in one.items()} for head, one in entry["scores"].items()} == {
        "linear": {"1": 3, "4": 3},
        "knn": {"1": 3, "4": 3},
    }
    assert entry["value"] == pytest.approx(np.mean(entry["scores"]["linear"]["4"]))
    assert "interval is over draws" in found["few_shot"]["note"] and [k for k, _ in entry["curve"]] == [1, 4]


def test_trained_protocols_are_runs_on_the_same_splits_that_read_the_test_split_once(everything, data):
    out, found = everything
    for name in TRAINED:
        run = json.loads((out / name / "summary.json").read_text())
        accuracy = next(m for m in run["metrics"] if m["name"] == "accuracy")
        assert accuracy["value"] == found[name]["accuracy"] and accuracy["low"] == pytest.approx(found[name]["low"])
        assert run["trained_parameters"] == found[name]["trained"]
        assert (out / name / "splits.csv").read_text() == (out / "splits.csv").read_text()
        settings = (out / name / "config.yaml").read_text()
        assert "epochs: 2\n" in settings and "batch_size: 18\n" in settings and "hflip: false\n" in settings
    assert "prompts: 2\n" in (out / "dvpt" / "config.yaml").read_text()


def test_the_same_command_trains_nothing_again(everything, data, monkeypatch):
    out, found = everything

    def never(*args, **kwargs):
        raise AssertionError("it was computed again")

    monkeypatch.setattr("vitkit.run.jobs.run_job", never)
    monkeypatch.setattr("vitkit.tokens.encode", never)
    again = vitkit.evaluate(**MODEL, **QUICK, data=data, protocols=",".join(SINGLE), out=str(out))
    assert {k: v["value"] for k, v in again.items()} == {k: v["value"] for k, v in found.items()}


def test_protocols_may_be_added_to_a_folder_and_not_taken_away(data, tmp_path):
    out = str(tmp_path / "e")
    vitkit.evaluate(**MODEL, data=data, protocols="knn", out=out)
    found = vitkit.evaluate(**MODEL, data=data, protocols="knn,linear", out=out)
    assert list(found) == ["knn", "linear"] and "protocols:\n- knn\n- linear\n" in Path(out, "config.yaml").read_text()
    with pytest.raises(ConfigError, match="protocols"):
        vitkit.evaluate(**MODEL, data=data, protocols="knn", out=out)
    with pytest.raises(ConfigError, match=r"(?s)k: auto -> 3"):
        vitkit.evaluate(**MODEL, data=data, protocols="knn,linear,linear_grid", k=3, out=out)
    assert Path(out, "summary.json").is_file()  # refused before anything was touched


def test_the_trunk_runs_once_for_all_frozen_protocols(data, monkeypatch):
    from vitkit import tokens

    seen, real = [], tokens.encode

    def counted(vit, images, **kwargs):
        seen.append(len(images))
        return real(vit, images, **kwargs)

    monkeypatch.setattr(tokens, "encode", counted)
    frozen = "knn,linear,linear_grid,few_shot"
    together = vitkit.evaluate(**MODEL, data=data, protocols=frozen, shots=(4,), draws=2, grid_epochs=1)
    assert sum(seen) == 36 + 18 + 24
    alone = vitkit.evaluate(**MODEL, data=data, protocols="linear")
    assert alone["linear"]["value"] == together["linear"]["value"]  # the pooled feature is the same beside the grid's


def test_a_cache_of_other_weights_is_never_used(data, tmp_path):
    out, other = tmp_path / "a", tmp_path / "b"
    settings = {**MODEL, "data": data, "protocols": "knn,linear_grid", "grid_epochs": 1}
    vitkit.evaluate(**settings, out=str(out))
    vitkit.evaluate(**settings, out=str(other), seed=1)
    names = {path.name for path in (out / "cache").iterdir()}
    assert len(names) == 3 and names.isdisjoint(path.name for path in (other / "cache").iterdir())
    for path in (other / "cache").iterdir():  # even lying in the same folder
        path.rename(out / "cache" / path.name)
    again = vitkit.evaluate(**settings, out=str(out))
    assert again["knn"]["value"] == results(out)["protocols"]["knn"]["value"]


# ---------------------------------------------------------------- nothing is chosen on scored images


def choices(folder: Path, name: str) -> tuple:
    """Everything that a protocol chose, and what it said of the scored images."""
    entry = results(folder)["protocols"][name]
    table = folder / f"predictions_{name}.csv"
    said = pd.read_csv(table, dtype=str).drop(columns="label").to_csv() if table.is_file() else ""
    curve = [] if name == "few_shot" else entry["curve"]
    return entry["chosen"].split(", lr=")[0], entry["picked_on"], curve, said


def test_permuted_test_labels_change_nothing_that_was_chosen(everything, tmp_path):
    """For every protocol: the same choice, the same curve, the same predictions; only scores differ."""
    spec = blobs(tmp_path / "blobs.npz", groups=True, shuffle="test")
    vitkit.evaluate(**MODEL, **QUICK, data=spec, protocols=SINGLE, out=str(tmp_path / "b"))
    a, b = (results(folder)["protocols"] for folder in (everything[0], tmp_path / "b"))
    for name in SINGLE:
        assert choices(everything[0], name) == choices(tmp_path / "b", name), name
    assert all(a[name]["value"] != b[name]["value"] for name in ("linear", "knn"))


def test_where_validation_is_scored_its_labels_choose_nothing(tmp_path):
    names = (*SINGLE[:4], "lora")
    for name, shuffle in (("a", ""), ("b", "val")):
        spec = blobs(tmp_path / f"{name}.npz", shuffle=shuffle, without=("test",))
        settings = {"shots": (1, 4), "draws": 2, "epochs": 1}
        vitkit.evaluate(**MODEL, **settings, data=spec, protocols=names, out=str(tmp_path / name))
    a, b = (results(tmp_path / name)["protocols"] for name in "ab")
    for name in names:
        assert choices(tmp_path / "a", name) == choices(tmp_path / "b", name), name
        assert a[name]["split"] == "val"
    assert any(a[name]["value"] != b[name]["value"] for name in names)
    assert a["lora"]["picked_on"] == "nothing" and a["lora"]["curve"] == []  # no epoch is picked on scored images
    assert a["linear_grid"]["picked_on"] == protocols.STAND_IN


def test_several_labels_choose_without_the_test_labels(tmp_path):
    names = "mlknn,linear_grid,linear,knn,lora"
    for name in "ab":
        (tmp_path / name).mkdir()
        spec = Path(multi(tmp_path / name))
        if name == "b":
            frame = pd.read_csv(spec, dtype=str)
            test = frame.index[frame.split == "test"]
            frame.loc[test, ["bright", "left"]] = frame.loc[test[::-1], ["left", "bright"]].to_numpy()
            frame.to_csv(spec, index=False)
        vitkit.evaluate(
            **MODEL, data=str(spec), protocols=names, epochs=1, grid_epochs=2, out=str(tmp_path / f"out-{name}")
        )
    for name in names.split(","):
        assert choices(tmp_path / "out-a", name) == choices(tmp_path / "out-b", name), name
    a, b = (results(tmp_path / f"out-{name}")["protocols"]["mlknn"] for name in "ab")
    assert a["chosen"].startswith("k=") and len(a["curve"]) > 2 and a["value"] != b["value"]
    assert a["name"] == "mean_auc"
    assert "Label by label" in (tmp_path / "out-a" / "report.html").read_text()


def test_refit_trains_on_validation_too_and_changes_no_choice(data):
    names = "knn,linear,linear_grid"
    plain = vitkit.evaluate(**MODEL, data=data, protocols=names)
    again = vitkit.evaluate(**MODEL, data=data, protocols=names, refit=True)
    assert all(plain[name]["chosen"] == again[name]["chosen"] for name in plain)
    assert any(plain[name]["log_loss"] != again[name]["log_loss"] for name in plain)


# ---------------------------------------------------------------- what is wrong is said


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"protocols": "mlknn"},
            DataError,
            r"mlknn is for several labels an image, and blobs has one\n  fix: --protocols knn",
        ),
        ({"protocols": "lora"}, ConfigError, r"lora trains a model, and there is no out to write it to\n  fix: --out"),
        ({"protocols": "segment_unet"}, DataError, r"segment_unet is for images with masks, and blobs has none"),
        (
            {"protocols": "few_shot", "shots": (50,)},
            DataError,
            r"50 images a class of training classes with at most 12",
        ),
        ({"protocols": "few_shot", "shots": (0,)}, ConfigError, r"shots is \(0,\)|50 images"),
        ({"training": {"hflip": False}}, ConfigError, r"training=\{'hflip': False\} is for full, lora"),
        ({"epochs": 0}, ConfigError, r"epochs is 0\n  fix: at least 1"),
    ],
)
def test_settings_and_data_that_do_not_fit(data, settings, error, message):
    with pytest.raises(error, match=message):
        vitkit.evaluate(**MODEL, data=data, **settings)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lora": {"rnak": 4}}, r"there is no setting rnak\n  fix: did you mean rank\?"),
        ({"lora": 4}, r"training.lora is 4\n  fix: a mapping, e.g. \{lora: \{blr: 1e-3\}\}"),
        ({"full": {"blr": 1e-3}}, r"settings for full, which is not asked for\n  fix: --protocols full"),
        (
            {"lora": {"epochs": 3}},
            r"training sets epochs, which is the same for every protocol\n  fix: --epochs beside it",
        ),
        ({"split_seed": 3}, r"training sets split_seed, which is the same"),
    ],
)
def test_training_settings_are_checked_before_anything_runs(data, tmp_path, training, message):
    with pytest.raises(ConfigError, match=message):
        vitkit.evaluate(**MODEL, data=data, protocols="knn,lora", training=training, out=str(tmp_path / "e"))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocols": "few_shot", "draws": 0}, r"draws is 0\n  fix: at least 1"),
        ({"protocols": "linear_grid", "grid_rates": (-1.0,)}, r"rates \(-1\.0,\) must be positive"),
        ({"protocols": "knn", "k": 0}, r"k is 0"),
    ],
)
def test_settings_of_heads_are_checked_before_features_are_computed(data, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        vitkit.evaluate(**MODEL, data=data, out=str(tmp_path / "e"), **settings)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("labels", [0, -1])
def test_no_label_a_class_is_refused(data, labels):
    with pytest.raises(ConfigError, match=f"labels_per_class is {labels}\n  fix: at least 1 image a class"):
        vitkit.evaluate(**MODEL, data=data, labels_per_class=labels)


def uneven(path: Path, split: str) -> str:
    """Blobs of which one split shows class 0 only."""
    content = dict(np.load(blobs(path)))
    keep = content[f"y_{split}"] == 0
    content |= {f"x_{split}": content[f"x_{split}"][keep], f"y_{split}": content[f"y_{split}"][keep]}
    np.savez(path, **content)
    return str(path)


def test_a_single_class_is_not_scored_and_not_chosen_on(tmp_path, capsys):
    with pytest.raises(DataError, match=r"all 8 test images have the same labels, so any score of them says nothing"):
        vitkit.evaluate(**MODEL, data=uneven(tmp_path / "test.npz", "test"))
    found = vitkit.evaluate(**MODEL, data=uneven(tmp_path / "val.npz", "val"), protocols="knn,linear,linear_grid")
    assert found["linear"]["picked_on"] == "cross-validation"
    assert found["linear_grid"]["picked_on"] == protocols.STAND_IN
    assert found["knn"]["picked_on"].startswith("the training images")


def test_labels_of_images_that_are_not_there_are_named(tmp_path):
    spec = Path(multi(tmp_path))
    spec.write_text(spec.read_text() + "nobody.png,1,0,p99,test\n")
    with pytest.raises(DataError, match=r"nobody\.png"):
        vitkit.evaluate(**MODEL, data=str(spec))


def test_a_run_on_other_data_is_not_mixed_in(data, tmp_path):
    from vitkit.data import read
    from vitkit.run.protocols_trained import _read_scores

    part = read(data, say=None).part("test")
    frame = pd.DataFrame({"image": part.names[::-1], **{f"p({name})": 0.5 for name in part.classes}})
    frame.to_csv(tmp_path / "p.csv")
    with pytest.raises(DataError, match="is not about the 24 images that the other protocols are scored on"):
        _read_scores(tmp_path / "p.csv", part)


def test_help_and_methods_teach_the_protocols(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("linear_grid", "few_shot", "segment_unet", "--mask_epochs", "the test split is")
    )
    assert main(["methods", "evaluate"]) == 0
    text = capsys.readouterr().out
    assert all(f"evaluate {name}" in " ".join(text.split()) for name in ("mlknn", "linear_grid", "few_shot", "segment"))
    assert set(protocols.TRAINED) <= {method.name for method in vitkit.methods("adapt")} and len(SEGMENTING) == 5


def test_the_command_line_prints_a_line_a_protocol(data, capsys):
    shape = json.dumps(MODEL["arch_kwargs"])
    words = ["--model", "VisionTransformer", "--pretrained", "false", "--image_size", "12", "--arch_kwargs", shape]
    assert main(["evaluate", *words, "--data", data, "--quiet", "--protocols", "knn,linear_grid"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("knn          accuracy 0.") and lines[1].startswith("linear_grid  accuracy 0.")
