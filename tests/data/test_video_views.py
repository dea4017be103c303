"""Clips from videos: which frames, which pixels, one augmentation for all frames, and videos that are too short."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit.data import transforms, video_views
from vitkit.data.loader import loader
from vitkit.errors import ConfigError
from vitkit.passport import Preprocess

P = Preprocess(image_size=(4, 16, 16), kind="video", frame_stride=2, interpolation="bilinear")


class Counting:
    """A video whose frame k is of value k."""

    name = "counting"

    def __init__(self, frames: int, size=(20, 30)):
        self.frames, self.size, self.asked = frames, size, []

    def __len__(self):
        return self.frames

    def read(self, numbers):
        numbers = np.asarray(numbers)
        assert numbers.min() >= 0 and numbers.max() < self.frames
        self.asked = numbers.tolist()
        return torch.as_tensor(numbers, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, *self.size).clone()


def times(clip):
    return clip[0, :, 0, 0].tolist()


def test_the_middle_clip():
    clip = transforms.eval_view(P)(Counting(20))
    assert clip.shape == (3, 4, 16, 16) and clip.dtype == torch.uint8 and clip.is_contiguous()
    assert times(clip) == [6, 8, 10, 12]


@pytest.mark.parametrize("frames,want", [(1, [0, 0, 0, 0]), (3, [0, 2, 2, 2]), (8, [0, 2, 4, 6])])
def test_a_short_video_goes_on_with_its_last_frame(frames, want):
    for view in (transforms.eval_view(P), transforms.pretrain_view(P), transforms.finetune_view(P, randaug=None)):
        assert times(view(Counting(frames))) == want
    several = video_views.test_views(P, segments=2, crops=3)(Counting(frames))
    assert several.shape == (6, 3, 4, 16, 16) and times(several[0])[0] == 0


def test_training_clips_start_anywhere_they_fit():
    torch.manual_seed(0)
    view = transforms.pretrain_view(P)
    starts = {times(view(Counting(12)))[0] for _ in range(60)}
    assert starts == set(range(5))


def test_several_crops_of_the_same_frames():
    video = Counting(30)
    clips = video_views.pretrain_view(P, clips=3)(video)
    assert clips.shape == (3, 3, 4, 16, 16) and len(video.asked) == 4  # decoded once
    assert times(clips[0]) == times(clips[1]) == times(clips[2])


def test_multi_scale_boxes_are_the_thirteen_places():
    torch.manual_seed(0)
    boxes = {video_views.multi_scale_box(40, 60, (1.0, 0.875, 0.75, 0.66)) for _ in range(4000)}
    sides = {(h, w) for h, w, _, _ in boxes}
    lengths = [40, 35, 30, 26]
    assert sides == {(a, b) for i, a in enumerate(lengths) for j, b in enumerate(lengths) if abs(i - j) <= 1}
    places = {(top, left) for h, w, top, left in boxes if (h, w) == (26, 26)}
    assert places == {(3 * down, 8 * right) for right, down in video_views.PLACES}


def test_every_frame_is_augmented_alike():
    class Still(Counting):
        def read(self, numbers):
            picture = torch.arange(20 * 30).view(20, 30).remainder(256).to(torch.uint8)
            return picture.expand(len(numbers), 3, 20, 30).clone()

    torch.manual_seed(0)
    view = transforms.finetune_view(P, randaug="rand-m7-n4-mstd0.5-inc1", rotate=20)
    for _ in range(4):
        clip = view(Still(20))
        assert all(torch.equal(clip[:, 0], clip[:, t]) for t in range(4))


def test_dense_test_views_are_the_published_ones():
    """Segments start at int(k room / (S - 1)) of the thinned video, crops at int(c free / 2) along the long side."""

    class Ramp(Counting):
        def read(self, numbers):
            video = super().read(numbers).float()
            return (video + 4 * torch.arange(30)).clamp(max=255).to(torch.uint8)

    p = Preprocess(image_size=(4, 20, 20), kind="video", frame_stride=2, interpolation="bilinear")
    views = video_views.test_views(p, segments=3, crops=3)(Ramp(21))  # 11 thinned frames, 7 to spare
    assert views.shape == (9, 3, 4, 20, 20)
    assert [times(v)[0] for v in views[::3]] == [0, 2 * int(1 * 7 / 2), 14]
    left = [(int(v[0, 0, 0, 0]) - int(views[0, 0, 0, 0, 0])) // 4 for v in views[:3]]
    assert left == [0, 5, 10]
    with pytest.raises(ConfigError, match="0 clips x 3 crops"):
        video_views.test_views(p, segments=0)


def test_grey_models_get_grey_clips():
    grey = Preprocess(mean=(0.5,), std=(0.5,), image_size=(4, 16, 16), kind="video", frame_stride=1)
    assert transforms.eval_view(grey)(Counting(9)).shape == (1, 4, 16, 16)


def test_batches_are_the_same_for_any_number_of_workers(tmp_path):
    from tests.videos import write_video
    from vitkit.data import read

    for i in range(6):
        write_video(tmp_path / f"{i}.mp4", 12)
    images = read(tmp_path, kind="video")
    view = transforms.pretrain_view(P)
    runs = [list(loader(images, view, batch_size=2, seed=0, workers=workers)) for workers in (0, 2)]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(*runs, strict=True))
    assert runs[0][0]["image"].shape == (2, 3, 4, 16, 16)


def test_a_damaged_video_is_replaced_counted_and_limited(tmp_path):
    from tests.videos import write_video
    from vitkit.data import read
    from vitkit.errors import DataError

    for i in range(5):
        write_video(tmp_path / f"{i}.mp4", 12)
    (tmp_path / "3.mp4").write_bytes(b"no video")
    images = read(tmp_path, kind="video")
    batches = list(loader(images, transforms.eval_view(P), batch_size=5, seed=0, shuffle=False, max_bad=0.2))
    assert batches[0]["bad"] == [str(tmp_path / "3.mp4")] and batches[0]["index"].tolist() == [0, 1, 2, 4, 4]
    with pytest.raises(DataError, match=r"1 file of 5 cannot be read, more than max_bad=0\.1"):
        list(loader(images, transforms.eval_view(P), batch_size=5, seed=0, max_bad=0.1))
