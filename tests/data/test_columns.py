"""Columns of a table whose text stays with the images: several rows a picture, subsets, fingerprints, slices of volumes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitkit.data import read
from vitkit.errors import DataError

from .scan_makers import nifti


@pytest.fixture
def table(tmp_path):
    for name in "abc":
        Image.fromarray(np.full((4, 4), ord(name), np.uint8)).save(tmp_path / f"{name}.png")
    rows = ["path,split,text,age", "a.png,train,one,30", "b.png,train,,31", "a.png,train,two,30", "c.png,test,three,"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    return tmp_path / "t.csv"


def test_texts_of_all_rows_stay_with_their_picture(table):
    images = read(table, label_columns=[], keep_columns=("text", "age"), say=None)
    assert images.names == ["a.png", "b.png", "c.png"]
    assert images.columns["text"].tolist() == [("one", "two"), (), ("three",)]
    assert images.columns["age"].tolist() == [("30",), ("31",), ()]
    assert images.subset([2, 0]).columns["text"].tolist() == [("three",), ("one", "two")]
    assert images.part("test").columns["age"].tolist() == [()]
    assert read(table, label_columns=[], say=None).columns == {}


def test_the_fingerprint_knows_kept_texts(table):
    plain, kept = (read(table, label_columns=[], keep_columns=k, say=None).fingerprint for k in ((), "text"))
    table.write_text(table.read_text().replace("three", "drei"))
    again, other = (read(table, label_columns=[], keep_columns=k, say=None).fingerprint for k in ((), "text"))
    assert plain == again and kept != other and kept != plain


def test_slices_keep_the_text_of_their_file(tmp_path):
    for k in range(2):
        nifti(tmp_path / f"v{k}.nii.gz", np.random.default_rng(k).normal(size=(6, 6, 3)).astype(np.float32))
    (tmp_path / "t.csv").write_text("path,text\nv0.nii.gz,first\nv1.nii.gz,second\n")
    images = read(tmp_path / "t.csv", label_columns=[], keep_columns="text", say=None)
    assert images.columns["text"].tolist() == [("first",)] * 3 + [("second",)] * 3


def test_a_column_that_is_not_there_is_named(table):
    with pytest.raises(DataError, match=r"there is no column 'txt'[\s\S]*did you mean 'text'"):
        read(table, keep_columns="txt")
    with pytest.raises(DataError, match="it is not a table"):
        read("digits", keep_columns="text")
