"""Folders of parts: what is good, what is defective, where the masks lie, and what is said or refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from vitkit.data.defects import read_defects, resize_mask
from vitkit.errors import DataError

from .makers import broken, mvtec, part, save


def test_mvtec_layout(tmp_path):
    said = []
    found = read_defects(mvtec(tmp_path / "tile", good=20), say=said.append)
    images = found.images
    assert images.classes == ["good", "disc"] and found.kinds == ["disc"]
    assert images.counts == {"train": 17, "val": 3, "test": 6}
    assert (images.part("train", "val").labels == 0).all() and images.part("test").labels.sum() == 3
    assert len(found.masks) == 3 and "masks for all 3 defective pictures" in said
    mask = found.mask("test/disc/001.png", (40, 40))
    assert torch.equal(mask, torch.from_numpy(broken(601)[1]))
    assert found.mask("test/good/001.png", (40, 40)) is None
    again = read_defects(tmp_path / "tile")
    assert again.images.part("val").names == images.part("val").names  # drawn by the seed alone
    assert read_defects(tmp_path / "tile", seed=1).images.part("val").names != images.part("val").names


def test_a_validation_folder_and_defects_in_train_are_understood(tmp_path):
    root = mvtec(tmp_path / "p")
    save(root / "validation/good/a.png", part(90))
    save(root / "train/scratch/a.png", part(91))
    said = []
    found = read_defects(root, say=said.append)
    assert found.images.counts["val"] == 1 and found.images.counts["train"] == 12
    assert any("left out: 1 image that cannot be used (train/scratch/a.png)" in line for line in said)


def test_without_ground_truth_it_is_image_level_only(tmp_path):
    said = []
    found = read_defects(mvtec(tmp_path / "p", masks=False), say=said.append)
    assert not found.masks and "no ground_truth/ masks: whole pictures are scored" in " ".join(said)


def test_some_masks_missing(tmp_path):
    root = mvtec(tmp_path / "p")
    (root / "ground_truth/disc/002_mask.png").unlink()
    said = []
    read_defects(root, say=said.append)
    assert any("masks for 2 of 3 defective pictures" in line and "test/disc/002.png" in line for line in said)


def test_a_folder_of_good_parts_alone_and_good_beside_defects(tmp_path):
    for i in range(8):
        save(tmp_path / f"flat/{i}.png", part(i))
        save(tmp_path / f"beside/ok/{i}.png", part(i))
        save(tmp_path / f"beside/dent/{i}.png", part(i))
    said = []
    assert set(read_defects(tmp_path / "flat", say=said.append).images.counts) == {"train", "val"}
    assert "there are no test parts: heatmaps and a threshold, but no scores" in said
    found = read_defects(tmp_path / "beside").images
    test = found.part("test")
    assert found.classes == ["good", "dent"] and (test.labels == 0).any() and (test.labels == 1).sum() == 8
    assert (found.part("train", "val").labels == 0).all()


@pytest.mark.parametrize("make", ["nothing", "defects only", "one", "file", "missing"])
def test_what_cannot_be_learnt_from_is_refused(tmp_path, make):
    root = tmp_path / "p"
    root.mkdir()
    words = {
        "nothing": "holds no image files",
        "defects only": "no good parts to learn from",
        "one": "1 good part to learn from",
        "file": "is a file",
        "missing": "there is no such folder",
    }[make]
    if make == "defects only":
        save(root / "train/scratch/0.png", part(0))
    if make == "one":
        save(root / "train/good/0.png", part(0))
    where = {"file": save(tmp_path / "x.png", part(0)), "missing": tmp_path / "no"}.get(make, root)
    with pytest.raises(DataError, match=words) as error:
        read_defects(where)
    assert error.value.fix


def test_parts_photographed_several_times_stay_together(tmp_path):
    root = mvtec(tmp_path / "p", good=24)
    lines = ["file,part"] + [f"train/good/{i:03d}.png,{i // 4}" for i in range(24)]
    lines += [f"test/{kind}/{i:03d}.png,{kind}{i}" for kind in ("good", "disc") for i in range(3)]
    (root / "index.csv").write_text("\n".join(lines))
    images = read_defects(root, group_column="part").images
    train, val = ({*images.part(split).group} for split in ("train", "val"))
    assert val and not train & val
    with pytest.raises(DataError, match="there is no column tile"):
        read_defects(root, group_column="tile")
    (root / "index.csv").write_text("\n".join(lines[:5]))
    with pytest.raises(DataError, match="26 pictures without a row"):
        read_defects(root, group_column="part")
    (root / "index.csv").unlink()
    with pytest.raises(DataError, match="group_column=part, but there is no table"):
        read_defects(root, group_column="part")


def test_a_mask_of_another_size_is_refused(tmp_path):
    root = mvtec(tmp_path / "p")
    save(root / "ground_truth/disc/000_mask.png", np.zeros((20, 40), bool))
    found = read_defects(root)
    with pytest.raises(DataError, match=r"000_mask.png: the mask has 40 x 20 pixels, its picture 40 x 40"):
        found.mask("test/disc/000.png", (40, 40))


def test_small_defects_survive_resizing():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10, 10] = True
    assert resize_mask(mask, (8, 8)).sum() == 1
    mask[:] = True
    assert resize_mask(mask, (8, 12)).all()
    assert not resize_mask(torch.zeros(64, 64, dtype=torch.bool), (8, 8)).any()
    half = torch.zeros(8, 8, dtype=torch.bool)
    half[:, :4] = True
    assert torch.equal(resize_mask(half, (4, 4)), half[::2, ::2])


def test_the_folder_itself_is_left_alone(tmp_path):
    root = mvtec(tmp_path / "p")
    before = sorted(path.name for path in root.rglob("*"))
    read_defects(root)
    assert sorted(path.name for path in root.rglob("*")) == before
    shutil.rmtree(root)


def test_digits_are_a_toy_of_one_class():
    found = read_defects("digits")
    images = found.images
    assert images.classes[:2] == ["good", "digit 1"] and not found.masks
    assert (images.part("train", "val").labels == 0).all() and len({*images.part("test").labels.tolist()}) == 10
