"""PH-Reg's promises: exact way back from every view, registers that are timm's own, only what is unlocked moves, the verb."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vitkit
from tests.test_tokens import FAMILIES, close, images, make
from vitkit import tokens, weights
from vitkit.clean.ph_reg import PHReg, Settings, distillation
from vitkit.errors import ConfigError
from vitkit.parts import registers
from vitkit.parts import shifted_views as views
from vitkit.parts.architecture import constructor
from vitkit.parts.cover_crop import CoverCrop
from vitkit.passport import Passport, Preprocess

BATCH = {"seed": torch.tensor([5, 9])}


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("grid", [(6, 6), (4, 9)])
def test_the_way_back_is_exact(grid):
    """Features that are a function of each patch's pixels average to the plain ones at every cell."""
    offsets, flips = (torch.from_numpy(one) for one in views.draw_views([1, 2], 7, grid, 0.4))
    cells = views.view_cells(offsets, flips, grid)
    x = torch.rand(2, 3, grid[0] * 4, grid[1] * 4)
    pixels = views.view_pixels(x, offsets, flips, (4, 4), torch.ones(3))
    content = (
        nn.functional.avg_pool2d(pixels.flatten(0, 1), 4).flatten(2).transpose(1, 2)
    )  # mirror images have equal means
    plain = nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
    assert torch.allclose(views.put_back(content, cells), plain, atol=1e-6)
    assert (
        bool((cells[:, 0] == torch.arange(grid[0] * grid[1])).all()) and bool(flips.any()) and bool((cells < 0).any())
    )
    wrong = views.view_cells(-offsets, flips, grid)
    assert not torch.allclose(views.put_back(content, wrong), plain, atol=1e-3)
    wrong = views.view_cells(offsets, 1 - flips, grid)
    assert not torch.allclose(views.put_back(content, wrong), plain, atol=1e-3)


def test_averaging_shrinks_what_depends_on_the_place_in_the_view():
    grid = (8, 8)
    offsets, flips = (torch.from_numpy(one) for one in views.draw_views([3], 10, grid, 0.3))
    cells = views.view_cells(offsets, flips, grid)
    bias = torch.randn(1, 64, 5, generator=torch.Generator().manual_seed(0))
    mean = views.put_back(bias.expand(10, -1, -1), cells)
    assert float(mean.var()) < 0.5 * float(bias.var())


def test_views_are_a_function_of_the_seed_and_begin_with_the_image():
    one, two = (views.draw_views([4, 7], 10, (14, 14), 0.15) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert np.array_equal(one[0][1], views.draw_views([7], 10, (14, 14), 0.15)[0][0])
    offsets, flips = one
    assert not offsets[:, 0].any() and not flips[:, 0].any() and np.abs(offsets).max() == 2
    assert not views.draw_views([4], 10, (14, 14), 0.15, flips=False)[1].any()


def test_farthest_points_take_the_first_of_equals():
    points = np.array([[[0, 0], [2, 0], [0, 2], [1, 1]]])
    assert views.farthest_points(points, 4, np.array([0])).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("shift", [(5, 0), (0, -9), (8, 8)])
def test_shifts_out_of_the_picture_leave_only_the_fill(shift):
    out = views.shift_pixels(torch.zeros(2, 5, 8), shift, torch.tensor([1.0, 2.0]))
    assert torch.equal(out, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 5, 8))


def test_shifted_embeddings_are_those_of_shifted_pixels():
    for family in ("plain", "clip", "dinov3", "siglip"):
        vit, x = make(family), images((64, 96))
        method = PHReg(vit, Settings(views=6, shift_frac=0.3))
        offsets, flips = method.views_of({"image": x, **BATCH})
        cells = views.view_cells(offsets, flips, (4, 6))
        pixels = views.view_pixels(x, offsets, flips, (16, 16), method.blank)
        with torch.no_grad():
            want = tokens.dense(method.teacher, tokens.encode(method.teacher, pixels.flatten(0, 1))).all
            got = method.view_tokens(x, offsets, flips, cells).all
        assert close(got, want, 2e-5), family


def test_a_stem_that_looks_beyond_patches_embeds_every_view():
    class Overlapping(type(make("plain").patch_embed)):
        def forward(self, x):
            return super().forward(nn.functional.avg_pool2d(x, 3, 1, 1))

    vit, x = make("plain"), images((64, 64))
    vit.patch_embed.__class__ = Overlapping
    assert not views.embeds_patches_alone(vit)
    method = PHReg(vit, Settings(views=3, shift_frac=0.3))
    offsets, flips = method.views_of({"image": x, **BATCH})
    pixels = views.view_pixels(x, offsets, flips, (16, 16), method.blank)
    with torch.no_grad():
        want = tokens.encode(method.teacher, pixels.flatten(0, 1)).patches
    assert torch.equal(method.view_tokens(x, offsets, flips, views.view_cells(offsets, flips, (4, 4))).patches, want)


def test_white_is_white_in_the_models_own_units():
    vit = make("plain")
    vit.passport = Passport("x", {}, Preprocess(mean=(0.4815, 0.4578, 0.4082), std=(0.2686, 0.2613, 0.2758)))
    want = torch.tensor([1.93033625, 2.07488384, 2.14589699])
    assert torch.allclose(PHReg(vit).blank, want, atol=3e-3)
    assert torch.allclose(PHReg(make("plain")).blank, torch.tensor([2.2489083, 2.42857143, 2.64]), atol=1e-6)


# ---------------------------------------------------------------- registers

WITHOUT = [name for name in FAMILIES if not registers.registers_of(make(name))]


@pytest.mark.parametrize("family", WITHOUT)
def test_registers_are_timms_own(family):
    """A ViT with registers is the timm model of its keywords, at its own size and another."""
    torch.manual_seed(1)
    vit = make(family)
    registers.add_registers(vit, 3)
    registers.merge_rows(vit)
    if not registers.keywords(vit):
        assert family == "deit_distilled"
        return
    arch, kwargs = FAMILIES[family]
    given = {"embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5, "img_size": 64, "dynamic_img_size": True}
    twin = timm.create_model(arch, **{**given, **kwargs, **constructor(arch, registers.keywords(vit))}).eval()
    twin.load_state_dict(vit.state_dict())
    for size in ((64, 64), (64, 112)):
        x = images(size)
        with torch.no_grad():
            assert torch.equal(tokens.encode(vit, x).all, twin.forward_features(x))
            assert torch.equal(tokens.logits(vit, x), twin(x))


@pytest.mark.parametrize("family", WITHOUT)
def test_registers_that_nobody_looks_at_change_nothing(family):
    """Keys of minus infinity are not reachable, so the rows are compared before attention: tokens and positions."""
    vit, x = make(family), images((64, 96))
    with torch.no_grad():
        before = tokens.embed(vit, x).x
        count = vit.num_prefix_tokens
        registers.add_registers(vit, 4)
        after = tokens.embed(vit, x).x
        registers.merge_rows(vit)
        merged = tokens.embed(vit, x).x
    kept = torch.cat([after[:, :count], after[:, count + 4 :]], 1)
    assert vit.num_prefix_tokens == count + 4
    assert close(kept, before, 1e-6) and close(merged, after, 1e-6)


def test_distillation_tokens_keep_their_place():
    vit = make("deit_distilled")
    vit.passport = Passport("deit_tiny_distilled_patch16_224", {}, Preprocess(image_size=(64, 64)))
    method = PHReg(vit, Settings(registers=3))
    x = images((64, 64))
    with torch.no_grad():
        want = tokens.encode(vit, x).all
        found = method.finish()
        assert found.num_prefix_tokens == 5 and close(tokens.encode(found, x).all, want, 1e-5)
    assert found.passport.steps[0]["method"] == "clean.ph_reg" and found.passport.arch_kwargs == {}
    again = weights.apply_step(make("deit_distilled"), found.passport.steps[0])
    again.load_state_dict(found.state_dict())
    with torch.no_grad():
        assert torch.equal(tokens.encode(again, x).all, tokens.encode(found, x).all)


def test_a_vit_with_registers_keeps_them_and_gets_no_others():
    method = PHReg(make("dinov2_registers"))
    assert method.vit.num_prefix_tokens == 5 and not method.vit.reg_token.requires_grad
    assert method.notes == ["the ViT has 4 registers of its own: they stay, and none are added"]
    with pytest.raises(ConfigError, match=r"already has 4 registers\n.*--registers 0"):
        PHReg(make("dinov2_registers"), Settings(registers=8))
    none = PHReg(make("plain"), Settings(registers=0))
    assert none.vit.reg_token is None and none.vit.pos_embed.requires_grad
    assert tokens.encode(none.finish(), images((64, 64))).prefix.shape[1] == 1


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize("family", ["plain", "deit_distilled", "dinov3", "no_class_token", "eva02", "clip"])
def test_only_what_is_unlocked_moves(family):
    method = PHReg(make(family), Settings(views=4, shift_frac=0.3)).train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = torch.optim.AdamW(method.param_groups(0.01), lr=1e-2)
    out = method({"image": images((64, 64)), **BATCH})
    out["loss"].backward()
    optimizer.step()
    moved = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    allowed = ("vit.blocks.2.", "vit.pos_embed", "vit.patch_embed.proj.", "vit.reg_token", "vit.parametrizations.")
    assert moved and all(name.startswith(allowed) for name in moved)
    assert not any(name.endswith(".original") for name in moved)
    assert {name for name in method.persistent() if name.startswith("teacher")} == set()
    assert not method.teacher.training and method.vit.training


def test_the_loss_is_cosine_and_squared_error():
    t, f = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    cosine, mse = distillation(t, f)
    assert torch.allclose(cosine, 1 - nn.functional.cosine_similarity(t, f, dim=-1).mean(), atol=1e-6)
    assert torch.allclose(mse, nn.functional.mse_loss(f, t))
    assert abs(float(distillation(t, t)[0])) < 1e-6
    method = PHReg(make("plain"), Settings(mse_scale=0.0)).eval()
    out = method({"image": images((64, 64)), **BATCH})
    assert torch.equal(out["loss"], out["cosine"])


def test_kept_targets_are_the_same_and_computed_once():
    x = images((64, 64), 3)
    method = PHReg(make("plain"), Settings(keep_targets=True, views=4, shift_frac=0.3)).train()
    calls = []
    original = method.target
    method.target = lambda *a: calls.append(len(a[0])) or original(*a)
    first = method({"image": x, "index": torch.tensor([4, 2, 9])})["loss"]
    again = method({"image": x, "index": torch.tensor([4, 2, 9])})["loss"]
    assert torch.equal(first, again) and calls == [3]
    method({"image": x[[1, 0]], "index": torch.tensor([2, 7])})
    assert calls == [3, 1]
    method.eval()({"image": x + 1, "index": torch.tensor([4, 2, 9])})
    assert calls == [3, 1, 3]  # held-out images have the same numbers
    fresh = PHReg(make("plain"), Settings(views=4, shift_frac=0.3)).train()
    torch.nn.Module.load_state_dict(fresh, method.state_dict())
    views_of = method.draw(torch.tensor([4, 2, 9]), x)
    assert torch.equal(original(x, *views_of), fresh.target(x, *views_of))


def test_random_crops_cover_the_model_and_grey_becomes_colour():
    view = CoverCrop(Preprocess(image_size=(32, 48)))
    torch.manual_seed(0)
    for shape in ((3, 100, 40), (1, 20, 200), (3, 32, 48), (1, 5, 7)):
        picture = torch.randint(0, 255, shape, dtype=torch.uint8)
        out = view(picture)
        assert out.shape == (3, 32, 48) and out.dtype == torch.uint8
        if shape == (3, 32, 48):
            assert torch.equal(out, picture)
    wide = torch.arange(200, dtype=torch.uint8).expand(1, 20, 200)
    assert len({int(CoverCrop(Preprocess(image_size=(20, 20)))(wide)[0, 0, 0]) for _ in range(20)}) > 5


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"registers": -1}, r"registers is -1\n.*published 16"),
        ({"views": 1}, "views is 1"),
        ({"shift_frac": 0.0}, r"shift_frac is 0.0\n.*published 0.15"),
        ({"lr_decay": 0.0}, "lr_decay 0.0"),
        ({"decay_epochs": 0}, "decay_epochs is 0"),
        ({"registers": "many"}, "registers is 'many'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**given)


def test_what_cannot_be_shifted_or_kept_is_refused():
    with pytest.raises(ConfigError, match=r"grid of 3x3 patches is too small for shifts of 15%.*\n.*4 patches or more"):
        PHReg(make("plain"))({"image": images((48, 48)), **BATCH})
    with pytest.raises(ConfigError, match=r"unlock_blocks is 7\n.*3 blocks"):
        PHReg(make("plain"), Settings(unlock_blocks=7))
    vit = make("plain")
    vit.passport = SimpleNamespace(
        preprocess=Preprocess(image_size=(64, 64)), feature=SimpleNamespace(positions="timm")
    )
    method = PHReg(vit, Settings(keep_targets=True))
    method.require(1000, 8, 1)
    with pytest.raises(ConfigError, match=r"would hold \d+ GB for 100000000 images"):
        method.require(100_000_000, 8, 1)
    with pytest.raises(ConfigError, match="is not a multiple of the patch size"):
        method({"image": images((60, 64)), **BATCH})


# ---------------------------------------------------------------- the verb

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small ViT's weights in a file, with its config beside it."""
    import json

    folder = tmp_path_factory.mktemp("base")
    vit = weights.load(
        "vit_tiny_patch16_224", pretrained=False, arch_kwargs=TINY, image_size=32, patch_size=8, in_chans=1, say=None
    )
    torch.save(vit.state_dict(), folder / "vit.pth")
    (folder / "config.json").write_text(json.dumps({**TINY, "img_size": [32, 32], "patch_size": [8, 8], "in_chans": 1}))
    return folder / "vit.pth"


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    settings = {"registers": 2, "views": 3, "shift_frac": 0.3, "epochs": 2, "batch_size": 16, "max_steps": 4}
    return vitkit.clean("ph_reg", model=base, data="digits", out=out, workers=0, quiet=True, **settings)


def test_the_verb_gives_a_plain_timm_vit_and_a_report_that_compares(run, base):
    vit = weights.load(run.path, say=None)
    assert type(vit).__name__ == "VisionTransformer" and vit.num_prefix_tokens == 3 and not vit.passport.steps
    alone = timm.create_model("vit_tiny_patch16_224", **TINY, img_size=32, patch_size=8, in_chans=1, num_classes=0,
                              dynamic_img_size=True, reg_tokens=2, no_embed_class=True)  # fmt: skip
    alone.load_state_dict(weights.read_state(run.path / "model.safetensors")[0])
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(alone.eval().forward_features(x), tokens.encode(vit.eval(), x).all, atol=1e-5)
    before = weights.load(base, say=None)
    same = [name for name in before.state_dict() if name.startswith(("blocks.0.", "norm."))]
    assert same and all(torch.equal(vit.state_dict()[name], before.state_dict()[name]) for name in same)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    for words in ("How clean the patch features are", "share of high-norm tokens", "content rolled", "before", "after"):
        assert words in page
    summary = run.summary
    assert set(summary["cleanliness"]) >= {"high_norm", "position", "position_rolled"}
    assert summary["verdict"].startswith("Cleaned on 1,") and "position code" in summary["verdict"]
    assert 0 < summary["trained_parameters"] < summary["total_parameters"]
    records = [line for line in (run.path / "metrics.jsonl").read_text().splitlines() if '"cosine"' in line]
    assert records and '"rate"' in records[0]


def test_a_cleaned_vit_goes_on_to_other_verbs(run, tmp_path):
    found = vitkit.evaluate(model=run.path, data="digits", protocols=("linear",), quiet=True, workers=0)
    assert found["linear"]["n"] > 0
    from vitkit.adapt import adaptformer

    vit = adaptformer.inject(weights.load(run.path, say=None), adaptformer.Settings(bottleneck=4))
    with torch.no_grad():
        assert tokens.encode(vit.eval(), torch.randn(1, 1, 32, 32)).prefix.shape[1] == 3
        assert tokens.attention_maps(vit, torch.randn(1, 1, 32, 32))[0].shape[-1] == 16 + 3


def test_a_run_that_was_stopped_resumes_bit_for_bit(run, base, tmp_path):
    settings = {"registers": 2, "views": 3, "shift_frac": 0.3, "epochs": 2, "batch_size": 16, "save_every": 1}
    from vitkit.run import loop

    original = loop._Fit._optimize

    def stop_at_two(self, batch):
        original(self, batch)
        if self.state.step == 2:
            self.stop["now"] = True

    loop._Fit._optimize = stop_at_two
    try:
        with pytest.raises(KeyboardInterrupt):
            vitkit.clean("ph_reg", model=base, data="digits", out=tmp_path / "b", max_steps=4, workers=0, quiet=True,
                         **settings)  # fmt: skip
    finally:
        loop._Fit._optimize = original
    again = vitkit.clean(
        "ph_reg", model=base, data="digits", out=tmp_path / "b", max_steps=4, workers=0, quiet=True, **settings
    )
    one, two = (weights.read_state(path.path / "model.safetensors")[0] for path in (run, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_copies_are_apart():
    method = PHReg(make("plain"), Settings(views=3, shift_frac=0.3))
    twin = copy.deepcopy(method)
    with torch.no_grad():
        twin.vit.reg_token.add_(1)
    assert not torch.equal(twin.vit.reg_token, method.vit.reg_token)
