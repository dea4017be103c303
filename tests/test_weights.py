"""`weights.load`: from every kind of name to a ViT with the right numbers, or an error that says how to go on."""

import argparse
import copy
import json
import os
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitkit import layouts, weights
from vitkit.errors import WeightsError
from vitkit.parts import architecture
from vitkit.parts.positions import resample_positions, sincos_2d
from vitkit.parts.sources import split_head
from vitkit.passport import Preprocess

FIXTURES = Path(os.environ.get("VITKIT_PARITY", Path(__file__).parent / "parity" / "fixtures"))
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def tiny(seed=0, **changes):
    """A small timm ViT with random, not merely initial, numbers everywhere."""
    torch.manual_seed(seed)
    vit = VisionTransformer(**{**TINY, "num_classes": 0, "dynamic_img_size": True, **changes})
    for value in vit.state_dict().values():
        value.copy_(torch.randn(value.shape) * 0.1)
    return vit.eval()


def write(folder, state, config=None, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    weights.save_state(folder / name, state)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / name


def load(ref, **kwargs):
    return weights.load(ref, **{"say": None, **kwargs}).eval()


def images(size=(32, 32), chans=3, seed=1):
    return torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(seed))


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# --- names -------------------------------------------------------------------------------------------------------------


def test_random_weights_come_from_the_seed_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = load("timm/test_vit.r160_in1k", pretrained=False, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    two, other = load("test_vit", pretrained=False, seed=5), load("test_vit", pretrained=False, seed=6)
    assert same(one.state_dict(), two.state_dict()) and not same(one.state_dict(), other.state_dict())
    base = one.passport.base
    assert (base["kind"], base["ref"], base["seed"]) == ("random", "test_vit.r160_in1k", 5)
    assert one.load_report == ["test_vit.r160_in1k: random weights"] and one.num_classes == 0


def test_same_numbers_as_timm_at_any_size():
    vit = load("test_vit", pretrained=False)
    theirs = timm.create_model("test_vit", num_classes=0).eval()
    theirs.load_state_dict(vit.state_dict())
    assert torch.equal(vit(images((160, 160))), theirs(images((160, 160))))
    assert vit(images((96, 64))).shape == (2, 64)


def test_passport_of_a_timm_name():
    passport = load("vit_tiny_patch16_224", pretrained=False, image_size=(64, 96), arch_kwargs={"depth": 1}).passport
    assert passport.arch == "vit_tiny_patch16_224" and passport.arch_kwargs == {"depth": 1, "img_size": [64, 96]}
    assert passport.preprocess == Preprocess((0.5,) * 3, (0.5,) * 3, (64, 96), crop_pct=0.9)
    assert (passport.feature.pool, passport.feature.norm, passport.feature.positions) == ("token", "norm", "timm")
    json.dumps(passport.to_dict())


@pytest.mark.parametrize(
    ("name", "pool", "norm"),
    [("test_vit2", "avg", "fc_norm"), ("test_vit3", "map", "norm"), ("eva02_tiny_patch14_224", "avg", "fc_norm")],
)
def test_feature_is_what_timm_pools(name, pool, norm):
    feature = load(name, pretrained=False, arch_kwargs={"depth": 1}).passport.feature
    assert (feature.pool, feature.norm) == (pool, norm)


def test_dinov3_reads_the_class_token_and_says_so():
    kwargs = {"pretrained": False, "image_size": 32}
    vit = load("vit_small_patch16_dinov3", arch_kwargs={"depth": 1}, **kwargs)
    assert vit.global_pool == "token" == vit.passport.feature.pool and "class token" in vit.load_report[0]
    free = load("vit_small_patch16_dinov3", arch_kwargs={"global_pool": "avg", "depth": 1}, **kwargs)
    assert free.passport.feature.pool == "avg"
    rounded = load("vit_small_patch16_dinov3", arch_kwargs={"depth": 1}, rope="bfloat16", **kwargs)
    assert rounded.passport.feature.rope == "bfloat16"
    assert torch.equal(rounded.rope.periods, vit.rope.periods.bfloat16().float())
    with pytest.raises(WeightsError, match="without rotary periods"):
        load("test_vit", pretrained=False, rope="bfloat16")


def test_bare_class():
    vit = load("VisionTransformer", arch_kwargs={**TINY, "norm_eps": 1e-5, "mlp_ratio": 3}, pretrained=False)
    assert vit.blocks[0].norm1.eps == 1e-5 and vit.blocks[0].mlp.fc1.out_features == 96
    assert load("VisionTransformer", arch_kwargs=TINY, pretrained=False).norm.eps == 1e-6
    assert "ImageNet mean and std are assumed" in vit.load_report[1]
    with pytest.raises(WeightsError, match="bare class and has no pre-trained weights"):
        load("VisionTransformer", arch_kwargs=TINY)


@pytest.mark.parametrize(
    ("ref", "kwargs", "words"),
    [
        (
            "vit_tinny_patch16_224",
            {},
            r"neither a file nor a model that timm knows\n  fix: did you mean vit_tiny_patch16_224",
        ),
        ("test_vit.r999", {}, r"no weights 'r999' of test_vit\n  fix: its tags: r160_in1k"),
        ("resnet18", {}, "is a ResNet; vitkit's methods work on.*\n  fix: .*tokens.maps"),
        ("swin_tiny_patch4_window7_224", {}, "is a SwinTransformer"),
        ("test_vit", {"arch_kwargs": {"embed_dmi": 3}}, r"unknown key 'embed_dmi'\n  fix: did you mean 'embed_dim'"),
        ("test_vit", {"arch_kwargs": {"num_heads": 7}}, "test_vit cannot be built with num_heads=7"),
        ("test_vit", {"arch": "vit_tiny_patch16_224"}, "beside the model name"),
        ("test_vit", {"image_size": 100}, "not a multiple of the patch size .*use a multiple, e.g. 96 instead of 100"),
        ("test_vit", {"image_size": (1, 2, 3)}, r"image_size is \(1, 2, 3\)"),
        ("test_vit", {"in_chans": 0}, "in_chans is 0"),
        ("vit_tiny_r_s16_p8_224", {"image_size": 112}, r"img_size=\[112, 112\]: .*its stem cannot divide"),
        ("vit_tiny_r_s16_p8_224", {"patch_size": 4}, "HybridEmbed, whose patches are not one convolution"),
        ("runs/none", {}, r"runs/none does not exist\n  fix: check the path, or write hf-hub:runs/none"),
        ("nothing.pth", {}, r"nothing\.pth does not exist"),
    ],
)
def test_wrong_names_say_what_works(ref, kwargs, words):
    with pytest.raises(WeightsError, match="(?s)" + words):
        load(ref, **{"pretrained": ref.endswith(".pth") or "/" in ref, **kwargs})


def test_unreachable_weights_are_never_replaced(monkeypatch):
    def offline(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("timm.models.load_model_config_from_hf", offline)
    for name in ("test_vit.r160_in1k", "hf-hub:org/model"):
        with pytest.raises(
            WeightsError, match=f"(?s){name} could not be loaded .*unreachable.*nothing was substituted.*false"
        ):
            load(name)
    with pytest.raises(WeightsError, match="timm has no pre-trained weights of vit_base_patch16_18x2_224"):
        load("vit_base_patch16_18x2_224")
    with pytest.raises(WeightsError, match="is a ResNet"):  # refused before anything is fetched
        load("resnet18")


@pytest.fixture
def hub(monkeypatch):
    """timm's hub, holding one model: its state dict."""
    torch.manual_seed(3)
    state = {name: torch.randn_like(value) for name, value in timm.create_model("test_vit").state_dict().items()}
    fetch = {"test_vit": lambda: {name: value.clone() for name, value in state.items()}}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: fetch["test_vit"]())
    return state


def test_timm_weights_and_their_head(hub):
    plain, whole = load("test_vit"), load("test_vit.r160_in1k", num_classes=None)
    assert same(whole.state_dict(), hub) and same(plain.state_dict(), split_head(hub)[0])
    assert plain.passport.licence == "apache-2.0" and plain.passport.base["kind"] == "timm"
    assert plain.passport.base["sha256"] == weights.sha256_of(plain.state_dict()) == whole.passport.base["sha256"]
    assert "the head of 1000 classes (2 tensors) is left out" in plain.load_report
    fresh = load("test_vit", num_classes=7)
    assert fresh.head.out_features == 7 and "a new head of 7 classes, randomly initialised" in fresh.load_report
    assert torch.equal(fresh.head.weight, load("test_vit", num_classes=7).head.weight)
    assert torch.equal(load("test_vit", num_classes=1000).head.weight, hub["head.weight"])


def test_timm_weights_follow_timm_when_adapted(hub):
    ours = load("test_vit", image_size=(64, 96), in_chans=1, patch_size=8, drop_path_rate=0.1)
    theirs = timm.create_model("test_vit", pretrained=True, num_classes=0, img_size=(64, 96), in_chans=1, patch_size=8)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours.pos_embed, theirs.pos_embed)
    assert ours.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert ours.passport.preprocess.channels == "grey" and ours.passport.preprocess.image_size == (64, 96)
    # Resampled numbers differ in their last bits between machines, so the base is known by those before.
    assert ours.passport.base["sha256"] == load("test_vit").passport.base["sha256"]
    other = load("test_vit", image_size=96, positions="mae")
    table = resample_positions(hub["pos_embed"], (6, 6), prefix=1, rule="mae")
    assert torch.equal(other.pos_embed, table) and other.passport.feature.positions == "mae"


@pytest.mark.parametrize(
    ("name", "side"), [("vit_tiny_r_s16_p8_224", 192), ("vitamin_small_224", 112), ("eva02_tiny_patch14_224", 112)]
)
def test_stems_and_rotary_tables_of_every_kind_adapt(monkeypatch, name, side):
    source = timm.create_model(name, depth=1)
    state = source.state_dict()
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: model.load_state_dict(state))
    vit = load(name, image_size=side, in_chans=1, arch_kwargs={"depth": 1})
    assert vit(images((side, side), chans=1)).shape == (2, vit.num_features)
    adapted = {f"{source.pretrained_cfg['first_conv']}.weight", "pos_embed"}
    for key, value in vit.state_dict().items():
        expected = value if key == "pos_embed" else state[key]
        assert torch.equal(value, expected.sum(1, keepdim=True) if key in adapted - {"pos_embed"} else expected)


# --- files and their architecture --------------------------------------------------------------------------------------


def test_flat_config_beside(tmp_path):
    vit = tiny(img_size=(32, 48), mlp_ratio=3)
    config = {
        **TINY,
        "img_size": [32, 48],
        "mlp_ratio": 3,
        "mean": [0.5] * 3,
        "std": [0.3] * 3,
        "crop_pct": 0.9,
        "note": "x",
    }
    for ref in (write(tmp_path / "a", vit.state_dict(), config), tmp_path / "a"):  # the file, or its folder
        ours = load(ref)
        assert same(ours.state_dict(), vit.state_dict()) and torch.equal(ours(images((32, 48))), vit(images((32, 48))))
    assert ours.passport.preprocess == Preprocess((0.5,) * 3, (0.3,) * 3, (32, 48), crop_pct=0.9)
    assert "model.safetensors: read as timm-style ViT: 30 tensors used" in ours.load_report
    assert f"not used from {tmp_path / 'a' / 'config.json'}: note" in ours.load_report


def test_synonyms_and_timm_config(tmp_path):
    vit = tiny()
    names = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 32,
    }
    ours = load(write(tmp_path / "a", vit.state_dict(), {**names, "layer_norm_eps": 1e-6, "activation": "gelu"}))
    assert torch.equal(ours(images()), vit(images()))
    deep = timm.create_model("test_vit")
    cfg = {"architecture": "test_vit", "num_classes": 1000, "num_features": 64, "pretrained_cfg": deep.pretrained_cfg}
    ours = load(write(tmp_path / "b", deep.state_dict(), json.loads(json.dumps(cfg))), num_classes=None)
    assert same(ours.state_dict(), deep.state_dict()) and ours.passport.arch == "test_vit"
    assert ours.passport.preprocess.mean == (0.5,) * 3 and ours.passport.licence == "apache-2.0"


def test_own_config_in_the_metadata(tmp_path):
    vit = tiny()
    weights.save_state(tmp_path / "x.safetensors", vit.state_dict(), {"config": json.dumps({"num_heads": 8})})
    assert load(tmp_path / "x.safetensors").blocks[0].attn.num_heads == 8


def test_arch_kwargs_win_over_the_config(tmp_path):
    path = write(tmp_path, tiny().state_dict(), TINY)
    vit = load(path, arch_kwargs={"num_heads": 2, "mean": [0.1] * 3, "std": [0.2] * 3})
    assert vit.blocks[0].attn.num_heads == 2 and vit.passport.preprocess.mean == (0.1,) * 3
    with pytest.raises(WeightsError, match="arch_kwargs: unknown key 'heads'"):
        load(path, arch_kwargs={"heads": 2})


def test_standard_shapes_need_no_config(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    path = write(tmp_path, vit.state_dict(), name="nonsense-base-patch32.safetensors")
    ours = load(path)
    assert ours.blocks[0].attn.num_heads == 3 and ours.passport.preprocess.image_size == (32, 32)
    assert same(ours.state_dict(), vit.state_dict())
    assert any("the usual number at width 192 and depth 12" in line for line in ours.load_report)


def test_unknown_heads_list_the_candidates(tmp_path):
    path = write(tmp_path, tiny(embed_dim=48).state_dict(), name="x.safetensors")
    with pytest.raises(WeightsError) as caught:
        load(path)
    text = str(caught.value)
    assert "number of attention heads" in text and "48 wide, 2 deep, patch 8x8, 32x32 px" in text
    assert "candidates: 1, 2, 3, 4, 6;" in text and '{"num_heads": N} into a config.json' in text and "--arch" in text
    assert load(path, arch_kwargs={"num_heads": 3}).blocks[0].attn.num_heads == 3


def small(sincos):
    """Tensors of a ViT-S/16 for 32 px, all zero and without memory of their own but for the position table."""
    with torch.device("meta"):
        shapes = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=0).state_dict()
    state = {name: torch.zeros(1).expand(value.shape) for name, value in shapes.items()}
    table = sincos_2d(384, (2, 2), prefix=1).unsqueeze(0)
    return state | {"pos_embed": table if sincos else torch.randn(table.shape)}


def heads(state):
    reading = layouts.read(state)
    return architecture.num_heads(reading, architecture.facts(reading, {}))[0]


def test_small_vit_with_a_fixed_table_is_ambiguous():
    with pytest.raises(
        WeightsError, match=r"fit two architectures .*6 heads \(vit_small_patch16_224, MAE\) or 12 \(MoCo v3"
    ):
        heads(small(sincos=True))
    with pytest.raises(WeightsError, match="--arch vit_small_patch16_224 for 6 heads"):  # a linear probe of MoCo v3
        heads(small(sincos=True) | {"head.weight": torch.ones(2, 384)})
    assert heads(small(sincos=False)) == 6
    assert heads(small(sincos=True) | {"decoder_embed.weight": torch.ones(4, 384)}) == 6
    assert heads({f"module.base_encoder.{name}": value for name, value in small(sincos=True).items()}) == 12


def test_moco_names_its_model_like_dino_does(tmp_path):
    state = {f"module.base_encoder.{name}": value for name, value in small(sincos=True).items()}
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "x.pth.tar")
    assert load(tmp_path / "x.pth.tar").blocks[0].attn.num_heads == 12
    assert load(tmp_path / "x.pth.tar", arch_kwargs={"num_heads": 6}).blocks[0].attn.num_heads == 6


def test_arguments_saved_by_authors(tmp_path):
    state = small(sincos=True) | {"decoder_embed.weight": torch.ones(4, 384), "mask_token": torch.ones(1, 1, 4)}
    args = argparse.Namespace(model="mae_vit_small_patch16_dec512d2b", mask_ratio=0.9, norm_pix_loss=False, lr=1e-3)
    torch.save({"model": state, "args": args, "optimizer": {}, "epoch": 800}, tmp_path / "x.pth")
    vit = load(tmp_path / "x.pth")
    assert vit.blocks[0].attn.num_heads == 6 and "model=mae_vit_small_patch16_dec512d2b" in vit.load_report[1]
    assert vit.passport.feature.positions == "mae" and set(vit.extras) == {"decoder_embed.weight", "mask_token"}
    assert vit.load_report[0] == "x.pth: read as MAE encoder: 150 tensors used, 2 decoder tensors left"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mae_vit_small_patch16_dec512d2b_448", (384, 12, 6, [16, 16], 512, 2)),
        ("mae_vit_huge_patch14", (1280, 32, 16, [14, 14], 512, 8)),
        ("mae_vit_base_patch16_dec512d8b", (768, 12, 12, [16, 16], 512, 8)),
        ("mae_vit_small_patch16_dec128d2b", (384, 12, 6, [16, 16], 128, 2)),
    ],
)
def test_mae_zoo(name, expected):
    from vitkit.parts.configs import zoo_model

    zoo = zoo_model(name)
    keys = ("embed_dim", "depth", "num_heads", "patch_size", "decoder_embed_dim", "decoder_depth")
    assert tuple(zoo[key] for key in keys) == expected and zoo["decoder_num_heads"] == 16
    assert zoo_model("vit_large_patch16")["num_heads"] == 16 and zoo_model("vit_small")["num_heads"] == 6
    assert zoo_model("vit_base_patch16_224") is None and zoo_model("resnet50") is None


def test_config_that_contradicts_the_tensors(tmp_path):
    path = write(tmp_path, tiny().state_dict(), {**TINY, "depth": 3, "mlp_ratio": 2})
    with pytest.raises(
        WeightsError, match=r"config\.json contradicts the tensors: depth is 3, the tensors have 2; mlp_"
    ):
        load(path)
    path = write(tmp_path / "b", tiny(global_pool="avg").state_dict(), {**TINY, "global_pool": False})
    with pytest.raises(WeightsError, match="global_pool is the class token, but the tensors have fc_norm"):
        load(path)
    path = write(tmp_path / "c", tiny().state_dict(), {**TINY, "num_heads": 5})
    with pytest.raises(WeightsError, match="5 heads do not divide a width of 32"):
        load(path)


def test_grids_that_are_not_square_need_a_config(tmp_path):
    vit = tiny(img_size=(32, 48))
    path = write(tmp_path, vit.state_dict(), {"num_heads": 4})
    with pytest.raises(
        WeightsError, match=r"image size cannot be read off .*25 position rows, 1 prefix tokens, patch 8x8"
    ) as e:
        load(path)
    assert '"no_embed_class": true if the table has rows for patches only' in str(e.value)  # 25 is 5x5 as well
    assert load(path, arch_kwargs={"no_embed_class": True}).patch_embed.grid_size == (5, 5)
    assert load(path, arch_kwargs={"img_size": [32, 48]}).patch_embed.grid_size == (4, 6)
    with pytest.raises(WeightsError, match=r"img_size \[32, 32\] does not fit the position table"):
        load(path, arch_kwargs={"img_size": 32})


@pytest.mark.parametrize(
    "changes",
    [
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"reg_tokens": 3, "no_embed_class": True},
        {"reg_tokens": 2},
        {"init_values": 1e-5, "qkv_bias": False},
        {"pre_norm": True, "qk_norm": True},
        {"global_pool": "avg"},
        {"patch_size": (4, 8), "in_chans": 2},
        {"mlp_ratio": 209 / 32},
    ],
)
def test_shapes_tell_the_rest(tmp_path, changes):
    vit = tiny(**changes)
    told = {"no_embed_class", "patch_size"} & set(changes)  # the grid is then not surely a square one
    size = {"img_size": [32, 32]} if told else {}
    ours = load(write(tmp_path, vit.state_dict(), {"num_heads": 4, **size}))
    x = images(chans=changes.get("in_chans", 3))
    torch.testing.assert_close(ours(x), vit(x), rtol=0, atol=0)


def test_swiglu_dinov2(tmp_path):
    from timm.layers import SwiGLUPacked

    vit = tiny(
        mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=4, init_values=1e-5, reg_tokens=2, no_embed_class=True
    )
    state = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for n, v in vit.state_dict().items()}
    shift = torch.randn(1, 1, 32)
    state |= {"register_tokens": state.pop("reg_token"), "cls_token": state["cls_token"] - shift}
    state |= {"pos_embed": torch.cat([shift, state["pos_embed"]], 1), "mask_token": torch.ones(1, 32)}
    ours = load(write(tmp_path, state, {"num_heads": 4}))
    torch.testing.assert_close(ours(images()), vit(images()))


def test_distilled_deit(tmp_path):
    vit = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32).eval()
    ours = load(write(tmp_path, vit.state_dict()), num_classes=None)
    assert ours.passport.arch == "VisionTransformerDistilled" and same(ours.state_dict(), vit.state_dict())
    assert torch.equal(ours(images()), vit(images()))


def test_eva_by_name(tmp_path):
    vit = timm.create_model("eva02_tiny_patch14_224", img_size=28, num_classes=0, dynamic_img_size=True).eval()
    ours = load(write(tmp_path, vit.state_dict()), arch="eva02_tiny_patch14_224")
    assert same(ours.state_dict(), vit.state_dict()) and torch.equal(ours(images((56, 28))), vit(images((56, 28))))


def test_named_architecture_follows_the_file(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, in_chans=1, num_classes=0, global_pool="avg")
    ours = load(write(tmp_path, vit.state_dict()), arch="vit_tiny_patch16_224")
    assert ours.patch_embed.grid_size == (3, 3) and ours.passport.feature.norm == "fc_norm"
    assert same(ours.state_dict(), vit.state_dict()) and ours.passport.preprocess.channels == "grey"
    with pytest.raises(
        WeightsError, match=r"(?s)do not fit vit_small_patch16_224: .* of another shape .*nearest is vit_tiny"
    ):
        load(tmp_path, arch="vit_small_patch16_224")
    with pytest.raises(WeightsError, match="arch 'vit_tinny_patch16_224' is unknown\n  fix: did you mean vit_tiny"):
        load(tmp_path, arch="vit_tinny_patch16_224")


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    state = tiny().state_dict()
    del state["norm.weight"], state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(
        WeightsError, match=r"2 missing \(blocks\.1\.mlp\.fc2\.bias, norm\.weight\); 1 unexpected \(gate\)"
    ):
        load(write(tmp_path, state | {"gate": torch.ones(1)}, TINY))


def test_video_and_rotary_files_are_refused(tmp_path):
    state = tiny().state_dict()
    video = {**state, "patch_embed.proj.weight": torch.ones(32, 3, 2, 8, 8)}
    with pytest.raises(WeightsError, match=r"three axes \(32, 3, 2, 8, 8\), and nothing says of what"):
        load(write(tmp_path / "a", video, TINY))
    del state["pos_embed"]
    with pytest.raises(WeightsError, match="no position table, so positions are rotary, fixed or absent"):
        load(write(tmp_path / "b", state, TINY))


def test_half_precision_becomes_float32_and_is_said(tmp_path):
    state = {name: value.half() for name, value in tiny().state_dict().items()}
    vit = load(write(tmp_path, state, TINY))
    assert all(value.dtype == torch.float32 for value in vit.state_dict().values())
    assert "weights were float16, used as float32" in vit.load_report


def test_report_is_said_on_stderr_unless_told_otherwise(tmp_path, capsys):
    path, heard = write(tmp_path, tiny().state_dict(), TINY), []
    vit = weights.load(path)
    assert capsys.readouterr().err.splitlines() == vit.load_report
    assert weights.load(path, say=heard.append).load_report == heard
    weights.load(path, say=None)
    assert capsys.readouterr() == ("", "")


def test_folders_without_or_with_several_weight_files(tmp_path):
    with pytest.raises(WeightsError, match=r"no run folder \(no passport\.json\) and holds no weight file"):
        load(tmp_path)
    for name in ("a.pth", "b.pth"):
        write(tmp_path, tiny().state_dict(), name=name)
    with pytest.raises(WeightsError, match=r"holds 2 weight files \(a\.pth, b\.pth\)"):
        load(tmp_path)


def test_loaded_tensors_are_copies_that_train(tmp_path):
    vit = load(write(tmp_path, tiny().state_dict(), TINY))
    twin = copy.deepcopy(vit)
    with torch.no_grad():
        for value in vit.parameters():
            value.add_(1)
    assert all(value.requires_grad for value in twin.parameters()) and twin.passport == vit.passport
    assert same(load(tmp_path).state_dict(), twin.state_dict())


def test_random_weights_of_a_files_architecture(tmp_path):
    path = write(tmp_path, tiny().state_dict(), TINY)
    vit = load(path, pretrained=False, seed=4, image_size=48)
    assert vit.passport.base["kind"] == "random" and vit.patch_embed.grid_size == (6, 6)
    again = load("VisionTransformer", arch_kwargs=vit.passport.arch_kwargs, pretrained=False, seed=4)
    assert same(vit.state_dict(), again.state_dict())


# --- adapting ----------------------------------------------------------------------------------------------------------


def test_grey_images_give_the_same_as_rgb(tmp_path):
    vit = tiny()
    path = write(tmp_path, vit.state_dict(), {**TINY, "mean": [0.5] * 3, "std": [0.25] * 3})
    grey = load(path, in_chans=1)
    x = images(chans=1)
    torch.testing.assert_close(grey(x), vit(x.expand(-1, 3, -1, -1)))
    assert grey.passport.preprocess == Preprocess((0.5,), (0.25,), (32, 32))
    assert any("3 channels to 1: patch kernel summed" in line for line in grey.load_report)
    assert load(
        path, arch_kwargs={"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.3, 0.4]}, in_chans=1
    ).passport.preprocess.mean == (pytest.approx(0.2),)


@pytest.mark.parametrize("chans", [2, 3, 5, 7])
def test_channel_rule_is_timms(tmp_path, chans):
    from timm.models import adapt_input_conv

    vit = tiny()
    ours = load(write(tmp_path, vit.state_dict(), TINY), in_chans=chans)
    theirs = adapt_input_conv(chans, vit.patch_embed.proj.weight.detach())
    torch.testing.assert_close(ours.patch_embed.proj.weight, theirs)
    assert ours.passport.preprocess.in_chans == chans


def test_grey_weights_on_rgb_images(tmp_path):
    vit = tiny(in_chans=1)
    ours = load(write(tmp_path, vit.state_dict(), {**TINY, "in_chans": 1, "mean": [0.4], "std": [0.2]}), in_chans=3)
    x = images(chans=1)
    torch.testing.assert_close(ours(x.expand(-1, 3, -1, -1)), vit(x))
    assert ours.passport.preprocess.mean == (0.4,) * 3 and ours.passport.preprocess.channels == "rgb"


def test_patch_size_uses_the_pseudo_inverse(tmp_path):
    from timm.layers import resample_patch_embed

    vit = tiny()
    ours = load(write(tmp_path, vit.state_dict(), TINY), patch_size=(4, 8))
    assert torch.equal(ours.patch_embed.proj.weight, resample_patch_embed(vit.patch_embed.proj.weight, [4, 8]))
    assert ours.patch_embed.grid_size == (8, 4) and ours.pos_embed.shape == (1, 33, 32)
    assert any("8x8 to 4x8: kernel resized by the pseudo-inverse" in line for line in ours.load_report)
    with pytest.raises(WeightsError, match="not a multiple of the patch size"):
        load(tmp_path, patch_size=7)


@pytest.mark.parametrize(("layout", "rule"), [("mae", "mae"), ("dinov2", "dinov2"), ("plain", "timm")])
def test_positions_follow_the_authors(tmp_path, layout, rule):
    vit = tiny()
    state = dict(vit.state_dict())
    state |= {"mae": {"decoder_embed.weight": torch.ones(2, 2)}, "dinov2": {"mask_token": torch.ones(1, 32)}}.get(
        layout, {}
    )
    ours = load(write(tmp_path, state, TINY), image_size=(48, 40))
    assert ours.passport.feature.positions == rule
    assert torch.equal(ours.pos_embed, resample_positions(vit.pos_embed, (6, 5), prefix=1, rule=rule))
    assert any(line.startswith("position table 4x4 to 6x5") for line in ours.load_report)
    assert any(f"{'MAE' if rule == 'mae' else rule[:4]}".lower() in line.lower() for line in ours.load_report)


def test_average_pooling_asked_of_a_mae_encoder(tmp_path):
    vit = tiny()
    ours = load(write(tmp_path, vit.state_dict(), TINY), arch_kwargs={"global_pool": True})
    assert isinstance(ours.norm, nn.Identity) and torch.equal(ours.fc_norm.weight, torch.ones(32))
    assert torch.equal(ours.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    assert "average pooling: the final norm (2 tensors) is left out and fc_norm starts fresh" in ours.load_report


def test_kept_dropped_and_new_heads(tmp_path):
    vit = tiny(num_classes=5)
    path = write(tmp_path, vit.state_dict(), TINY)
    kept = load(path, num_classes=None)
    assert torch.equal(kept(images()), vit(images())) and kept.num_classes == 5
    assert torch.equal(load(path, num_classes=5)(images()), vit(images()))
    dropped, fresh = load(path), load(path, num_classes=3)
    assert dropped.num_classes == 0 and isinstance(dropped.head, nn.Identity) and fresh(images()).shape == (2, 3)
    assert "the head of 5 classes (2 tensors) is left out" in dropped.load_report
    assert load(write(tmp_path / "b", tiny().state_dict(), TINY), num_classes=None).num_classes == 0
    state = {name: value for name, value in vit.state_dict().items() if name != "head.bias"}
    bare = load(write(tmp_path / "c", state, TINY), num_classes=None)
    torch.testing.assert_close(bare(images()), vit(images()) - vit.head.bias)
    odd = load(write(tmp_path / "d", tiny().state_dict() | {"head.mlp.weight": torch.ones(2)}, TINY), num_classes=None)
    assert "a head of unknown form (head.mlp.weight) is left out" in odd.load_report


# --- the authors' own numbers ------------------------------------------------------------------------------------------


def fixture(name):
    path = FIXTURES / f"{name}.safetensors"
    assert path.exists(), f"{path} is not there; copy the recorded tensors or set VITKIT_PARITY"
    tensors, _ = weights.read_state(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return {n.removeprefix("weights."): v for n, v in tensors.items() if n.startswith("weights.")}, tensors, config


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_official_thorax_classifier(tmp_path):
    state, tensors, config = fixture("thorax_mae.finetune")
    torch.save({"model": state, "epoch": 1}, tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit = load(tmp_path / "x.pth", num_classes=None)
    close(vit(tensors["in.imgs"]), tensors["out.logits"])
    close(vit.forward_head(vit.forward_features(tensors["in.imgs"]), pre_logits=True), tensors["out.features"])
    assert vit.passport.feature.norm == "fc_norm"
    old, grid = tensors["in.ckpt_pos_embed"], vit.patch_embed.grid_size
    assert torch.equal(resample_positions(old, grid, prefix=1, rule="mae"), tensors["out.interp_pos_embed"])
    state["pos_embed"] = old
    torch.save({"model": state}, tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": config["num_heads"]}))
    sides = vit.patch_embed.img_size
    assert torch.equal(load(tmp_path / "x.pth", image_size=sides).pos_embed, tensors["out.interp_pos_embed"])


def test_official_mae(tmp_path):
    state, _, config = fixture("thorax_mae.mae")
    write(tmp_path, state, config)
    vit = load(tmp_path)
    assert vit.load_report[0].startswith(
        f"model.safetensors: read as MAE encoder: {len(vit.state_dict())} tensors used, "
    )
    outside = {name for name in state if name.startswith(("decoder", "mask_token"))}
    assert set(vit.extras) == outside and same(vit.state_dict(), {n: state[n] for n in state if n not in outside})
    assert torch.equal(vit.pos_embed[0], sincos_2d(vit.embed_dim, vit.patch_embed.grid_size, prefix=1))
    alone = load(
        write(tmp_path / "encoder", {n: state[n] for n in vit.state_dict()}, {"num_heads": config["num_heads"]})
    )
    assert any("cannot reconstruct" in line for line in alone.load_report)


@pytest.mark.parametrize("part", ["cls", "gap_seq", "vpt"])
def test_official_adaptformer(tmp_path, part):
    state, tensors, config = fixture(f"adaptformer.{part}")
    torch.save({"model": state}, tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit = load(tmp_path / "x.pth", num_classes=None)
    assert vit.head[0].running_mean.shape == (vit.embed_dim,) and vit.num_classes == config["num_classes"]
    assert vit.passport.feature.pool == ("avg" if config["global_pool"] else "token")
    close(vit.head(tensors["out.features"]), tensors["out.logits"])  # trunk outputs need the adapters
    again = layouts.to_adaptformer(weights.trunk_state(vit))
    assert same(again | vit.extras, {n: v for n, v in state.items() if not n.startswith("head.")})


# --- run folders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bias:
    size: float = 0.0
    layers: tuple[int, ...] = ()


def inject(vit, settings):
    assert isinstance(settings.layers, tuple)
    for index in settings.layers:
        vit.blocks[index].shift = nn.Parameter(torch.full((3,), settings.size))
    return vit


@pytest.fixture
def method(monkeypatch):
    """A method vitkit.adapt.shifting that adds a parameter to blocks."""
    module = types.ModuleType("vitkit.adapt.shifting")
    module.inject, module.Settings = inject, Bias
    monkeypatch.setitem(sys.modules, "vitkit.adapt.shifting", module)
    return {"method": "adapt.shifting", "settings": {"size": 1.0, "layers": [0, 1]}}


def train(vit, step=None):
    """Add `step` and a head of 3 classes, and move what a method would have trained; names of what changed."""
    if step is not None:
        vit = weights.apply_step(vit, step)
        vit.passport.steps.append(step)
    vit.reset_classifier(3)
    names = [name for name in vit.state_dict() if "shift" in name or name.startswith("head.")]
    with torch.no_grad():
        for name in names:
            vit.state_dict()[name].add_(torch.randn(vit.state_dict()[name].shape))
    vit.passport.classes, vit.passport.task = ["a", "b", "c"], "single"
    return names


def test_full_run(tmp_path):
    vit = load("VisionTransformer", arch_kwargs=TINY, pretrained=False)
    train(vit)
    vit.passport.lineage.append({"method": "pretrain.mae"})
    weights.save_run(tmp_path / "run", vit, extras={"mask_token": torch.ones(1, 1, 4)})
    again = load(tmp_path / "run", num_classes=None)
    assert same(again.state_dict(), vit.state_dict()) and again.passport.classes == ["a", "b", "c"]
    assert again.passport.lineage == [{"method": "pretrain.mae"}] and list(again.extras) == ["mask_token"]
    assert again.passport.base["kind"] == "run" and again.passport.preprocess == vit.passport.preprocess
    plain = load(tmp_path / "run" / "model.safetensors")  # the file of a run means the run
    assert plain.num_classes == 0 and plain.passport.classes is None
    assert load(tmp_path / "run", image_size=48, in_chans=1).patch_embed.grid_size == (6, 6)
    with pytest.raises(WeightsError, match="it has no untrained form"):
        load(tmp_path / "run", pretrained=False)


def test_a_single_file_with_its_passport_is_a_whole_model(tmp_path, method):
    vit = load(write(tmp_path / "base", tiny().state_dict(), TINY), positions="mae")
    train(vit, method)
    meta = {"vitkit": "full", "passport": json.dumps(vit.passport.to_dict())}
    weights.save_state(tmp_path / "given.safetensors", vit.state_dict(), meta)
    again = load(tmp_path / "given.safetensors", num_classes=None)
    assert same(again.state_dict(), vit.state_dict()) and again.passport.classes == ["a", "b", "c"]
    assert again.passport.feature.positions == "mae" and again.passport.steps == [method]
    assert again.passport.base["kind"] == "file" and again.passport.base["load"]["positions"] == "mae"


@pytest.mark.parametrize("kind", ["file", "random", "timm"])
def test_delta_run(tmp_path, method, kind, hub):
    if kind == "file":
        base = write(tmp_path / "base", tiny().state_dict(), TINY)
        vit = load(base, image_size=48, in_chans=1)
    elif kind == "random":
        vit = load("VisionTransformer", arch_kwargs=TINY, pretrained=False, seed=3)
    else:
        vit = load("test_vit", image_size=32)
    names = train(vit, method)
    path = weights.save_run(tmp_path / "runs" / "a", vit, trained=names)
    assert set(weights.read_state(path)[0]) == set(names)
    again = load(tmp_path / "runs" / "a", num_classes=None)
    assert same(again.state_dict(), vit.state_dict()) and again.passport.steps == [method]
    assert again.passport.task == "single"
    bigger = load(tmp_path / "runs" / "a", image_size=64)
    assert torch.equal(bigger.blocks[1].shift, vit.blocks[1].shift) and bigger.patch_embed.img_size == (64, 64)


def test_runs_on_runs_apply_each_step_once(tmp_path, method):
    first = load(write(tmp_path / "base", tiny().state_dict(), TINY))
    weights.save_run(tmp_path / "one", first, trained=train(first, method))
    second = load(tmp_path / "one")
    names = train(second, {"method": "adapt.shifting", "settings": {"size": 5.0, "layers": [1]}})
    weights.save_run(tmp_path / "two", second, trained=[name for name in names if "blocks.0" not in name])
    again = load(tmp_path / "two", num_classes=None)
    assert len(again.passport.steps) == 2 and torch.equal(again.blocks[0].shift, first.blocks[0].shift)
    assert torch.equal(again.blocks[1].shift, second.blocks[1].shift)


def test_pooling_changed_by_a_run_is_rebuilt(tmp_path):
    from vitkit.parts.heads import set_pooling

    vit = load(write(tmp_path / "base", tiny().state_dict(), TINY))
    set_pooling(vit, "avg")
    vit.fc_norm.weight.data.mul_(2)
    weights.save_run(tmp_path / "run", vit, trained=[*train(vit), "fc_norm.weight", "fc_norm.bias"])
    assert torch.equal(load(tmp_path / "run", num_classes=None)(images()), vit.eval()(images()))


def test_bn_head_of_a_run(tmp_path):
    from vitkit.parts.heads import install_head

    vit = load(write(tmp_path / "base", tiny().state_dict(), TINY))
    install_head(vit, "bn_linear", 4)
    vit.head[0].running_mean.add_(1)
    weights.save_run(tmp_path / "run", vit, trained=[name for name in vit.state_dict() if name.startswith("head.")])
    assert torch.equal(load(tmp_path / "run", num_classes=None)(images()), vit.eval()(images()))


def test_moved_and_lost_bases(tmp_path, method):
    base = write(tmp_path / "here" / "base", tiny().state_dict(), TINY)
    vit = load(base)
    weights.save_run(tmp_path / "here" / "run", vit, trained=train(vit, method))
    shutil.move(tmp_path / "here", tmp_path / "there")  # both together
    assert same(load(tmp_path / "there" / "run", num_classes=None).state_dict(), vit.state_dict())
    shutil.rmtree(tmp_path / "there" / "base")
    with pytest.raises(WeightsError, match=r"the base of run .* is gone: looked for .*\n  fix: put it back"):
        load(tmp_path / "there" / "run")


def test_changed_base_is_refused(tmp_path, method):
    base = write(tmp_path / "base", tiny().state_dict(), TINY)
    vit = load(base)
    weights.save_run(tmp_path / "run", vit, trained=train(vit, method))
    write(tmp_path / "base", tiny(seed=1).state_dict(), TINY)
    with pytest.raises(
        WeightsError, match=r"the base of run .* has changed: .* now has sha256 \w{12}, the run was made on"
    ):
        load(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["steps"].clear(), r"2 of 2 trained tensors of .* do not fit its base, e\.g\. blocks\.0\.shift"),
        (lambda p: p["steps"][0].update(method="os.path"), r"needs a method that is not in this vitkit|no step"),
        (lambda p: p["steps"][0].update(method="../evil"), r"names a step '\.\./evil'"),
        (lambda p: p["steps"][0].update(method="run.files"), "'run.files' is no step that changes a model"),
        (lambda p: p["steps"][0]["settings"].update(colour=1), "settings of step 'adapt.shifting' are not those"),
        (lambda p: p["base"].update(kind="run", ref="", relative="."), "is its own base"),
    ],
)
def test_broken_runs(tmp_path, method, change, words):
    vit = load(write(tmp_path / "base", tiny().state_dict(), TINY))
    weights.save_run(tmp_path / "run", vit, trained=[name for name in train(vit, method) if "shift" in name])
    path = tmp_path / "run" / "passport.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=words):
        load(tmp_path / "run")


def test_delta_without_its_passport(tmp_path):
    vit = load(write(tmp_path / "base", tiny().state_dict(), TINY))
    path = weights.save_run(tmp_path / "run", vit, trained=train(vit))
    (tmp_path / "run" / "passport.json").unlink()
    with pytest.raises(WeightsError, match="holds only the trained part of a run"):
        load(path)
    with pytest.raises(WeightsError, match=r"1 trained tensors are not in the model, e\.g\. nothing"):
        weights.save_run(tmp_path / "run", vit, trained=["nothing"])
