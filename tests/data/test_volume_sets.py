"""Whole volumes as a data set: what folders and tables mean, masks on the same grid, crops of the right voxels."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data.scan_makers import ct_series
from tests.data.volume_makers import ball, nifti, volume_set
from vitkit.data import read
from vitkit.data.cases import read_case
from vitkit.data.loader import loader
from vitkit.data.volume_views import eval_view, finetune_view, pretrain_view, whole
from vitkit.errors import ConfigError, DataError
from vitkit.passport import Preprocess


def volumes(path, **settings):
    return read(path, kind="volume", **settings)


def prepared(size=(6, 6, 6), channels=1, **more) -> Preprocess:
    return Preprocess(mean=(0.0,) * channels, std=(1.0,) * channels, image_size=size, kind="volume", **more)


# --- what is understood


def test_images_and_labels(tmp_path):
    found = volumes(volume_set(tmp_path / "a", count=10))
    assert found.kind == "volume" and found.task == "mask" and len(found) == 10
    assert found.classes == ["background", "class 1", "class 2"] and set(found.counts) == {"train", "val", "test"}
    case = found.decode(0)
    assert case.data.shape == (1, 10, 12, 9) and case.data.dtype == np.int16 and case.mask.max() == 2
    assert torch.equal(found.mask(0), torch.from_numpy(case.mask))
    assert found.decode(0) is case and found.in_memory
    again = pickle.loads(pickle.dumps(found))  # as workers get it: without what is in memory
    assert not again.store._cache and np.array_equal(again.decode(0).data, case.data)


def test_a_table_with_splits_wins(tmp_path):
    root = volume_set(tmp_path / "a", split=True)
    for spec in (root, root / "index.csv"):
        found = volumes(spec)
        assert found.counts == {"train": 4, "val": 1, "test": 1}
    said: list[str] = []
    read(root, kind="volume", say=said.append)
    assert any("columns image = image, mask = mask, split = split" in line for line in said)
    assert any("voxels along right, anterior, superior: 10 x 12 x 9" in line for line in said)
    assert volumes(root, label_columns=[]).task is None


def test_a_label_column_of_files_is_the_mask(tmp_path):
    root = volume_set(tmp_path / "a", count=2)
    (root / "index.csv").write_text(
        "split,image,label\ntrain,images/case0.nii.gz,labels/case0.nii.gz\nval,images/case1.nii.gz,\n"
    )
    found = volumes(root)
    assert found.task == "mask" and found.store.masks[1] is None


def nnunet(root, cases=3, channels=2, names=True):
    for i in range(cases):
        data, mask = ball((8, 8, 8), i)
        for c in range(channels):
            nifti(root / "imagesTr" / f"c{i}_{c:04d}.nii.gz", data + 10 * c)
        if i:
            nifti(root / "labelsTr" / f"c{i}.nii.gz", mask)
    nifti(root / "imagesTs" / "t_0000.nii.gz", data)
    if names:
        content = {"labels": {"background": 0, "low": 1, "high": 2}, "file_ending": ".nii.gz"}
        (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_nnunet_folders(tmp_path):
    found = volumes(nnunet(tmp_path / "Dataset001_A"))
    assert found.classes == ["background", "low", "high"] and found.decode(0).data.shape == (2, 8, 8, 8)
    assert found.names == ["c0", "c1", "c2", "imagesTs/t"]
    assert [found.split[i] for i in (0, 3)] == ["unlabelled", "unlabelled"]
    old = {"labels": {"0": "background", "1": "a", "2": "b"}}
    (tmp_path / "Dataset001_A" / "dataset.json").write_text(json.dumps(old))
    assert volumes(tmp_path / "Dataset001_A").classes == ["background", "a", "b"]
    nnunet(tmp_path / "Dataset002_B")
    both = volumes(tmp_path)
    assert len(both) == 8 and both.task is None and both.names[0] == "Dataset001_A/c0"


def test_loose_files_dicom_series_and_split_folders(tmp_path):
    nifti(tmp_path / "x" / "train" / "a.nii.gz", ball((8, 8, 8), 0)[0])
    nifti(tmp_path / "x" / "val" / "b.nii", ball((8, 8, 8), 1)[0])
    found = volumes(tmp_path / "x")
    assert found.counts == {"train": 1, "val": 1}
    ct_series(tmp_path / "y" / "patient", [0.0, 1.0, 2.0, 3.0])
    found = volumes(tmp_path / "y")
    assert len(found) == 1 and found.decode(0).data.shape[3] == 4
    assert volumes(tmp_path / "x" / "val" / "b.nii").names == ["b.nii"]


def test_axes_are_right_anterior_superior_and_4d_is_channels(tmp_path):
    data = np.arange(4 * 5 * 6 * 2, dtype=np.float32).reshape(4, 5, 6, 2)
    flipped = np.diag([-1.0, 2.0, 3.0, 1.0])  # the first axis is stored towards the left
    case = read_case([str(nifti(tmp_path / "a.nii.gz", data, flipped))])
    assert case.data.shape == (2, 4, 5, 6) and case.spacing == (1.0, 2.0, 3.0)
    assert np.array_equal(case.data[1], data[::-1, :, :, 1])


def test_resampling_keeps_the_field_and_the_classes(tmp_path):
    data, mask = ball((12, 12, 6), 0)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    path, labels = nifti(tmp_path / "a.nii.gz", data, affine), nifti(tmp_path / "m.nii.gz", mask, affine)
    case = read_case([str(path)], str(labels))
    even = case.at((1.0, 1.0, 1.0))
    assert even.size == (12, 12, 12) and set(np.unique(even.mask)) == {0, 1, 2}
    assert case.at((1.0, 1.0, 1.0)) is even and case.at((1.0, 1.0, 2.0)) is case and case.at(None) is case
    assert whole(case, prepared(spacing=(1.0, 1.0, 1.0))).shape == (1, 12, 12, 12)


# --- bad input


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        volumes(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no volumes"):
        volumes(tmp_path / "empty")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="not a volume"):
        volumes(tmp_path / "a.txt")
    root = volume_set(tmp_path / "odd", count=2)
    nifti(root / "labels" / "case1.nii.gz", np.zeros((10, 12, 8), np.uint8))
    with pytest.raises(
        DataError, match=r"case1.nii.gz: the mask is 10 x 12 x 8 voxels, its volume case1.nii.gz 10 x 12 x 9"
    ):
        volumes(root)
    nifti(root / "labels" / "case1.nii.gz", np.zeros((10, 12, 9), np.uint8))
    nifti(root / "labels" / "case7.nii.gz", np.zeros((10, 12, 9), np.uint8))
    with pytest.raises(DataError, match="1 mask of volumes that are not there: case7"):
        volumes(root)


def test_tables_that_cannot_be_used(tmp_path):
    root = volume_set(tmp_path / "a", count=1)
    for text, words in (
        ("image\nimages/none.nii.gz\n", "1 volume do not exist"),
        ("image,mask\nimages/case0.nii.gz,labels/none.nii.gz\n", "there is no such mask"),
        ("image,split\nimages/case0.nii.gz,holdout\n", "split 'holdout'"),
        ("number\n1\n", "no column with the files of volumes"),
    ):
        (root / "index.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            volumes(root)
    with pytest.raises(DataError, match="there is no column 'scan'"):
        volumes(root, image_column="scan")


def test_broken_files_are_counted_and_limited(tmp_path):
    root = volume_set(tmp_path / "a", count=4, split=True)
    path = root / "images" / "case0.nii.gz"
    view = pretrain_view(prepared())
    found = volumes(root)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"case0\.nii\.gz"):
        list(loader(found, view, batch_size=4, seed=0, max_bad=0))
    (batch,) = loader(found, view, batch_size=4, seed=0, max_bad=0.3)
    assert batch["image"].shape == (4, 1, 6, 6, 6) and len(batch["bad"]) == 1


def test_voxels_that_are_not_numbers(tmp_path):
    data = ball((8, 8, 8), 0)[0].astype(np.float32)
    data[0, 0, 0] = np.nan
    case = read_case([str(nifti(tmp_path / "a.nii.gz", data))])
    assert np.isfinite(case.data).all() and any("1 voxels that are not finite" in note for note in case.notes)
    with pytest.raises(DataError, match="holds no finite value"):
        read_case([str(nifti(tmp_path / "b.nii.gz", np.full((4, 4, 4), np.nan, np.float32)))])
    with pytest.raises(DataError, match="a mask must hold one class number per voxel"):
        read_case([str(tmp_path / "a.nii.gz")], str(nifti(tmp_path / "m.nii.gz", np.full((8, 8, 8), 0.4, np.float32))))


def test_channels_that_the_model_does_not_take(tmp_path):
    case = volumes(nnunet(tmp_path / "a")).decode(0)
    with pytest.raises(DataError, match=r"2 channels, and the model takes 1\n.*--in_chans 2"):
        eval_view(prepared())(case)
    assert eval_view(prepared(channels=2))(case).shape == (2, 6, 6, 6)


# --- views


@pytest.fixture
def case(tmp_path):
    return volumes(volume_set(tmp_path / "a", count=2)).decode(0)


def test_windows_and_percentiles(case):
    view = eval_view(prepared(window=(200.0, 600.0)))(case)
    at = tuple(slice((n - 6) // 2, (n - 6) // 2 + 6) for n in case.size)
    want = np.clip((case.data[0][at].astype(np.float32) - 200) / 400, 0, 1)
    assert torch.allclose(view[0], torch.from_numpy(want)) and view.dtype == torch.float32
    own = whole(case, prepared())
    assert own.min() == 0 and own.max() == 1


def test_small_volumes_are_padded_on_both_sides(case):
    view = eval_view(prepared(size=(14, 12, 9)))(case)
    assert view.shape == (1, 14, 12, 9) and view[:, :2].abs().sum() == 0 and view[:, 12:].abs().sum() == 0
    out = finetune_view(prepared(size=(14, 12, 9)), flip=0, rotate90=0, intensity=0)(case)
    assert (out["mask"][:2] == 255).all() and torch.equal(out["mask"][2:12], torch.from_numpy(case.mask))
    assert torch.equal(out["image"], view)


def test_images_and_masks_are_turned_together(case):
    """The image is made of the mask, so that every flip and turn must keep them equal."""
    twin = replace(case, data=case.mask[None].astype(np.int16) * 100, _even={})
    view = finetune_view(prepared(window=(0.0, 200.0)), crops=8, flip=0.5, rotate90=1.0, intensity=0.0)
    torch.manual_seed(0)
    out = view(twin)
    assert out["image"].shape == (8, 1, 6, 6, 6) and out["mask"].shape == (8, 6, 6, 6)
    assert torch.equal(out["image"][:, 0] * 2, out["mask"].float())
    assert not torch.equal(out["mask"][0], out["mask"][1])
    flat = finetune_view(prepared(size=(6, 4, 4), window=(0.0, 200.0)), crops=8, rotate90=1.0, intensity=0.0)(twin)
    assert torch.equal(flat["image"][:, 0] * 2, flat["mask"].float())  # sides that differ: half turns only


def test_crops_are_centred_where_they_should_be(tmp_path):
    data, mask = np.zeros((20, 20, 20), np.int16), np.zeros((20, 20, 20), np.uint8)
    data[15, 15, 15], mask[4, 4, 4] = 900, 1
    path, labels = nifti(tmp_path / "a.nii.gz", data), nifti(tmp_path / "m.nii.gz", mask)
    case = read_case([str(path)], str(labels))
    torch.manual_seed(0)
    out = finetune_view(prepared(size=(5, 5, 5)), crops=20, foreground=1.0)(case)
    assert (out["mask"].flatten(1) > 0).any(1).all()
    out = finetune_view(prepared(size=(3, 3, 3)), crops=20, foreground=0.0)(case)
    assert (out["mask"].flatten(1) > 0).float().amax(1).mean() < 0.2
    bright = replace(
        case, mask=None, data=np.where(np.arange(20) < 10, 500, 0)[None, :, None, None] + data[None], _even={}
    )
    view = pretrain_view(prepared(size=(2, 2, 2), window=(0.0, 900.0)), crops=40, foreground=1.0, intensity=0.0)
    assert (view(bright).flatten(1).amax(1) > 0).all()


def test_views_follow_the_seed(case):
    view = pretrain_view(prepared(), crops=2)
    torch.manual_seed(3)
    first = view(case)
    torch.manual_seed(3)
    assert torch.equal(first, view(case))
    assert not torch.equal(first, view(case))
    with pytest.raises(ConfigError, match="crops is 0"):
        pretrain_view(prepared(), crops=0)
    with pytest.raises(ConfigError, match="flip is 2"):
        pretrain_view(prepared(), flip=2.0)


def test_a_volume_is_shown_by_its_middle_slice_front_up(case):
    shown = case.picture()
    assert shown.shape == (1, 12, 10) and shown.dtype == torch.uint8 and shown.max() == 255
    low, high = case.limits[0]
    corner = np.clip((case.data[0, -1, -1, 4] - low) / (high - low), 0, 1) * 255  # right and front come first
    assert abs(int(shown[0, 0, 0]) - corner) <= 1


def test_digits_are_volumes_that_need_no_files():
    found = volumes("digits")
    assert found.kind == "volume" and found.task == "mask" and len(found) == 600 and found.in_memory
    case = found.decode(7)
    assert case.data.shape == (1, 16, 16, 16) and set(np.unique(case.mask)) == {0, 1}
    assert found.decode(7) is case and torch.equal(found.mask(7), torch.from_numpy(case.mask))
    assert len(set(found.names)) == 600 and found.store.stamp(3) != found.store.stamp(4)
