"""Pictures in memory and in tar shards: layouts, scaling, damage."""

import io
import tarfile

import numpy as np
import pytest
import torch

from tests.data.makers import texture
from vitkit import data
from vitkit.errors import DataError

X = np.stack([texture(i, 10, 12) for i in range(6)])


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_x_and_y(tmp_path):
    images = data.read(save(tmp_path / "a.npz", x=X, y=np.array([0, 1, 0, 1, 0, 1])), val_fraction=0, test_fraction=0)
    assert images.task == "single" and images.classes == ["0", "1"] and images.in_memory
    assert images.decode(3).shape == (3, 10, 12) and np.array_equal(images.decode(3).permute(1, 2, 0), X[3])
    assert images.path(3) == "a.npz[3]" and images.names[3] == "[3]"


@pytest.mark.parametrize("keys", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
def test_split_arrays_and_class_names(tmp_path, keys):
    arrays = {"classes": np.array(["cat", "dog"])}
    for k, split in enumerate(("train", "val", "test")):
        arrays[keys[0].format(split)] = X[2 * k : 2 * k + 2]
        arrays[keys[1].format(split)] = np.array([[0], [1]])
    images = data.read(save(tmp_path / "a.npz", **arrays))
    assert images.counts == {"train": 2, "val": 2, "test": 2} and images.classes == ["cat", "dog"]
    assert np.array_equal(images.part("test").decode(1).permute(1, 2, 0), X[5])
    assert images.part("test").path(1) == f"a.npz:{keys[0].format('test')}[1]"


def test_multi_label_split_and_group_arrays(tmp_path):
    y = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 1]])
    split = np.array(["train", "train", "valid", "test", "test", "train"])
    images = data.read(save(tmp_path / "a.npz", images=X, labels=y, split=split, patient_id=np.arange(6)))
    assert images.task == "multi" and images.labels.dtype == np.float32
    assert images.counts == {"train": 3, "val": 1, "test": 2} and images.group.tolist() == list("012345")


def test_minus_one_is_unlabelled(tmp_path):
    images = data.read(save(tmp_path / "a.npz", x=X, y=np.array([0, 1, -1, 1, 0, 5])), val_fraction=0, test_fraction=0)
    assert images.labels.tolist() == [0, 1, -1, 1, 0, 2] and images.classes == ["0", "1", "5"]
    assert images.counts == {"train": 5, "unlabelled": 1}


def test_without_labels(tmp_path):
    images = data.read(save(tmp_path / "a.npz", data=X[..., 0]))
    assert images.task is None and images.decode(0).shape == (1, 10, 12)
    assert data.read(save(tmp_path / "b.npz", x=X, y=np.zeros(6, int)), label_columns=[]).labels is None


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (X.astype(np.float32) / 255, X),
        (X.astype(np.float64), X),
        (X.astype(np.uint16) * 257, X),
        (X.astype(np.int64), X),
        (np.moveaxis(X, 3, 1), X),
        (X[..., :1], X[..., 0]),
        (X[..., 0] > 100, (X[..., 0] > 100) * np.uint8(255)),
        (np.concatenate([X, np.full((*X.shape[:3], 1), 255, np.uint8)], 3), X),
    ],
)
def test_layouts_and_types_become_the_same_uint8(tmp_path, array, expected):
    images = data.read(save(tmp_path / "a.npz", x=array))
    found = images.decode(1).permute(1, 2, 0).numpy()
    assert np.array_equal(found.squeeze(), expected[1])


def test_pictures_cannot_be_changed_through_a_tensor(tmp_path):
    images = data.read(save(tmp_path / "a.npz", x=X))
    images.decode(0).zero_()
    assert images.decode(0).any()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pong": X}, r"no pictures among its arrays \(pong\)"),
        ({"x": X[0, 0]}, "an array of shape 12 x 3 is no stack of pictures"),
        ({"x": X.astype(float) - 500}, "have no known meaning as brightness"),
        ({"x": X / 255 * 1.2}, r"values from 0 to 1\.1\d+ have no known meaning as brightness"),
        ({"x": X * np.nan}, "not finite"),
        ({"x": X, "y": np.arange(4)}, "labels of shape 4 for 6 pictures"),
        ({"x": X, "y": np.full(6, 0.5)}, "are no classes"),
        ({"x": X, "y": np.full((6, 2), 3)}, "other values than 0 and 1"),
        ({"x": X, "split": np.array(["a"] * 6)}, "unknown 'a'"),
        ({"x": X, "split": np.array(["train"] * 5)}, "5 splits for 6 pictures"),
        ({"x_train": X, "x_test": X, "y_train": np.zeros(6, int)}, "x_test has no labels"),
    ],
)
def test_arrays_that_make_no_sense(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        data.read(save(tmp_path / "a.npz", **arrays))


def test_pickles_in_an_npz_are_never_loaded(tmp_path):
    with pytest.raises(DataError, match="which are never loaded"):
        data.read(save(tmp_path / "a.npz", x=np.array([{}, 1], dtype=object)))


def test_truncated_npz(tmp_path):
    path = save(tmp_path / "a.npz", x=X)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"is damaged or no \.npz file"):
        data.read(path)


def test_columns_make_no_sense_for_arrays(tmp_path):
    with pytest.raises(DataError, match="it is not a table"):
        data.read(save(tmp_path / "a.npz", x=X), group_column="g")


def test_digits():
    images = data.read("digits")
    assert (len(images), images.task, images.counts) == (1797, "single", {"train": 1097, "val": 200, "test": 500})
    assert images.decode(17).shape == (1, 32, 32) and images.path(17) == "digits[17]" and images.group is None
    for split, low, high in (("val", 18, 22), ("test", 47, 53)):
        sizes = np.bincount(images.part(split).labels)
        assert low <= sizes.min() and sizes.max() <= high
    pixels = torch.cat([images.decode(i) for i in range(100)])
    assert pixels.max() == 255 and pixels.min() == 0
    again = data.read("digits", split_seed=5)
    assert np.array_equal(again.split, images.split) and again.fingerprint == images.fingerprint


def shard(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in items:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(seed):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(texture(seed, 8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_tar_shards(tmp_path):
    for k, name in enumerate(("train-0000", "train-0001", "val-0000", "test-0000")):
        items = [
            (f"{i}.{end}", content)
            for i in range(3)
            for end, content in (("png", png(10 * k + i)), ("cls", b"%d" % (i % 2)))
        ]
        shard(tmp_path / f"{name}.tar", items)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    images = data.read(tmp_path)
    assert images.counts == {"train": 6, "val": 3, "test": 3} and images.classes == ["cat", "dog"]
    val = images.part("val")
    assert np.array_equal(val.decode(2).permute(1, 2, 0), texture(22, 8, 8)) and val.labels.tolist() == [0, 1, 0]
    assert val.path(2).endswith("val-0000.tar::2.png")
    one = data.read(tmp_path / "train-0001.tar")
    assert len(one) == 3 and one.classes == ["cat", "dog"]


def test_damaged_shards(tmp_path):
    path = shard(tmp_path / "train-0.tar", [("a.png", png(0)), ("a.cls", b"0"), ("b.png", png(1)), ("b.cls", b"1")])
    images = data.read(path, val_fraction=0, test_fraction=0)
    raw = path.read_bytes()
    path.write_bytes(raw[:700])
    with pytest.raises(DataError, match=r"train-0\.tar::a\.png: the member is truncated"):
        images.decode(0)
    path.write_bytes(b"\x1f\x8b not a tar")
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar archive"):
        data.read(path)
    shard(path, [("a.png", png(0)), ("b.png", png(1)), ("b.cls", b"1")])
    with pytest.raises(DataError, match=r"1 image of 2 without a label, e\.g\. train-0\.tar/a\.png"):
        data.read(path)
    shard(path, [("a.txt", b"hello")])
    with pytest.raises(DataError, match="holds no images"):
        data.read(path)
