"""Trait panels: colours in the right place and order, any image shape, and words that a person can read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit import weights
from vitkit.errors import ConfigError
from vitkit.explain import traits
from vitkit.explain.prompt_cam import Settings, inject, install_scorer

NAMES = ["wren", "owl", "a bird with a name that is far too long for a caption"]


@pytest.fixture(scope="module")
def vit():
    arch = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = weights.load(
        "vit_tiny_patch16_224", pretrained=False, image_size=32, patch_size=8, arch_kwargs=arch, say=None
    )
    torch.manual_seed(0)
    install_scorer(inject(vit, Settings(prompts=3)))
    return vit.eval()


def test_the_hottest_patch_is_red_and_the_coldest_blue():
    grey = torch.linspace(0, 1, 64).expand(1, 1, 48, 64)
    maps = torch.zeros(1, 6, 8)
    maps[0, 1, 6] = 1.0
    picture = traits.overlay(grey, maps)[0].astype(int)
    assert picture.shape == (48, 64, 3)
    hot, cold = picture[12, 52], picture[40, 4]
    assert hot[0] > hot[2] + 60 and cold[2] > cold[0] + 60
    red, _, blue = picture.transpose(2, 0, 1)
    assert np.unravel_index((red - blue).argmax(), red.shape)[0] // 8 == 1


def test_a_red_photograph_stays_red():
    photo = torch.zeros(1, 3, 32, 32)
    photo[:, 0, :, 16:] = 1.0
    flat = traits.overlay(photo, torch.zeros(1, 4, 4))[0].astype(int)
    assert (flat[..., 0] - flat[..., 2])[:, 20:].mean() > (flat[..., 0] - flat[..., 2])[:, :12].mean() + 100


def test_smoothing_is_the_gaussian_of_the_sheet():
    point = torch.zeros(1, 1, 21, 21)
    point[..., 10, 10] = 1
    found = traits.smooth(point)[0, 0]
    line = torch.exp(-torch.arange(-4.0, 5).square() / (2 * 1.7**2))
    line /= line.sum()
    assert torch.allclose(found[6:15, 6:15], line[:, None] * line, atol=1e-6)
    assert found[:6].abs().sum() == 0 and torch.allclose(found.sum(), torch.ones(()), atol=1e-5)
    assert torch.allclose(traits.smooth(torch.ones(2, 1, 3, 9)), torch.ones(2, 1, 3, 9), atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
def test_one_panel_a_class(vit, size):
    pixels = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(0))
    found = traits.panels(vit, pixels, [0, 2], NAMES, [0, 0, 1, None], heads=4)
    assert [title for title, _ in found] == [f"What tells “{NAMES[0]}”", f"What tells “{NAMES[2]}”"]
    for _, picture in found:
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert 300 < picture.shape[0] < 2000 and 600 < picture.shape[1] < 1200
        assert picture.std() > 20
    whole = traits.panels(vit, (pixels * 255).round().to(torch.uint8), [0], NAMES, [0, 0, 1, 2])
    assert whole[0][1].shape == found[0][1].shape


def test_examples_are_of_the_label_right_ones_first():
    scores = torch.tensor([[3.0, 0, 0], [0, 3, 0], [5, 0, 0], [0, 0, 1]])
    assert traits.examples(scores, [0, 0, 0, 1], 0) == [2, 0]
    assert traits.examples(scores, [1, 0, 1, 1], 0) == [1]
    assert traits.examples(scores, [-1, -1, -1, -1], 2)[0] == 3


def test_errors_say_what_to_do(vit):
    pixels = torch.rand(1, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"class 3 does not exist\n.*0\.\.2"):
        traits.panels(vit, pixels, [3], NAMES, [0])
    with pytest.raises(ConfigError, match="2 class names for 3 classes"):
        traits.panels(vit, pixels, [0], NAMES[:2], [0])
    with pytest.raises(ConfigError, match="heads is 0"):
        traits.panels(vit, pixels, [0], NAMES, [0], heads=0)
    with pytest.raises(ConfigError, match="cannot be laid over"):
        traits.overlay(pixels, torch.zeros(1, 2, 2, 2))
