"""Folders: which layouts are understood, in what words, and what is refused."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from tests.data.makers import class_folders, picture, texture
from vitkit import data
from vitkit.errors import DataError


def said(images, text):
    assert any(text in sentence for sentence in images.understood), images.understood


def test_class_folders_with_splits(tmp_path):
    for split, n in (("train", 5), ("val", 2), ("test", 3)):
        class_folders(tmp_path / "pets", {"cat": n, "dog": n}, split, start=n * 10)
    images = data.read(tmp_path / "pets")
    assert (images.name, images.task, images.classes) == ("pets", "single", ["cat", "dog"])
    assert images.counts == {"train": 10, "val": 4, "test": 6}
    assert images.labels.dtype == np.int64 and images.labels.sum() == 10
    assert all((("cat", "dog")[label] in path) for label, path in zip(images.labels, images.paths, strict=True))
    assert images.decode(0).shape == (3, 48, 48) and str(images.decode(0).dtype) == "torch.uint8"
    said(images, "20 images in 2 classes from pets: train/val/test folders of class folders")


@pytest.mark.parametrize(
    "words", [("training", "validation", "testing"), ("Train", "dev", "TEST"), ("train", "valid", "test")]
)
def test_other_words_for_splits(tmp_path, words):
    for word in words:
        class_folders(tmp_path, {"a": 2, "b": 2}, word)
    assert data.read(tmp_path).counts == {"train": 4, "val": 4, "test": 4}


def test_class_folders_without_splits_are_divided(tmp_path):
    images = data.read(class_folders(tmp_path, {"a": 20, "b": 10}), val_fraction=0.1, test_fraction=0.2)
    assert images.counts == {"train": 21, "val": 3, "test": 6}
    said(images, "split drawn with seed 0 (stratified by class)")


def test_missing_validation_is_cut_out_of_train_only(tmp_path):
    class_folders(tmp_path, {"a": 10, "b": 10}, "train")
    class_folders(tmp_path, {"a": 4, "b": 4}, "test", start=50)
    images = data.read(tmp_path, val_fraction=0.2)
    assert images.counts == {"train": 16, "val": 4, "test": 8}
    assert all(
        name.startswith("test/") == (split == "test") for name, split in zip(images.names, images.split, strict=True)
    )
    said(images, "validation part cut out of train")


def test_only_a_train_folder_gets_a_test_part_too(tmp_path):
    images = data.read(class_folders(tmp_path, {"a": 20, "b": 20}, "train"), val_fraction=0.1, test_fraction=0.2)
    assert images.counts == {"train": 28, "val": 4, "test": 8}


def test_missing_test_part_is_said(tmp_path):
    class_folders(tmp_path, {"a": 2, "b": 2}, "train")
    class_folders(tmp_path, {"a": 2, "b": 2}, "val", start=9)
    images = data.read(tmp_path)
    assert images.counts == {"train": 4, "val": 4}
    said(images, "there is no test part")


def test_class_folders_win_over_a_table_beside_them(tmp_path):
    class_folders(tmp_path, {"a": 3, "b": 3}, "train")
    (tmp_path / "index.csv").write_text("split,label,file\ntrain,a,train/a/000.png\n")
    images = data.read(tmp_path)
    assert len(images) == 6
    said(images, "index.csv in the folder is not used")


def test_images_in_a_folder_below_the_class(tmp_path):
    for name in ("n01", "n02"):
        picture(tmp_path / "train" / name / "images" / "x.JPEG", 1)
        picture(tmp_path / "val" / name / "images" / "y.JPEG", 2)
    assert data.read(tmp_path).classes == ["n01", "n02"]


def test_one_class_folder_is_no_classification(tmp_path):
    images = data.read(class_folders(tmp_path, {"holiday": 3}))
    assert images.task is None and images.labels is None
    said(images, "a single folder, holiday/: one class is nothing to tell apart")


def test_flat_and_nested_folders_without_labels(tmp_path):
    picture(tmp_path / "flat" / "a.png")
    picture(tmp_path / "nested" / "2020" / "may" / "a.png", 1)
    picture(tmp_path / "nested" / "2021" / "june" / "b.png", 2)
    for name, n in (("flat", 1), ("nested", 2)):
        images = data.read(tmp_path / name)
        assert images.task is None and images.counts == {"unlabelled": n} and images.classes == []
    said(images, "their names are not classes")


def test_labels_can_be_declined(tmp_path):
    images = data.read(class_folders(tmp_path, {"a": 2, "b": 2}), label_columns=[])
    assert images.task is None and len(images) == 4
    said(images, "as asked")


def test_splits_of_unlabelled_folders_are_kept(tmp_path):
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "test" / "b.png", 1)
    images = data.read(tmp_path)
    assert images.task is None and images.counts == {"train": 1, "test": 1}


def test_loose_files_are_unlabelled_and_foreign_files_are_said(tmp_path):
    class_folders(tmp_path, {"a": 3, "b": 3})
    picture(tmp_path / "loose.png", 99)
    (tmp_path / "a" / "x.heic").write_bytes(b"1")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"1")
    picture(tmp_path / "__MACOSX" / "a" / "y.png")
    images = data.read(tmp_path)
    assert len(images) == 7 and images.counts["unlabelled"] == 1
    assert images.labels[images.names.index("loose.png")] == -1
    said(images, "1 .heic")
    said(images, "1 image outside any class folder")


def test_folders_below_unlabelled_are_no_classes(tmp_path):
    class_folders(tmp_path, {"a": 5, "b": 5}, "train")
    class_folders(tmp_path, {"camera1": 2, "camera2": 2}, "unlabelled", start=50)
    images = data.read(tmp_path)
    assert images.classes == ["a", "b"] and images.counts["unlabelled"] == 4


def test_class_without_training_image_is_said(tmp_path):
    class_folders(tmp_path, {"good": 6}, "train")
    class_folders(tmp_path, {"good": 2, "broken": 2}, "test", start=20)
    picture(tmp_path / "ground_truth" / "broken" / "000_mask.png")
    images = data.read(tmp_path)
    assert images.classes == ["broken", "good"]
    said(images, "no training image of 1 class: broken")
    said(images, "left out: 1 image outside the split folders")


def test_class_with_one_image_stays_in_train_and_is_said(tmp_path):
    images = data.read(class_folders(tmp_path, {"many": 20, "one": 1, "two": 2}))
    assert images.split[images.names.index("one/000.png")] == "train"
    said(images, "1 class (one) has a single image")


def test_linked_folders_are_followed_but_not_round_in_circles(tmp_path):
    class_folders(tmp_path / "store", {"a": 2, "b": 2})
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "store" / "a", tmp_path / "set" / "a")
    os.symlink(tmp_path / "store" / "b", tmp_path / "set" / "b")
    os.symlink(tmp_path / "set", tmp_path / "set" / "again")
    images = data.read(tmp_path / "set")
    assert len(images) == 4 and images.classes == ["a", "b"]


def mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.mark.parametrize(
    "pattern", ["images/{s}/{n}.jpg|masks/{s}/{n}.png", "{s}/images/{n}.jpg|{s}/labels/{n}_mask.png"]
)
def test_images_and_masks_with_splits(tmp_path, pattern):
    image, label = pattern.split("|")
    for k, split in enumerate(("train", "val", "test")):
        for n in range(2):
            picture(tmp_path / image.format(s=split, n=n), k * 10 + n, 8, 12)
            mask(tmp_path / label.format(s=split, n=n), np.full((8, 12), n + k, np.uint8))
    images = data.read(tmp_path)
    assert images.task == "mask" and images.counts == {"train": 2, "val": 2, "test": 2}
    for i in range(len(images)):
        k = ("train", "val", "test").index(images.split[i])
        assert images.mask(i).shape == images.decode(i).shape[1:]
        assert images.mask(i).unique().tolist() == [k + int(images.names[i][-5])]


def test_mask_classes_and_ignored_value_come_from_a_file(tmp_path):
    for n in range(3):
        picture(tmp_path / "images" / f"{n}.png", n)
        mask(tmp_path / "masks" / f"{n}.png", np.full((48, 48), n, np.uint8))
    (tmp_path / "classes.json").write_text(json.dumps({"classes": {"0": "road", "1": "car"}, "ignore_index": 2}))
    images = data.read(tmp_path)
    assert images.classes == ["road", "car"] and images.masks.ignore == 2
    said(images, "value 2 is to be ignored")
    by_name = {name: int(images.mask(i).unique()) for i, name in enumerate(images.names)}
    assert sorted(by_name.values()) == [0, 1, 255]


def test_an_ignored_value_of_binary_masks_is_not_their_foreground():
    class Stored:
        def name(self, row):
            return "mask"

        def raw(self, row):
            return None

        def array(self, row):
            return np.array([[0, 128, 255]], np.uint16)

    masks = data.images.Masks(Stored(), ignore=128, binary=True)
    assert masks.array(0).tolist() == [[0, 255, 1]]
    masks = data.images.Masks(Stored(), ignore=128)
    assert masks.array(0).tolist() == [[0, 255, 255]]


def test_binary_masks_and_instances(tmp_path):
    for folder, values in (("masks", np.array([[0, 255]], np.uint8)), ("instances", np.array([[0, 700]], np.uint16))):
        root = tmp_path / folder
        for n in range(3):
            picture(root / "images" / f"{n}.png", n, 1, 2)
            mask(root / folder / f"{n}.png", values)
        images = data.read(root)
        assert images.mask(0).tolist() == [[0, 1]]
        assert len(images.classes) == 2 and str(images.mask(0).dtype) == "torch.uint8"


def test_masks_take_splits_from_the_table_beside_them(tmp_path):
    for n in range(3):
        picture(tmp_path / "images" / f"{n}.png", n)
        mask(tmp_path / "masks" / f"{n}.png", np.full((48, 48), n % 2, np.uint8))
    rows = "".join(f"{s},images/{n}.png,masks/{n}.png\n" for n, s in enumerate(("train", "val", "test")))
    (tmp_path / "index.csv").write_text("split,image,mask\n" + rows)
    assert data.read(tmp_path).counts == {"train": 1, "val": 1, "test": 1}


def test_unpaired_masks(tmp_path):
    for n in range(3):
        picture(tmp_path / "images" / f"{n}.png", n)
    mask(tmp_path / "masks" / "0.png", np.zeros((48, 48), np.uint8))
    images = data.read(tmp_path)
    assert len(images) == 1
    said(images, "left out: 2 images without a mask")
    os.rename(tmp_path / "masks" / "0.png", tmp_path / "masks" / "other.png")
    with pytest.raises(DataError, match="no image has a mask of the same name") as caught:
        data.read(tmp_path)
    assert "same stem" in caught.value.fix


def test_mask_values_beyond_256_are_refused(tmp_path):
    picture(tmp_path / "images" / "0.png")
    mask(tmp_path / "masks" / "0.png", np.full((48, 48), 300, np.uint16))
    images = data.read(tmp_path)
    with pytest.raises(DataError, match="mask values reach 300"):
        images.mask(0)


def test_asking_for_masks_where_there_are_none(tmp_path):
    with pytest.raises(DataError, match="there are no masks"):
        data.read(class_folders(tmp_path, {"a": 2, "b": 2})).mask(0)


def test_missing_folder_names_its_neighbours(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match="flowrs: there is no such file or folder") as caught:
        data.read(tmp_path / "flowrs")
    assert "did you mean flowers?" in caught.value.fix


def test_misspelled_built_in_name():
    with pytest.raises(DataError) as caught:
        data.read("digit")
    assert "digits" in caught.value.fix


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="the folder is empty") as caught:
        data.read(tmp_path)
    assert "a folder" in caught.value.fix


def test_folder_of_other_files(tmp_path):
    (tmp_path / "a.mha").write_bytes(b"1")
    (tmp_path / "b.mha").write_bytes(b"1")
    with pytest.raises(DataError, match=r"holds no image files \(2 \.mha\)"):
        data.read(tmp_path)


def test_archives_and_single_images_are_refused_with_a_fix(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"1")
    with pytest.raises(DataError) as caught:
        data.read(tmp_path / "a.zip")
    assert "unpack it" in caught.value.fix
    with pytest.raises(DataError, match="not read as a data set"):
        data.read(picture(tmp_path / "a.png"))


def test_columns_without_a_table(tmp_path):
    with pytest.raises(DataError, match="columns were named") as caught:
        data.read(class_folders(tmp_path, {"a": 2, "b": 2}), label_columns=["x"])
    assert "labels.csv" in caught.value.fix


def test_say_hears_every_sentence(tmp_path):
    heard = []
    images = data.read(class_folders(tmp_path, {"a": 5, "b": 5}), say=heard.append)
    assert heard == images.understood and heard


def test_nothing_is_decoded_until_asked(tmp_path):
    class_folders(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "000.png").write_bytes(b"no image")
    images = data.read(tmp_path)
    with pytest.raises(DataError, match=r"000\.png: not an image"):
        images.decode(0)
    assert np.array_equal(images.decode(1).permute(1, 2, 0), texture(1))
