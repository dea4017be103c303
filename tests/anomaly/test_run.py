"""`vitkit anomaly ear` and `vitkit predict` on drawn parts: what is written, what loads again, what is refused and said."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import vitkit
from vitkit.errors import ConfigError, DataError
from vitkit.run.anomaly_jobs import check_shares
from vitkit.run.anomaly_predict import finds_defects, load_detector, predict_anomalies
from vitkit.run.cli import main
from vitkit.run.folder import RunFolder

from .makers import broken, mvtec, part, save

MODEL = {
    "model": "vit_tiny_patch16_224",
    "pretrained": False,
    "arch_kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    "image_size": 32,
    "patch_size": 8,
}
QUICK = {**MODEL, "filters": (4, 8), "epochs": 1, "batch_size": 4, "workers": 0, "quiet": True, "cells": (8,)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every baseline, on parts of mixed sizes."""
    root = mvtec(tmp_path_factory.mktemp("data") / "tile", good=10)
    save(root / "train/good/wide.png", part(50, (40, 60)))
    picture, mask = broken(51, (60, 40))
    save(root / "test/disc/tall.png", picture), save(root / "ground_truth/disc/tall_mask.png", mask)
    out = tmp_path_factory.mktemp("runs") / "a"
    every = ("no_hint", "random", "identity", "memory")
    return vitkit.anomaly("ear", data=str(root), out=str(out), baselines=every, **QUICK), root


def test_the_page_the_figures_and_the_files(run):
    done, _ = run
    figures = done.metrics
    assert {"image AUROC", "pixel AUROC", "PRO", "defects found", "false alarms"} <= set(figures)
    assert figures["U-Net passes"] == 1 and 0 < figures["share hidden"] < 1
    tables = {table["title"]: table for table in done.summary["tables"]}
    names = [row[0] for row in tables["Detectors side by side"]["rows"]]
    assert names == ["EAR", "no hint", "random masks", "nothing hidden", "patch memory"]
    passes = {row[0]: row[3] for row in tables["What is worth its cost"]["rows"]}
    assert passes == {"EAR": 1, "no hint": 1, "random masks": 3, "nothing hidden": 1, "patch memory": 0}
    kinds = [row[:2] for row in tables["By kind of defect"]["rows"]]
    assert kinds == [["good", 3], ["disc", 4]]
    assert sum(row[4] == "taken" for row in tables["Scale of the mosaic"]["rows"]) == 1
    page = done.report.read_text()
    assert "Defect: disc" in page and "Detectors side by side" in page and "<img" in page
    rows = list(csv.DictReader((done.path / "predictions.csv").open()))
    assert len(rows) == 7 and {"image", "label", "score", "defective", "hidden", "score(memory)"} <= set(rows[0])
    assert not list(done.path.glob("baselines/*/last.ckpt")) and (done.path / "splits.csv").is_file()


def test_predicting_gives_the_scores_of_the_run(run, tmp_path):
    done, root = run
    assert finds_defects(done.path) and not finds_defects(root)
    found = vitkit.predict(done.path, str(root / "test"), out=str(tmp_path / "o"))
    rows = {row["image"]: row for row in csv.DictReader((done.path / "predictions.csv").open())}
    for name, score, alarm in zip(found.names, found.scores, found.defective, strict=True):
        row = rows[f"test/{name}"]
        assert abs(score - float(row["score"])) < 1e-5 and str(alarm) == row["defective"]
    table = list(csv.DictReader((tmp_path / "o/scores.csv").open()))
    assert len(table) == 7 and set(table[0]) == {"image", "score", "defective", "hidden", "heatmap"}
    for name, file in zip(found.names, found.files, strict=True):
        with Image.open(file) as heat, Image.open(root / "test" / name) as own:
            assert heat.size == own.size  # mixed sizes: every map lies on its own picture
    values = np.load(tmp_path / "o/maps" / f"{found.files[-1].rpartition('/')[2].removesuffix('.png')}.npy")
    assert values.dtype == np.float32 and values.shape == Image.open(root / "test" / found.names[-1]).size[::-1]
    again = vitkit.predict(done.path, str(root / "test"))
    assert np.array_equal(again.scores, found.scores) and len(again.maps) == 7  # the same twice
    assert found.at(0.5)[0] <= found.limit


def test_the_command_line_one_file_and_the_memory(run, tmp_path, capsys):
    done, root = run
    one = str(root / "test/disc/000.png")
    assert main(["predict", str(done.path), one]) == 0
    line = capsys.readouterr().out.splitlines()
    assert line[0] == "image,score,defective,hidden" and line[1].startswith("000.png,")
    memory = predict_anomalies(done.path, one, detector="memory")
    rows = {row["image"]: row for row in csv.DictReader((done.path / "predictions.csv").open())}
    assert abs(memory.scores[0] - float(rows["test/disc/000.png"]["score(memory)"])) < 1e-3
    assert np.isnan(memory.hidden).all()
    with pytest.raises(ConfigError, match="has no detector 'random'") as error:
        load_detector(done.path, "random")
    assert "ear, memory" in error.value.fix
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; heatmaps and scores go into a folder"):
        predict_anomalies(done.path, one, out=tmp_path / "file")


def test_the_whole_picture_is_seen(run):
    done, _ = run
    preprocess = json.loads((done.path / "passport.json").read_text())["preprocess"]
    assert preprocess["crop_mode"] == "squash" and preprocess["crop_pct"] == 1.0


def test_runs_are_the_same_twice_and_resume(run, tmp_path):
    done, root = run
    one = vitkit.anomaly("ear", data=str(root), out=str(tmp_path / "b"), baselines=("none",), **QUICK)
    assert one.metrics["image AUROC"] == done.metrics["image AUROC"]  # baselines change nothing
    text = [row["score"] for row in csv.DictReader((one.path / "predictions.csv").open())]
    assert text == [row["score"] for row in csv.DictReader((done.path / "predictions.csv").open())]
    again = vitkit.anomaly("ear", data=str(root), out=str(tmp_path / "b"), baselines=("none",), **QUICK)
    assert again.summary == one.summary  # finished: returned as it is


def test_choices_never_see_the_test_labels(run, tmp_path):
    """Scale, epoch, weights and threshold are the same when test parts are shuffled between good and defective."""
    done, root = run
    other = tmp_path / "tile"
    for path in (root / "train").rglob("*.png"):
        save(other / path.relative_to(root), np.asarray(Image.open(path)))
    for i in range(3):
        save(other / f"test/good/{i}.png", broken(i)[0]), save(other / f"test/disc/{i}.png", part(i))
    twin = vitkit.anomaly("ear", data=str(other), out=str(tmp_path / "c"), baselines=("none",), **QUICK)
    a, b = (vitkit.weights.load(one.path, say=None).extras for one in (done, twin))
    assert all(torch.equal(value, a[key]) for key, value in b.items())


def test_image_level_only_is_said(tmp_path, capsys):
    root = mvtec(tmp_path / "p", masks=False)
    done = vitkit.anomaly(
        "ear", data=str(root), out=str(tmp_path / "r"), **{**QUICK, "quiet": False, "baselines": ("none",)}
    )
    assert "pixel AUROC" not in done.metrics and "image AUROC" in done.metrics
    assert "no ground_truth/ masks: whole pictures are scored" in capsys.readouterr().err
    assert "where defects lie was not measured" in done.summary["verdict"]
    assert "No ground-truth masks" in done.summary["tables"][0]["note"]


def test_good_parts_alone_give_heatmaps_and_a_threshold(tmp_path):
    for i in range(8):
        save(tmp_path / f"flat/{i}.png", part(i))
    done = vitkit.anomaly(
        "ear",
        data=str(tmp_path / "flat"),
        out=str(tmp_path / "r"),
        **{**QUICK, "mask": "none", "baselines": ("memory",)},
    )
    assert done.metrics == {} and "no test parts of both kinds" in done.summary["verdict"]
    assert len(vitkit.predict(done.path, str(tmp_path / "flat")).scores) == 8


def test_masks_of_nothing_and_of_everything_are_said(tmp_path, capsys):
    root = mvtec(tmp_path / "p")
    save(root / "ground_truth/disc/000_mask.png", np.zeros((40, 40), bool))
    save(root / "ground_truth/disc/001_mask.png", np.ones((40, 40), bool))
    done = vitkit.anomaly(
        "ear", data=str(root), out=str(tmp_path / "r"), **{**QUICK, "quiet": False, "baselines": ("none",)}
    )
    said = capsys.readouterr().err
    assert "1 masks cover the whole picture" in said and "1 masks are empty and are not used" in said
    assert 0 <= done.metrics["PRO"] <= 1


def test_pictures_that_hide_nothing_or_everything_are_refused(tmp_path):
    from vitkit.anomaly.ear import Settings

    with pytest.raises(DataError, match="the masks hide nothing in any of 3 good parts"):
        check_shares(np.zeros(3), "tile", Settings())
    with pytest.raises(DataError, match="the masks hide 100% of the good parts"):
        check_shares(np.ones(3), "tile", Settings())
    said = check_shares(np.array([0.0, 0.1]), "tile", Settings())
    assert "WARNING: 10 to 40 % is usual" in said[1] and "nothing is hidden in 1 good parts" in said[2]
    assert len(check_shares(np.array([0.2, 0.3]), "tile", Settings())) == 1
    assert check_shares(np.zeros(3), "tile", Settings(mask="none")) == []
    root = mvtec(tmp_path / "p", good=4)
    with pytest.raises(DataError, match="the masks hide nothing"):  # no attention is 99 deviations above its mean
        vitkit.anomaly("ear", data=str(root), out=str(tmp_path / "r"), amount=99.0, **QUICK)
    assert not (tmp_path / "r").exists()  # and nothing stands in the way of the corrected command


def test_textures_without_an_object_are_learnt_from(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        save(tmp_path / f"p/train/good/{i}.png", rng.integers(100, 140, (32, 32, 3)).astype(np.uint8))
    save(tmp_path / "p/test/good/0.png", np.full((32, 32, 3), 120, np.uint8))
    done = vitkit.anomaly("ear", data=str(tmp_path / "p"), out=str(tmp_path / "r"), **{**QUICK, "baselines": ("none",)})
    assert "There were no test parts of both kinds" in done.summary["verdict"]


def test_damaged_good_parts_are_left_out_and_named(tmp_path):
    root = mvtec(tmp_path / "p", good=10)
    (root / "train/good/003.png").write_bytes(b"not a picture")
    more = {**QUICK, "baselines": ("memory",)}
    with pytest.raises(DataError, match=r"003\.png"):
        vitkit.anomaly("ear", data=str(root), out=str(tmp_path / "r"), **more)
    done = vitkit.anomaly("ear", data=str(root), out=str(tmp_path / "s"), max_bad=0.6, **more)
    assert any("003.png" in str(table["rows"]) for table in done.summary["tables"])


def test_augmentation_moves_masks_with_their_pictures():
    from vitkit.data.hidden import HiddenView

    image = torch.zeros(1, 32, 32, dtype=torch.uint8)
    image[:, 8:16, 4:12] = 255
    view = HiddenView((32, 32), (0.3, 1.0), True)
    torch.manual_seed(0)
    for _ in range(20):
        out = view({"image": image, "hidden": image > 0})
        same = (out["image"] > 127) == out["hidden"]
        assert same.float().mean() > 0.9 and out["hidden"].dtype == torch.bool


def test_a_detector_is_asked_of_anomaly_runs_only(tmp_path):
    with pytest.raises(ConfigError, match="is no anomaly run, and detector is for these"):
        vitkit.predict(tmp_path, "x", detector="memory")


def test_baselines_resume_from_their_own_checkpoints(run, tmp_path, monkeypatch):
    """Stopped after the first baseline, the same command goes on there and gives the same figures."""
    done, root = run
    from vitkit.run import anomaly_jobs

    more = {**QUICK, "data": str(root), "out": str(tmp_path / "d"), "baselines": ("no_hint", "memory")}
    with monkeypatch.context() as patch:
        patch.setattr(anomaly_jobs.PatchMemory, "of", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            vitkit.anomaly("ear", **more)
    assert RunFolder(tmp_path / "d").read_summary() is None
    again = vitkit.anomaly("ear", **more)
    table = {row[0]: row[1:] for row in again.summary["tables"][0]["rows"]}
    want = {row[0]: row[1:] for row in done.summary["tables"][0]["rows"]}
    assert all(table[key] == want[key] for key in table)


def test_a_vit_from_a_run_makes_the_masks_too(run, tmp_path):
    done, root = run
    own = {key: value for key, value in QUICK.items() if key not in MODEL}
    out = tmp_path / "e"
    vitkit.anomaly("ear", model=str(done.path), data=str(root), out=str(out), baselines=("none",), **own)
    assert (out / "model.safetensors").stat().st_size < 2000  # the ViT is loaded from where it came
    one = vitkit.predict(out, str(root / "test/disc"))
    rows = {row["image"]: row for row in csv.DictReader((out / "predictions.csv").open())}
    assert abs(one.scores[0] - float(rows[f"test/disc/{one.names[0]}"]["score"])) < 1e-5
