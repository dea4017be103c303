"""The attack's invariants and closed forms, on tiny ViTs of several families."""

from __future__ import annotations

import pytest
import torch

from vitkit import tokens, weights
from vitkit.attack import pgd
from vitkit.attack.dta import DTA, Settings, craft, features, similarity
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.parts.jpeg import jpeg

from ..test_tokens import make

EPS = 8 / 255
FAMILIES = ["plain", "dinov3", "dinov2_registers", "no_class_token", "rope_mixed"]


def pixels(count: int = 4, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    """Smooth pictures with some exact black and white, in [0, 1]."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 1.4 - 0.2
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").clamp(0, 1)


def small(**more) -> Settings:
    return Settings(**{"eps": EPS, "steps": 4, "layer": 1, **more})


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_average_token_cosine_by_hand():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    b = torch.tensor([[[1.0, 1.0], [0.0, -3.0]]])
    assert similarity(a, b).item() == pytest.approx((2**-0.5 - 1) / 2)
    assert similarity(a, b, "flat").item() == pytest.approx((1 - 6) / (5**0.5 * 11**0.5))


def test_one_large_token_rules_the_flat_cosine_but_not_the_average():
    torch.manual_seed(0)
    a, b = torch.randn(1, 20, 8), torch.randn(1, 20, 8)
    b[:, 0] = a[:, 0]
    flat, average = similarity(a, b, "flat"), similarity(a, b)
    a[:, 0], b[:, 0] = a[:, 0] * 1e3, b[:, 0] * 1e3
    assert similarity(a, b, "flat") > 0.99 > flat
    assert torch.allclose(similarity(a, b), average, atol=1e-5)


def test_similarity_of_an_image_with_itself_is_one_and_its_gradient_zero():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    changed = x.clone().requires_grad_()
    found = similarity(changed, x)
    assert torch.allclose(found, torch.ones(3, dtype=torch.float64))
    found.sum().backward()
    assert changed.grad.abs().max() < 1e-12
    attack, clean = DTA(make("plain"), small()), pixels()
    gradient, costs = pgd.gradient_of(attack.cost(clean), clean)
    away, _ = pgd.gradient_of(attack.cost(clean), (clean + 0.02 * torch.randn_like(clean)).clamp(0, 1))
    assert torch.allclose(costs, torch.ones(4)) and gradient.abs().max() < 1e-4 * away.abs().max()


# ---- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("param", ["sign", "tanh"])
def test_budget_range_and_descent(family, param):
    x = pixels(2, (64, 96))
    attack = DTA(make(family), small(param=param, step_size="auto" if param == "sign" else 0.3, steps=6))
    found = attack.crafted(x)
    assert (found.pixels - x).abs().max() <= EPS + 1e-6
    assert found.pixels.min() >= 0 and found.pixels.max() <= 1
    curve = found.costs.mean(1)
    assert curve[-1] < curve[0] and (curve.diff() < 0.02).all()
    (gone,) = similarity(
        *(features(attack.encoders[0], attack.prepare[0](p), (1,))[0] for p in (x, found.pixels))
    ).mean()[None]
    noise = pgd.sign_noise(x, EPS)
    (kept,) = similarity(*(features(attack.encoders[0], attack.prepare[0](p), (1,))[0] for p in (x, noise))).mean()[
        None
    ]
    assert gone < kept  # worse than noise of the same size


def test_the_budget_is_in_pixels_whatever_the_normalisation():
    """The classic mistake: eps applied after dividing by std is several times too large."""
    vit = weights.load("vit_tiny_patch16_224", pretrained=False, image_size=32, arch_kwargs={"depth": 2}, say=None)
    from dataclasses import replace

    vit.passport.preprocess = replace(vit.passport.preprocess, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.05))
    x = pixels(2, (32, 32))
    found = craft(vit, x, small())
    assert EPS - 1e-3 < (found - x).abs().max() <= EPS + 1e-6


def test_each_encoder_normalises_by_its_own_passport():
    from dataclasses import replace

    twins = [make("plain"), make("plain")]
    for twin, std in zip(twins, (0.5, 0.25), strict=True):
        loaded = weights.load("vit_tiny_patch16_224", pretrained=False, say=None)
        twin.passport = loaded.passport
        twin.passport.preprocess = replace(loaded.passport.preprocess, std=(std,) * 3)
    x = pixels(2)
    ones = [DTA(twin, small()).prepare[0](x) for twin in twins]
    assert not torch.allclose(*ones)
    both = DTA(twins, small())
    want = sum(DTA(twin, small()).cost(x)(pgd.sign_noise(x, EPS)) for twin in twins) / 2
    assert torch.allclose(both.cost(x)(pgd.sign_noise(x, EPS)), want)


def test_a_result_does_not_depend_on_the_batch_around_it():
    attack, x, seeds = DTA(make("plain"), small()), pixels(5), torch.tensor([9, 4, 7, 1, 3])
    whole = attack(x, seeds)
    order = torch.tensor([3, 0, 4])
    part = attack(x[order], seeds[order])
    assert ((part - whole[order]).abs() < 1e-6).float().mean() > 0.999
    assert torch.equal(attack(x, seeds), whole)
    assert not torch.equal(attack(x, seeds + 1), whole)
    pieces = craft(attack.encoders, x, attack.settings, seeds=seeds, batch_size=2)
    assert ((pieces - whole).abs() < 1e-6).float().mean() > 0.999


def test_starts_are_uniform_and_by_seed():
    x = torch.full((2, 3, 64, 64), 0.5)
    drawn = pgd.uniform(x, torch.tensor([5, 5]))
    assert (
        torch.equal(drawn[0], drawn[1]) and drawn.abs().max() <= 1 and drawn.std() == pytest.approx(3**-0.5, abs=0.02)
    )
    noise = pgd.sign_noise(x, EPS)
    assert torch.allclose((noise - x).abs(), torch.full_like(x, EPS))
    with pytest.raises(ConfigError, match="3 seeds for 2 images"):
        pgd.uniform(x, torch.arange(3))


@pytest.mark.parametrize("param", ["sign", "tanh"])
def test_no_budget_gives_the_images_back_exactly(param):
    x = pixels()
    assert torch.equal(craft(make("plain"), x, small(eps=0.0, param=param)), x)


def test_more_budget_moves_features_further():
    vit, x, left = make("plain"), pixels(), []
    for eps in (0, 2, 4, 8, 16):
        changed = craft(vit, x, small(eps=eps / 255))
        pair = (features(vit, DTA(vit, small()).prepare[0](one), (1,))[0] for one in (x, changed))
        left.append(float(similarity(*pair).mean().detach()))
    assert left == sorted(left, reverse=True) and left[0] == pytest.approx(1)


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_only_blocks_up_to_the_attacked_one_run_and_clean_features_once():
    vit, calls = make("plain"), []
    for index, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda *a, index=index: calls.append((index, torch.is_grad_enabled())))
    craft(vit, pixels(), small(layer=1, steps=4))
    assert [index for index, _ in calls] == [0, 1] * 5  # clean once, then once a step; block 2 never
    assert [grad for _, grad in calls] == [False] * 2 + [True] * 8


def test_the_encoder_is_left_as_it_was():
    vit = make("plain").train()
    vit.norm.bias.requires_grad_(False)
    vit.blocks[0].eval()
    before = {name: p.requires_grad for name, p in vit.named_parameters()}
    values = {name: p.clone() for name, p in vit.state_dict().items()}
    attack = DTA(vit, small(layer="auto"))
    attack.search(pixels())
    attack(pixels())
    assert {name: p.requires_grad for name, p in vit.named_parameters()} == before
    assert vit.training and not vit.blocks[0].training and vit.blocks[1].training
    assert all(p.grad is None for p in vit.parameters())
    assert all(torch.equal(values[name], p) for name, p in vit.state_dict().items())


@pytest.mark.parametrize("param", ["sign", "tanh"])
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_crafting_works_where_gradients_are_off(off, param):
    vit = make("plain")
    wanted = craft(vit, pixels(), small(param=param, layer="auto"))
    with off():
        changed = craft(vit, pixels(), small(param=param, layer="auto"))
    assert torch.equal(changed, wanted) and not changed.requires_grad


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_of_any_precision_are_attacked(family, kind):
    """Pixels, budget and costs stay in float32 or better, whatever the encoder computes in."""
    found = DTA(make(family).to(kind), small()).crafted(pixels())
    assert found.pixels.dtype == torch.float32 and (found.pixels - pixels()).abs().max() <= EPS + 1e-6
    wanted = DTA(make(family), small()).crafted(pixels())
    assert (found.costs - wanted.costs).abs().max() <= (5e-2 if kind == torch.bfloat16 else 5e-3)


def test_seeds_may_be_a_list():
    vit = make("plain")
    assert torch.equal(
        craft(vit, pixels(2), small(), seeds=[5, 3]), craft(vit, pixels(2), small(), seeds=torch.tensor([5, 3]))
    )


# ---- the search ------------------------------------------------------------------------------------------------------


def test_search_returns_the_whole_profile_and_takes_the_lowest_footprint():
    vit = make("plain")
    attack = DTA(vit, small(layer="auto", exploit=1))
    (profile,) = attack.search(pixels(6))
    assert profile.candidates == (0, 1, 2) and profile.depth == 3 and profile.images == 6
    for block, row, mean in zip(profile.candidates, profile.similarity, profile.footprint, strict=True):
        assert len(row) == 3 and mean == pytest.approx(sum(row) / 3) and profile.row(block) == row
    best = min(profile.candidates, key=lambda block: profile.footprint[block])
    assert profile.chosen == (best,) and attack.layers == [(best,)]
    assert max(profile.footprint) < profile.noise < 1  # every block is worse than noise
    # its entries are what a short attack there does
    changed = DTA(vit, small(layer=2, steps=2))(pixels(6))
    with torch.no_grad():
        clean, other = (features(vit, attack.prepare[0](p), range(3)) for p in (pixels(6), changed))
    assert profile.row(2) == pytest.approx([float(similarity(a, b).mean()) for a, b in zip(clean, other, strict=True)])


def test_search_looks_at_the_calibration_images_only():
    vit, x = make("plain"), pixels(6)
    first = DTA(vit, small(layer="auto", calibration=3)).search(x)
    other = DTA(vit, small(layer="auto", calibration=3)).search(torch.cat([x[:3], 1 - x[3:]]))
    assert first == other and first[0].images == 3


def test_coarse_search_tries_every_third_and_the_neighbours_of_the_best():
    vit = make("plain", depth=12)
    (full,) = DTA(vit, small(layer="auto", steps=2)).search(pixels(2))
    (coarse,) = DTA(vit, small(layer="auto", steps=2, search="coarse")).search(pixels(2))
    assert len(full.candidates) == 12 and {2, 5, 8, 11} <= set(coarse.candidates)
    assert 5 <= len(coarse.candidates) <= 8
    for block in coarse.candidates:
        assert coarse.row(block) == pytest.approx(full.row(block))
    best = min((2, 5, 8, 11), key=lambda block: sum(coarse.row(block)))
    assert {one for one in (best - 1, best + 1) if 0 <= one < 12} <= set(coarse.candidates)


def test_several_blocks_and_several_encoders():
    one, two = make("plain"), make("dinov3")
    attack = DTA([one, two], small(layer="auto", exploit=2))
    profiles = attack.search(pixels(3))
    assert len(profiles) == 2 and all(len(profile.chosen) == 2 for profile in profiles)
    x = pixels(3)
    changed = attack(x)
    assert (changed - x).abs().max() <= EPS + 1e-6
    cost = DTA(one, small(layer=(0, 2))).cost(x)
    want = sum(DTA(one, small(layer=layer)).cost(x)(changed) for layer in (0, 2)) / 2
    assert torch.allclose(cost(changed), want)


def test_token_choices():
    vit, x = make("dinov2_registers"), pixels(2)
    images = DTA(vit, small()).prepare[0](x)
    every, patches, prefix = (features(vit, images, (0,), which)[0] for which in ("all", "patches", "prefix"))
    assert torch.equal(torch.cat([prefix, patches], 1), every) and prefix.shape[1] == vit.num_prefix_tokens
    with torch.no_grad():
        (final,) = features(vit, images, "output")
        assert torch.equal(final, tokens.encode(vit, images).all)
    with pytest.raises(ConfigError, match="no class token"):
        craft(make("no_class_token"), x, small(tokens="prefix"))


# ---- JPEG ------------------------------------------------------------------------------------------------------------


def test_jpeg_is_nearly_what_a_real_encoder_does():
    import io

    import numpy as np
    from PIL import Image

    smooth = 0.3 + 0.4 * pixels(1, (64, 64))  # away from the clamp
    x = (smooth * 255).round() / 255
    array = (x[0].permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=75, subsampling=2)
    real = np.asarray(Image.open(file)).astype(np.float32)
    ours = jpeg(x, 75)[0].permute(1, 2, 0).numpy() * 255
    luminance = np.array([0.299, 0.587, 0.114])
    assert np.abs((ours - real) @ luminance).mean() < 1  # grey levels; chroma is interpolated more smoothly there
    assert np.abs(ours - array).mean() < 4


def test_jpeg_keeps_flat_colour_and_has_a_gradient():
    grey = torch.full((1, 3, 16, 16), 128 / 255)
    assert torch.allclose(jpeg(grey, 90), grey, atol=1e-5)
    x = pixels(1, (32, 32)).requires_grad_()
    jpeg(x, 50).square().sum().backward()
    assert x.grad.abs().sum() > 0 and torch.isfinite(x.grad).all()
    assert torch.isfinite(jpeg(pixels(1, (32, 32)), 100)).all()


def test_an_attack_through_jpeg_survives_it_better():
    vit, x = make("plain"), pixels(4)
    plain, through = (craft(vit, x, small(steps=8, eps=6 / 255, jpeg=quality)) for quality in (0, 60))
    cost = DTA(vit, small()).cost(x)
    assert cost(jpeg(through, 60)).mean() < cost(jpeg(plain, 60)).mean()


def test_jpeg_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="multiples of 16"):
        jpeg(torch.rand(1, 3, 24, 16), 75)
    with pytest.raises(ConfigError, match="JPEG quality is 0"):
        jpeg(torch.rand(1, 3, 16, 16), 0)


# ---- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [8 / 255, 0.05, 0.001])
def test_rounding_to_8_bits_keeps_the_budget(eps):
    clean = (pixels() * 255).round() / 255
    stored = pgd.eight_bit(pgd.sign_noise(clean, eps), clean, eps)
    assert stored.dtype == torch.uint8
    assert ((stored.float() - clean * 255).abs() <= eps * 255 + 1e-3).all()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more,text",
    [
        ({"eps": -0.1}, "eps is -0.1, and pixels are in"),
        ({"eps": 8}, "eps is 8, and pixels are in \\[0, 1\\]\n  fix: a share of it, e.g. 8/255"),
        ({"steps": 0}, "steps is 0"),
        ({"exploit": 0}, "exploit is 0"),
        ({"step_size": -1.0}, "step_size is -1"),
        ({"jpeg": 200}, "jpeg is 200"),
        ({"eps": 1.5}, "eps is 1.5, and pixels are in \\[0, 1\\]\n  fix: a share of it, e.g. 8/255"),
        ({"layer": "last"}, "layer is 'last'\n  fix: a block such as 8"),
        ({"objective": "tokn"}, "objective is 'tokn'\n  fix: one of: token, flat"),
        ({"tokens": "cls"}, "tokens is 'cls'"),
        ({"param": "tan"}, "param is 'tan'"),
        ({"search": "fast"}, "search is 'fast'"),
        ({"step_size": "small"}, "step_size is 'small'\n  fix: one of: auto, a number"),
    ],
)
def test_settings_that_make_no_sense(more, text):
    with pytest.raises(ConfigError, match=text):
        small(**more)


def test_layers_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"layer 3 does not exist\n  fix: the encoder has blocks 0..2 \(or -3..-1\)"):
        DTA(make("plain"), small(layer=3))
    with pytest.raises(ConfigError, match="layer -4 does not exist"):
        DTA(make("plain"), small(layer=(0, -4)))
    with pytest.raises(ConfigError, match="exploit is 4, and 3 blocks were tried"):
        DTA(make("plain"), small(layer="auto", exploit=4)).search(pixels(2))
    assert DTA(make("plain"), small(layer=-1)).layers == [(2,)]


def test_images_that_are_no_pixels():
    vit = make("plain")
    with pytest.raises(DataError, match=r"images reach from -\S+ to \S+, and an attack works on pixels in \[0, 1\]"):
        craft(vit, torch.randn(2, 3, 64, 64), small())
    with pytest.raises(DataError, match="fix: pass uint8, divide by 255"):
        craft(vit, pixels() * 255, small())
    with pytest.raises(DataError, match="images reach from nan"):
        craft(vit, pixels() * float("nan"), small())
    with pytest.raises(DataError, match="images of type torch"):
        craft(vit, torch.zeros(1, 3, 64, 64, dtype=torch.int64), small())
    with pytest.raises(DataError, match="images of shape"):
        craft(vit, pixels()[0], small())
    eight = (pixels() * 255).round().byte()
    assert torch.equal(craft(vit, eight, small()), craft(vit, eight.float() / 255, small()))


def test_an_attack_before_its_search():
    with pytest.raises(ConfigError, match="layer is auto and was not searched"):
        DTA(make("plain"), small(layer="auto"))(pixels())
    with pytest.raises(ConfigError, match="no encoder was given"):
        DTA([], small())


def test_encoders_that_cannot_be_used():
    import timm
    from timm.models.vision_transformer import VisionTransformer

    with pytest.raises(WeightsError, match="not a timm VisionTransformer"):
        DTA(timm.create_model("resnet18"), small())
    bare = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(WeightsError, match="carries no mean and std"):
        DTA(bare, small(layer=0))
