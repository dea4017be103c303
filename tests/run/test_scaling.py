"""`vitkit scaling`: cells by the code of evaluate, resumable; sentences that are right where the answer is known."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vitkit
from vitkit import weights
from vitkit.data import read
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import metrics, scaling
from vitkit.run import cli, scaling_cells, scaling_found, scaling_models
from vitkit.run.scaling_cells import Cell, Study

from ..data.scan_makers import nifti


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Memory and speed are tested with their functions; here they would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "peak_memory", lambda run, device="cpu": 1 << 20)
        patch.setattr(scaling, "speed", lambda run, batch, *more: 100.0)
        patch.setattr(scaling_found, "DRAWS", 1000)
        yield


QUIET = {"quiet": True, "accelerator": "cpu", "batch_size": 32, "workers": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small ViTs as run folders: "wide" has four times the parameters of "slim"."""
    home = tmp_path_factory.mktemp("models")
    for name, dim in (("slim", 24), ("wide", 48)):
        kwargs = {"embed_dim": dim, "depth": 2, "num_heads": 2}
        vit = weights.load(
            "vit_tiny_patch16_224", pretrained=False, arch_kwargs=kwargs, image_size=16, patch_size=8, say=None
        )
        with torch.no_grad():
            vit.patch_embed.proj.weight.mul_(0.3)
        weights.save_run(home / name, vit)
    return home


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """Stripes whose direction is the class: 60 training, 30 validation, 60 test pictures of 32 px."""
    rng = np.random.default_rng(0)
    content = {}
    row, column = np.mgrid[:32, :32]
    for split, n in (("train", 60), ("val", 30), ("test", 60)):
        y = np.arange(n) % 2
        wave = np.where(y[:, None, None] == 0, row, column) + rng.integers(0, 8, (n, 1, 1))
        x = 120 + 60 * np.sin(wave * math.pi / 2) + rng.normal(0, 25, (n, 32, 32))
        content |= {f"x_{split}": np.clip(x, 0, 255).astype(np.uint8), f"y_{split}": y}
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    np.savez(path, **content)
    return str(path)


def study(models, blobs, out, **more):
    given = {"sizes": "16,32", "protocols": "linear,knn"} | QUIET | more
    return vitkit.scaling(models=[models / "slim", models / "wide"], data=blobs, out=out, **given)


@pytest.fixture(scope="module")
def done(models, blobs, quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "s"
    return out, study(models, blobs, out)


# ---------------------------------------------------------------- the whole way


def test_every_cell_is_what_evaluate_says(models, blobs, done):
    found = done[1]
    assert len(found["cells"]) == 2 * 2 * 2 and not found["missing"]
    for size in (16, 32):
        alone = vitkit.evaluate(model=models / "wide", data=blobs, image_size=size, protocols="linear,knn", **QUIET)
        for protocol, figures in alone.items():
            cell = next(c for c in found["cells"]
                        if (c["model"], c["size"], c["labels"], c["protocol"]) == ("wide", size, 1.0, protocol))  # fmt: skip
            for name in ("value", "low", "high", "chosen"):
                assert cell[name] == figures[name], (size, protocol, name)
    assert {s["of"] for s in found["steps"]} == {"size", "backbone"} and len(found["steps"]) == 4
    assert [t["of"] for t in found["trends"]] == ["size", "backbone"]


def test_shares_of_the_labels(models, blobs, tmp_path):
    out = tmp_path / "s"
    found = study(models, blobs, out, fractions="0.2,1", protocols="knn", sizes="16")
    assert [c["trained_on"] for c in found["cells"]] == [12, 60, 12, 60]
    assert [t["of"] for t in found["trends"]] == ["backbone", "labels"]
    assert "By training labels at 16 px" in (out / "scaling.html").read_text()


def test_files_and_page(done):
    out, found = done
    page = (out / "scaling.html").read_text()
    for words in (
        "Accuracy by input size",
        "against cost",
        "million parameters",
        "Larger input, same backbone",
        "front",
    ):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 8 and float(rows[0]["flops"]) > 0 and int(rows[0]["parameters"]) > 0
    results = json.loads((out / "results.json").read_text())
    assert results["verdict"] == found["verdict"] and results["settings"]["sizes"] == [16, 32]


def test_finished_cells_are_not_computed_again_and_a_study_grows(models, blobs, done, monkeypatch):
    out, found = done
    asked = []
    plain = scaling_cells.run_protocol
    monkeypatch.setattr(scaling_cells, "run_protocol", lambda name, *a: asked.append(name) or plain(name, *a))
    again = study(models, blobs, out)
    assert not asked and again["cells"] == found["cells"] and again["verdict"] == found["verdict"]
    grown = study(models, blobs, out, sizes="16,24", protocols="linear")
    assert asked == ["linear", "linear"]  # size 24 of both
    assert [c["size"] for c in grown["cells"]] == [16, 24, 16, 24]
    with pytest.raises(ConfigError, match="holds another run"):
        study(models, blobs, out, split_seed=5)


def test_other_weights_are_computed_again(models, blobs, tmp_path):
    vit = weights.load(models / "slim", say=None)
    weights.save_run(tmp_path / "slim", vit)
    a = vitkit.scaling(models=[tmp_path / "slim"], sizes=16, data=blobs, out=tmp_path / "s", protocols="knn", **QUIET)
    with torch.no_grad():
        vit.blocks[0].attn.proj.weight.add_(torch.randn_like(vit.blocks[0].attn.proj.weight))
    weights.save_run(tmp_path / "slim", vit)
    b = vitkit.scaling(models=[tmp_path / "slim"], sizes=16, data=blobs, out=tmp_path / "s", protocols="knn", **QUIET)
    fresh = vitkit.evaluate(model=tmp_path / "slim", image_size=16, data=blobs, protocols="knn", **QUIET)
    assert b["cells"][0]["value"] == fresh["knn"]["value"]
    assert len(list((tmp_path / "s" / "cells").glob("*.npz"))) == 2
    assert a["cells"][0]["model"] == b["cells"][0]["model"]


def test_what_a_model_cannot_take_is_left_empty(models, blobs, tmp_path, monkeypatch, capsys):
    plain = scaling_cells.Job._measure

    def starved(self, backbone, size):
        if size == 32 and backbone.name == "wide":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(self, backbone, size)

    monkeypatch.setattr(scaling_cells.Job, "_measure", starved)
    found = study(models, blobs, tmp_path / "s", sizes="16,20,32", protocols="knn")
    why = {(m["model"], m["size"]): m["why"] for m in found["missing"]}
    assert set(why) == {("slim", 20), ("wide", 20), ("wide", 32)}
    assert "20 px is not a multiple of its patch of 8 px (16 or 24 would be)" in why["slim", 20]
    assert "not enough memory for 32 px in batches of 32" in why["wide", 32]
    assert sum("value" in c for c in found["cells"]) == 3
    assert "Empty: wide at 32 px: not enough memory" in (tmp_path / "s" / "scaling.html").read_text()
    with pytest.raises(ConfigError, match="no cell could be computed"):
        study(models, blobs, tmp_path / "t", sizes="20")


def test_masks(models, tmp_path):
    """Bright discs: a decoder at every size, judged at the masks' own size."""
    rng = np.random.default_rng(0)
    (tmp_path / "d").mkdir()
    lines = ["image,mask,split"]
    row, column = np.mgrid[:32, :32]
    for i in range(18):
        disc = (row - rng.integers(10, 22)) ** 2 + (column - rng.integers(10, 22)) ** 2 < 49
        Image.fromarray(np.clip(60 + 120 * disc + rng.normal(0, 9, (32, 32)), 0, 255).astype(np.uint8)).save(
            tmp_path / f"d/{i}.png"
        )
        Image.fromarray(disc.astype(np.uint8)).save(tmp_path / f"d/m{i}.png")
        lines.append(f"{i}.png,m{i}.png,{'train' if i < 10 else 'val' if i < 13 else 'test'}")
    (tmp_path / "d/index.csv").write_text("\n".join(lines))
    given = {"models": [models / "wide"], "data": tmp_path / "d/index.csv", "out": tmp_path / "s", "epochs": 12}
    found = vitkit.scaling(sizes=(16, 32), **given, **QUIET)
    assert found["metric"] == "iou" and found["decided_by"] == "linear decoder"
    small, large = (c["value"] for c in found["cells"])
    assert large > small and found["trends"][0]["gain"] == pytest.approx(large - small)
    assert vitkit.scaling(sizes=(16, 32), **given, **QUIET)["cells"] == found["cells"]
    with pytest.raises(ConfigError, match="labels_per_class is 2, and images with masks have no class to draw by"):
        vitkit.scaling(sizes=16, labels_per_class=2, **{**given, "out": tmp_path / "t"}, **QUIET)


def test_volumes_are_scored_as_volumes(models, tmp_path):
    """Slices of NIfTI files with one label a volume: the figures of `vitkit evaluate`, n counts volumes."""
    rows = ["path,label,split"]
    for k in range(18):
        values = np.random.default_rng(k).normal(100, 25, (16, 16, 2 + k % 3))
        values[:8] *= 1 + k % 2
        nifti(tmp_path / f"scans/{k:02d}.nii.gz", values.astype(np.float32))
        rows.append(f"scans/{k:02d}.nii.gz,{'ab'[k % 2]},{'train' if k < 8 else 'val' if k < 12 else 'test'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    given = {"data": tmp_path / "labels.csv", "protocols": "knn"} | QUIET
    found = vitkit.scaling(models=[models / "slim"], sizes=16, out=tmp_path / "s", **given)
    alone = vitkit.evaluate(model=models / "slim", image_size=16, **given)["knn"]
    cell = found["cells"][0]
    assert cell["n"] == alone["n"] == 6 and cell["trained_on"] == 8
    assert [cell[key] for key in ("value", "low", "high")] == [alone[key] for key in ("value", "low", "high")]


def test_command_line_and_bad_input(models, blobs, tmp_path, capsys):
    words = ["--models", f"{models / 'slim'}", "--sizes", "16", "--data", blobs, "--protocols", "knn"]
    assert cli.main(["scaling", *words, "--out", str(tmp_path / "s"), "--accelerator", "cpu"]) == 0
    seen = capsys.readouterr()
    assert "Best is slim at 16 px with " in seen.out and "scaling.html" in seen.out
    assert "1 of 1: slim at 16 px" in seen.err and "patches of 8 px" in seen.err
    for given, message in (
        ({"models": []}, "models is empty"),
        ({"sizes": "0"}, "sizes is"),
        ({"fractions": "0,1"}, "fractions is"),
        ({"models": ["a", "a"]}, "names something twice"),
        ({"protocols": "svm"}, "svm"),
        ({"image_size": 32}, "image_size is 32, but a study has several"),
        ({"out": ""}, "out is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            vitkit.scaling(**{"models": ["a"], "data": blobs, "out": tmp_path / "t", **QUIET, **given})
    with pytest.raises(DataError, match="no labels"):
        plain = np.load(blobs)["x_train"]
        np.savez(tmp_path / "plain.npz", x=plain)
        vitkit.scaling(models=[models / "slim"], data=tmp_path / "plain.npz", out=tmp_path / "u", **QUIET)


# ---------------------------------------------------------------- parts


def test_random_weights_and_sizes_of_their_own(models):
    config = SimpleNamespace(
        inputs=vitkit.settings.Inputs(arch_kwargs={"embed_dim": 24, "depth": 1, "num_heads": 2}),
        machine=vitkit.settings.Machine(),
    )
    said = []
    refs = ["random:vit_tiny_patch16_224", "random:vit_small_patch14_dinov2"]
    some = scaling_models.open_backbones(refs, config, said.append)
    assert some[0].name == "vit_tiny_patch16_224, random weights" and some[0].random
    assert some[0].shell.patch_embed.proj.weight.is_meta
    assert scaling_models.sizes_for(some) == [112, 224, 336]  # multiples of both patches, 16 and 14
    assert scaling_models.misfit(some[1], 224) == "" and "210 or 224" in scaling_models.misfit(some[1], 220)


def test_pictures_are_decoded_once_and_are_the_same_data(tmp_path):
    for i in range(6):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 9), 40 * i, np.uint8)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    images = read(tmp_path, say=None)
    kept = scaling_models.remember(images)
    assert kept.fingerprint == images.fingerprint and len(kept.store.arrays) == 6
    good = [i for i in range(len(images)) if "broken" not in images.names[i]]
    assert all(torch.equal(kept.decode(i), images.decode(i)) for i in good)
    with pytest.raises(DataError, match=r"broken\.png"):
        kept.decode(next(i for i in range(len(images)) if i not in good))
    assert scaling_models.remember(images, limit=10) is images


def fake(accuracy: dict, parameters: dict, random=(), n=400, seed=0) -> Study:
    """A study whose cells are right on a given share of the images, nested as real models are (easy images first)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    sizes = sorted({size for _, size in accuracy})
    some = [scaling_models.Backbone(m, m, p, (8, 8), 32, m in random, None) for m, p in parameters.items()]
    part = SimpleNamespace(labels=y, group=None, __len__=lambda: n)
    scored = type("Scored", (), {"labels": y, "group": None, "__len__": lambda self: n})()
    study = Study(part, scored, "test", "accuracy", some, sizes, [1.0], ["linear"])
    hard = rng.random(n)
    for (m, size), share in accuracy.items():
        right = hard + rng.normal(0, 0.1, n) < share
        scores = np.eye(2)[np.where(right, y, 1 - y)]
        cell = Cell(m, size, 1.0, "linear", scores, "", n, 0.0)
        cell.interval = scaling_cells.bootstrap(metrics.accuracy, y, scores)
        study.cells[m, size, 1.0, "linear"] = cell
        study.costs[m, size] = scaling.Cost(parameters[m], size**2, float(parameters[m] * size**2), 1.0, 1, 1)
    return study


def test_the_sentence_is_right_where_the_answer_is_known():
    shares = {("s", 96): 0.6, ("s", 224): 0.8, ("l", 96): 0.6, ("l", 224): 0.8}
    found = scaling_found.find(fake(shares, {"s": 5, "l": 20}))
    assert found.sentences[0].startswith("A larger input helps (+") and ", but a larger backbone does not help" in (
        found.sentences[0])  # fmt: skip
    assert [t.verdict for t in found.trends] == ["helps", "not shown"]
    shares = {("s", 96): 0.8, ("s", 224): 0.6, ("l", 96): 0.95, ("l", 224): 0.75}
    found = scaling_found.find(fake(shares, {"s": 5, "l": 20}))
    assert found.sentences[0].startswith("A larger input hurts (−") and ", but a larger backbone helps (+" in (
        found.sentences[0])  # fmt: skip
    assert found.sentences[-1].startswith("Shown to be worse: from 96 to 224 px for s (−")
    assert found.best is found.enough and (found.best.model, found.best.size) == ("l", 96)
    assert found.front == {("s", 96), ("l", 96)}


def test_the_cheapest_good_enough_cell_and_equal_or_random_backbones():
    shares = {("a", 96): 0.7, ("a", 160): 0.86, ("a", 224): 0.87, ("r", 96): 0.3, ("r", 160): 0.3, ("r", 224): 0.3}
    found = scaling_found.find(fake(shares, {"a": 5, "r": 50}, random=("r",), n=1500, seed=0))
    assert (found.enough.model, found.enough.size) == ("a", 160)
    assert "the cheapest setting that is not shown to be worse is a at 160 px" in " ".join(found.sentences)
    assert "at 51% of the FLOPs" in " ".join(found.sentences)
    assert not any(t.family == "backbone" for t in found.trends)  # an untrained one is no larger backbone
    assert not any("Shown to be worse" in s for s in found.sentences)
    few = scaling_found.find(fake({("a", 96): 0.5, ("a", 224): 0.55}, {"a": 5}, n=30))
    assert "cannot be told from 30 test images" in " ".join(few.sentences)
    first = " ".join(scaling_found.find(fake({("a", 96): 0.9, ("a", 224): 0.5}, {"a": 5})).sentences)
    assert "; no setting is cheaper." in first and "every cheaper setting" not in first
    last = " ".join(scaling_found.find(fake({("a", 96): 0.5, ("a", 224): 0.9}, {"a": 5})).sentences)
    assert "; every cheaper setting is shown to be worse." in last
    equal = scaling_found.find(fake({("a", 96): 0.5, ("b", 96): 0.9}, {"a": 5, "b": 5}))
    assert "about as many parameters" in " ".join(equal.sentences)
    assert len(equal.steps) == 1 and not equal.steps[0].larger


def test_damaged_cells_are_computed_again(tmp_path):
    cell = Cell("m", 16, 1.0, "knn", np.eye(3), "k=5", 10, 0.1, note="x")
    scaling_cells.write_cell(tmp_path / "a.npz", cell)
    back = scaling_cells.read_cell(tmp_path / "a.npz")
    assert back.kept and back.chosen == "k=5" and np.array_equal(back.scores, np.eye(3))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:80])
    assert scaling_cells.read_cell(tmp_path / "a.npz") is None and scaling_cells.read_cell(tmp_path / "b.npz") is None
