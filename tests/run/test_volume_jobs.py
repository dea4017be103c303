"""From a folder of volumes with masks to a run, and from a run to masks of new volumes on their own grid."""

from __future__ import annotations

import nibabel
import numpy as np
import pandas as pd
import pytest

import vitkit
from tests.data.volume_makers import ball, nifti, volume_set
from vitkit import weights
from vitkit.adapt.unetr import Settings, per_epoch_lr
from vitkit.errors import ConfigError, DataError
from vitkit.run.cli import main
from vitkit.run.volume_predict import load_segmentation, segments_volumes

TINY = {
    "model": "volume_vit_tiny_patch16_96", "pretrained": False, "image_size": 8, "patch_size": 4, "quiet": True,
    "arch_kwargs": {"embed_dim": 12, "depth": 4, "num_heads": 2}, "layers": (0, 1, 2), "feature_size": 4, "crops": 2,
    "batch_size": 2, "lr": 1e-2, "warmup_epochs": 0.0, "workers": 0, "overlap": 0.0, "windows": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on balls: a few epochs teach it that bright is not background."""
    root = tmp_path_factory.mktemp("volumes")
    data = volume_set(root / "data", count=8, split=True)
    run = vitkit.adapt("unetr", data=data, out=root / "run", epochs=6, eval_every=3, **TINY)
    return root, run


def test_a_run_scores_volumes_class_by_class(trained):
    root, run = trained
    assert run.metrics["dice"] > 0.2 and {"dice", "dice_with_background"} == set(run.metrics)
    summary = run.summary
    assert [row[0] for row in summary["tables"][0]["rows"]] == ["background", "class 1", "class 2"]
    assert "without background on 1 test volumes" in summary["verdict"]
    scores = pd.read_csv(root / "run" / "predictions.csv")
    assert list(scores) == ["volume", "dice", "dice(background)", "dice(class 1)", "dice(class 2)"] and len(scores) == 1
    page = run.report.read_text(encoding="utf-8")
    assert "Dice of each class" in page and "What it finds in test volumes" in page
    records = [line for line in (root / "run" / "metrics.jsonl").read_text().splitlines() if "val_dice" in line]
    assert len(records) == 2


def test_its_encoder_is_a_model_of_volumes(trained):
    root, run = trained
    vit = weights.load(run.path, say=None)
    assert vit.patch_embed.kind == "volume" and "unetr.out.conv.conv.weight" in vit.extras
    assert segments_volumes(run.path) and not segments_volumes(root / "data")
    method = load_segmentation(run.path)
    assert method.classes == ("background", "class 1", "class 2") and method.settings.feature_size == 4


def test_masks_lie_on_the_files_own_grid(trained, tmp_path, capsys):
    _, run = trained
    data, mask = ball((10, 12, 9), 50)
    affine = np.array(
        [[0, 0, 1.5, 3], [-1.0, 0, 0, 4], [0, 2.0, 0, 5], [0, 0, 0, 1]]
    )  # other axes, a flip, other spacing
    plain = vitkit.predict(run.path, nifti(tmp_path / "plain.nii.gz", data))
    # The same voxels stored along other axes: index (i, j, k) of the second file is (k, flipped i, j) of the first.
    stored = np.ascontiguousarray(data[:, ::-1, :].transpose(1, 2, 0))
    path = nifti(tmp_path / "in" / "odd.nii.gz", stored, affine)
    assert main(["predict", str(run.path), str(path), "--out", str(tmp_path / "out")]) == 0
    written = nibabel.load(tmp_path / "out" / "odd.nii.gz")
    assert (
        written.shape == stored.shape and np.allclose(written.affine, affine) and written.get_data_dtype() == np.uint8
    )
    back = np.asarray(written.dataobj).transpose(2, 0, 1)[:, ::-1, :]
    assert np.array_equal(back, plain.masks[0])
    assert (plain.masks[0] > 0)[mask > 0].mean() > (plain.masks[0] > 0)[mask == 0].mean()
    table = capsys.readouterr().out
    assert table.startswith("volume,mask,ml(class 1),ml(class 2)") and "odd.nii.gz" in table
    assert np.isclose(plain.ml[0].sum(), 10 * 12 * 9 / 1000)


def test_resampled_volumes_come_back_at_their_own_size(trained, tmp_path):
    root, _ = trained
    run = vitkit.adapt(
        "unetr", data=root / "data", out=tmp_path / "run", epochs=1, spacing=(1.0, 1.0, 0.5), **{**TINY, "crops": 1}
    )
    assert weights.load(run.path, say=None).passport.preprocess.spacing == (1.0, 1.0, 0.5)
    found = vitkit.predict(run.path, root / "data" / "images")
    assert len(found.masks) == 8 and all(mask.shape == (10, 12, 9) for mask in found.masks)


def test_fine_tuning_starts_from_pretraining_and_few_labels(trained, tmp_path, capsys):
    root, _ = trained
    pre = {key: TINY[key] for key in ("model", "pretrained", "image_size", "patch_size", "arch_kwargs", "layers")}
    start = vitkit.pretrain(
        "hi_end_mae", data=root / "data", out=tmp_path / "pre", epochs=1, crops=2, decoder_dim=12, decoder_heads=2,
        quiet=True, **pre,
    )  # fmt: skip
    own = {key: value for key, value in TINY.items() if key not in ("model", "pretrained", "arch_kwargs")}
    run = vitkit.adapt(
        "unetr", model=start.path, data=root / "data", out=tmp_path / "seg", epochs=1, volumes=2, freeze=True,
        **{**own, "quiet": False},
    )  # fmt: skip
    assert "training on 2 labelled volumes" in capsys.readouterr().err
    before, after = (weights.load(one.path, say=None) for one in (start, run))
    assert all(a.equal(b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))
    assert [one["method"] for one in after.passport.lineage] == ["pretrain.hi_end_mae", "adapt.unetr"]


def test_volumes_smaller_than_the_crop_are_said(trained, tmp_path, capsys):
    root, _ = trained
    settings = {**TINY, "image_size": (12, 12, 12), "quiet": False, "crops": 1}
    vitkit.adapt("unetr", data=root / "data", out=tmp_path / "run", epochs=1, **settings)
    said = capsys.readouterr().err
    assert "8 of 8 volumes are smaller than the crop of 12 x 12 x 12: they are padded" in said


def test_data_that_cannot_be_learnt_from(trained, tmp_path):
    root, _ = trained
    with pytest.raises(DataError, match=r"no masks were found.*\n.*nnU-Net"):
        vitkit.adapt("unetr", data=root / "data" / "images", out=tmp_path / "a", epochs=1, **TINY)
    with pytest.raises(DataError, match="volumes=9, but only 6 training volumes"):
        vitkit.adapt("unetr", data=root / "data", out=tmp_path / "b", epochs=1, volumes=9, **TINY)
    with pytest.raises(ConfigError, match="is for models of volumes, and vit_tiny_patch16_224 takes images"):
        image = {**TINY, "model": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8}
        vitkit.adapt("unetr", data=root / "data", out=tmp_path / "c", epochs=1, **image)
    with pytest.raises(ConfigError, match="does not segment volumes"):
        pre = vitkit.pretrain(
            "mae", model="vit_tiny_patch16_224", pretrained=False, image_size=32, patch_size=8, data="digits", quiet=True,
            arch_kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2}, decoder_dim=16, decoder_heads=2, max_steps=1,
            out=tmp_path / "pre",
        )  # fmt: skip
        load_segmentation(pre.path)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"feature_size": 0}, "feature_size is 0"),
        ({"volumes": 0}, "at least 1 training volume"),
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"blend": "max"}, "constant or gaussian"),
        ({"rotate90": 2.0}, "rotate90 is 2.0"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        Settings(**settings)


def test_the_released_schedule_wastes_its_first_epoch():
    rates = [per_epoch_lr(e, lr=1.0, warmup=3, epochs=6) for e in range(6)]
    assert rates[:4] == [0.0, 0.5, 1.0, 1.0] and rates[5] < rates[4] < 1


def test_features_of_whole_volumes_with_a_gallery(trained, tmp_path):
    root, run = trained
    found = vitkit.embed(model=run.path, data=root / "data", out=tmp_path / "features", quiet=True, workers=0)
    assert found.shape == (8, 12) and np.isfinite(found).all()
    assert (tmp_path / "features" / "gallery.html").is_file()
