"""Splits: proportions, whole groups, determinism, tiny classes, saving; and the other selections of `Images`."""

import dataclasses

import numpy as np
import pytest

from tests.data.makers import class_folders
from vitkit import data
from vitkit.data import splits
from vitkit.data.images import Images
from vitkit.data.stores import ArrayStore
from vitkit.errors import ConfigError, DataError


def made(labels, group=None, split=None, task=None):
    """Images of one pixel with these labels."""
    labels = None if labels is None else np.asarray(labels)
    n = len(group) if labels is None else len(labels)
    classes = 0 if labels is None else labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    return Images(
        name="made",
        task=task or (None if labels is None else "single" if labels.ndim == 1 else "multi"),
        classes=[f"c{k}" for k in range(classes)],
        labels=labels,
        split=np.full(n, "train") if split is None else np.asarray(split),
        group=None if group is None else np.asarray(group),
        store=ArrayStore("made", {"x": np.zeros((n, 1, 1), np.uint8)}),
        rows=np.arange(n),
        names=[f"[{i:04d}]" for i in range(n)],
    )


def share(images, split):
    return (images.split == split).mean()


def test_every_class_is_divided_in_proportion():
    labels = np.repeat(np.arange(4), [100, 50, 30, 20])
    images = made(labels).with_splits(val=0.1, test=0.2, seed=3)
    for label in range(4):
        mine = images.split[labels == label]
        n = len(mine)
        assert abs((mine == "test").sum() - 0.2 * n) < 1 and abs((mine == "val").sum() - 0.1 * n) < 1
    assert images.counts == {"train": 140, "val": 20, "test": 40}


def test_rounding_is_carried_on_so_that_totals_are_right():
    images = made(np.repeat(np.arange(100), 4)).with_splits(val=0.1, test=0.2)
    assert abs(images.counts["test"] - 80) <= 1 and abs(images.counts["val"] - 40) <= 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_classes_always_have_a_training_image(n):
    labels = np.concatenate([np.repeat(0, 50), np.repeat(np.arange(1, 30), n)])
    images = made(labels).with_splits(val=0.3, test=0.3, seed=1)
    assert set(labels[images.split == "train"]) == set(range(30))


def test_only_the_seed_and_the_names_matter():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    images = made(labels)
    one, again, other = (images.with_splits(0.1, 0.2, seed=seed).split for seed in (4, 4, 5))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    mixed = np.random.default_rng(1).permutation(200)
    assert np.array_equal(images.subset(mixed).with_splits(0.1, 0.2, seed=4).split, one[mixed])


def test_the_drawing_is_frozen():
    """A different version of numpy must not divide people's data differently."""
    split = splits.stratified(np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), val=0.2, test=0.2, seed=0)
    assert np.flatnonzero(split == "test").tolist() == [3, 5] and np.flatnonzero(split == "val").tolist() == [0, 6]


@pytest.mark.parametrize("task", ["single", "multi", None])
def test_groups_never_straddle_and_labels_stay_balanced(task):
    rng = np.random.default_rng(0)
    group = np.repeat([f"patient{i}" for i in range(200)], rng.integers(1, 8, 200))
    of_group = {g: rng.integers(0, 3) for g in dict.fromkeys(group)}
    labels = np.array([of_group[g] for g in group])
    labels = {
        "single": labels,
        "multi": (rng.random((len(group), 3)) < [0.5, 0.2, 0.05]).astype(np.float32),
        None: None,
    }[task]
    images = made(labels, group).with_splits(val=0.1, test=0.2, seed=2)
    assert not splits.leaks(images)
    assert abs(share(images, "test") - 0.2) < 0.02 and abs(share(images, "val") - 0.1) < 0.02
    if task:
        positives = splits._positives(labels, 3, len(group))
        for k in range(3):
            assert abs(positives[images.split == "test", k].sum() / positives[:, k].sum() - 0.2) < 0.07


def test_rare_labels_reach_every_split():
    rng = np.random.default_rng(0)
    labels = np.zeros((400, 4), np.float32)
    for k, n in enumerate((200, 60, 20, 6)):
        labels[rng.permutation(400)[:n], k] = 1
    images = made(labels).with_splits(val=0.2, test=0.2, seed=0)
    for split in ("train", "val", "test"):
        assert (labels[images.split == split].sum(0) > 0).all()
    assert abs(share(images, "test") - 0.2) < 0.02


def test_unknown_labels_do_not_disturb():
    labels = np.full((50, 2), np.nan, np.float32)
    labels[:25] = np.tile([[1, 0]], (25, 1))
    assert made(labels).with_splits(0.2, 0.2).counts == {"train": 30, "val": 10, "test": 10}


def test_few_groups_fill_every_split_or_say_why_not():
    images = made(np.zeros(102, int), np.repeat(["a", "b", "c"], [100, 1, 1])).with_splits(0.1, 0.2)
    assert set(images.split) == {"train", "val", "test"}
    images = made(np.zeros(10, int), np.repeat("a", 10)).with_splits(0.1, 0.2)
    assert set(images.split) == {"train"}
    assert "WARNING: nothing could be put into val and test: too few groups" in images.understood


def test_groups_of_unlabelled_images_are_not_tested_on():
    group = np.repeat(np.arange(20).astype(str), 5)
    labels = np.tile(np.array([0, 1, 0, 1, -1]), 20)
    split = np.where((np.arange(100) % 5 == 4) & (np.arange(100) < 50), "unlabelled", "train")
    images = made(labels, group, split).with_splits(0.2, 0.2)
    unlabelled = set(group[images.split == "unlabelled"])
    assert not unlabelled & set(group[np.isin(images.split, ("val", "test"))])
    assert {"val", "test"} <= set(images.split)


def test_fractions_must_leave_something():
    with pytest.raises(ConfigError, match=r"val=0\.5 and test=0\.6 leave nothing to train on"):
        made(np.zeros(5, int)).with_splits(0.5, 0.6)


def test_unlabelled_data_can_be_divided_on_request():
    images = made(None, group=["a"] * 3 + ["b"] * 3 + ["c"] * 6, split=["unlabelled"] * 12)
    assert images.with_splits(val=0.25, test=0.25).counts == {"train": 6, "val": 3, "test": 3}


def test_saved_splits_come_back(tmp_path):
    images = data.read(class_folders(tmp_path / "set", {"a": 6, "b": 6}))
    path = splits.save(images, tmp_path / "run" / "splits.csv")
    lines = path.read_text().splitlines()
    assert lines[0] == "name,split,label,group" and lines[1] == f"a/000.png,{images.split[0]},a,"
    other = images.with_splits(0.3, 0.3, seed=9)
    assert not np.array_equal(other.split, images.split)
    assert np.array_equal(splits.load(other, path).split, images.split)


def test_saved_splits_must_fit_the_data(tmp_path):
    images = data.read(class_folders(tmp_path / "set", {"a": 3, "b": 3}))
    path = splits.save(images, tmp_path / "splits.csv")
    with pytest.raises(DataError, match=r"2 images of set listed in it but not in the data: a/000.png, a/001.png"):
        splits.load(images.subset(np.arange(2, 6)), path)
    splits.save(images.subset(np.arange(4)), path)
    with pytest.raises(DataError, match=r"2 images of set not listed in it: b/001.png, b/002.png"):
        splits.load(images, path)
    path.write_text("name,split\na/000.png,holdout\n")
    with pytest.raises(DataError, match="unknown split 'holdout'"):
        splits.load(images, path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no table of splits"):
        splits.load(images, path)
    with pytest.raises(DataError, match="splits cannot be read"):
        splits.load(images, tmp_path / "none.csv")


def test_labels_in_saved_splits(tmp_path):
    images = made(np.array([[1, 1], [0, 1], [np.nan, 0]], np.float32), group=["x", "y", "z"])
    lines = splits.save(images, tmp_path / "s.csv").read_text().splitlines()
    assert [line.split(",")[2:] for line in lines[1:]] == [["c0|c1", "x"], ["c1", "y"], ["", "z"]]


def test_few_takes_k_a_class_and_grows():
    images = made(np.repeat(np.arange(3), [50, 10, 2]))
    small, large = images.few(2, seed=1), images.few(5, seed=1)
    assert np.bincount(small.labels).tolist() == [2, 2, 2] and np.bincount(large.labels).tolist() == [5, 5, 2]
    assert set(small.names) <= set(large.names)
    assert images.few(2, seed=1).names == small.names and images.few(2, seed=2).names != small.names


def test_few_of_several_labels():
    labels = (np.random.default_rng(0).random((300, 3)) < 0.3).astype(np.float32)
    images = made(labels).few(4, seed=0)
    assert (images.labels.sum(0) >= 4).all() and len(images) <= 12


def test_few_needs_labels_and_a_number():
    with pytest.raises(DataError, match="needs labels"):
        made(None, group=["a"]).few(1)
    with pytest.raises(ConfigError, match="at least 1"):
        made(np.zeros(3, int)).few(0)


def test_parts_and_subsets():
    images = made(np.arange(6), group=list("abcdef"), split=["train", "val", "test", "unlabelled", "train", "val"])
    assert images.part("train", "unlabelled").labels.tolist() == [0, 3, 4]
    chosen = images.subset([4, 1])
    assert (
        chosen.labels.tolist() == [4, 1]
        and chosen.group.tolist() == ["e", "b"]
        and chosen.names == ["[0004]", "[0001]"]
    )
    assert chosen.path(0) == "made[4]" and chosen.paths == ["made[4]", "made[1]"]
    assert len(images.subset(images.labels > 3)) == 2 and len(images.subset([])) == 0
    with pytest.raises(ConfigError, match="there is no split 'tests'") as caught:
        images.part("tests")
    assert "did you mean test?" in caught.value.fix
    with pytest.raises(DataError, match="index 6 for 6 images"):
        images.subset([6])
    with pytest.raises(DataError, match="boolean selection"):
        images.subset(np.ones(3, bool))


def test_columns_of_different_length_are_refused():
    images = made(np.arange(3))
    with pytest.raises(DataError, match="made: 2 labels for 3 images"):
        dataclasses.replace(images, labels=np.arange(2))


def test_fingerprint_changes_with_files_labels_and_splits(tmp_path):
    root = class_folders(tmp_path / "set", {"a": 3, "b": 3})
    images = data.read(root)
    first = images.fingerprint
    assert data.read(root).fingerprint == first and len(first) == 32
    assert images.with_splits(0, 0.5).fingerprint != first
    assert images.subset(np.arange(5)).fingerprint != first
    (root / "a" / "000.png").write_bytes((root / "b" / "000.png").read_bytes() + b"more")
    assert data.read(root).fingerprint != first
    (root / "a" / "001.png").unlink()
    with pytest.raises(DataError, match=r"001\.png"):
        images.subset([1]).fingerprint  # noqa: B018


def test_fingerprint_does_not_depend_on_where_the_folder_lies(tmp_path):
    first = data.read(class_folders(tmp_path / "set", {"a": 3, "b": 3})).fingerprint
    (tmp_path / "set").rename(tmp_path / "moved")
    assert data.read(tmp_path / "moved").fingerprint == first


def test_images_survive_pickling(tmp_path):
    import pickle

    images = data.read(class_folders(tmp_path, {"a": 2, "b": 2}))
    again = pickle.loads(pickle.dumps(images))
    assert again.names == images.names and (again.decode(1) == images.decode(1)).all()
