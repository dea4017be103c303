"""Streams of frames: what is read, where nothing may look, and the views of moments."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit.data import read
from vitkit.data.frame_views import Augment, FourViews, Observe, crop_box, jitter
from vitkit.data.frames import Moment, actions
from vitkit.data.streams import ArraySource, Stream
from vitkit.errors import ConfigError, DataError


def counting(frames: int, side: int = 12) -> np.ndarray:
    """Frame t is filled with 20 + t."""
    return np.repeat(np.arange(20, 20 + frames, dtype=np.uint8), side * side).reshape(frames, side, side)


def moment(stream: np.ndarray, index: int, low: int = 0, high: int | None = None) -> Moment:
    return Moment(Stream("s", len(stream), ArraySource(stream, "s")), index, low, len(stream) if high is None else high)


def starts(image: torch.Tensor) -> list[int]:
    """The frame numbers that an observation of `counting` holds."""
    return [int(value) - 20 for value in image[:, 0, 0]]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_arrays_are_split_by_time_and_nothing_looks_across(tmp_path):
    np.savez(tmp_path / "a.npz", one=counting(100), two=counting(50))
    said = []
    images = read(tmp_path / "a.npz", kind="frames", say=said.append)
    assert images.kind == "frames" and "2 streams of 150 frames in 2 episodes (one, two)" in said[0]
    assert images.counts == {
        "train": 65 - 2 + 33 - 2,
        "val": 15 - 2,
        "test": 20 - 2 + 10 - 2,
    }  # two's 7 for val are too few
    for i in range(len(images)):
        m = images.decode(i)
        where = [m.low, m.high]
        cut = (0, 65, 80, 100) if m.stream.name == "one" else (0, 33, 40, 50)
        assert where in [list(pair) for pair in pairwise(cut)]
        assert m.low <= m.index <= m.high - 3


def test_fractions_are_the_users(tmp_path):
    np.savez(tmp_path / "a.npz", one=counting(100))
    images = read(tmp_path / "a.npz", kind="frames", val_fraction=0.0, test_fraction=0.0)
    assert images.counts == {"train": 98}


def test_episodes_and_terminals_bound_moments(tmp_path):
    numbers = np.repeat([4, 5, 9], [20, 30, 50])
    np.savez(tmp_path / "e.npz", frames=counting(100), episodes=numbers, actions=np.arange(100))
    ends = np.zeros(100, bool)
    ends[[19, 49, 99]] = True
    np.savez(tmp_path / "t.npz", frames=counting(100), terminals=ends)
    for name in ("e", "t"):
        images = read(tmp_path / f"{name}.npz", kind="frames", val_fraction=0, test_fraction=0)
        assert {(m.low, m.high) for m in map(images.decode, range(len(images)))} == {(0, 20), (20, 50), (50, 100)}
        assert images.names[0] == f"{name}[0]"
    images = read(tmp_path / "e.npz", kind="frames", val_fraction=0, test_fraction=0)
    assert actions(images).tolist() == (images.store.index + 2).tolist()


def test_mapped_files_with_logs_beside(tmp_path):
    np.save(tmp_path / "game.npy", counting(40))
    np.save(tmp_path / "game.actions.npy", np.arange(40) % 3)
    images = read(tmp_path, kind="frames")
    assert [s.name for s in images.store.streams] == ["game"]
    assert (
        isinstance(images.decode(3).stream.read(2, 4), np.ndarray) and images.decode(3).stream.read(2, 4)[0, 0, 0] == 22
    )
    assert actions(images)[0] == 2
    before = images.fingerprint
    np.save(tmp_path / "game.npy", counting(40)[::-1])
    assert read(tmp_path, kind="frames").fingerprint != before


def test_folders_of_pictures_and_animations(tmp_path):
    for t, frame in enumerate(counting(20)):
        (tmp_path / "run1").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "run1" / f"f{t}.png")  # f10 comes after f9
    rgb = [Image.fromarray(np.stack([frame] * 3, -1)) for frame in counting(15)]
    rgb[0].save(tmp_path / "film.gif", save_all=True, append_images=rgb[1:])
    images = read(tmp_path, kind="frames", val_fraction=0, test_fraction=0)
    assert [(s.name, s.length) for s in images.store.streams] == [("film", 15), ("run1", 20)]
    run = next(m for m in map(images.decode, range(len(images))) if m.stream.name == "run1" and m.index == 9)
    assert starts(Observe((12, 12))(run)) == [9, 10, 11]
    assert images.decode(0).stream.read(0, 2).shape == (2, 12, 12, 3)


def test_a_damaged_frame_is_named(tmp_path):
    for t, frame in enumerate(counting(12)):
        Image.fromarray(frame).save(tmp_path / f"f{t:02}.png")
    (tmp_path / "f05.png").write_bytes((tmp_path / "f05.png").read_bytes()[:30])
    images = read(tmp_path, kind="frames", val_fraction=0, test_fraction=0)
    with pytest.raises(DataError, match=r"f05\.png"):
        Observe((12, 12))(images.decode(4))
    Image.fromarray(counting(1, 14)[0]).save(tmp_path / "f05.png")
    with pytest.raises(DataError, match=r"f05\.png: \(14, 14\) beside \(12, 12\)"):
        Observe((12, 12))(images.decode(4))


def test_what_is_no_stream_is_refused(tmp_path):
    cases = {
        "one": r"holds one frame \(a\.png\)\n  fix: a stream has frames in order",
        "two": r"holds no streams of frames \(x/ holds one frame and is left out",
        "empty": r"holds no streams of frames\n",
    }
    for name in cases:
        (tmp_path / name).mkdir()
    Image.fromarray(counting(1)[0]).save(tmp_path / "one" / "a.png")
    (tmp_path / "two" / "x").mkdir()
    Image.fromarray(counting(1)[0]).save(tmp_path / "two" / "x" / "a.png")
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / name, kind="frames")
    np.savez(tmp_path / "f.npz", x=np.zeros((9, 4, 4), np.float32))
    np.savez(tmp_path / "l.npz", frames=counting(20), actions=np.zeros(3))
    np.save(tmp_path / "b.npy", np.zeros((9, 4, 4, 2), np.uint8))
    np.savez(tmp_path / "s.npz", frames=counting(20), episodes=np.arange(20))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "film.mp4").write_bytes(b"0")
    for name, message in (
        ("f.npz", r"no array of frames among x float32\[9, 4, 4\]"),
        ("l.npz", r"actions of l has shape \(3,\) for 20 frames"),
        ("b.npy", r"uint8 of shape \(9, 4, 4, 2\) are no frames"),
        ("s.npz", r"every episode is shorter than three observations"),
        ("broken.npz", r"cannot be read as \.npz"),
        ("film.mp4", r"files of this kind hold no streams"),
        ("nowhere", r"there is no such file"),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path / name, kind="frames")


def test_actions_that_were_not_logged_are_asked_for(tmp_path):
    np.savez(tmp_path / "a.npz", frames=counting(30))
    with pytest.raises(DataError, match=r"no actions are logged for a\n  fix: an array `actions`"):
        actions(read(tmp_path / "a.npz", kind="frames"))
    with pytest.raises(ConfigError, match="holds no streams of frames"):
        actions(read("digits"))


# ---- views -----------------------------------------------------------------------------------------------------------


def test_neighbours_share_no_frame_and_stay_in_bounds():
    found = FourViews((12, 12))(moment(counting(30), 10))
    assert [starts(found[key]) for key in ("image", "image_z", "image_w")] == [[10, 11, 12], [7, 8, 9], [13, 14, 15]]
    first = FourViews((12, 12))(moment(counting(30), 9, 9, 20))
    assert [starts(first[key]) for key in ("image", "image_z", "image_w")] == [[9, 10, 11], [9, 10, 11], [12, 13, 14]]
    last = FourViews((12, 12))(moment(counting(30), 16, 9, 20))
    assert [starts(last[key]) for key in ("image_z", "image_w")] == [[13, 14, 15], [17, 18, 19]]
    assert starts(FourViews((12, 12), frames=2)(moment(counting(30), 10))["image_z"]) == [8, 9]


def test_a_moment_too_short_for_its_frames_is_named():
    with pytest.raises(DataError, match=r"s\[0\]: its piece of 9 frames is shorter than three observations of 4"):
        Observe((12, 12), frames=4)(moment(counting(9), 0))


def test_flicker_frames_are_replaced_within_bounds():
    stream = counting(30)
    stream[[10, 11]] = 0
    assert starts(Observe((12, 12))(moment(stream, 9))) == [9, 9, 12]
    assert starts(Observe((12, 12))(moment(stream, 9, 0, 12))) == [9, 9, 9]
    assert starts(Observe((12, 12), flicker=0)(moment(stream, 9))) == [9, -20, -20]
    dark = np.zeros((30, 12, 12), np.uint8)  # nothing brighter is near: kept
    assert not Observe((12, 12))(moment(dark, 9)).any()


def test_pixels_beyond_the_last_whole_patch_are_cut_others_resized():
    stream = np.random.default_rng(0).integers(30, 255, (12, 20, 20), dtype=np.uint8)
    cut = Observe((16, 16), (8, 8))(moment(stream, 0))
    assert torch.equal(cut, torch.from_numpy(stream[:3, :16, :16]))
    assert Observe((8, 16), (8, 8))(moment(stream, 0)).shape == (3, 8, 16)
    colour = np.repeat(stream[..., None], 3, -1)
    assert Observe((16, 16), (8, 8), frames=2, colour=True)(moment(colour, 0)).shape == (6, 16, 16)
    assert torch.equal(Observe((16, 16), (8, 8))(moment(colour, 0)), cut)


def test_views_are_drawn_apart_and_repeat_with_the_seed():
    stream = np.random.default_rng(0).integers(30, 255, (30, 24, 24), dtype=np.uint8)
    for photometric in ("stacked", "frame"):
        view = FourViews((24, 24), augment=Augment(photometric=photometric))
        torch.manual_seed(0)
        a = view(moment(stream, 10))
        torch.manual_seed(0)
        b = view(moment(stream, 10))
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == torch.uint8 for key in a)
        assert not torch.equal(a["image"], a["image_y"])


def test_the_official_blur_changes_nothing():
    """7 x 7, deviation up to 0.2 pixels: why these views have none."""
    from torchvision.transforms.v2 import functional as F

    x = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    assert torch.equal(F.gaussian_blur(x, [7, 7], [0.2, 0.2]), x)


def test_frame_mode_treats_frames_alike():
    frame = torch.randint(40, 200, (1, 1, 16, 16), dtype=torch.uint8)
    x = frame.repeat(3, 1, 1, 1)
    torch.manual_seed(1)
    for change in jitter(coloured=False):
        x = change(x)
    assert torch.equal(x[0], x[1]) and torch.equal(x[1], x[2]) and len(jitter(coloured=True)) == 4


def test_crops_have_torchvisions_statistics():
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    ours = torch.tensor([crop_box(84, 84, (0.08, 1.0)) for _ in range(1500)]).float().mean(0)
    own = RandomResizedCrop(84)
    boxes = [own.make_params([torch.zeros(1, 84, 84)]) for _ in range(1500)]
    theirs = torch.tensor([[b[key] for key in ("top", "left", "height", "width")] for b in boxes]).float().mean(0)
    assert (ours - theirs).abs().max() < 2.5
    assert crop_box(10, 1000, (1.0, 1.0))[2] == 10


def test_a_wrong_crop_is_refused():
    with pytest.raises(ConfigError, match=r"crop_scale=\(0\.5, 1\.5\)"):
        Augment(scale=(0.5, 1.5))
