"""Views of videos averaged, features of windows, heads by label maps, and what a teacher adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pretrain.test_videomae_v2 import model
from vitkit.adapt.full import Full
from vitkit.adapt.full import Settings as FullSettings
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.video import merge_views, window_features, window_starts
from vitkit.parts.label_maps import convert_head, read_label_map
from vitkit.parts.logit_distillation import distillation_loss
from vitkit.settings import Task


def test_views_are_averaged_after_the_softmax():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], np.float32)
    found = merge_views(probabilities, [7, 3, 7, 3])
    assert found.videos.tolist() == [7, 3] and np.allclose(found.probabilities, [[0.75, 0.25], [0.35, 0.65]])
    assert found.top(1, np.array([0, 0])) == 0.5 and found.top(2, np.array([0, 0])) == 1.0
    with pytest.raises(DataError, match="4 views, but 2 numbers of videos"):
        merge_views(probabilities, [1, 2])


def test_windows_share_tubes_and_give_the_numbers_of_separate_clips():
    vit = model().eval()
    frames = torch.randint(0, 256, (13, 20, 30, 3), dtype=torch.uint8)
    assert window_starts(13, 4, 4) == [0, 4, 8] and window_starts(3, 4, 4) == [0]
    for stride in (2, 3):  # shared tubes, and starts between tubes
        starts = window_starts(13, 4, stride)
        alone = [window_features(vit, frames[s : s + 4], [0]) for s in starts]
        assert np.allclose(window_features(vit, frames, starts, batch_size=2), np.concatenate(alone), atol=1e-5)
    raw = window_features(vit, frames, [0], normalise=False)
    assert not np.allclose(raw, window_features(vit, frames, [0]))
    assert window_features(vit, frames[:2], [0]).shape == (1, 24)  # goes on with the last frame
    with pytest.raises(ConfigError, match="windows of 4 frames every 0"):
        window_starts(13, 4, 0)
    with pytest.raises(DataError, match="frames of shape"):
        window_features(vit, frames[:0], [0])


def test_a_head_is_converted_by_a_label_map(tmp_path):
    path = tmp_path / "map.json"
    path.write_text("[2, 0]")
    vit = model()
    vit.reset_classifier(3)
    before = vit.head.weight.detach().clone()
    method = Full(vit, FullSettings(label_map=str(path)), task=Task("single", ("a", "b")))
    assert torch.equal(method.vit.head.weight, before[[2, 0]])
    with pytest.raises(DataError, match="the label map has 2 entries for 3 classes"):
        read_label_map(path, 3)
    with pytest.raises(ConfigError, match="names class 9 of a head of 3 classes"):
        convert_head({"weight": before}, [9])
    with pytest.raises(ConfigError, match="label_map, but the model has no head"):
        Full(model(), FullSettings(label_map=str(path)), task=Task("single", ("a", "b")))
    path.write_text("{")
    with pytest.raises(DataError, match="no label map can be read"):
        read_label_map(path, 2)


def test_distillation_is_the_divergence_of_probabilities():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    p = (teacher / 2).softmax(-1)
    want = 4 * (p * (p.log() - (student / 2).log_softmax(-1))).sum(1).mean()
    assert torch.allclose(distillation_loss(student, teacher, 2.0), want)
    for wrong, words in (
        ({"teacher_weight": 2.0}, "teacher_weight is 2.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            FullSettings(**wrong)
