"""`vitkit evaluate` on images with masks: decoders on maps computed once, intervals over images, truth beside predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitkit
from vitkit.data import read
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.evaluate import feature_maps, masks
from vitkit.run import protocols
from vitkit.run.protocols_masks import overlay

from ..data.scan_makers import nifti
from .test_measure import outside

SIZE = 24
MODEL = {
    "model": "VisionTransformer",
    "arch_kwargs": {"embed_dim": 24, "depth": 5, "num_heads": 3, "patch_size": 4},
    "pretrained": False,
    "image_size": SIZE,
    "quiet": True,
    "accelerator": "cpu",
}
QUICK = {"mask_rates": (0.02, 0.1), "mask_epochs": 8}


def discs(folder: Path, *, swap: str = "", without: str = "", wrong: bool = False) -> str:
    """Bright discs in a table of images and masks; masks of the split `swap` are exchanged among themselves."""
    rng = np.random.default_rng(0)
    rows, row, column = ["image,mask,split,patient"], *np.mgrid[:SIZE, :SIZE]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    truth, splits = [], ["train"] * 16 + ["val"] * 6 + ["test"] * 8
    for i, split in enumerate(splits):
        centre, radius = rng.integers(7, 17, 2), rng.integers(4, 7)
        disc = (row - centre[0]) ** 2 + (column - centre[1]) ** 2 < radius**2
        pixels = np.clip(60 + 120 * disc + rng.normal(0, 10, (SIZE, SIZE)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i:02d}.png")
        truth.append(disc.astype(np.uint8))
        if split != without:
            rows.append(f"images/{i:02d}.png,masks/{i:02d}.png,{split},p{i // 2}")
    for i, split in enumerate(splits):
        of = i + 1 if split == swap and i + 1 < len(splits) and splits[i + 1] == split else i
        mask = truth[of][: SIZE - 3] if wrong and i == 20 else truth[of]
        Image.fromarray(mask).save(folder / f"masks/{i:02d}.png")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "index.csv")


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return discs(tmp_path_factory.mktemp("discs"))


@pytest.fixture(scope="module")
def evaluated(spec, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "masks"
    names = "segment_linear,segment_unet"
    return out, vitkit.evaluate(**MODEL, **QUICK, data=spec, protocols=names, out=str(out))


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_decoders_are_scored_with_intervals_over_patients(evaluated):
    out, found = evaluated
    assert list(found) == ["segment_linear", "segment_unet"]
    for entry in found.values():
        assert entry["name"] == "iou" and entry["n"] == 8 and 0 <= entry["iou"] <= entry["dice"] <= 1
        assert (
            entry["low"] <= entry["iou"] <= entry["high"] and entry["dice_low"] <= entry["dice"] <= entry["dice_high"]
        )
        assert entry["picked_on"] == "validation" and entry["trained"] > 0
    assert found["segment_linear"]["trained"] == 2 * 25
    page = (out / "report.html").read_text()
    assert outside(page) == [] and "bootstrap over whole groups" in page and "4 groups" in page
    assert "Truth and predictions" in page and page.count("data:image/png") >= 6 * 4


def test_maps_are_computed_once_and_found_again_only_by_the_same_weights(evaluated, spec, monkeypatch):
    out, found = evaluated
    assert len(list((out / "cache").glob("maps-*.npy"))) == 3
    seen = []
    real = feature_maps.prepared
    monkeypatch.setattr(feature_maps, "prepared", lambda vit, x, rescale: seen.append(len(x)) or real(vit, x, rescale))
    again = vitkit.evaluate(**MODEL, **QUICK, data=spec, protocols=",".join(found), out=str(out))
    assert seen == [] and {k: v["iou"] for k, v in again.items()} == {k: v["iou"] for k, v in found.items()}
    images, vit = read(spec, say=None), vitkit.load(**load_settings(), seed=1, say=None).vit
    feature_maps.cache(vit, images, np.arange(4), 5, (SIZE, SIZE), folder=out / "cache")
    assert seen == [4]
    for changed in ({"rescale": True}, {"size": (SIZE, SIZE + 4)}, {"needs": 4}):
        args = {"needs": 5, "size": (SIZE, SIZE), **changed}
        feature_maps.cache(vit, images, np.arange(4), folder=out / "cache", **args)
    assert seen == [4] * 4
    path = max((out / "cache").glob("maps-*.npy"), key=lambda one: one.stat().st_mtime)
    path.write_bytes(path.read_bytes()[:-100])  # a damaged file is computed again
    feature_maps.cache(vit, images, np.arange(4), 4, (SIZE, SIZE), folder=out / "cache")
    assert seen == [4] * 5


def load_settings() -> dict:
    return {key: MODEL[key] for key in ("model", "arch_kwargs", "pretrained", "image_size")}


@pytest.mark.parametrize(("swap", "without"), [("test", ""), ("val", "test")])
def test_scored_masks_choose_nothing(tmp_path, swap, without):
    found = []
    for name, moved in (("a", ""), ("b", swap)):
        data = discs(tmp_path / name, swap=moved, without=without)
        out = tmp_path / f"out-{name}"
        vitkit.evaluate(**MODEL, **QUICK, data=data, test_fraction=0.0, out=str(out))
        found.append(results(out)["protocols"])
    a, b = found
    assert list(a) == ["segment_linear", "segment_unet"]  # what auto means for masks
    for name in a:
        assert a[name]["chosen"] == b[name]["chosen"] and a[name]["curve"] == b[name]["curve"]
        assert a[name]["split"] == swap and a[name]["iou"] != b[name]["iou"]
        assert a[name]["picked_on"] == ("validation" if swap == "test" else protocols.STAND_IN)


def test_a_decoder_that_finds_nothing_says_so(spec, monkeypatch):
    from vitkit.evaluate import segment

    monkeypatch.setattr(segment, "predict_maps", lambda decoder, data: np.zeros(tuple(data.masks.shape), np.uint8))
    found = vitkit.evaluate(**MODEL, data=spec, protocols="segment_light", mask_rates=(0.1,), mask_epochs=1)
    entry = found["segment_light"]
    assert entry["iou"] == 0 and "it predicts background alone: more --mask_epochs" in entry["note"]


def test_a_model_whose_maps_are_not_finite_is_refused(spec, tmp_path):
    images, vit = read(spec, say=None), vitkit.load(**load_settings(), say=None).vit
    with torch.no_grad():
        vit.patch_embed.proj.weight.fill_(float("nan"))
    with pytest.raises(WeightsError, match=r"feature maps that are not finite or too large(.|\n)*00\.png"):
        feature_maps.cache(vit, images, np.arange(4), 5, (SIZE, SIZE), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_of_another_shape_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"20\.png is \(24, 24\), its mask \(21, 24\)\n  fix: a mask has the size of its image"
    ):
        vitkit.evaluate(**MODEL, **QUICK, data=discs(tmp_path, wrong=True))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"protocols": "linear"},
            DataError,
            r"linear is for labels of whole images, and .* has masks\n  fix: --protocols segm",
        ),
        (
            {"arch_kwargs": {**MODEL["arch_kwargs"], "depth": 2}},
            ConfigError,
            r"segment_unet reads 5 blocks of a ViT with 2",
        ),
        ({"labels_per_class": 3}, ConfigError, r"labels_per_class is 3, and images with masks have no class"),
        ({"mask_rates": (0.0,)}, ConfigError, r"rates \(0.0,\) must be positive"),
    ],
)
def test_what_does_not_fit_is_said(spec, settings, error, message):
    with pytest.raises(error, match=message):
        vitkit.evaluate(**{**MODEL, **QUICK, **settings}, data=spec)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (range(16), r"all 16 train masks show background \(class 0\) only, nothing to learn from"),
        (range(22, 30), r"all 8 test masks show background \(class 0\) only, nothing to score by"),
    ],
)
def test_masks_without_an_object_are_refused(tmp_path, rows, message):
    data = discs(tmp_path)
    empty(tmp_path, rows)
    with pytest.raises(DataError, match=message):
        vitkit.evaluate(**MODEL, **QUICK, data=data, protocols="segment_linear")


def test_validation_masks_without_an_object_choose_nothing(tmp_path):
    data = discs(tmp_path)
    empty(tmp_path, range(16, 22))
    found = vitkit.evaluate(**MODEL, **QUICK, data=data, protocols="segment_linear", out=str(tmp_path / "out"))
    assert found["segment_linear"]["picked_on"] == protocols.STAND_IN
    assert "6 validation masks show background only" in results(tmp_path / "out")["cautions"][0]


def empty(folder: Path, rows: range) -> None:
    for i in rows:
        Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(folder / f"masks/{i:02d}.png")


def test_slices_of_a_volume_are_drawn_whole(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        data = rng.normal(100, 10, (SIZE, SIZE, 3)).astype(np.float32)
        mask = np.zeros(data.shape, np.uint8)
        mask[6:15, 6 + k : 14 + k] = 1
        nifti(tmp_path / f"images/case{k}.nii.gz", data + 80 * mask)
        nifti(tmp_path / f"masks/case{k}.nii.gz", mask)
    found = vitkit.evaluate(
        **MODEL, data=str(tmp_path), protocols="segment_linear", mask_rates=(0.1,), mask_epochs=2, test_fraction=0.4
    )["segment_linear"]
    assert found["n"] % 3 == 0 and found["picked_on"] == "nothing: one rate was given"
    nifti(tmp_path / "masks/case0.nii.gz", np.zeros((SIZE, SIZE, 4), np.uint8))
    with pytest.raises(DataError, match=r"case0"):
        vitkit.evaluate(**MODEL, data=str(tmp_path), protocols="segment_linear")


def test_tables_give_the_figures_of_any_selection():
    rng = np.random.default_rng(0)
    y, said = rng.integers(0, 3, (5, 8, 8)), rng.integers(0, 3, (5, 8, 8))
    y[0, 0] = 255
    tables = masks.confusions(y, said, 3)
    rows = [4, 1, 1]
    assert tables.shape == (5, 3, 3)
    assert masks.table_iou(tables[rows]) == masks.mean_iou(y[rows], said[rows], 3)
    assert masks.table_dice(tables[rows]) == masks.mean_dice(y[rows], said[rows], 3)
    assert np.array_equal(masks.class_iou_of(tables), masks.class_iou(y, said, 3))


def test_an_overlay_colours_classes_and_darkens_the_unknown():
    pixels = np.full((2, 2, 3), 200, np.uint8)
    out = overlay(pixels, np.array([[0, 1], [2, 255]]))
    assert (out[0, 0] == 200).all() and (out[1, 1] == 90).all()
    assert out[0, 1].tolist() != out[1, 0].tolist()
