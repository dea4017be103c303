"""Volumes through a 2-D trunk: maps of slices, a 3-D decoder that sees neighbours, nothing chosen on test volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit import weights
from vitkit.dense import volume_segment
from vitkit.dense.volume_segment import Training
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import knn, pooling

TRAINING = Training(rates=(1e-3, 1e-2), epochs=12, width=8, levels=2)


@pytest.fixture(scope="module")
def vit():
    kwargs = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    return weights.load(
        "vit_tiny_patch16_224", pretrained=False, arch_kwargs=kwargs, image_size=32, patch_size=8, say=None
    ).eval()


@pytest.fixture(scope="module")
def cases():
    """Bright balls in volumes of different depth and size."""
    rng = np.random.default_rng(0)
    volumes, masks = [], []
    for i in range(12):
        shape = (6 + i % 3, 24, 24 + 4 * (i % 2))
        grid = np.mgrid[tuple(slice(n) for n in shape)]
        centre = [rng.integers(n // 3, 2 * n // 3 + 1) for n in shape]
        scale = (0.45, 1.0, 1.0)
        ball = sum(((g - c) / s) ** 2 for g, c, s in zip(grid, centre, scale, strict=True)) < 36
        volumes.append(np.clip(60 + 130 * ball + rng.normal(0, 8, shape), 0, 255).astype(np.uint8))
        masks.append(ball.astype(np.uint8))
    split = ["train"] * 7 + ["val"] * 2 + ["test"] * 3
    return volumes, masks, split


@pytest.fixture(scope="module")
def found(vit, cases):
    return volume_segment.fit(vit, *cases, size=32, training=TRAINING)


def test_from_volumes_to_masks(vit, cases, found):
    volumes, masks, _ = cases
    assert found.scores["test_dice"] > 0.6 and found.rate == max(found.table, key=lambda pair: pair[1])[0]
    assert found.cases.shape == (3, 2, 2) and found.cases.sum() == sum(m.size for m in masks[-3:])
    said = found.predict(volumes[-1])
    assert said.shape == masks[-1].shape and said.dtype == np.uint8
    assert volume_segment.mean_dice(found.cases) == found.scores["test_dice"]
    assert not any(p.grad is not None for p in vit.parameters())


def test_order_of_slices_matters_for_masks_and_not_for_classes(vit, cases, found):
    """The sheet's third demand."""
    volume = cases[0][0]
    order = np.random.default_rng(1).permutation(len(volume))
    assert not np.array_equal(found.predict(volume[order]), found.predict(volume)[order])
    x = vit.passport.preprocess.normalise(torch.from_numpy(volume)[:, None, :, :24].expand(-1, 3, -1, -1))
    with torch.no_grad():
        plain, mixed = pooling.volume_inputs(vit, [x, x[torch.from_numpy(order)]], blocks=1)
    assert torch.allclose(plain, mixed, atol=1e-6)
    y = np.array([[1.0, 0.0], [0.0, 1.0]])
    scores = knn.scores(np.eye(2, x := 48), y, np.stack([plain, mixed])[:, :x], n_classes=2, settings=knn.Settings(k=1))
    assert np.array_equal(scores[0], scores[1])


def test_selection_reads_no_test_mask(vit, cases, found):
    volumes, masks, split = cases
    turned = [1 - m if s == "test" else m for m, s in zip(masks, split, strict=True)]
    again = volume_segment.fit(vit, volumes, turned, split, size=32, training=TRAINING)
    assert again.table == found.table and again.scores["test_dice"] != found.scores["test_dice"]
    for a, b in zip(again.decoder.parameters(), found.decoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_maps_are_those_of_single_slices(vit, cases):
    volume = cases[0][0]
    whole = volume_segment.volume_maps(vit, volume, (32, 40), 2)
    assert whole.shape == (2, len(volume), 24, 4, 5)
    one = volume_segment.volume_maps(vit, volume[2:3], (32, 40), 2)
    assert torch.allclose(whole[:, 2:3].float(), one.float(), atol=2e-3)


def test_dice_of_volumes_leaves_out_what_is_not_there():
    cases = np.array(
        [[[5, 0, 0], [0, 4, 0], [0, 0, 0]], [[9, 0, 0], [0, 0, 0], [0, 0, 0]], [[5, 1, 0], [1, 2, 0], [0, 0, 3]]]
    )
    assert volume_segment.mean_dice(cases) == pytest.approx(np.mean([1.0, np.mean([4 / 6, 1.0])]))


def test_what_is_wrong_is_said(vit, cases):
    volumes, masks = cases[:2]
    with pytest.raises(DataError, match=r"volume 0 is \(6, 24, 24\), its mask \(6, 24, 23\)"):
        volume_segment.fit(vit, volumes[:1], [masks[0][..., 1:]], ["train"])
    with pytest.raises(DataError, match="no training volumes"):
        volume_segment.fit(vit, volumes[:1], masks[:1], ["test"], training=Training(levels=1))
    with pytest.raises(DataError, match="no validation volumes"):
        volume_segment.fit(vit, volumes[:1], masks[:1], ["train"], training=Training(levels=1))
    with pytest.raises(DataError, match="float32"):
        volume_segment.volume_maps(vit, volumes[0].astype(np.float32), 32, 1)
    with pytest.raises(ConfigError, match="epochs is 0"):
        Training(epochs=0)


def test_the_trunk_is_left_in_the_modes_it_was_in(vit, cases):
    vit.train()
    vit.blocks[0].eval()
    try:
        modes = [module.training for module in vit.modules()]
        first = volume_segment.volume_maps(vit, cases[0][0], 32, 2)
        assert modes == [module.training for module in vit.modules()]
    finally:
        vit.eval()
    assert torch.equal(first, volume_segment.volume_maps(vit, cases[0][0], 32, 2))
