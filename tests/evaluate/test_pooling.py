"""Linear inputs as slices of one extraction; volumes whose slices' order, padding and neighbours do not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit import tokens, weights
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import pooling, rescale


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    kwargs = {"embed_dim": 24, "depth": 5, "num_heads": 3}
    return weights.load(
        "vit_tiny_patch16_224", pretrained=False, arch_kwargs=kwargs, image_size=32, patch_size=8, say=None
    ).eval()


def test_every_variant_is_a_slice_of_the_largest(vit):
    x = torch.randn(3, 3, 32, 24)
    whole = pooling.encode_inputs(vit, x, 4)
    taps = tokens.encode(vit, x, layers=[-4, -3, -2, -1]).taps
    for blocks in (1, 2, 4):
        for avgpool in (True, False):
            want = pooling.linear_input(taps, blocks, avgpool)
            assert torch.equal(whole[:, pooling.columns(24, 4, blocks, avgpool)], want)
    assert torch.allclose(want[:, -24:], vit.forward_features(x)[:, 0], atol=1e-6)


def test_extraction_is_in_eval_mode_and_restores_the_mode(vit):
    vit.train()
    x = torch.randn(5, 3, 32, 32)
    found = pooling.extract(vit, x.split(2), blocks=2)
    assert vit.training and vit.blocks[0].training
    vit.eval()
    with torch.no_grad():
        assert np.allclose(found, pooling.encode_inputs(vit, x, 2), atol=1e-6)
    with pytest.raises(DataError, match="no images"):
        pooling.extract(vit, [])


def test_volumes_ignore_order_padding_and_company(vit):
    short, long = torch.randn(2, 3, 32, 32), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        alone = pooling.volume_inputs(vit, [short])[0]
        both = pooling.volume_inputs(vit, [long, short], batch_size=3)
        shuffled = pooling.volume_inputs(vit, [long[torch.randperm(5)], short.flip(0)])
        by_hand = pooling.encode_inputs(vit, long).mean(0)
    assert torch.allclose(both[1], alone, atol=1e-6)
    assert torch.allclose(both, shuffled, atol=1e-6)
    assert torch.allclose(both[0], by_hand, atol=1e-6)


def test_padding_is_found_and_never_a_whole_volume(vit):
    padded = pooling.pad_volumes([torch.zeros(1, 3, 8, 8), torch.zeros(3, 3, 8, 8)])
    assert pooling.is_padding(padded).tolist() == [[False, True, True], [False, False, False]]
    with pytest.raises(DataError, match="no slice that is not padding"):
        pooling.volume_inputs(vit, torch.full((1, 2, 3, 32, 32), pooling.PADDING))
    with pytest.raises(DataError, match="slices of shapes"):
        pooling.pad_volumes([torch.zeros(1, 3, 8, 8), torch.zeros(3, 3, 8, 9)])


def test_too_many_blocks_are_refused(vit):
    with pytest.raises(ConfigError, match="6 blocks of a ViT with 5"):
        pooling.encode_inputs(vit, torch.zeros(1, 3, 32, 32), 6)
    with pytest.raises(ConfigError, match="5 blocks are asked of features with 4"):
        pooling.columns(24, 4, 5, True)
    with pytest.raises(ConfigError, match="blocks of 1 taps"):
        pooling.linear_input([(torch.zeros(1, 4, 8), torch.zeros(1, 8))], 2)


def test_rescaling_guards_constant_slices():
    x = torch.stack([torch.full((4, 4), 7.0), torch.arange(16.0).view(4, 4), -torch.arange(16.0).view(4, 4)])
    found = rescale.min_max(x)
    assert torch.isfinite(found).all() and not found[0].any()
    assert found[1:].amin() == 0 and found[1:].amax() == 1
    assert torch.equal(rescale.min_max((x[1:2]).to(torch.uint8)), found[1:2])
    with pytest.raises(DataError, match="not finite"):
        rescale.min_max(torch.tensor([[[float("nan"), 1.0]]]))


def test_the_view_of_the_protocol():
    x = torch.randint(0, 4000, (2, 1, 30, 40)).float()
    view = rescale.eval_view(x, (24, 16))
    assert view.shape == (2, 3, 24, 16)
    assert torch.equal(view[1], rescale.eval_view(x[1], (24, 16)))  # every image by its own values
    cropped = rescale.eval_view(x, 24, resize=32)
    assert cropped.shape == (2, 3, 24, 24)
    back = rescale.DEFAULT.denormalise(cropped)
    assert torch.allclose(back.amin((2, 3)), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(back.amax((2, 3)), torch.ones(2, 3), atol=1e-5)
    with pytest.raises(DataError, match="2 channels"):
        rescale.eval_view(torch.zeros(2, 8, 8), 8)
    with pytest.raises(DataError, match="window"):
        rescale.window(x, 5, 5)
    assert rescale.window(torch.tensor([-2000.0, 0, 700]), -1024, 600).tolist() == [-1024, 0, 600]
