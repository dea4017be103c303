"""UNETR on volumes of any shape, windows that do not depend on how many run together, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit import tokens, weights
from vitkit.dense.losses import dice_ce_loss, dice_loss
from vitkit.dense.unetr import UNETR, from_monai, stages
from vitkit.dense.volume_windows import sliding_windows
from vitkit.errors import ConfigError, WeightsError
from vitkit.evaluate.volumes import dice_cases, mean_dice, volume_means


def small(size=(8, 8, 8), patch=(4, 4, 4), chans=1, depth=4, **arch):
    kwargs = {"embed_dim": 12, "depth": depth, "num_heads": 2, **arch}
    return weights.load(
        "volume_vit_tiny_patch16_96", pretrained=False, arch_kwargs=kwargs, image_size=size, patch_size=patch,
        in_chans=chans, say=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "size, patch, chans",
    [
        ((8, 8, 8), (4, 4, 4), 1),
        ((8, 12, 24), (2, 6, 12), 2),
        ((4, 8, 8), (1, 8, 4), 1),
        ((32, 16, 16), (16, 16, 8), 3),
    ],
)
def test_logits_of_every_shape(size, patch, chans):
    model = UNETR(small(size, patch, chans), 3, feature_size=2, layers=(0, 1, 2))
    volume = torch.randn(1, chans, *size)
    logits = model(volume)
    assert logits.shape == (1, 3, *size)
    dice_ce_loss(logits, torch.randint(0, 3, (1, *size)), smooth=1e-6, over=0.0, squared=True).backward()
    unused = ("vit.norm", "vit.head")
    silent = [
        n
        for n, p in model.named_parameters()
        if (p.grad is None or not p.grad.abs().sum()) and not n.startswith(unused)
    ]
    # A skip that is one voxel in size is constant after instance norm: nothing can be learnt from it.
    assert not silent or min(a // b for a, b in zip(size, patch, strict=True)) * 2 <= 4, silent


def test_the_patch_is_undone_axis_by_axis():
    assert stages((12, 12, 12)) == ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert stages((1, 4, 16)) == ((1, 2, 2), (1, 2, 2), (1, 1, 2))
    assert stages((3, 2, 8)) == ((2, 2, 2), (1, 1, 2), (1, 1, 2))


def test_maps_are_raw_taps_and_the_normalised_output():
    vit = small().eval()
    model = UNETR(vit, 2, feature_size=2, layers=(0, 1, 2))
    volume = torch.randn(2, 1, 8, 8, 8)
    with torch.no_grad():
        maps = model.maps(volume)
        found = tokens.encode(vit, volume, layers=[0, 1, 2], norm=False)
        assert all(torch.equal(a, b.map) for a, b in zip(maps, found.taps, strict=False))
        assert torch.equal(maps[-1], tokens.encode(vit, volume).map)
        bigger = torch.randn(1, 1, 12, 8, 16)  # not the model's own size
        assert model(bigger).shape == (1, 2, 12, 8, 16)


def test_what_unetr_refuses():
    with pytest.raises(ConfigError, match="needs a ViT of volumes"):
        UNETR(weights.load("vit_tiny_patch16_224", pretrained=False, arch_kwargs={"depth": 4}, say=None), 2)
    with pytest.raises(ConfigError, match=r"layers \(3, 6, 9\) of a ViT with 4 blocks\n.*e.g. \(0, 1, 2\)"):
        UNETR(small(), 2)
    with pytest.raises(ConfigError, match="at least background and one class"):
        UNETR(small(), 1, layers=(0, 1, 2))


def test_official_tensors_land_completely_or_not_at_all():
    model = UNETR(small(class_token=False, global_pool="avg"), 2, feature_size=2, layers=(0, 1, 2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    monai = {}
    for name, value in state.items():
        if name == "vit.patch_embed.proj.weight":
            name, value = "vit.patch_embedding.patch_embeddings.1.weight", value.permute(0, 2, 3, 4, 1).flatten(1)
        for new, old in (
            ("patch_embed.proj.bias", "patch_embedding.patch_embeddings.1.bias"),
            ("vit.pos_embed", "vit.patch_embedding.position_embeddings"),
            (".attn.proj.", ".attn.out_proj."),
            (".mlp.fc", ".mlp.linear"),
        ):
            name = name.replace(new, old)
        monai[name] = value
    assert all(torch.equal(from_monai(monai, (4, 4, 4))[name], value) for name, value in state.items())
    assert model.load_official(monai) == len(state)
    with pytest.raises(WeightsError, match=r"1 of \d+ tensors have no place in this network, e.g. vit.cls_token"):
        model.load_official({**monai, "vit.cls_token": torch.zeros(1)})
    monai.pop("out.conv.conv.bias")
    with pytest.raises(WeightsError, match=r"tensors of the network are missing.*out.conv.conv.bias"):
        model.load_official(monai)


def test_a_head_travels_as_extras():
    a, b = (UNETR(small(), 3, feature_size=2, layers=(0, 1, 2)).eval() for _ in range(2))
    b.load_head(a.head_state())
    b.vit.load_state_dict(a.vit.state_dict())
    volume = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(a(volume), b(volume))
    with pytest.raises(WeightsError, match="UNETR decoder are missing or have another shape"):
        UNETR(small(), 2, feature_size=2, layers=(0, 1, 2)).load_head(a.head_state())


def test_windows_cover_every_voxel_and_do_not_depend_on_the_batch():
    volume = torch.randn(1, 1, 9, 4, 13)

    def predict(x):
        return torch.cat([x, x * x], 1)

    for windows in (1, 3, 64):
        merged = sliding_windows(predict, volume, (4, 6, 5), windows=windows)
        assert torch.allclose(merged, predict(volume), atol=1e-6)
    assert torch.allclose(sliding_windows(predict, volume, (4, 6, 5), blend="gaussian"), predict(volume), atol=1e-5)
    with pytest.raises(ConfigError, match=r"overlap is 1\.0"):
        sliding_windows(predict, volume, (4, 4, 4), overlap=1.0)
    with pytest.raises(ConfigError, match="blend is 'max'"):
        sliding_windows(predict, volume, (4, 4, 4), blend="max")


def test_squared_dice_by_hand():
    logits, target = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    target[0, 0] = 255
    p = logits.softmax(1)
    total = []
    for b in range(2):
        known = target[b] != 255
        for c in range(3):
            y, q = (target[b][known] == c).float(), p[b, c][known]
            total.append(1 - 2 * (q * y).sum() / ((q * q).sum() + y.sum() + 1e-6))
    got = dice_loss(logits, target, smooth=1e-6, over=0.0, squared=True)
    assert torch.allclose(got, torch.stack(total).mean(), atol=1e-6)


def test_dice_of_volumes():
    counts = np.array([[[8, 2, 0], [0, 4, 0], [0, 0, 0]], [[5, 0, 1], [0, 0, 0], [0, 0, 2]]])
    cases = dice_cases(counts)
    assert np.allclose(cases[0, :2], [16 / 18, 8 / 10]) and np.isnan(cases[0, 2]) and np.isnan(cases[1, 1])
    assert np.allclose(volume_means(cases), [0.8, 4 / 5]) and mean_dice(cases) == (pytest.approx(0.8), 2)
    nothing = dice_cases(np.array([[[9, 1], [0, 0]]]))  # no foreground, some predicted
    value, volumes = mean_dice(nothing)
    assert np.isnan(value) and volumes == 0
    assert mean_dice(nothing, background=True) == (pytest.approx(18 / 19), 1)
