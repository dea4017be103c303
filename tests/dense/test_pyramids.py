"""UPerNet and the simple feature pyramid: numbers of transformers' heads, names, odd grids, and the protocols."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vitkit
from vitkit.dense.simple_pyramid import PyramidDecoder, SemanticBranch, SimpleFeaturePyramid
from vitkit.dense.upernet import UPerHead, UPerNetDecoder
from vitkit.errors import ConfigError
from vitkit.evaluate import segment
from vitkit.evaluate.feature_maps import Cached

from ..run.test_protocols_masks import MODEL, discs


def randomised(module):
    """Batch-norm statistics and weights that are not their defaults."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) * 0.1)
    return module


def close(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max()) <= 2e-5


@pytest.mark.parametrize("grids", [[(16, 16), (8, 8), (4, 4), (2, 2)], [(20, 12), (10, 6), (5, 3), (2, 1)]])
@pytest.mark.parametrize("width,channels", [(8, [4, 6, 8, 10]), (5, [12] * 4)])
def test_the_head_gives_transformers_numbers(grids, width, channels):
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead

    torch.manual_seed(0)
    config = UperNetConfig(hidden_size=width, num_labels=3, pool_scales=[1, 2, 3, 6])
    theirs = randomised(UperNetHead(config, channels))
    ours = UPerHead(channels, 3, width=width)
    ours.load_state_dict(theirs.state_dict())
    maps = [torch.randn(2, c, *grid) for c, grid in zip(channels, grids, strict=True)]
    for head in (theirs.eval(), ours.eval()), (theirs.train(), ours.train()):
        a, b = (one([m.clone() for m in maps]) for one in head)
        assert a.shape == (2, 3, *grids[0]) and close(b, a)
    grads = [
        torch.autograd.grad(one.square().sum(), one_head.parameters()) for one, one_head in ((a, theirs), (b, ours))
    ]
    want = dict(zip((n for n, _ in theirs.named_parameters()), grads[0], strict=True))
    for (name, _), grad in zip(ours.named_parameters(), grads[1], strict=True):
        assert float((grad - want[name]).abs().max()) <= 1e-4 * max(1.0, float(want[name].abs().max())), name


def test_the_neck_and_head_are_those_of_beit():
    """BEiT's segmentation class of transformers without its trunk: the same tensors, the same logits."""
    from transformers import BeitConfig, BeitForSemanticSegmentation

    torch.manual_seed(0)
    config = BeitConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        out_indices=[1, 2, 3, 4],
        num_labels=3,
        use_auxiliary_head=False,
        reshape_hidden_states=True,
    )
    theirs = randomised(BeitForSemanticSegmentation(config)).eval()
    ours = UPerNetDecoder(8, 3, width=8)
    words = {
        "fpn.fpn1.conv_transpose1": "fpn1.0",
        "fpn.fpn1.normalization": "fpn1.1",
        "fpn.fpn1.conv_transpose2": "fpn1.3",
        "fpn.fpn2": "fpn2.0",
        "psp_bottleneck": "bottleneck",
        ".normalization.": ".batch_norm.",
        ".convolution.": ".conv.",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        key = re.sub(r"psp_modules\.blocks\.(\d)\.conv", r"psp_modules.\1.1", key)
        for old, new in words.items():
            key = key.replace(old, new)
        if not key.startswith("beit."):
            state[key] = value
    ours.load_state_dict(state)
    ours.eval()
    with torch.no_grad():
        maps = [torch.randn(2, 8, 5, 4) for _ in range(4)]
        want = theirs.decode_head(theirs.fpn(tuple(maps)))
        assert want.shape == (2, 3, 20, 16) and close(ours(maps, (20, 16)), want)


@pytest.mark.parametrize("kind", [UPerNetDecoder, PyramidDecoder])
@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (7, 4), (8, 8)])
def test_any_grid_any_mask_size_and_gradients_everywhere(kind, grid):
    torch.manual_seed(0)
    decoder = kind(12, 3, width=8)
    maps = [torch.randn(2, 12, *grid, requires_grad=True) for _ in range(decoder.needs)]
    out = decoder(maps, (50, 61))
    assert out.shape == (2, 3, 50, 61)
    out.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoder.parameters())
    assert all(bool(m.grad.abs().sum() > 0) for m in maps)


def test_the_pyramid_is_its_formula_with_detectrons_names():
    torch.manual_seed(0)
    pyramid = randomised(SimpleFeaturePyramid(8, width=6))
    s = pyramid.state_dict()
    assert {
        "simfp_2.0.weight",
        "simfp_2.1.weight",
        "simfp_2.3.weight",
        "simfp_2.4.norm.weight",
        "simfp_2.5.weight",
    } <= set(s)
    assert {"simfp_3.0.weight", "simfp_3.2.norm.bias", "simfp_4.0.weight", "simfp_5.1.weight"} <= set(s)
    assert "simfp_4.0.bias" not in s and s["simfp_2.3.weight"].shape == (4, 2, 2, 2)

    def norm(x, at):
        mean = x.mean(1, keepdim=True)
        deviation = (x - mean).square().mean(1, keepdim=True).add(1e-6).sqrt()
        return (x - mean) / deviation * s[f"{at}.weight"][:, None, None] + s[f"{at}.bias"][:, None, None]

    def up(x, at):
        return F.conv_transpose2d(x, s[f"{at}.weight"], s[f"{at}.bias"], stride=2)

    def out(x, at, first):
        x = norm(F.conv2d(x, s[f"{at}.{first}.weight"]), f"{at}.{first}.norm")
        return norm(F.conv2d(x, s[f"{at}.{first + 1}.weight"], padding=1), f"{at}.{first + 1}.norm")

    x = torch.randn(2, 8, 6, 4)
    want = [
        out(up(F.gelu(norm(up(x, "simfp_2.0"), "simfp_2.1")), "simfp_2.3"), "simfp_2", 4),
        out(up(x, "simfp_3.0"), "simfp_3", 1),
        out(x, "simfp_4", 0),
        out(F.max_pool2d(x, 2), "simfp_5", 1),
    ]
    got = pyramid(x)
    assert [tuple(one.shape[2:]) for one in got] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert all(close(a, b) for a, b in zip(got, want, strict=True))
    branch = SemanticBranch(6, 3, width=4)
    assert [len(tower) for tower in branch.towers] == [1, 1, 2, 3] and branch(got).shape == (2, 3, 24, 16)


def test_what_is_refused_says_why():
    maps = [torch.randn(2, 8, 4, 4)] * 4
    with pytest.raises(ConfigError, match=r"3 feature maps for UPerNet, which reads 4[\s\S]*last 4 blocks"):
        UPerNetDecoder(8, 2, width=4)(maps[:3], (8, 8))
    with pytest.raises(ConfigError, match=r"UPerNet halves the patch grid, which is 1 x 4[\s\S]*at least 2 patches"):
        UPerNetDecoder(8, 2, width=4)([m[:, :, :1] for m in maps], (8, 8))
    with pytest.raises(ConfigError, match=r"the simple feature pyramid halves the patch grid, which is 4 x 1"):
        PyramidDecoder(8, 2, width=4)([maps[0][..., :1]], (8, 8))
    with pytest.raises(ConfigError, match=r"normalises over a batch, and got one image"):
        UPerNetDecoder(8, 2, width=4).train()([m[:1] for m in maps], (8, 8))
    assert UPerNetDecoder(8, 2, width=4).eval()([m[:1] for m in maps], (8, 8)).shape == (1, 2, 8, 8)
    with pytest.raises(ConfigError, match="width is 1"):
        PyramidDecoder(8, 2, width=1)


@pytest.mark.parametrize("kind", [UPerNetDecoder, PyramidDecoder])
def test_they_learn_a_mask_that_only_neighbours_reveal(kind):
    """Class 1 where the map's first channel is above that of its left neighbour: no single patch tells."""
    torch.manual_seed(0)
    field = torch.randn(24, 1, 6, 6)
    truth = (field > field.roll(1, 3)).squeeze(1).repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8)
    maps = torch.cat([field, torch.zeros(24, 7, 6, 6)], 1)[:, None].expand(-1, kind.needs, -1, -1, -1).half()
    data = Cached(maps.contiguous(), truth)
    settings = segment.Settings(rates=(5e-3,), epochs=20, batch_size=8, optimizer="adamw")
    scores = {}
    for name, make in (("linear", "linear"), ("own", partial(kind, width=8))):
        found = segment.fit_maps(data, make=make, n_classes=2, settings=settings)
        scores[name] = segment.score(found.decoder, data, 2)["iou"]
    assert scores["own"] > scores["linear"] + 0.05, scores


def test_as_protocols(tmp_path):
    out = tmp_path / "run"
    found = vitkit.evaluate(
        **MODEL,
        data=discs(tmp_path / "discs"),
        protocols="segment_linear,segment_upernet,segment_pyramid",
        mask_rates=(0.05,),
        mask_epochs=4,
        mask_width=8,
        out=str(out),
    )
    assert list(found) == ["segment_linear", "segment_upernet", "segment_pyramid"]
    assert all(np.isfinite(entry["iou"]) and 0 <= entry["iou"] <= 1 for entry in found.values())
    assert found["segment_upernet"]["trained"] == sum(p.numel() for p in UPerNetDecoder(24, 2, width=8).parameters())
    page = (out / "report.html").read_text()
    assert "UPerNet" in page and "simple feature pyramid" in page
    with pytest.raises(ConfigError, match="mask_width is 1"):
        vitkit.evaluate(**MODEL, data=str(tmp_path / "discs"), protocols="segment_upernet", mask_width=1)
