"""The doctor names what is wrong, finds pictures stored twice, and stays quiet about what is right."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.data.makers import class_folders, picture, pictures, table, texture
from tests.data.test_splits import made
from vitkit.data import check, hashes


@pytest.fixture
def root(tmp_path):
    """Three splits of two classes, 18 different pictures, nothing wrong."""
    for k, split in enumerate(("train", "val", "test")):
        class_folders(tmp_path / "set", {"a": 3, "b": 3}, split, start=10 * k)
    return tmp_path / "set"


def problem(report, kind):
    found = [p for p in report.problems if kind in p.kind]
    assert len(found) == 1, (kind, report.problems)
    return found[0]


def test_good_data_have_nothing_to_complain_about(root):
    report = check(root)
    assert report.ok and report.problems == [] and report.verdict == "ok: nothing to complain about"
    assert report.classes == [["a", 3, 3, 3], ["b", 3, 3, 3]]
    text = report.text()
    for words in ("set", "18 images in 2 classes", "all 48 x 48 pixels", "18 PNG", "18 RGB", "standard deviation"):
        assert words in text


def test_mean_and_deviation_are_those_of_the_training_pixels(root):
    report = check(root)
    seeds = [*range(6)]
    pixels = np.concatenate([texture(seed).reshape(-1, 3) for seed in seeds]) / 255
    assert np.allclose(report.mean, pixels.mean(0), atol=1e-4) and np.allclose(report.std, pixels.std(0), atol=1e-4)


def test_grey_data_have_one_mean(tmp_path):
    for i in range(4):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i, channels=1)
    assert len(check(tmp_path).mean) == 1


def test_broken_files_are_errors_by_kind(root):
    raw = (root / "train" / "a" / "000.png").read_bytes()
    (root / "train" / "a" / "000.png").write_bytes(b"")
    (root / "train" / "a" / "001.png").write_bytes(b"text")
    jpeg = io.BytesIO()
    Image.fromarray(texture(5, 96, 96)).save(jpeg, "JPEG")
    (root / "train" / "b" / "cut.jpg").write_bytes(jpeg.getvalue()[:-700])
    (root / "train" / "b" / "000.png").write_bytes(raw[:60] + b"\0" * 40 + raw[100:])
    report = check(root)
    assert not report.ok and report.verdict.startswith("NOT OK: 4 errors")
    assert problem(report, "empty file").files == ["train/a/000.png"]
    assert problem(report, "not an image").files == ["train/a/001.png"]
    assert problem(report, "truncated file").files == ["train/b/cut.jpg"]
    assert problem(report, "corrupt file").files == ["train/b/000.png"]
    assert all(p.severity == "error" and p.advice for p in report.problems)
    assert "empty file: train/a/000.png\n    -> replace by intact copies" in report.text()


def test_half_a_jpeg_with_a_proper_end_is_noticed(root):
    jpeg = io.BytesIO()
    Image.fromarray(texture(5, 96, 96)).save(jpeg, "JPEG")
    (root / "train" / "a" / "x.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2] + b"\xff\xd9")
    found = problem(check(root), "ends in plain grey")
    assert found.severity == "warning" and found.files == ["train/a/x.jpg"]


def test_long_lists_are_cut_in_the_text_but_not_in_the_report(root):
    for i in range(8):
        (root / "train" / "a" / f"bad{i}.png").write_bytes(b"")
    report = check(root)
    assert len(problem(report, "empty file").files) == 8
    assert (
        "empty file (8): train/a/bad0.png, train/a/bad1.png" in report.text() and "bad4.png and 3 more" in report.text()
    )


def test_constant_and_single_pixel_pictures(root):
    Image.new("RGB", (48, 48), (9, 9, 9)).save(root / "train" / "a" / "flat.png")
    Image.new("RGB", (48, 48), (9, 9, 9)).save(root / "test" / "a" / "flat.png")
    Image.new("RGB", (1, 1)).save(root / "train" / "a" / "dot.png")
    report = check(root)
    assert problem(report, "constant picture").files == ["train/a/flat.png", "test/a/flat.png"]
    assert problem(report, "a single pixel").files == ["train/a/dot.png"]
    assert not [p for p in report.problems if "same picture" in p.kind]  # two black frames are no copy of each other


def test_kinds_of_files_are_noted(root):
    folder = root / "train" / "a"
    image = Image.fromarray(texture(77))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(texture(78)).convert("P").save(folder / "palette.png")
    Image.fromarray(texture(79)).convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(texture(80, channels=1).astype(np.uint16) * 257).save(folder / "deep.png")
    frames = [Image.fromarray(texture(81 + i, channels=1)) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(texture(90)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(texture(91)).save(folder / "really.jpg", "PNG")
    report = check(root)
    assert report.ok
    for kind, name in {
        "CMYK": "cmyk.jpg",
        "transparency": "alpha.png",
        "more than 8 bits": "deep.png",
        "several frames": "moving.gif",
        "turned by EXIF": "turned.jpg",
        "ending that does not fit": "really.jpg",
    }.items():
        found = problem(report, kind)
        assert found.severity == "note" and found.files == [f"train/a/{name}"]
    assert "train/a/palette.png" in problem(report, "palette").files


def test_dark_sixteen_bit_data_are_a_warning_unless_stretched(tmp_path):
    for i in range(6):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(texture(i, channels=1).astype(np.uint16) * 16).save(path)
    found = problem(check(tmp_path), "16-bit pictures that use only values up to 40")
    assert found.severity == "warning" and 'deep="minmax"' in found.advice
    assert not [p for p in check(tmp_path, deep="minmax").problems if p.severity == "warning"]


def test_copies_across_splits_are_the_worst(root):
    (root / "test" / "a" / "copy.png").write_bytes((root / "train" / "a" / "000.png").read_bytes())
    Image.open(root / "train" / "a" / "001.png").save(root / "val" / "a" / "other_format.bmp")
    report = check(root)
    found = problem(report, "the same picture in several splits")
    assert found.severity == "error" and not report.ok
    assert sorted(found.files) == ["train/a/000.png = test/a/copy.png", "train/a/001.png = val/a/other_format.bmp"]
    assert report.problems[0] is found


def test_copies_within_a_split_are_a_warning(root):
    (root / "train" / "a" / "copy.png").write_bytes((root / "train" / "a" / "000.png").read_bytes())
    found = problem(check(root), "the same picture twice")
    assert found.severity == "warning" and found.files == ["train/a/000.png = train/a/copy.png"]


def test_copies_with_different_labels(root):
    (root / "train" / "b" / "copy.png").write_bytes((root / "train" / "a" / "000.png").read_bytes())
    found = problem(check(root), "different labels")
    assert found.severity == "error" and found.files == ["train/a/000.png = train/b/copy.png"]


def resaved(array, how):
    image = Image.fromarray(array)
    if how == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=40)
        return np.asarray(Image.open(buffer))
    if how == "half":
        return np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC))
    return np.asarray(image.point(lambda v: min(255, int(v * 1.15)))) if how == "brighter" else array


def test_nearly_the_same_with_different_labels(root):
    array = texture(500, 96, 96)
    Image.fromarray(array).save(root / "train" / "a" / "first.png")
    Image.fromarray(resaved(array, "half")).save(root / "train" / "b" / "again.png")
    found = problem(check(root), "nearly the same picture with different labels")
    assert found.severity == "warning" and found.files == ["train/a/first.png ~ train/b/again.png"]


@pytest.mark.parametrize("how", ["jpeg", "half", "brighter"])
def test_pictures_saved_again_are_found(root, how):
    array = texture(500, 96, 96)
    Image.fromarray(array).save(root / "train" / "a" / "first.png")
    Image.fromarray(resaved(array, how)).save(root / "test" / "a" / "again.png")
    found = problem(check(root), "nearly the same picture in several splits")
    assert found.severity == "warning" and found.files == ["train/a/first.png ~ test/a/again.png"]


def test_different_pictures_of_one_kind_are_no_copies():
    """Hand-written digits, 1,797 of them, at 32 x 32: alike by nature; next to none may be called a copy."""
    report = check("digits")
    assert report.ok and not [p for p in report.problems if p.severity == "warning"]
    assert sum(len(p.files) for p in report.problems if "nearly" in p.kind) <= 2


def test_near_pairs_are_exact_in_blocks_and_in_bands(monkeypatch):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for i in range(40):  # pairs 200+i ~ i that differ in 0..7 bits
        flips = rng.permutation(63)[: i % 8]
        codes[200 + i] = codes[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0))
    distance = np.array([[bin(int(a ^ b)).count("1") for b in codes] for a in codes])
    expected = {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(distance <= 6, 1)), strict=True)}
    thumbs = np.tile(texture(0, 32, 32, 1), (400, 1, 1))
    for limit in (50_000, 10):
        monkeypatch.setattr(hashes, "ALL_PAIRS", limit)
        pairs, cut = hashes.near_pairs(codes, thumbs, hashes.SAME)
        assert {tuple(pair) for pair in pairs.tolist()} == expected and not cut
    monkeypatch.setattr(hashes, "MOST", 3)
    pairs, cut = hashes.near_pairs(codes, thumbs, hashes.SAME)
    assert len(pairs) == 3 and cut


def test_bit_counting_without_numpy_2(monkeypatch):
    words = np.random.default_rng(0).integers(0, 2**63, (5, 7), dtype=np.uint64)
    expected = [[bin(int(word)).count("1") for word in row] for row in words]
    assert hashes.popcount(words).tolist() == expected
    assert hashes.popcount_by_table(words).tolist() == expected


def test_group_leaks(tmp_path):
    pictures(tmp_path, 5)
    rows = "p0.png,a,train,x\np1.png,b,test,x\np2.png,a,val,y\np3.png,b,train,z\np4.png,,unlabelled,y\n"
    text = "path,label,split,patient_id\n" + rows
    report = check(table(tmp_path / "set.csv", text))
    found = problem(report, "groups in several splits")
    assert found.severity == "error" and found.files == ["x (train, test)"] and not report.ok
    assert problem(report, "groups that are unlabelled and held out").files == ["y"]


def test_classes_that_are_too_small_missing_or_unbalanced(tmp_path):
    for split, counts in {"train": {"a": 22, "b": 2}, "val": {"a": 2}, "test": {"a": 2, "b": 1, "c": 1}}.items():
        class_folders(tmp_path, counts, split, start={"train": 0, "val": 100, "test": 200}[split])
    report = check(tmp_path)
    assert problem(report, "class with a single image").files == ["c"]
    assert problem(report, "class without a training image").files == ["c"]
    assert problem(report, "class without any image in val").files == ["b"]
    found = problem(report, "imbalanced classes, 11 to 1")
    assert found.files == ["a 22, b 2 training images"] and "balanced accuracy" in found.advice
    assert report.ok


def test_images_without_labels_among_labelled():
    labels = np.array([[1, 0], [np.nan, np.nan], [0, 1]], np.float32)
    assert problem(check(made(labels)), "no label at all").files == ["[0001]"]
    assert problem(check(made(np.array([0, -1, 1]))), "no label").files == ["[0001]"]


def test_sizes(root):
    picture(root / "train" / "a" / "tiny.png", 300, 16, 16)
    picture(root / "train" / "a" / "long.png", 301, 40, 400)
    report = check(root)
    assert problem(report, "smaller than 32 pixels").files == ["train/a/tiny.png"]
    assert problem(report, "shape unlike the others").files == ["train/a/long.png"]
    assert any("smallest 16 x 16, median 48 x 48, largest 40 x 400" in fact for fact in report.facts)


def test_one_wrong_size_among_many(tmp_path):
    class_folders(tmp_path, {"a": 20, "b": 20})
    picture(tmp_path / "a" / "odd.png", 99, 48, 50)
    assert problem(check(tmp_path), "not 48 x 48 like all others").files == ["a/odd.png (48 x 50)"]


def test_masks_are_checked(tmp_path):
    for n in range(4):
        picture(tmp_path / "images" / f"{n}.png", n)
        values = np.full((48, 48), 1, np.uint8) if n else np.zeros((40, 48), np.uint8)
        values[0, 0] = {2: 9, 3: 255}.get(n, 0)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "masks" / f"{n}.png")
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    report = check(tmp_path)
    assert problem(report, "mask of another size").files[0].endswith("0.png is 40 x 48, its image 48 x 48")
    assert problem(report, "mask values that are no class").files[0].endswith("2.png holds 9")
    (tmp_path / "masks" / "1.png").write_bytes(b"")
    assert problem(check(tmp_path), "mask: empty file").severity == "error"


def test_data_that_cannot_be_read_are_a_report(tmp_path):
    report = check(tmp_path / "none")
    assert not report.ok and "the data cannot be read" in report.problems[0].kind and report.problems[0].advice
    assert "NOT OK: 1 error" in report.text()


def test_progress_and_tables(root):
    heard = []
    report = check(root, progress=lambda done, total: heard.append((done, total)), workers=1)
    assert heard == [(18, 18)]
    (root / "val" / "a" / "000.png").write_bytes(b"")
    report = check(root)
    titles = {title: rows for title, columns, rows in report.tables()}
    assert titles["Images of each class"] == [["a", 3, 3, 3], ["b", 3, 3, 3]]
    assert titles["Problems"][0][:4] == ["error", "empty file", "1", "val/a/000.png"]
    assert all(len(row) == 5 for row in report.rows())


def test_damaged_pictures_do_not_stop_the_rest(tmp_path):
    class_folders(tmp_path, {"a": 2, "b": 2})
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    report = check(tmp_path)
    assert len(problem(report, "empty file").files) == 4 and report.mean == []
