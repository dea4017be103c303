"""Hi-End-MAE on other shapes than the recorded ones, what it must and must not look at, its verb from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import vitkit
from tests.data.volume_makers import volume_set
from tests.pretrain import plain_hi_end_mae as plain
from vitkit import weights
from vitkit.errors import ConfigError, WeightsError
from vitkit.pretrain.hi_end_mae import HiEndMAE, Settings, one_axis

BASE = {
    "enc_depth": 10,
    "self_depth": 2,
    "mlp_ratio": 4.0,
    "enc_heads": 3,
    "dec_heads": 2,
    "enc_dim": 18,
    "dec_dim": 12,
}
TWINS = {
    "two channels, sides and patches that differ": {
        "img_size": [8, 12, 16], "patch_size": [4, 4, 8], "in_chans": 2, "mask_ratio": 0.6,
    },
    "deeper, wider decoder, three blocks before": {
        "img_size": [12, 12, 6], "patch_size": [4, 3, 2], "in_chans": 1, "mask_ratio": 0.75,
        "enc_depth": 13, "self_depth": 3, "dec_dim": 24, "dec_heads": 4,
    },
    "one block before, many visible, slim MLPs": {
        "img_size": [6, 6, 6], "patch_size": [2, 2, 2], "in_chans": 3, "mask_ratio": 0.3, "self_depth": 1, "mlp_ratio": 2.0,
    },
    "flat volume, nearly everything hidden": {
        "img_size": [2, 16, 20], "patch_size": [2, 4, 4], "in_chans": 1, "mask_ratio": 0.93, "enc_dim": 24, "enc_heads": 2,
    },
}  # fmt: skip


def small(depth=10, size=(8, 8, 8), patch=(4, 4, 4), chans=1, seed=0, **arch):
    kwargs = {"embed_dim": 24, "depth": depth, "num_heads": 2, **arch}
    return weights.load(
        "volume_vit_tiny_patch16_96", pretrained=False, arch_kwargs=kwargs, image_size=size, patch_size=patch,
        in_chans=chans, seed=seed, say=None,
    )  # fmt: skip


def method_of(vit, **settings) -> HiEndMAE:
    torch.manual_seed(1)
    return HiEndMAE(vit, Settings(**{"decoder_dim": 12, "decoder_heads": 2, **settings}))


@pytest.mark.parametrize("name", TWINS)
def test_loss_and_gradients_equal_the_plain_form(name, tmp_path):
    config = {**BASE, **TWINS[name]}
    state = {key: value.requires_grad_() for key, value in plain.random_state(config).items()}
    path = tmp_path / "hi_end_mae_10k.pth"
    torch.save({"state_dict": {f"module.{key}": value.detach() for key, value in state.items()}}, path)
    (tmp_path / "config.json").write_text(
        json.dumps({"num_heads": config["enc_heads"], "img_size": config["img_size"]})
    )
    vit = weights.load(path, say=None)
    ours = HiEndMAE(
        vit,
        Settings(
            mask_ratio=config["mask_ratio"],
            decoder_dim=config["dec_dim"],
            decoder_heads=config["dec_heads"],
            decoder_depth=config["self_depth"],
            decoder_mlp_ratio=config["mlp_ratio"],
        ),
    )
    ours.load_extras(vit.extras)
    generator = torch.Generator().manual_seed(3)
    volume = torch.randn(2, config["in_chans"], *config["img_size"], generator=generator)
    noise = torch.rand(2, state["encoder_pos_embed"].shape[1], generator=generator)
    want = plain.loss(state, volume, noise, config)
    want.backward()
    got = ours({"image": volume, "noise": noise})["loss"]
    got.backward()
    assert torch.allclose(got, want, rtol=1e-5)
    compared = 0
    for key, theirs in state.items():
        if key == "decoder_pos_embed":
            continue
        new = (
            "vit.pos_embed"
            if key == "encoder_pos_embed"
            else key.replace("encoder.", "vit.", 1)
            if key.startswith("encoder.")
            else key
        )
        mine = ours.get_parameter(new).grad
        assert (mine - theirs.grad).abs().max() <= 3e-5 * theirs.grad.abs().max().clamp_min(1e-8), key
        compared += 1
    assert compared == len(state) - 1


def test_hidden_voxels_change_the_target_and_nothing_else():
    method = method_of(small()).eval()
    volume, noise = torch.randn(2, 1, 8, 8, 8), torch.rand(2, 8)
    batch = {"image": volume, "noise": noise}
    mask = method.mask(batch)
    changed = volume.clone()
    for b in range(2):
        for p in mask.masked[b].tolist():
            a, r = divmod(p, 4)
            i, j, k = 4 * a, 4 * (r // 2), 4 * (r % 2)
            changed[b, :, i : i + 4, j : j + 4, k : k + 4] += 1 + torch.rand(4, 4, 4)
    assert torch.equal(method.predict_all(batch), method.predict_all({"image": changed, "noise": noise}))
    assert not torch.equal(method(batch)["loss"], method({"image": changed, "noise": noise})["loss"])


def test_every_named_layer_reaches_the_decoder_by_itself():
    method = method_of(small(depth=12))
    volume, noise = torch.randn(2, 1, 8, 8, 8), torch.rand(2, 8)
    mask = method.mask({"image": volume, "noise": noise})
    _, hidden = method.encode(volume, mask.keep)
    before = method.predict_all({"image": volume, "noise": noise}, memory=method.bridge(hidden))
    for i in range(3):
        moved = [x + (0.5 * torch.randn_like(x) if k == i else 0) for k, x in enumerate(hidden)]
        after = method.predict_all({"image": volume, "noise": noise}, memory=method.bridge(moved))
        assert (after - before).abs().max() > 1e-4
    method({"image": volume, "noise": noise})["loss"].backward()
    for i in range(4):  # three layers and the final norm go through a bridge of their own
        assert method.encoder_to_decoder[i].weight.grad.abs().sum() > 0
    assert len({tuple(x.flatten()[:4].tolist()) for x in hidden}) == 3
    block4 = small(depth=12)
    seen = {}
    block4.blocks[3].register_forward_hook(lambda module, given, out: seen.update(out=out))
    again = method_of(block4)
    _, hidden = again.encode(volume, mask.keep)
    assert torch.equal(hidden[0], seen["out"])  # 3 counts from 0: the output of the fourth block


def test_other_grids_prefixes_and_layers():
    vit = small(depth=4, size=(8, 8, 16), patch=(4, 4, 4), class_token=False, global_pool="avg", reg_tokens=2)
    method = method_of(vit, layers=(0, 2), decoder_depth=1, mask_ratio=0.5)
    for size in ((8, 8, 16), (8, 12, 8)):  # the second is not the model's own
        out = method({"image": torch.randn(2, 1, *size), "seed": torch.arange(2)})
        assert torch.isfinite(out["loss"])
        out["loss"].backward()
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0


def test_masks_follow_the_sample_not_the_batch():
    method = method_of(small())
    volumes, seeds = torch.randn(3, 2, 1, 8, 8, 8), torch.tensor([2**62 + 5, 7, 9])
    flat = one_axis({"image": volumes, "seed": seeds})
    assert flat["image"].shape == (6, 1, 8, 8, 8) and len(set(flat["seed"].tolist())) == 6
    together = method.mask(flat).keep
    alone = method.mask(one_axis({"image": volumes[1:2], "seed": seeds[1:2]})).keep
    assert torch.equal(together[2:4], alone)


def test_weight_decay_spares_vectors_unless_asked():
    vit = small()
    named = dict(method_of(vit).named_parameters())
    groups = method_of(vit).param_groups(0.05)
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in method_of(vit).named_parameters() if id(p) in spared}
    assert {"vit.cls_token", "vit.norm.weight", "vit.blocks.0.attn.qkv.bias"} <= names
    assert "vit.blocks.0.attn.qkv.weight" not in names
    assert [group["weight_decay"] for group in method_of(vit, decay_all=True).param_groups(0.05)] == [0.05]
    total = sum(len(group["params"]) for group in groups)
    assert total == sum(p.requires_grad for p in named.values())


def test_positions_are_fixed_for_fresh_models_only():
    assert not method_of(small()).vit.pos_embed.requires_grad
    assert method_of(small(), positions="keep").vit.pos_embed.requires_grad
    assert method_of(small(embed_dim=20)).vit.pos_embed.requires_grad  # 6 does not divide 20: learned
    with pytest.raises(WeightsError, match="multiple of 6, got 20"):
        method_of(small(embed_dim=20), positions="sincos")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mask_ratio": 1.0}, "a share between 0 and 1"),
        ({"decoder_dim": 16}, "multiple of decoder_heads and of 6"),
        ({"layers": (6, 3)}, "block numbers from 0, rising"),
        ({"crops": 0}, "at least 1 of each"),
        ({"foreground": 2.0}, "a share from 0 to 1"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        Settings(**{"decoder_dim": 12, "decoder_heads": 2, **settings})


def test_models_that_cannot_be():
    with pytest.raises(ConfigError, match=r"ViT with 6 blocks.*\n.*at least 10 blocks, or layers=\(1, 2, 3\)"):
        method_of(small(depth=6))
    image = weights.load("vit_tiny_patch16_224", pretrained=False, arch_kwargs={"depth": 10}, say=None)
    with pytest.raises(ConfigError, match="trains ViTs of volumes"):
        method_of(image)


def test_a_decoder_that_does_not_fit_is_told():
    method = method_of(small())
    assert "goes on from the checkpoint" in method.adopt(method.extras())
    other = method_of(small(), decoder_dim=18)
    assert "decoder_dim=12 would go on" in other.adopt(method.extras())
    with pytest.raises(WeightsError, match="decoder tensors are missing"):
        other.load_extras(method.extras())


def test_reconstruction_predicts_visible_patches_too():
    method = method_of(small()).eval()
    batch = {"image": torch.rand(2, 1, 8, 8, 8), "noise": torch.rand(2, 8)}
    shown = method.reconstruct(batch)
    assert shown["reconstructed"].shape == (2, 1, 8, 8, 8)
    kept = shown["masked"] != 0
    assert torch.equal(shown["masked"][kept], batch["image"][kept]) and kept.float().mean() == 0.25
    assert not torch.allclose(shown["reconstructed"][kept], batch["image"][kept])
    assert 0.9 < method.baselines([], [batch])["predicting zero"] <= 1.0
    painted = method.show_hidden(shown["mask"][0], batch["image"][:1])
    assert (painted == 0.5).float().mean() >= 0.75


ARCH = {"embed_dim": 24, "depth": 4, "num_heads": 2}
TINY = {
    "model": "volume_vit_tiny_patch16_96", "pretrained": False, "arch_kwargs": ARCH, "image_size": 8, "patch_size": 4,
    "decoder_dim": 12, "decoder_heads": 2, "layers": (0, 1, 2), "crops": 2, "batch_size": 2, "quiet": True,
}  # fmt: skip


def test_the_verb_from_files_to_a_run_that_goes_on(tmp_path):
    data = volume_set(tmp_path / "scans", count=6, split=True)
    run = vitkit.pretrain("hi_end_mae", data=data, out=tmp_path / "run", epochs=2, lr=1e-3, **TINY)
    assert {"held-out loss", "predicting zero"} <= set(run.metrics)
    assert (run.path / "report.html").is_file() and (run.path / "extras.safetensors").is_file()
    vit = weights.load(run.path, say=None)
    assert vit.passport.preprocess.kind == "volume" and tuple(vit.passport.preprocess.image_size) == (8, 8, 8)
    assert "decoder.cross_attention_blocks.2.cross_attn.kv.weight" in vit.extras
    again = {key: value for key, value in TINY.items() if key not in ("model", "pretrained", "arch_kwargs")}
    more = vitkit.pretrain("hi_end_mae", model=run.path, data=data, out=tmp_path / "more", epochs=1, **again)
    assert np.isfinite(more.metrics["held-out loss"])


def test_volumes_smaller_than_the_crop_are_padded_and_said(tmp_path, capsys):
    data = volume_set(tmp_path / "scans", count=4, split=True)
    settings = {**TINY, "image_size": (12, 12, 12), "quiet": False}
    vitkit.pretrain("hi_end_mae", data=data, out=tmp_path / "run", epochs=1, lr=1e-3, **settings)
    assert "2 of 2 volumes are smaller than the crop of 12 x 12 x 12: they are padded" in capsys.readouterr().err


def test_a_run_of_two_halves_is_the_whole_run(tmp_path):
    data = volume_set(tmp_path / "scans", count=4)
    settings = {**TINY, "data": data, "epochs": 2, "lr": 1e-3}
    whole = vitkit.pretrain("hi_end_mae", out=tmp_path / "whole", **settings)
    vitkit.pretrain("hi_end_mae", out=tmp_path / "half", max_steps=2, **settings)
    for name in ("summary.json", "report.html", "config.yaml"):
        (tmp_path / "half" / name).unlink()
    (tmp_path / "half" / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    half = vitkit.pretrain("hi_end_mae", out=tmp_path / "half", **settings)
    a, b = (weights.load(run.path, say=None).state_dict() for run in (whole, half))
    assert all(torch.equal(a[key], b[key]) for key in a)
