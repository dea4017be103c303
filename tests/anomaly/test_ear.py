"""What EAR promises where no official code says it: masks, mosaics, scale, determinism, one pass, and every refusal."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from tests.test_tokens import images, make
from vitkit.anomaly import obfuscation, scores
from vitkit.anomaly.ear import EAR, Settings
from vitkit.anomaly.memory import PatchMemory, k_centre, nearest, patch_features
from vitkit.anomaly.unet import UNet
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.explain import attention

SMALL = {"filters": (4, 8)}


def ear(family: str = "plain", **settings) -> EAR:
    torch.manual_seed(0)
    return EAR(make(family), Settings(**{**SMALL, **settings})).eval()


# ---- masks -------------------------------------------------------------------------------------------------------------


def test_sigma_rule_counts_what_exceeds_mean_and_deviations():
    a = torch.rand(3, 2, 6, 5)
    level = a.flatten(-2).mean(-1) + 0.674 * a.flatten(-2).std(-1, correction=0)
    assert torch.equal(obfuscation.salient(a), a > level[..., None, None])
    normal = obfuscation.salient(torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0)))
    assert abs(float(normal.float().mean()) - 0.25) < 0.01  # the third quartile


def test_percentile_and_mass_rules():
    a = torch.rand(2, 4, 8)
    assert (obfuscation.salient(a, "percentile", 0.25).flatten(1).sum(1) == 8).all()
    kept = obfuscation.salient(a, "mass", 0.6)
    for one, mask in zip(a, kept, strict=True):
        share = one[mask].sum() / one.sum()
        without = (one[mask].sum() - one[mask].min()) / one.sum()
        assert share >= 0.6 - 1e-6 and without < 0.6 + 1e-6  # the fewest places that hold it
    with pytest.raises(ConfigError, match="no mask rule 'otsu'"):
        obfuscation.salient(a, "otsu")


def test_attention_without_contrast_hides_nothing():
    assert not obfuscation.salient(torch.full((2, 3, 3), 0.1)).any()
    assert not obfuscation.salient(torch.full((2, 3, 3), 0.1) * (1 + 1e-8)).any()


@pytest.mark.parametrize("family", ["plain", "dinov3", "no_class_token", "dinov2_registers"])
def test_masks_are_those_of_the_attention_and_never_change(family):
    method, x = ear(family), images((64, 96))
    mask = method.hide(x)
    assert mask.shape == (2, 1, 64, 96) and mask.dtype == torch.bool
    assert torch.equal(mask, method.hide(x)) and torch.equal(mask[1:], method.hide(x[1:]))
    a = attention.by_head(method.vit, x).mean(1)
    want = obfuscation.salient(a).repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert torch.equal(mask[:, 0], want)


def test_any_head_and_bilinear_masks():
    x = images((64, 64))
    mean, every = ear().hide(x), ear(heads="any").hide(x)
    a = obfuscation.salient(attention.by_head(ear().vit, x)).any(1)
    assert torch.equal(F.max_pool2d(every[:, 0].float(), 16).bool(), a) and every.sum() != mean.sum()
    smooth = ear(upsample="bilinear").hide(x)
    assert smooth.shape == mean.shape and 0 < smooth.float().mean() < 1
    assert ear(layer=0).hide(x).sum() > 0
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        ear(layer=9).hide(x)


# ---- mosaics -----------------------------------------------------------------------------------------------------------


def test_mosaic_identities():
    x = torch.rand(2, 3, 24, 16)
    assert torch.equal(obfuscation.mosaic(x, 1), x)
    m = obfuscation.mosaic(x, 8)
    assert torch.allclose(obfuscation.mosaic(m, 8), m, atol=1e-6)
    assert torch.allclose(F.avg_pool2d(m, 8), F.avg_pool2d(x, 8), atol=1e-6)  # every cell keeps its mean
    assert (m.unfold(2, 8, 8).unfold(3, 8, 8).flatten(-2).std(-1) < 1e-6).all()
    with pytest.raises(ConfigError, match="a mosaic of 5 pixels on 24 x 16"):
        obfuscation.mosaic(x, 5)


def test_only_what_is_hidden_changes():
    x, mask = torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16) > 0.6
    for scale in (4, None):
        shown = obfuscation.obfuscate(x, mask, scale)
        assert torch.equal(shown[(~mask).expand_as(x)], x[(~mask).expand_as(x)])
    assert not obfuscation.obfuscate(x, mask, None)[mask.expand_as(x)].any()


def test_scale_is_chosen_from_normal_pictures_and_said():
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(16, 3, 4, 4, generator=g), size=(64, 64), mode="bilinear")
    mask = torch.zeros(16, 1, 64, 64, dtype=torch.bool)
    mask[:, :, 16:48, 16:48] = True
    chosen, rows = obfuscation.choose_scale(smooth, mask)
    assert [row["scale"] for row in rows] == [2, 4, 8, 16, 32]
    assert chosen == max(rows, key=lambda row: row["gap"])["scale"]
    assert (chosen, rows) == obfuscation.choose_scale(smooth, mask)  # deterministic
    assert all(a["normal"] <= b["normal"] + 1e-6 for a, b in itertools.pairwise(rows))  # coarser loses more
    assert obfuscation.choose_scale(smooth[:1], mask[:1]) == (2, [])  # one picture chooses nothing
    assert obfuscation.usual_scale((256, 256)) == 8 and obfuscation.usual_scale((224, 224)) == 7
    assert obfuscation.usual_scale((30, 20)) == 1 and obfuscation.scales_for((36, 40)) == [2, 4]


def test_pasted_patches_lie_where_the_mask_is():
    x = torch.zeros(4, 1, 32, 32)
    mask = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    mask[:, :, 16, 16] = True
    out, region = obfuscation.paste(x, torch.ones_like(x), mask, torch.Generator().manual_seed(0))
    assert torch.equal(out > 0, region) and region[:, 0, 16, 16].all() and region.flatten(1).float().mean() < 0.1
    everywhere = obfuscation.paste(x, torch.ones_like(x), torch.zeros_like(mask), torch.Generator().manual_seed(0))[1]
    assert everywhere.flatten(1).any(1).all()  # nothing salient: anywhere


def test_random_masks_are_disjoint_cover_all_and_depend_on_the_seed_alone():
    masks = obfuscation.random_cells(torch.tensor([5, 6, 5]), (20, 28), 8, 3)
    assert masks.shape == (3, 3, 20, 28) and (masks.sum(1) == 1).all()
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


# ---- losses and scores -------------------------------------------------------------------------------------------------


def test_equal_pictures_have_no_loss_and_no_anomaly():
    x = torch.rand(2, 3, 32, 40)
    method = ear(edge=1.0, l2=2.0)
    terms = method.losses(x, x.clone())
    assert set(terms) == {"loss", "l2", "ssim", "msgms", "edge"} and float(terms["loss"]) < 1e-5
    assert float(scores.anomaly_map(x, x).abs().max()) < 1e-5
    y = x.clone()
    y[:, :, 10:14, 20:24] = 0
    found = scores.anomaly_map(x, y, 2, smooth=1.0)
    at = found[0, 0].flatten().argmax().item()
    assert 8 <= at // 40 <= 16 and 18 <= at % 40 <= 26
    assert torch.equal(scores.image_score(found), found.amax((1, 2, 3)))


def test_weights_of_the_terms_and_the_blur():
    x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    method = ear(ssim=0.0, msgms=3.0)
    terms = method.losses(x, y)
    assert set(terms) == {"loss", "l2", "msgms"}
    assert torch.allclose(terms["loss"], (x - y).square().mean() + 3 * scores.msgms_loss(x, y))
    flat = torch.full((1, 1, 9, 9), 2.0)
    assert torch.allclose(scores.gaussian_blur(flat, 2.0), flat)
    assert torch.equal(scores.gaussian_blur(flat[:, :, :1, :1], 2.0), flat[:, :, :1, :1])


# ---- one pass, the same twice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"hint": False}, {"mask": "none"}])
def test_one_unet_pass_an_image_and_the_same_numbers_twice(settings):
    method, x = ear(**settings), images((64, 64), 3)
    first, calls = method.inspect(x), []
    method.unet.register_forward_hook(lambda *args: calls.append(1))
    again = method.inspect(x)
    assert len(calls) == 1 and method.passes == 6
    for key, value in first.items():
        assert torch.equal(value, again[key])
    alone = torch.cat([method.inspect(x[i : i + 1])["score"] for i in range(3)])
    assert torch.allclose(alone, first["score"], atol=1e-5)
    assert first["map"].shape == (3, 1, 64, 64) and first["score"].shape == (3,)


def test_random_masks_take_a_pass_for_every_part_and_cell():
    method, x = ear(mask="random", cells=(4, 16), parts=3), images((64, 64), 2)
    out = method.inspect(x)
    assert method.passes == 2 * 2 * 3 and out["hidden"].all()
    assert torch.equal(out["score"], method.inspect(x)["score"])
    method.train()  # an untrained network hardly depends on its input with the statistics of a trained one
    one = method({"image": x, "seed": torch.tensor([3, 4])})["loss"]
    assert torch.equal(one, method({"image": x, "seed": torch.tensor([3, 4])})["loss"])
    assert not torch.equal(one, method({"image": x, "seed": torch.tensor([3, 5])})["loss"])


def test_masks_made_before_give_the_same_loss():
    method, x = ear().train(), images((64, 64))
    assert torch.equal(method({"image": x})["loss"], method({"image": x, "hidden": method.hide(x)})["loss"])
    full = method({"image": x, "hidden": torch.ones(2, 1, 64, 64, dtype=torch.bool)})
    assert not torch.equal(full["loss"], method({"image": x})["loss"])


def test_only_the_unet_trains():
    method = ear().train()
    assert all(name.startswith("unet.") for name, p in method.named_parameters() if p.requires_grad)
    before = {k: v.clone() for k, v in method.vit.state_dict().items()}
    optimizer = torch.optim.AdamW(method.param_groups(0.0), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = method({"image": images((64, 64))})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(torch.equal(v, before[k]) for k, v in method.vit.state_dict().items())


def test_extras_bring_the_unet_and_the_scale_back():
    method, x = ear(), images((64, 64))
    method.choose_scale(x, method.hide(x))
    other = EAR(method.vit, Settings(**SMALL)).eval()
    other.load_extras(method.extras())
    assert other.scale == method.scale and torch.equal(other.inspect(x)["score"], method.inspect(x)["score"])
    with pytest.raises(WeightsError, match=r"hold no U-Net of filters \(4, 16\)"):
        EAR(method.vit, Settings(filters=(4, 16))).load_extras(method.extras())


# ---- U-Net -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "filters"), [((33, 47), (4, 6, 8)), ((16, 16), (4, 8)), ((40, 24), (4, 4, 6, 8, 8))])
def test_unet_keeps_any_size(size, filters):
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        y = UNet(3, filters).eval()(x)
    assert y.shape == x.shape and float(y.min()) >= 0 and float(y.max()) <= 1


def official(unet: UNet) -> dict[str, torch.Tensor]:
    """The state of `unet` under the author's names."""
    state = {}
    for number, layer in enumerate(unet._in_order()):
        parts = {"conv": layer} if isinstance(layer, torch.nn.Conv2d) else {"conv": layer[0], "bn": layer[1]}
        for kind, module in parts.items():
            state |= {f"{number}.conv.x_{kind}.{name}": value for name, value in module.state_dict().items()}
    return state


@pytest.mark.parametrize(("channels", "filters", "ksize"), [(1, (4, 6), 5), (3, (3, 5, 7, 9), 3), (2, (8, 8, 8), 1)])
def test_official_layout_of_other_shapes(channels, filters, ksize):
    a, b, x = UNet(channels, filters, ksize), UNet(channels, filters, ksize), torch.rand(2, channels, 16, 16)
    for norm in a.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.running_mean)
    b.load_official(official(a))
    assert torch.equal(a.eval()(x), b.eval()(x))


def test_checkpoints_that_do_not_fit_are_refused():
    state = official(UNet(3, (4, 8)))
    with pytest.raises(WeightsError, match=r"U-Net layer 0: conv.weight has shape \(4, 3, 3, 3\), wanted"):
        UNet(3, (6, 8)).load_official(state)
    with pytest.raises(WeightsError, match=r"is no tensor of this U-Net of 9 convolutions"):
        UNet(3, (4, 8)).load_official({"head.weight": torch.zeros(1)})
    del state["3.conv.x_bn.running_var"]
    with pytest.raises(WeightsError, match=r"U-Net layer 3: bn\.running_var is missing"):
        UNet(3, (4, 8)).load_official(state)


# ---- patch memory ------------------------------------------------------------------------------------------------------


def test_k_centre_is_the_greedy_one():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    chosen = k_centre(x, 12, seed=1).tolist()
    assert len(set(chosen)) == 12
    distance = torch.cdist(x.double(), x.double())
    for n in range(1, 12):  # each is the farthest from those before it
        to_chosen = distance[:, chosen[:n]].min(1).values
        assert math.isclose(float(to_chosen[chosen[n]]), float(to_chosen.max()), rel_tol=1e-4)
    assert k_centre(x, 100).shape == (60,)
    assert torch.allclose(nearest(x, x[chosen]), torch.cdist(x, x[chosen]).min(1).values, atol=1e-3)


def test_memory_finds_what_it_has_not_seen():
    vit, x = make("plain").eval(), images((64, 96), 4)
    memory = PatchMemory.of(vit, [x[:2], x[2:]], share=1.0)
    known = memory.inspect(x)
    strange = memory.inspect(torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(9)) * 3)
    assert known["map"].shape == (4, 1, 64, 96) and known["score"].max() < 0.1 < strange["score"].min()
    assert patch_features(vit, x, (0, 2)).shape == (4, 96, 4, 6)
    assert len(PatchMemory.of(vit, [x], share=1.0, most=7).bank) == 7
    with pytest.raises(DataError, match="no normal images"):
        PatchMemory.of(vit, [])


# ---- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"false_alarms": 0.0}, "false_alarms is 0"),
        ({"coreset": 1.5}, "coreset is 1.5"),
        ({"rule": "percentile", "amount": 2.0}, "amount is 2 with rule percentile"),
        ({"l2": 0.0, "ssim": 0.0, "msgms": 0.0}, "the weights l2, ssim, msgms and edge"),
        ({"parts": 1}, "parts 1"),
        ({"baselines": ("padim",)}, "no baseline 'padim'"),
        ({"baselines": ("none", "memory")}, "baselines are none and others"),
        ({"mask": "all"}, "mask is 'all'"),
        ({"filters": (8,)}, r"filters \(8,\)"),
        ({"ksize": 2}, "kernels of 2"),
    ],
)
def test_wrong_settings_are_refused(given, words):
    with pytest.raises(ConfigError, match=words) as error:
        ear(**given)
    assert error.value.fix


def test_settings_are_plain_values():
    assert json.dumps(vars(Settings()))
