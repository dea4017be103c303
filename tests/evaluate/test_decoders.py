"""Decoders, their losses and scores, and the whole way from a folder with masks to a trained one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit import data, weights
from vitkit.dense.decoders import DECODERS, LightDecoder, LinearDecoder, UNetDecoder, VolumeDecoder
from vitkit.dense.losses import dice_ce_loss, dice_loss
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import masks, metrics, segment
from vitkit.evaluate.feature_maps import Cached
from vitkit.evaluate.segment import Settings

SIZE = 48


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    kwargs = {"embed_dim": 32, "depth": 5, "num_heads": 2}
    return weights.load(
        "vit_tiny_patch16_224", pretrained=False, arch_kwargs=kwargs, image_size=SIZE, patch_size=8, say=None
    ).eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Bright discs on a dark ground: images/, masks/ with classes 0 and 1, splits by folder-free table."""
    folder = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    lines = ["image,mask,split"]
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    row, column = np.mgrid[:SIZE, :SIZE]
    for i in range(20):
        centre, radius = rng.integers(14, 34, 2), rng.integers(8, 13)
        disc = (row - centre[0]) ** 2 + (column - centre[1]) ** 2 < radius**2
        pixels = np.clip(60 + 120 * disc + rng.normal(0, 10, (SIZE, SIZE)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        Image.fromarray(disc.astype(np.uint8)).save(folder / f"masks/{i}.png")
        lines.append(f"images/{i}.png,masks/{i}.png,{'train' if i < 12 else 'val' if i < 16 else 'test'}")
    (folder / "index.csv").write_text("\n".join(lines))
    return data.read(folder / "index.csv", say=None)


@pytest.mark.parametrize("kind", DECODERS.values(), ids=DECODERS)
def test_logits_have_the_masks_size_on_any_grid(kind):
    decoder = kind(16, 3)
    maps = [torch.randn(2, 16, 3, 4) for _ in range(decoder.needs)]
    out = decoder(maps, (50, 60))
    assert out.shape == (2, 3, 50, 60)
    out.square().mean().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_what_the_published_decoders_promise():
    torch.manual_seed(0)
    linear, unet, plain = LinearDecoder(16, 3), UNetDecoder(16, 3), UNetDecoder(16, 3, rectify=False)
    assert not linear.decoder.bias.any() and 0.005 < linear.decoder.weight.std() < 0.02
    maps = [torch.randn(2, 16, 2, 2) for _ in range(5)]
    assert unet(maps).shape == (2, 3, 32, 32)
    assert unet(maps).min() >= 0 > plain(maps).min()
    with pytest.raises(ConfigError, match="4 feature maps for a decoder of 5"):
        unet(maps[:4])


def test_a_volume_decoder_sees_neighbouring_slices():
    torch.manual_seed(0)
    decoder = VolumeDecoder(16, 3, width=8, levels=2).eval()
    maps = [torch.randn(1, 5, 16, 2, 3) for _ in range(2)]
    out = decoder(maps, (32, 48))
    assert out.shape == (1, 3, 5, 32, 48)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = decoder([m[:, order] for m in maps], (5, 32, 48))
    assert not torch.allclose(shuffled, out[:, :, order], atol=1e-3)
    assert LightDecoder(16, 2, width=8)([maps[0][0]], (32, 48)).shape == (5, 2, 32, 48)


def test_dice_loss_is_its_formula_and_ignores_unknown_pixels():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    p = logits.softmax(1)
    values = []
    for b in range(2):
        for c in range(3):
            g = (target[b] == c).float()
            values.append(1 - (2 * (p[b, c] * g).sum() + 1e-5) / (p[b, c].sum() + g.sum() + 1e-5))
    assert torch.allclose(dice_loss(logits, target), torch.stack(values).mean())
    unknown, changed = target.clone(), logits.clone()
    unknown[0, 0] = 255
    changed[0, :, 0] += torch.randn(3, 5)
    for loss in (dice_loss, dice_ce_loss):
        assert torch.allclose(loss(logits, unknown), loss(changed, unknown))
        assert not torch.allclose(loss(logits, target), loss(changed, target))


def test_overlap_counts_false_positives_and_the_legacy_number_does_not():
    y = np.array([[[0, 0, 0, 0], [0, 1, 1, 0]]])
    everything = np.ones_like(y)
    assert masks.legacy_jaccard(y, everything, 2) == 1.0
    assert masks.mean_iou(y, everything, 2) == 2 / 8 == metrics.iou(y, everything)
    assert masks.mean_dice(y, everything, 2) == 2 * 2 / 10
    assert masks.mean_iou(y, y, 2) == masks.legacy_jaccard(y, y, 2) == 1.0
    assert np.isnan(masks.class_iou(y, y, 3)[2])  # neither there nor predicted: not in the mean
    assert masks.mean_iou(y, y, 3) == 1.0
    half = np.where(y == 0, 255, y)
    assert masks.mean_iou(half, everything, 2) == 1.0
    with pytest.raises(DataError, match="has class 3 of 2"):
        masks.confusion(y, y + 3 * (y == 1) - (y == 1), 2)
    with pytest.raises(DataError, match="do not fit together"):
        masks.confusion(y, y[:, :1], 2)


def test_from_a_folder_to_masks(vit, pictures):
    settings = Settings(rates=(1e-3, 1e-2), epochs=15, batch_size=4, optimizer="adamw")
    found = segment.fit(vit, pictures, decoder="unet", settings=settings)
    assert found.rate == max(found.table, key=lambda pair: pair[1])[0]
    assert found.scores["test_iou"] > 0.6
    said = found.predict(torch.stack([pictures.decode(i).expand(3, -1, -1) for i in range(2)]))
    truth = torch.stack([pictures.mask(i) for i in range(2)])
    assert said.shape == truth.shape and masks.mean_iou(truth.numpy(), said.numpy(), 2) > 0.6
    assert not any(p.grad is not None for p in vit.parameters())


def test_selection_reads_no_test_mask(vit, pictures):
    """Test masks turned inside out: the same rate, the same decoder, another test score."""
    settings = Settings(rates=(1e-3, 1e-2), epochs=2, batch_size=4, loss="dice_ce")
    own = [pictures.mask(i).numpy() for i in range(len(pictures))]
    inverted = [1 - m if s == "test" else m for m, s in zip(own, pictures.split, strict=True)]
    a = segment.fit(vit, pictures, own, decoder="light", settings=settings)
    b = segment.fit(vit, pictures, inverted, decoder="light", settings=settings)
    assert a.rate == b.rate and a.table == b.table
    assert all(torch.equal(p, q) for p, q in zip(a.decoder.parameters(), b.decoder.parameters(), strict=True))
    assert a.scores["test_iou"] != b.scores["test_iou"]


def test_maps_alone_flips_and_what_is_wrong(vit, pictures):
    rows = np.arange(4)
    plain = segment.cache(vit, pictures, rows, 1, (SIZE, SIZE))
    twice = segment.cache(vit, pictures, rows, 1, (SIZE, SIZE), flips=True)
    assert len(twice) == 2 * len(plain) and plain.maps.dtype == torch.float16
    one = Settings(rates=(0.01,), epochs=1, batch_size=3)
    found = segment.fit_maps(plain, make="linear", n_classes=2, settings=one)
    assert found.rate == 0.01 and segment.predict_maps(found.decoder, plain).shape == (4, SIZE, SIZE)
    with pytest.raises(DataError, match="several learning rates"):
        segment.fit_maps(plain, make="linear", n_classes=2)
    with pytest.raises(ConfigError, match="decoder is 'resunet'"):
        segment.fit(vit, pictures, decoder="resunet")
    with pytest.raises(DataError, match="its mask"):
        segment.cache(vit, pictures, rows, 1, (SIZE, SIZE), masks=[np.zeros((3, 3))] * 20)
    with pytest.raises(ConfigError, match="loss 'focal'"):
        Settings(loss="focal")
    with pytest.raises(ConfigError, match="trained on maps alone"):
        found.predict(torch.zeros(1, 3, SIZE, SIZE))
    assert isinstance(plain, Cached)
