"""CSV and Parquet: columns found or named, labels of every kind, and errors that name rows, values and fixes."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.data.makers import picture, pictures, table
from vitkit import data
from vitkit.errors import DataError

FINDINGS = "path,edema,mass,age\np0.png,1,0,50\np1.png,0,1,60\np2.png,0,0,70\np3.png,1,1,80\n"


def said(images, text):
    assert any(text in sentence for sentence in images.understood), images.understood


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path, 6)
    return tmp_path


def read(folder, text, **how):
    return data.read(table(folder / "set.csv", text), **how)


def test_one_label_column(folder):
    images = read(folder, "path,label,split\np0.png,cat,train\np1.png,dog,val\np2.png,cat,test\n")
    assert (images.name, images.task, images.classes) == ("set", "single", ["cat", "dog"])
    assert images.labels.tolist() == [0, 1, 0] and images.split.tolist() == ["train", "val", "test"]
    assert images.names == ["p0.png", "p1.png", "p2.png"] and images.path(1).endswith("p1.png")
    said(images, "labels from column 'label': 2 classes: cat, dog")


def test_numbers_are_ordered_as_numbers_and_words_like_na_stay(folder):
    images = read(folder, "path,label\np0.png,10\np1.png,2\np2.png,2.0\np3.png,1\n")
    assert images.classes == ["1", "2", "10"] and images.labels.tolist() == [2, 1, 1, 0]
    images = read(folder, "path,label\np0.png,None\np1.png,NA\n")
    assert images.classes == ["NA", "None"]


def test_class_names_beside_the_table(folder):
    (folder / "classes.csv").write_text("label,wnid,name\n1,n2,dog\n0,n1,cat\n")
    images = read(folder, "path,label\np0.png,1\np1.png,0\n")
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [1, 0]
    said(images, "named by classes.csv")


def test_several_labels_in_one_cell(folder):
    images = read(folder, "path,label\np0.png,a|b\np1.png,b\np2.png,c|a\n")
    assert images.task == "multi" and images.classes == ["a", "b", "c"]
    assert images.labels.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]] and images.labels.dtype == np.float32


def test_no_finding_is_no_class_when_it_says_nothing_more(folder):
    text = "Image Index,Finding Labels\np0.png,Edema|Mass\np1.png,No Finding\np2.png,Mass\n"
    images = read(folder, text)
    assert images.classes == ["Edema", "Mass"] and images.labels[1].tolist() == [0, 0]
    said(images, "'No Finding' is not a class")


def test_zero_one_columns_are_taken_and_said(folder):
    images = read(folder, FINDINGS)
    assert images.task == "multi" and images.classes == ["edema", "mass"]
    said(images, "columns not taken as labels: age")
    said(images, "multi-label, 2 columns taken: edema, mass")


def test_circumstances_are_not_labels(folder):
    text = "file,patient_id,sex,view,is_train,no_finding,edema,mass\n"
    text += "".join(
        f"p{i}.png,{i},{i % 2},0,1,{int(i % 3 == 0)},{int(i % 3 == 1)},{int(i % 3 == 2)}\n" for i in range(6)
    )
    images = read(folder, text)
    assert images.classes == ["edema", "mass"]
    said(images, "column 'no_finding' is not taken")


def test_chosen_label_columns_win(folder):
    text = FINDINGS.replace("age", "label")
    images = read(folder, text, label_columns=["mass", "edema"])
    assert images.classes == ["mass", "edema"] and images.labels[0].tolist() == [0, 1]
    assert read(folder, text, label_columns="mass,edema").classes == ["mass", "edema"]
    assert read(folder, FINDINGS, label_columns="mass").task == "single"
    assert read(folder, FINDINGS, label_columns=[]).task is None


def test_unknown_cells_are_nan_and_said(folder):
    images = read(folder, "path,a,b\np0.png,1,\np1.png,0,1\n")
    assert np.isnan(images.labels[0, 1])
    said(images, "1 cell of the label columns empty")


def test_rows_without_any_of_several_labels_are_said(folder):
    images = read(folder, "path,split,a,b\np0.png,train,1,0\np1.png,train,,\np2.png,val,0,1\np3.png,test,0,1\n")
    assert np.isnan(images.labels[1]).all() and images.split[1] == "train"
    said(images, "WARNING: 1 image without any label outside the unlabelled part (row 2)")


def test_the_only_other_column_is_the_label(folder):
    images = read(folder, "file,species\np0.png,a\np1.png,b\np2.png,a\np3.png,b\n")
    assert images.task == "single" and images.classes == ["a", "b"]


def test_ambiguous_columns_are_not_guessed(folder):
    images = read(folder, "file,colour,shape\np0.png,a,x\np1.png,b,y\n")
    assert images.task is None
    said(images, "none of the columns colour, shape is clearly a label (label_columns names it)")


def test_groups_are_recognised_and_kept_together(tmp_path):
    names = pictures(tmp_path, 30)
    rows = "".join(f"{name},{'ab'[i % 2]},{i // 3:03d}\n" for i, name in enumerate(names))
    images = read(tmp_path, "path,label,patient_id\n" + rows)
    assert images.group[0] == "000" and len(set(images.group)) == 10
    for group in set(images.group):
        assert len(set(images.split[images.group == group])) == 1
    said(images, "groups from column 'patient_id': 10 groups")


def test_group_column_by_hand_and_given_leak_is_said(folder):
    text = "path,label,split,farm\np0.png,a,train,1\np1.png,b,test,1\np2.png,a,val,2\np3.png,b,train,3\n"
    images = read(folder, text, group_column="farm")
    said(images, "WARNING: 1 group in more than one split, e.g. 1 in train and test")


def test_unlabelled_rows_need_no_label(folder):
    images = read(folder, "path,label,split\np0.png,a,train\np1.png,b,test\np2.png,,unlabelled\np3.png,b,val\n")
    assert images.labels.tolist() == [0, 1, -1, 1] and images.counts["unlabelled"] == 1
    images = read(folder, "path,a,b,split\np0.png,1,0,train\np1.png,0,1,test\np2.png,,,unlabelled\np3.png,0,1,val\n")
    assert np.isnan(images.labels[2]).all() and not np.isnan(images.labels[[0, 1, 3]]).any()


def test_table_in_a_folder_and_parquet(folder):
    rows = {"path": ["p0.png", "p1.png"], "label": [1, 0], "ok": [True, False]}
    pd.DataFrame(rows).to_parquet(folder / "labels.parquet")
    images = data.read(folder)
    assert images.name == folder.name and images.labels.tolist() == [1, 0] and images.classes == ["0", "1"]


def test_parquet_lists_and_missing_values(folder):
    frame = pd.DataFrame({"path": ["p0.png", "p1.png"], "labels": [["a", "b"], ["b"]], "patient": [1.0, None]})
    frame.to_parquet(folder / "set.parquet")
    images = data.read(folder / "set.parquet")
    assert images.labels.tolist() == [[1, 1], [0, 1]] and images.group[0] == "1" and "alone" in images.group[1]


def test_parquet_with_pictures_inside_is_refused(folder):
    pd.DataFrame({"image": [{"bytes": b"1", "path": "a"}], "label": [1]}).to_parquet(folder / "set.parquet")
    with pytest.raises(DataError, match="column 'image' holds pictures inside the table"):
        data.read(folder / "set.parquet")


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ";")])
def test_other_separators_and_byte_order_mark(folder, name, separator):
    text = "path,label\np0.png,a\np1.png,b\n".replace(",", separator)
    (folder / name).write_text(text, encoding="utf-8-sig")
    assert data.read(folder / name).classes == ["a", "b"]


def test_masks_from_a_column(folder):
    for i in range(2):
        Image.fromarray(np.full((16, 16), i, np.uint8)).save(folder / f"m{i}.png")
    images = read(folder, "image,label\np0.png,m0.png\np1.png,m1.png\n")
    assert images.task == "mask" and images.mask(1).unique().tolist() == [1]
    images = read(folder, "image,label,seg\np0.png,a,m0.png\np1.png,b,\np2.png,a,m1.png\n", mask_column="seg")
    assert images.task == "mask" and len(images) == 2 and images.mask(1).unique().tolist() == [1]
    assert images.path(1).endswith("p2.png")
    said(images, "left out: 1 image without a mask")
    with pytest.raises(DataError, match=r"1 mask of 2 in column 'seg' does not exist: m9\.png"):
        read(folder, "image,seg\np0.png,m0.png\np1.png,m9.png\n", mask_column="seg")


def test_rows_of_an_npz_beside_the_table(tmp_path):
    x = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8)
    np.savez(tmp_path / "scans.npz", x=x)
    text = "index,image,split,edema,mass\n2,no.png,train,1,0\n0,no2.png,val,0,1\n3,no3.png,test,1,1\n"
    images = data.read(table(tmp_path / "labels.csv", text))
    assert len(images) == 3 and np.array_equal(images.decode(0)[0], x[2]) and np.array_equal(images.decode(2)[0], x[3])
    assert images.names == ["scans.npz[2]", "scans.npz[0]", "scans.npz[3]"] and images.path(0) == "scans.npz[2]"
    assert data.read(tmp_path).fingerprint == images.fingerprint
    with pytest.raises(DataError, match=r"column 'index' holds 4, x \(rows 1, 2\), not rows of scans.npz") as caught:
        data.read(table(tmp_path / "labels.csv", "index,label\n4,a\nx,b\n"))
    assert "0 to 3" in caught.value.fix


# Errors: what, where, fix.


def test_missing_files_are_named_and_counted(folder):
    text = "path,label\n" + "".join(f"q{i}.png,a\n" for i in range(5)) + "p0.png,b\n"
    with pytest.raises(
        DataError, match=r"5 files of 6 in column 'path' do not exist: q0\.png, q1\.png, q2\.png and 2 more"
    ) as caught:
        read(folder, text)
    assert str(folder) in caught.value.fix


def test_unknown_column_names_the_nearest(folder):
    with pytest.raises(DataError, match="there is no column 'edma'") as caught:
        read(folder, FINDINGS, label_columns=["edma"])
    assert "did you mean 'edema'" in caught.value.fix


def test_missing_labels_name_their_rows(folder):
    with pytest.raises(DataError, match=r"no label in column 'label' for 2 rows \(rows 2, 4\)") as caught:
        read(folder, "path,label\np0.png,a\np1.png,\np2.png,b\np3.png,NaN\n")
    assert "unlabelled" in caught.value.fix


@pytest.mark.parametrize(("cell", "shown"), [("high", "'high'"), ("-1", "'-1'"), ("0.5", "'0.5'")])
def test_label_columns_must_hold_zeros_and_ones(folder, cell, shown):
    with pytest.raises(DataError, match=rf"label column 'b' holds {shown} \(row 2\)") as caught:
        read(folder, f"path,a,b\np0.png,1,0\np1.png,0,{cell}\n", label_columns=["a", "b"])
    assert "1 = present, 0 = absent" in caught.value.fix


def test_unknown_split_words(folder):
    with pytest.raises(DataError, match=r"column 'split' holds '', 'holdout' \(rows 2, 3\)") as caught:
        read(folder, "path,label,split\np0.png,a,train\np1.png,b,holdout\np2.png,b,\n")
    assert "train, val, test, unlabelled" in caught.value.fix


def test_no_image_column(folder):
    with pytest.raises(DataError, match=r"no column names the images \(columns: a, b\)") as caught:
        read(folder, "a,b\n1,2\n")
    assert "image_column" in caught.value.fix


def test_files_that_are_no_images(folder):
    (folder / "a.avi").write_bytes(b"1")
    with pytest.raises(DataError, match=r"names files that are not read as images \(\.avi\)"):
        read(folder, "path,label\na.avi,x\n")


def test_empty_file_cell(folder):
    with pytest.raises(DataError, match="column 'path' is empty in row 2"):
        read(folder, "path,label\np0.png,a\n,b\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a table"),
        (b"path,label\n", "has no rows"),
        (b"path,path\nx,y\n", "columns with the same name: path"),
        (b"\xff\xfe\x00a,b\nc", "cannot be read"),
    ],
)
def test_unreadable_tables(folder, content, message):
    (folder / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.read(folder / "bad.csv")


def test_rows_longer_than_the_header(folder):
    with pytest.raises(DataError, match="cannot be read as a table"):
        read(folder, "path,label\np0.png,a,b\np1.png,b,c\n")


def test_contradicting_rows_are_refused_and_repeated_ones_dropped(folder):
    images = read(folder, "path,label\np0.png,a\np1.png,b\np0.png,a\n")
    assert len(images) == 2
    said(images, "1 repeated row")
    with pytest.raises(DataError, match=r"p0\.png is listed twice with a different label \(rows 1 and 3\)") as caught:
        read(folder, "path,label\np0.png,a\np1.png,b\np0.png,b\n")
    assert "a|b" in caught.value.fix
    with pytest.raises(DataError, match="different split"):
        read(folder, "path,label,split\np0.png,a,train\np1.png,b,test\np0.png,a,test\n")


def test_absolute_paths_and_paths_below(tmp_path):
    inside, outside = picture(tmp_path / "set" / "img" / "a.png"), picture(tmp_path / "b.png", 1)
    images = read(tmp_path / "set", f"path,label\nimg/a.png,x\n{outside},y\n")
    assert images.paths == [str(inside), str(outside)]


def test_nameless_column_of_row_numbers_is_ignored(folder):
    pd.DataFrame({"file": ["p0.png", "p1.png", "p2.png"], "kind": ["a", "b", "a"]}).to_csv(folder / "set.csv")
    assert data.read(folder / "set.csv").labels.tolist() == [0, 1, 0]
