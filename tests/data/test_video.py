"""Video files and frame folders: the right frames, damaged files named, and what is understood of folders, tables, lists."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.videos import shown, write_video
from vitkit.data import read
from vitkit.data.video_files import VideoFile, open_video
from vitkit.errors import ConfigError, DataError, MissingExtra


def frames_of(folder, count=5, start=0):
    folder.mkdir(parents=True)
    for k in range(start, start + count):
        Image.fromarray(np.full((8, 10, 3), 5 * k, np.uint8)).save(folder / f"{k}.png")
    return folder


@pytest.mark.parametrize("name,codec", [("a.mp4", "libx264"), ("b.webm", "libvpx"), ("c.mpg", "mpeg2video")])
def test_frames_by_number_in_any_order(tmp_path, name, codec):
    video = open_video(write_video(tmp_path / name, codec=codec))
    assert len(video) == 40 and not video.stamps.variable and round(video.rate) == 25
    assert shown(video.read([30, 7, 7, 39, 0])) == [30, 7, 7, 39, 0]
    assert video.read([1]).shape == (1, 3, 48, 64) and video.read([1]).dtype == torch.uint8
    assert shown(video.picture()[None]) == [20]


def test_a_variable_frame_rate_is_sampled_evenly_in_time(tmp_path):
    """20 frames in 0.8 s, then 20 in 3.2 s: even steps skip some of the first and repeat the others."""
    times = [*range(20), *(20 + 4 * i for i in range(20))]
    video = open_video(write_video(tmp_path / "a.mp4", times=times))
    assert video.stamps.variable and len(video) == 40
    seen = np.array(times)[shown(video.read(range(40)))]
    assert np.abs(seen - np.linspace(0, times[-1], 40)).max() <= 2  # never further than half a long frame


def test_a_turned_phone_video_is_upright(monkeypatch, tmp_path):
    from vitkit.data import video_files

    class Frame:
        rotation = 90

        def to_ndarray(self, format):
            return np.arange(24, dtype=np.uint8).reshape(2, 4, 3)

    assert video_files.upright(Frame()).shape == (4, 2, 3)


def spoil(path, out, *, half=False):
    raw = bytearray(path.read_bytes())
    if half:
        raw = raw[: len(raw) // 2]
    else:
        generator = random.Random(0)
        for i in range(len(raw) // 3, len(raw) // 3 + 200):
            raw[i] = generator.randrange(256)
    out.write_bytes(bytes(raw))
    return out


def test_damaged_files_are_named(tmp_path):
    whole = write_video(tmp_path / "a.mp4")
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    cases = {
        tmp_path / "zero.mp4": r"zero.mp4: empty \(0 bytes\)",
        tmp_path / "text.mp4": "text.mp4: cannot be decoded as a video",
        spoil(whole, tmp_path / "half.mp4", half=True): "half.mp4: cannot be decoded as a video",
        spoil(
            write_video(tmp_path / "a.mkv", codec="mpeg4"), tmp_path / "half.mkv", half=True
        ): "half.mkv: truncated or damaged: it",
        tmp_path / "none.mp4": "none.mp4: No such file",
    }
    for path, words in cases.items():
        with pytest.raises(DataError, match=words):
            VideoFile(str(path))
    broken = VideoFile(str(spoil(whole, tmp_path / "broken.mp4")))
    with pytest.raises(
        DataError, match=r"broken.mp4: (cannot be decoded|\d+ of \d+ frames asked for cannot be decoded)"
    ):
        broken.read(range(40))


def test_a_file_without_pictures_is_no_video(tmp_path):
    import av

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match=r"sound.wav: there is no video in this file"):
        VideoFile(str(path))


def test_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    path = write_video(tmp_path / "a.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"'av', which is not installed\n.*pip install 'vitkit\[video\]'"):
        VideoFile(str(path))


def test_folders_of_frames_in_natural_order(tmp_path):
    video = open_video(frames_of(tmp_path / "clip", 12))
    assert len(video) == 12 and shown(video.read([2, 11])) == [2, 11]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no frames in this folder"):
        open_video(tmp_path / "empty")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "clip" / "12.png")
    with pytest.raises(DataError, match="frames of different sizes"):
        video = open_video(tmp_path / "clip")
        video.read([0, 12])


def test_class_folders_with_splits(tmp_path):
    for split in ("train", "test"):
        for action in ("run", "walk"):
            write_video(tmp_path / split / action / "1.mp4", 6)
            frames_of(tmp_path / split / action / "2")
    found = read(tmp_path, kind="video")
    assert found.kind == "video" and found.classes == ["run", "walk"] and len(found) == 8
    assert set(found.split) == {"train", "test", "val"} or set(found.split) == {"train", "test"}
    text = " ".join(found.understood)
    assert "8 videos in 2 classes" in text and "4 folders of frames, each a video" in text and " image" not in text
    assert len(found.decode(found.names.index("train/run/2"))) == 5
    assert read(tmp_path, kind="video", label_columns=[]).task is None


def test_unlabelled_folder_one_file_and_what_is_no_video(tmp_path):
    path = write_video(tmp_path / "v" / "a.mp4", 4)
    assert read(tmp_path / "v", kind="video").task is None
    assert len(read(path, kind="video")) == 1
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.doc").write_text("x")
    for spec, words in (
        (tmp_path / "t", r"t: holds no videos \(1 .doc\)"),
        (tmp_path / "nowhere", "there is no such file or folder"),
        (tmp_path / "t" / "a.doc", "files of this kind are not read as videos"),
    ):
        with pytest.raises(DataError, match=words):
            read(spec, kind="video")


def test_tables_with_splits_and_groups(tmp_path):
    for name in "abcd":
        write_video(tmp_path / "clips" / f"{name}.mp4", 4)
    rows = ["video,label,split,person"] + [f"clips/{n}.mp4,{n > 'b'},{s},{p}" for n, s, p in
            zip("abcd", ("train", "train", "test", "val"), (1, 1, 2, 3), strict=True)]  # fmt: skip
    (tmp_path / "index.csv").write_text("\n".join(rows))
    found = read(tmp_path / "index.csv", kind="video")
    assert found.counts == {"train": 2, "val": 1, "test": 1} and found.group is not None
    assert read(tmp_path, kind="video").counts == found.counts  # no class folders: the table beside
    with pytest.raises(DataError, match="there is no column 'film'"):
        read(tmp_path / "index.csv", kind="video", image_column="film")
    (tmp_path / "index.csv").write_text("label\nx\n")
    with pytest.raises(DataError, match="no column names the videos"):
        read(tmp_path / "index.csv", kind="video")


def test_lists_of_videomae(tmp_path):
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", 4)
    listing = tmp_path / "list.txt"
    listing.write_text("a.mp4 0 -1\nb.mp4 0 -1\n")
    assert read(listing, kind="video").task is None
    listing.write_text("a.mp4 3\nb.mp4 7\n")
    assert read(listing, kind="video").classes == ["3", "7"]
    listing.write_text("a.mp4 1 2 3\n")
    with pytest.raises(DataError, match="line 1 has 4 words"):
        read(listing, kind="video")


def test_stamps_change_with_the_file(tmp_path):
    path = write_video(tmp_path / "v" / "a.mp4", 4)
    before = read(tmp_path / "v", kind="video").fingerprint
    write_video(path, 9)
    assert read(tmp_path / "v", kind="video").fingerprint != before


def test_an_unknown_kind(tmp_path):
    with pytest.raises(ConfigError, match="kind='film'"):
        read(tmp_path, kind="film")


def test_built_in_digits_move_so_that_one_frame_does_not_tell_where():
    found = read("digits", kind="video")
    assert len(found) == 1797 and len(found.classes) == 8 and found.in_memory
    video = found.decode(found.labels.tolist().index(found.classes.index("down right")))
    frames = video.read([0, 5])
    assert frames.shape == (2, 3, 32, 32) and torch.equal(frames[0].roll((5, 5), (1, 2)), frames[1])
    with pytest.raises(DataError, match="columns were named"):
        read("digits", kind="video", label_columns="x")


def test_check_looks_through_videos(tmp_path):
    from vitkit.data import check

    for split in ("train", "test"):
        for action, count in (("run", 12), ("walk", 20)):
            write_video(tmp_path / split / action / f"{split}.mp4", count + len(split))
    write_video(tmp_path / "train" / "run" / "uneven.mp4", times=[*range(20), *(20 + 4 * i for i in range(20))])
    (tmp_path / "train" / "run" / "text.mp4").write_text("no video")
    (tmp_path / "test" / "run" / "copy.mp4").write_bytes((tmp_path / "train" / "run" / "uneven.mp4").read_bytes())
    report = check(tmp_path)
    text = report.text()
    assert not report.ok and "text.mp4" in text and "cannot be decoded as a video" in text
    assert "the same video in several splits" in text and "variable frame rate" in text and "frames: 16 to 40" in text
