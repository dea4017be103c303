"""DVT: the decomposition recovers a planted pattern, lazy Adam is Adam, and the cleaned ViT is a ViT like any other."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vitkit
from tests.test_tokens import FAMILIES, close, images, make
from vitkit import tokens, weights
from vitkit.clean.dvt import DVT, Denoiser, Settings, heads_of, inject, load_official, raw_features, table_grid
from vitkit.data import read
from vitkit.errors import ConfigError, DataError, TrainingError, WeightsError
from vitkit.parts.crop_views import draw_crops, patch_coordinates
from vitkit.parts.decomposition import Decomposition, Fit, Plan, coordinates, field_maps
from vitkit.parts.hash_grid import grid_levels
from vitkit.run import dvt_stage1
from vitkit.run.dvt_jobs import chosen_rows

LITTLE = {"views": 4, "steps": 6, "pixels": 32, "levels": 3, "base_resolution": 4, "features": 4}
MODEL = {
    "model": "vit_tiny_patch16_224",
    "arch_kwargs": {"embed_dim": 48, "depth": 2, "num_heads": 2},
    "pretrained": False,
    "patch_size": 8,
    "image_size": 32,
    "quiet": True,
    "workers": 0,
}


@pytest.fixture
def photos(tmp_path):
    """12 smooth random pictures of several sizes."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
        small.resize((40 + i, 36), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


# ---------------------------------------------------------------- decomposition


def planted(seed: int = 0, dim: int = 16, grid: tuple[int, int] = (8, 6), views: int = 40):
    """Views of a smooth field with one map over the places of the view, mirrored crops included: (features, coordinates,
    the map, the clean features of the whole)."""
    generator = torch.Generator().manual_seed(seed)
    waves, mixed = torch.randn(2, 4, generator=generator) * 3, torch.randn(4, dim, generator=generator)

    def clean(coords):
        return (coords @ waves).sin() @ mixed

    pattern = torch.randn(*grid, dim, generator=generator)
    size = (160, 120)
    places = [patch_coordinates(c, size, grid) for c in draw_crops(views, size, (0.1, 0.5), seed=seed).tolist()]
    where = torch.stack([*places, coordinates(grid)])
    features = clean(where) + pattern + 0.05 * torch.randn(*where.shape[:3], dim, generator=generator)
    return features, where, pattern, clean(where[-1])


def fitted(features, where, grid, *, steps=300, count=1, **more):
    plan = Plan(steps=steps, pixels=256, warmup=steps // 10, **more)
    levels = grid_levels(4, 32, 6, 12)
    model = Decomposition(features.shape[-1], grid, levels, features=4, count=count, seeds=range(count))
    Fit(model, features, where, plan, seeds=range(count)).run()
    return model


@pytest.mark.parametrize("grid", [(8, 6), (5, 9)])
def test_a_planted_pattern_is_recovered(grid):
    features, where, pattern, clean = planted(grid=grid)
    model = fitted(features[None], where[None], grid)
    found = model.artifacts[0].detach().view(*grid, -1)
    assert correlation(found, pattern) > 0.9
    assert error(field_maps(model)[0], clean) < error(features[-1], clean) / 3


def correlation(a, b):
    a, b = (x - x.mean((0, 1)) for x in (a, b))
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def error(a, b):
    return float(((a - a.mean((0, 1))) - (b - b.mean((0, 1)))).square().mean().sqrt())


def test_pictures_fitted_together_get_what_they_get_alone():
    data = [planted(seed, views=6) for seed in (0, 1)]
    features, where = (torch.stack([one[k] for one in data]) for k in (0, 1))
    both = field_maps(fitted(features, where, (8, 6), steps=12, count=2))
    levels = grid_levels(4, 32, 6, 12)
    alone = Decomposition(16, (8, 6), levels, features=4, seeds=[1])
    Fit(alone, features[1:], where[1:], Plan(steps=12, pixels=256, warmup=1), seeds=[1]).run()
    assert torch.allclose(both[1], field_maps(alone)[0], atol=1e-4)


def test_dense_and_touched_rows_end_alike():
    features, where, _, clean = planted(views=10)
    maps = [field_maps(fitted(features[None], where[None], (8, 6), rows=rows))[0] for rows in ("dense", "touched")]
    assert error(*maps) < 0.1 * error(features[-1], clean)


def test_the_shared_map_stands_still_in_the_second_phase():
    features, where, _, _ = planted(views=4)
    model = Decomposition(16, (8, 6), grid_levels(4, 8, 2, 8))
    fit = Fit(model, features[None], where[None], Plan(steps=10, pixels=64, warmup=1), seeds=[0])
    names = [set(fit.step()) for _ in range(6)]
    kept = model.artifacts.detach().clone()
    residual = model.residual_weight0.detach().clone()
    assert all(found == {"l2", "cosine"} for found in names)
    assert set(fit.step()) == {"l2", "cosine", "residual", "sparsity"}  # step 6 > 0.5 x 10
    assert torch.equal(model.artifacts, kept) and not torch.equal(model.residual_weight0, residual)


def test_foreign_tensors_are_refused():
    model = Decomposition(8, (2, 2), grid_levels(4, 8, 2, 8))
    with pytest.raises(WeightsError, match=r"1 tensors do not fit.*field.mlp.0.bias"):
        model.load_official({**model.official_state(), "field.mlp.0.bias": torch.zeros(9)})


# ---------------------------------------------------------------- the cleaned ViT


@pytest.mark.parametrize("name", FAMILIES)
def test_patches_are_cleaned_behind_the_norm_and_nothing_else_changes(name):
    vit, x = make(name), images((64, 96))
    with torch.no_grad():
        plain = tokens.encode(vit, x, layers=[0, -1])
        assert inject(vit, Settings()) is vit and table_grid(vit) == (4, 4)
        clean = tokens.encode(vit, x, layers=[0, -1])
        want = vit.dvt(plain.patches, (4, 6))
        assert torch.equal(clean.patches, want) and torch.equal(clean.prefix, plain.prefix)
        assert torch.equal(clean.taps[1].patches, want)  # what dense heads tap is the same
        assert torch.equal(clean.taps[0].patches, plain.taps[0].patches)  # inner layers are as they were
        assert torch.equal(raw_features(vit, x).flatten(1, 2), plain.patches)
        assert torch.equal(vit.forward_features(x), clean.all)
        assert torch.equal(vit(x), tokens.logits(vit, x))


def test_a_kept_subset_runs_with_its_own_positions():
    vit, x = inject(make("plain"), Settings()), images((64, 64))
    everything = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        all_of_them = tokens.encode(vit, x).patches
        assert close(tokens.encode(vit, x, keep=everything).patches, all_of_them, 1e-6)
        turned = tokens.encode(vit, x, keep=everything.flip(1)).patches
        assert close(turned.flip(1), all_of_them, 1e-5)


def test_it_composes_with_adapters_and_copies():
    from vitkit.adapt import adaptformer, lora, vpt

    vit, x = make("dinov3"), images((64, 64))
    for module, settings in (
        (adaptformer, adaptformer.Settings(bottleneck=4)),
        (vpt, vpt.Settings(prompts=2)),
        (lora, lora.Settings(rank=2)),
    ):
        module.inject(vit, settings)
    with torch.no_grad():
        before = tokens.encode(vit, x)
        inject(vit, Settings(blocks=2))
        after = tokens.encode(copy.deepcopy(vit), x)
        assert torch.equal(after.patches, vit.dvt(before.patches, before.grid))
        assert tokens.attention_maps(vit, x)[0].shape[0] == 2
    with pytest.raises(ConfigError, match="already carries a denoiser"):
        inject(vit, Settings())
    with pytest.raises(ConfigError, match="would pass the denoiser by"):
        vit.forward_intermediates(x)


def test_heads_divide_the_width():
    assert [heads_of(dim) for dim in (48, 64, 192, 200, 384, 768)] == [1, 1, 3, 2, 6, 12]


def test_a_table_of_another_shape_is_resampled():
    denoiser = Denoiser(64, (3, 5))
    out = denoiser(torch.randn(2, 4 * 7, 64), (4, 7))
    assert out.shape == (2, 28, 64)


def test_official_files_that_do_not_fit_say_why():
    state = {**Denoiser(48, (3, 5)).state_dict()}
    with pytest.raises(WeightsError, match=r"15 rows is no square grid.*\n.*give grid="):
        load_official(make("plain"), state)
    with pytest.raises(WeightsError, match="features of width 48, and this ViT has 64"):
        load_official(make("plain", embed_dim=64), state, (3, 5))
    with pytest.raises(WeightsError, match=r"no DVT denoiser.*\n.*distilled ones load with"):
        load_official(make("plain"), {"model.pos_embed": torch.zeros(1, 4, 48)})
    with pytest.raises(WeightsError, match="does not fit"):
        load_official(make("plain"), {k: v for k, v in state.items() if "fc1" not in k}, (3, 5))
    vit = load_official(make("plain"), {**state, "vit.cls_token": torch.zeros(1)}, (3, 5))
    assert torch.equal(vit.dvt.pos_embed, state["pos_embed"])


def test_distilled_checkpoints_are_plain_vits(tmp_path):
    vit = make("plain")
    state = {f"model.{key}": value for key, value in vit.state_dict().items()}
    torch.save({"model": state}, tmp_path / "distilled.pth")
    kwargs = {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": 64}
    loaded = weights.load(tmp_path / "distilled.pth", arch="vit_tiny_patch16_224", arch_kwargs=kwargs, say=None).eval()
    x = images((64, 64))
    with torch.no_grad():
        assert torch.equal(tokens.encode(loaded, x).all, tokens.encode(vit, x).all)


def test_only_the_denoiser_trains_and_the_rule_of_rates_is_the_official_one():
    method = DVT(make("plain"), Settings())
    assert {n for n, p in method.named_parameters() if p.requires_grad} == {
        n for n, _ in method.named_parameters() if n.startswith("vit.dvt.")
    }
    method.rates = {"lr": 1.0, "min_lr": 0.1, "warmup": 3, "total": 8}
    group = {"lr": 0.0}
    rates = []
    for step in range(9):
        method.before_step(type("Now", (), {"step": step}), [group])
        rates.append(group["lr"])
    assert rates[:4] == [0.0, 0.5, 1.0, 1.0] and rates[8] == 0.1
    assert method.train().vit.training is False and method.vit.dvt.training


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"views": 0}, "views is 0"),
        ({"crop_area": (0.5, 0.1)}, "crop_area is"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"max_resolution": 0}, "max_resolution is 0"),
        ({"together": 0}, "together is 0"),
        ({"grid": (1, 4)}, "grid is"),
        ({"distil_epochs": -1}, "distil_epochs is -1"),
        ({"rows": "some"}, "rows is 'some'"),
    ],
)
def test_wrong_settings(wrong, text):
    with pytest.raises(ConfigError, match=text):
        Settings(**wrong)


def test_models_without_a_map_of_patches_are_refused():
    with pytest.raises(ConfigError, match=r"a grid of 1 x 1 patches.*\n.*image_size"):
        inject(make("plain", size=16), Settings())


# ---------------------------------------------------------------- stage 1


def test_the_finest_grid_follows_the_crops():
    assert dvt_stage1.finest(Settings(), (37, 37)) == 128
    assert dvt_stage1.finest(Settings(), (14, 14)) == 64
    assert dvt_stage1.finest(Settings(max_resolution=1024), (14, 14)) == 1024
    few = dvt_stage1.levels_of(Settings(max_resolution=8), (4, 4))
    assert few[0].resolution == few[-1].resolution == 8


def test_pictures_at_once():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert dvt_stage1.together(Settings(), (37, 37), 768, cuda) == 4
    assert dvt_stage1.together(Settings(), (14, 14), 192, cuda) == 16
    assert dvt_stage1.together(Settings(), (37, 37), 768, cpu) == 1
    assert dvt_stage1.together(Settings(together=3), (37, 37), 768, cpu) == 3


def test_a_picture_gets_the_same_maps_whoever_stands_beside_it():
    vit = make("plain")
    vit.passport = weights.load(MODEL["model"], pretrained=False, image_size=64, say=None).passport
    pictures = list(images((64, 64), 3))
    more = {"device": torch.device("cpu"), "batch_size": 3}
    settings = Settings(**LITTLE)
    raw, clean, _ = dvt_stage1.decompose(vit, pictures, settings, seeds=[5, 8, 11], **more)
    _, alone, _ = dvt_stage1.decompose(vit, pictures[1:2], settings, seeds=[8], **more)
    assert torch.allclose(clean[1], alone[0], atol=1e-4)
    assert close(raw, raw_features(vit, torch.stack(pictures)), 1e-5)


def test_drawn_pictures_stay_apart():
    found = read("digits", say=None)
    learn, check = chosen_rows(found, 40, 0.1, 0)
    assert len(learn) == 36 and len(check) == 4 and not set(learn) & set(check)
    assert set(found.split[np.concatenate([learn, check])]) == {"train"}
    few = found.subset(np.flatnonzero(found.split == "train")[:3])
    with pytest.raises(DataError, match=r"3 training pictures are too few.*\n.*at least 4"):
        chosen_rows(few, 40, 0.1, 0)
    with pytest.raises(ConfigError, match="images is 2"):
        chosen_rows(found, 2, 0.1, 0)
    one = replace(found, group=np.array(["same"] * len(found)))
    with pytest.raises(DataError, match="all of one group"):
        chosen_rows(one, 40, 0.1, 0)


# ---------------------------------------------------------------- the verb


def test_from_pictures_to_a_clean_vit(photos, tmp_path, capsys, monkeypatch):
    base = vitkit.pretrain(
        "mae",
        data=str(photos),
        out=str(tmp_path / "base"),
        max_steps=1,
        batch_size=8,
        decoder_dim=16,
        decoder_depth=1,
        **MODEL,
    )
    out = tmp_path / "run"
    given = {"model": str(base.path), "data": str(photos), "epochs": 2, "batch_size": 4, "workers": 0, **LITTLE}
    made = []
    real = dvt_stage1.Pairs.write

    def write(self, shard, *maps):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(shard)
        real(self, shard, *maps)

    monkeypatch.setattr(dvt_stage1.Pairs, "write", write)
    with pytest.raises(KeyboardInterrupt):
        vitkit.clean("dvt", out=str(out), **given)
    monkeypatch.setattr(dvt_stage1.Pairs, "write", real)
    kept = (out / "stage1" / "00001.safetensors").read_bytes()
    capsys.readouterr()
    run = vitkit.clean("dvt", out=str(out), **given)
    said = capsys.readouterr().err
    assert "3 of 12 parts of stage 1 are done already" in said
    assert "12 pictures are few" in said and "comes " in said
    assert (out / "stage1" / "00001.safetensors").read_bytes() == kept

    stored, meta = weights.read_state(out / "model.safetensors")
    assert meta["vitkit"] == "delta" and all(name.startswith("dvt.") for name in stored)
    vit, trunk = weights.load(out, say=None).eval(), weights.load(base.path, say=None).eval()
    x = images((32, 32))
    with torch.no_grad():
        raw, clean = tokens.encode(trunk, x), tokens.encode(vit, x)
        assert torch.equal(clean.prefix, raw.prefix)
        assert torch.equal(clean.patches, vit.dvt(raw.patches, raw.grid))
    names = [one["name"] for one in run.summary["metrics"]]
    assert names[0] == "cosine to the clean target" and len(names) == 3
    passport = json.loads((out / "passport.json").read_text())
    assert passport["steps"][-1]["method"] == "clean.dvt" and passport["steps"][-1]["settings"]["grid"] == [4, 4]
    report = (out / "report.html").read_text()
    assert (
        "How clean the patch features are" in report and "&#39;value&#39;" not in report
    )  # intervals are shown as such


def test_adapting_a_clean_vit(tmp_path):
    given = {**MODEL, "in_chans": 1, "patch_size": 16, "epochs": 1, "batch_size": 64}
    clean = vitkit.clean("dvt", data="digits", out=str(tmp_path / "clean"), images=6, **given, **LITTLE)
    own = {"data": "digits", "quiet": True, "workers": 0}
    run = vitkit.adapt("linear", model=str(clean.path), out=str(tmp_path / "a"), labels_per_class=4, epochs=1, **own)
    assert [step["method"] for step in weights.load(run.path, say=None).passport.steps] == ["clean.dvt", "adapt.linear"]
    with pytest.raises(ConfigError, match="already carries a denoiser"):
        vitkit.clean("dvt", model=str(clean.path), out=str(tmp_path / "b"), **own)


def test_stage_3_gives_a_plain_vit_nearer_to_clean_patches(photos, tmp_path):
    own = {**LITTLE, **MODEL, "batch_size": 4, "lr": 2e-3, "epochs": 4, "distil_epochs": 12}
    out = tmp_path / "run"
    run = vitkit.clean("dvt", data=str(photos), out=str(out), **own)
    assert len((out / "stage3" / "metrics.jsonl").read_text().splitlines()) > 2
    student = weights.load(run.path, say=None).eval()
    assert type(student).__name__ == "VisionTransformer" and not any("dvt" in n for n in student.state_dict())
    size = {"image_size": 32, "patch_size": 8, "arch_kwargs": MODEL["arch_kwargs"], "pretrained": False}
    before = weights.load(MODEL["model"], say=None, **size).eval()
    teacher = load_official(copy.deepcopy(before), student.extras).eval()
    x = torch.stack(
        [dvt_stage1.whole_picture(read(str(photos), say=None).decode(i), before.passport.preprocess) for i in range(9)]
    )
    with torch.no_grad():
        want, raw, got = (tokens.encode(vit, x).patches for vit in (teacher, before, student))
    assert float((got - want).square().mean()) < 0.7 * float((raw - want).square().mean())


def test_pairs_of_another_run_are_refused(tmp_path):
    found = read("digits", say=None)
    pairs = dvt_stage1.Pairs(tmp_path, found, np.arange(3), 2)
    maps = torch.randn(2, 4, 4, 8)
    pairs.write(0, maps, maps)
    assert pairs.missing() == [1]
    assert torch.equal(pairs.batch([1])["raw"][0], maps[1].bfloat16().float())
    with pytest.raises(TrainingError, match="holds other pictures"):
        dvt_stage1.Pairs(tmp_path, found, np.arange(1, 3), 2).missing()


def test_features_that_are_not_finite_stop_stage_1():
    vit = make("plain")
    with torch.no_grad():
        vit.norm.weight.fill_(float("nan"))
    with pytest.raises(WeightsError, match="not finite"):
        dvt_stage1.decompose(vit, [images((64, 64))[0]], Settings(**LITTLE), seeds=[0], device=torch.device("cpu"))
