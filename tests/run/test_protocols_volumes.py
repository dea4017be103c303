"""Volumes of slices are scored as volumes: NIfTI and DICOM series, features pooled, never torn between splits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import vitkit
from vitkit.data import read
from vitkit.errors import ConfigError, DataError
from vitkit.run.protocols_volumes import volumes_of

from ..data.scan_makers import ct_series, nifti
from .test_protocols import MODEL

SPLITS = ["train"] * 12 + ["val"] * 4 + ["test"] * 8


def cohort(folder: Path, *, depth: tuple[int, ...] = (3, 5, 4), split: bool = True, order: int = 0) -> str:
    """24 NIfTI volumes of two classes (bright, dark) of different depth; `order` shuffles the slices of each."""
    rows = ["path,label" + ",split" * split]
    for k in range(24):
        rng = np.random.default_rng(k)
        data = rng.normal(100 + 40 * (k % 2), 25, (12, 12, depth[k % len(depth)])).clip(0, 255)
        data[:6] *= 1 + k % 2  # also a shape: brightness alone is windowed away
        if order:
            data = data[:, :, np.random.default_rng(order).permutation(data.shape[2])]
        nifti(folder / f"scans/case{k:02d}.nii.gz", data.astype(np.float32))
        rows.append(f"scans/case{k:02d}.nii.gz,{'ab'[k % 2]}" + f",{SPLITS[k]}" * split)
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "labels.csv")


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def evaluated(spec, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "volumes"
    names = "knn,linear,linear_grid,few_shot,bitfit"
    settings = {"shots": (1, 3), "draws": 2, "epochs": 1, "grid_epochs": 2}
    return out, vitkit.evaluate(**MODEL, **settings, data=spec, protocols=names, out=str(out))


def test_volumes_are_scored_not_slices(evaluated):
    out, found = evaluated
    assert all(entry["n"] == 8 for entry in found.values())
    results = json.loads((out / "results.json").read_text())
    assert results["scored"] == "volumes" and results["trained_on"] == 12
    frame = pd.read_csv(out / "predictions_linear.csv", dtype=str)
    assert list(frame.image) == [f"scans/case{k:02d}.nii.gz" for k in range(16, 24)]
    assert "8 test volumes" in (out / "report.html").read_text()


def test_a_trained_protocol_averages_its_slices_by_volume(evaluated):
    out, found = evaluated
    slices = pd.read_csv(out / "bitfit" / "predictions.csv")
    mean = slices.groupby(slices.image.str.rpartition("[")[0])["p(a)"].mean()
    ours = pd.read_csv(out / "predictions_bitfit.csv").set_index("image")["p(a)"]
    assert len(slices) > len(ours) == 8 and np.allclose(mean[ours.index], ours, atol=2e-6)
    assert "slice probabilities averaged" in found["bitfit"]["note"]


def test_a_volumes_feature_is_the_mean_of_its_slices_whatever_their_order(spec, tmp_path):
    vit = vitkit.load(
        **{k: v for k, v in MODEL.items() if k not in ("quiet", "accelerator", "batch_size")}, say=None
    ).vit
    from vitkit.evaluate.features import features

    rows = []
    for path in (spec, cohort(tmp_path, order=5)):
        images = read(path, say=None)
        whole = volumes_of(images, lambda text: None)
        part = whole.units.part("test")
        slices, owner = whole.slices_of(part)
        x = features(vit, slices)
        rows.append(whole.pooled(x, owner))
        assert np.allclose(rows[-1][2], x[owner == 2].mean(0), atol=1e-6) and len(rows[-1]) == 8
    assert not np.array_equal(features(vit, read(spec, say=None))[:3], x[:3]) and np.allclose(*rows, atol=1e-6)


def test_without_given_splits_no_volume_is_torn(tmp_path):
    images = read(cohort(tmp_path, split=False), say=None)
    whole = volumes_of(images, lambda text: None)
    assert len(whole.units) == 24 and sum(whole.units.counts.values()) == 24
    names = {split: set(whole.units.part(split).names) for split in ("train", "val", "test")}
    assert all(names.values()) and len(set.union(*names.values())) == 24


def test_a_torn_volume_is_refused(spec):
    from dataclasses import replace

    images = read(spec, say=None)
    split = images.split.copy()
    split[1] = "test"
    with pytest.raises(
        DataError, match=r"slices of the volume scans/case00.nii.gz lie in test and train\n  fix: one split"
    ):
        volumes_of(replace(images, split=split), lambda text: None)


def test_slices_with_labels_of_their_own_are_scored_as_slices(spec):
    from dataclasses import replace

    images = read(spec, say=None)
    labels, said = images.labels.copy(), []
    labels[0] = 1 - labels[0]
    assert volumes_of(replace(images, labels=labels), said.append) is None
    assert said == ["slices of one volume carry different labels: 96 slices are scored, not 24 volumes"]


def test_dicom_series_are_volumes_too(tmp_path):
    rows = ["path,label,split"]
    for k in range(16):
        places = [30.0 * (k % 2) + z for z in range(3 + k % 3)]
        ct_series(tmp_path / f"case{k:02d}", places, size=12, series=str(k))
        rows.append(f"case{k:02d},{'ab'[k % 2]},{'train' if k < 10 else 'test'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    found = vitkit.evaluate(**MODEL, data=str(tmp_path / "labels.csv"), protocols="linear", val_fraction=0.0)
    assert found["linear"]["n"] == 6 and found["linear"]["picked_on"] == "cross-validation"


def test_few_volumes_and_slices_do_not_mix(spec, tmp_path):
    with pytest.raises(ConfigError, match="labels_per_class draws slices for lora and volumes for the others"):
        vitkit.evaluate(**MODEL, data=spec, protocols="lora", labels_per_class=2, out=str(tmp_path / "e"))
    assert vitkit.evaluate(**MODEL, data=spec, protocols="knn", labels_per_class=2)["knn"]["n"] == 8
