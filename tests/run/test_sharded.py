"""`vitkit embed --format parquet`: the same rows as the array, whole shards or none, and only what changed again."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vitkit
from vitkit.data import read
from vitkit.errors import ConfigError, DataError
from vitkit.run import cli, parquet, sharded

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 4}
MODEL = {
    "model": "VisionTransformer",
    "arch_kwargs": TINY,
    "pretrained": False,
    "image_size": 12,
    "quiet": True,
    "accelerator": "cpu",
    "workers": 0,
}
SHARDS = {**MODEL, "format": "parquet", "shard_rows": 8}


def picture(i: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(path: Path, n: int = 30, broken: tuple[int, ...] = ()) -> Path:
    """Two class folders of pictures 00.png, 01.png, ... of which some are broken."""
    for i in range(n):
        file = path / ("a" if i < n // 2 else "b") / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no picture" if i in broken else picture(i))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The numbers of the shards that are computed from now on."""
    seen: list[int] = []
    real = sharded.compute

    def compute(work, number, *more):
        seen.append(number)
        return real(work, number, *more)

    monkeypatch.setattr(sharded, "compute", compute)
    return seen


def test_rows_equal_those_of_the_array(tmp_path):
    data = folder_of(tmp_path / "data")
    found = vitkit.embed(**SHARDS, data=data, out=tmp_path / "parquet")
    assert (found.rows, found.dim, found.shards, found.skipped) == (30, 24, 4, [])
    got = found.read()
    x = vitkit.embed(**{**MODEL, "format": "npy", "batch_size": 8}, data=data, out=tmp_path / "npy")
    table = pd.read_csv(tmp_path / "npy" / "images.csv", keep_default_na=False)
    np.testing.assert_allclose(got.x, x, rtol=0, atol=1e-6)
    assert got.x.dtype == np.float32 and got.names == table.name.tolist()
    assert got.splits.tolist() == table.split.tolist() and got.labels.tolist() == table.label.tolist()
    assert set(got.groups) == {""} and vitkit.Passport.read(tmp_path / "parquet").arch == "VisionTransformer"


def test_other_tools_read_the_shards(tmp_path):
    import pyarrow as pa

    found = vitkit.embed(**SHARDS, data=folder_of(tmp_path / "data"), out=tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out" / "features")
    assert list(frame.columns) == list(parquet.COLUMNS) and len(frame) == 30
    np.testing.assert_array_equal(np.stack(frame.features), found.read().x)
    tables = list(parquet.tables(tmp_path / "out"))
    assert [len(table) for table in tables] == [8, 8, 8, 6]
    assert tables[0].schema.field("features").type == pa.list_(pa.float32(), 24)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["shards"], summary["skipped"]) == (30, 4, 0)


def test_a_table_with_patients(tmp_path):
    folder_of(tmp_path)
    rows = [f"{'a' if i < 15 else 'b'}/{i:02}.png,{'yes' if i % 2 else 'no'},p{i // 3}" for i in range(30)]
    (tmp_path / "table.csv").write_text("path,label,patient\n" + "\n".join(rows) + "\n")
    got = vitkit.embed(**SHARDS, data=tmp_path / "table.csv", out=tmp_path / "out", group_column="patient").read()
    images = read(tmp_path / "table.csv", group_column="patient", say=lambda text: None)
    assert got.names == images.names and got.groups.tolist() == images.group.tolist()
    assert got.labels[:2].tolist() == ["no", "yes"] and got.splits.tolist() == images.split.tolist()


def test_tar_shards(tmp_path):
    for s, name in enumerate(("train-0000", "train-0001")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for i in range(10):
                for ending, content in ((".png", picture(10 * s + i)), (".cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(f"{i:04}{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    got = vitkit.embed(**SHARDS, data=tmp_path, out=tmp_path / "out").read()
    assert got.names[0] == "train-0000.tar/0000.png" and got.names[-1] == "train-0001.tar/0009.png"
    plain = vitkit.embed(**SHARDS, data=folder_of(tmp_path / "plain", 20), out=tmp_path / "out2").read()
    np.testing.assert_array_equal(got.x, plain.x)


def test_broken_files_are_left_out_named_and_counted(tmp_path, capsys):
    data = folder_of(tmp_path / "data", broken=(3, 4, 20))
    found = vitkit.embed(**{**SHARDS, "quiet": False}, data=data, out=tmp_path / "out")
    assert found.rows == 27 and [Path(name).name for name, _ in found.skipped] == ["03.png", "04.png", "20.png"]
    assert "3 files could not be read and are left out" in capsys.readouterr().err
    got, whole = found.read(), vitkit.embed(**SHARDS, data=folder_of(tmp_path / "all"), out=tmp_path / "out2").read()
    kept = [i for i in range(30) if i not in (3, 4, 20)]
    assert [Path(name).name for name in got.names] == [f"{i:02}.png" for i in kept]
    np.testing.assert_allclose(got.x, whole.x[kept], rtol=0, atol=1e-6)
    assert "cannot be read" in got.skipped[0][1] or "not" in got.skipped[0][1]


def test_a_stopped_job_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, computed):
    data, out = folder_of(tmp_path / "data"), tmp_path / "out"
    real = parquet.write

    def stops(out, plan, number, *more):
        if number == 2:
            raise KeyboardInterrupt
        return real(out, plan, number, *more)

    monkeypatch.setattr(parquet, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        vitkit.embed(**SHARDS, data=data, out=out)
    assert sorted(file.name for file in (out / "features").iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(DataError, match=r"is not finished: 2 shards are there\n  fix: give the same vitkit embed"):
        parquet.read(out)
    monkeypatch.setattr(parquet, "write", real)
    computed.clear()
    found = vitkit.embed(**{**SHARDS, "quiet": False, "format": "auto"}, data=data, out=out)  # goes on as it began
    assert computed == [2, 3] and found.rows == 30 and "2 of 4 shards are there already" in capsys.readouterr().err
    computed.clear()
    again = vitkit.embed(**{**SHARDS, "quiet": False}, data=data, out=out)
    assert computed == [] and again == found and "is finished; nothing to do" in capsys.readouterr().err


def test_a_shard_is_whole_or_absent(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    def dies(table, file, **more):
        file.write(b"PAR1 half a shard")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", dies)
    with pytest.raises(OSError, match="No space left"):
        vitkit.embed(**SHARDS, data=folder_of(tmp_path / "data"), out=tmp_path / "out")
    assert list((tmp_path / "out" / "features").iterdir()) == []


def test_only_what_changed_is_computed_again(tmp_path, computed):
    data, out = folder_of(tmp_path / "data", broken=(9,)), tmp_path / "out"
    first = vitkit.embed(**SHARDS, data=data, out=out).read()
    (data / "a" / "09.png").write_bytes(picture(9))  # mended
    computed.clear()
    second = vitkit.embed(**SHARDS, data=data, out=out)
    assert computed == [1] and second.rows == 30 and second.skipped == []
    np.testing.assert_array_equal(np.delete(second.read().x, 9, 0)[:8], first.x[:8])
    for i in (30, 31, 32):  # the archive grew: splits of the others may change, rows in other shards do not move
        (data / "b" / f"{i}.png").write_bytes(picture(i))
    assert vitkit.embed(**SHARDS, data=data, out=out).read().names[-1] == "b/32.png"


def test_files_left_out_are_tried_again(tmp_path, computed, monkeypatch):
    from vitkit.data.stores import FileStore

    data, out, real = folder_of(tmp_path / "data"), tmp_path / "out", FileStore.array

    def away(self, row):
        if self.paths[row].endswith("09.png"):
            raise DataError(f"{self.paths[row]}: cannot be read (Permission denied)")
        return real(self, row)

    monkeypatch.setattr(FileStore, "array", away)
    assert vitkit.embed(**SHARDS, data=data, out=out).rows == 29
    computed.clear()
    assert vitkit.embed(**SHARDS, data=data, out=out).rows == 29 and computed == []
    monkeypatch.setattr(FileStore, "array", real)
    assert vitkit.embed(**SHARDS, data=data, out=out).rows == 30 and computed == [1]


def test_only_shards_are_cleared_away(tmp_path):
    data, out = folder_of(tmp_path / "data"), tmp_path / "out"
    (out / "features" / "mine").mkdir(parents=True)
    (out / "features" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files but no vitkit run"):
        vitkit.embed(**SHARDS, data=data, out=out)
    vitkit.embed(**SHARDS, data=data, out=tmp_path / "b")
    (tmp_path / "b" / "features" / "mine").mkdir()
    for name in ("notes.txt", "part-00000.parquet", ".part-00001.parquet.x.part"):
        (tmp_path / "b" / "features" / name).write_text("x")
    vitkit.embed(**SHARDS, data=data, out=tmp_path / "b")
    left = {one.name for one in (tmp_path / "b" / "features").iterdir()} - {f"part-{k:05}.parquet" for k in range(4)}
    assert left == {"mine", "notes.txt"}


def test_an_archive_that_grew_computes_its_end_only(tmp_path, computed):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for i in range(20):
        (data / f"{i:02}.png").write_bytes(picture(i))
    vitkit.embed(**SHARDS, data=data, out=out)
    for i in range(20, 30):
        (data / f"{i:02}.png").write_bytes(picture(i))
    computed.clear()
    found = vitkit.embed(**SHARDS, data=data, out=out)
    assert computed == [2, 3] and found.rows == 30
    for i in range(10, 30):
        (data / f"{i:02}.png").unlink()
    assert vitkit.embed(**SHARDS, data=data, out=out).rows == 10
    assert len(list((out / "features").iterdir())) == 2  # shards of images that are gone are gone


def test_other_weights_are_never_mixed(tmp_path, monkeypatch, computed):
    data, out = folder_of(tmp_path / "data"), tmp_path / "out"
    first = vitkit.embed(**SHARDS, data=data, out=out).read()
    real = sharded.open_model

    def other(inputs, **more):
        vit = real(inputs, **more)
        with torch.no_grad():
            vit.norm.bias.add_(1)
        return vit

    monkeypatch.setattr(sharded, "open_model", other)
    computed.clear()
    second = vitkit.embed(**SHARDS, data=data, out=out).read()
    assert computed == [0, 1, 2, 3] and not np.allclose(first.x, second.x)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    data, out = folder_of(tmp_path / "data"), tmp_path / "out"
    vitkit.embed(**SHARDS, data=data, out=out)
    with pytest.raises(ConfigError, match=r"shard_rows: 8 -> 4"):
        vitkit.embed(**{**SHARDS, "shard_rows": 4}, data=data, out=out)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "is damaged"),
        (lambda file: file.write_bytes((file.parent / "part-00001.parquet").read_bytes()), "of other weights or data"),
    ],
)
def test_a_damaged_folder_is_not_read_but_mended(tmp_path, harm, message, computed):
    data, out = folder_of(tmp_path / "data"), tmp_path / "out"
    whole = vitkit.embed(**SHARDS, data=data, out=out).read()
    harm(out / "features" / "part-00002.parquet")
    with pytest.raises(DataError, match=message) as caught:
        parquet.read(out)
    assert "part-00002.parquet" in str(caught.value) and "vitkit embed command again" in str(caught.value)
    computed.clear()
    mended = vitkit.embed(**SHARDS, data=data, out=out).read()
    assert computed == [2] and np.array_equal(mended.x, whole.x)


def test_a_disk_that_is_not_there_stops_the_job(tmp_path):
    data = folder_of(tmp_path / "data", broken=tuple(range(16)))
    given = {**SHARDS, "shard_rows": 15, "data": data, "out": tmp_path / "out"}
    with pytest.raises(DataError, match=r"shard 0: 15 of 15 files cannot be read, more than max_bad=0.5") as caught:
        vitkit.embed(**given)
    assert "00.png" in str(caught.value) and "is the disk mounted (on every node)?" in str(caught.value)
    assert not (tmp_path / "out" / "features").exists()
    assert vitkit.embed(**given, max_bad=1).rows == 14  # max_bad may change on the way
    data = folder_of(tmp_path / "few", 4, broken=(0, 1, 2, 3))
    with pytest.raises(DataError, match=r"none of 4 images can be read; the first: .*00.png"):
        vitkit.embed(**SHARDS, data=data, out=tmp_path / "out2")


def test_settings_that_do_not_fit_are_refused(tmp_path):
    data = folder_of(tmp_path / "data", 4)
    for wrong, message in (
        ({"engine": "ray", "format": "npy"}, "engine is ray, which writes Parquet, and format is npy"),
        ({"format": "npy"}, "shard_rows is 8, and that is for shards"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"max_bad": 2}, "max_bad is 2"),
        ({"out": ""}, "out is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            vitkit.embed(**{**SHARDS, "data": data, "out": tmp_path / "out", **wrong})
    with pytest.raises(DataError, match=r"holds no embeddings in Parquet\n  fix: vitkit embed --format parquet"):
        parquet.read(data)


def test_the_command_line(tmp_path, capsys):
    data, out = folder_of(tmp_path / "data", broken=(5,)), str(tmp_path / "out")
    words = ["--model", "VisionTransformer", "--arch_kwargs", json.dumps(TINY), "--pretrained", "false"]
    words += ["--image_size", "12", "--data", str(data), "--out", out, "--format", "parquet", "--shard_rows", "16"]
    assert cli.main(["embed", *words, "--workers", "0"]) == 0
    said = capsys.readouterr()
    assert (
        said.out == f"29 images, 24 values each, 1 files left out: {out}/features/, 2 Parquet shards; manifest.json\n"
    )
    assert "images/s" in said.err and "left out: a/05.png" in said.err
