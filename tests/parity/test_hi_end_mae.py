"""hi_end_mae: pre-training, downstream UNETR and evaluation against FengheTan9/Hi-End-MAE, every recorded tensor."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vitkit import tokens, weights
from vitkit.adapt.unetr import per_epoch_lr
from vitkit.dense.losses import dice_ce_loss, dice_loss
from vitkit.dense.unetr import UNETR
from vitkit.dense.volume_windows import sliding_windows
from vitkit.evaluate.masks import confusion
from vitkit.evaluate.volumes import dice_cases, mean_dice, volume_means
from vitkit.parts.patches3d import patchify_3d
from vitkit.parts.schedules import warmup_cosine
from vitkit.parts.sincos3d import sincos_3d
from vitkit.pretrain.hi_end_mae import HiEndMAE, Settings

from .conftest import Compared, files, read

PAPER = {"smooth": 1e-6, "over": 0.0, "squared": True}


def quiet(_: str) -> None:
    pass


def load(fixture, folder) -> HiEndMAE:
    """As the authors save it: {"state_dict": {"module.encoder...": ...}}, with what tensors do not tell in a config.json."""
    c = fixture.config
    path = folder / "hi_end_mae_10k.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in fixture.group("weights.").items()}}, path)
    (folder / "config.json").write_text(
        json.dumps({"num_heads": c["enc_heads"], "img_size": c["img_size"], "norm_eps": c["norm_eps"]})
    )
    said: list[str] = []
    vit = weights.load(path, say=said.append)
    assert any("read as Hi-End-MAE encoder" in line and "decoder tensors left" in line for line in said)
    assert vit.patch_embed.kind == "volume" and vit.num_prefix_tokens == 1
    settings = Settings(
        mask_ratio=c["mask_ratio"],
        decoder_dim=c["dec_dim"],
        decoder_heads=c["dec_heads"],
        decoder_depth=c["self_depth"],
        decoder_mlp_ratio=c["mlp_ratio"],
    )
    method = HiEndMAE(vit, settings)
    assert "goes on from the checkpoint" in method.adopt(vit.extras)
    return method


@pytest.mark.parametrize("path", files("hi_end_mae.pretrain"), ids=lambda p: p.stem)
def test_pretraining(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    method = load(fixture, tmp_path)
    volume = fixture["in.volume"].clone().requires_grad_()
    batch = {"image": volume, "noise": fixture["in.noise"]}
    loss = method(batch)["loss"]
    loss.backward()
    seen.same("out.loss", loss)
    seen.same("grad.volume", volume.grad)
    for name in fixture.group("grad."):
        if name != "volume":
            seen.same(f"grad.{name}", method.get_parameter(ours(name)).grad)
    mask = method.mask(batch)
    assert mask.keep.shape[1] == c["sel_length"]
    assert torch.equal(torch.cat([mask.keep, mask.masked], 1), fixture["out.shuffle_indices"])
    seen.left.discard("out.shuffle_indices")
    with torch.no_grad():
        latent, hidden = method.encode(volume, mask.keep)
        seen.same("out.latent", latent)
        for layer, x, kv in zip(method.settings.layers, hidden, method.bridge(hidden), strict=True):
            seen.same(f"out.hidden_{layer}", x)
            seen.same(f"out.decoder_kv_{layer}", kv)
        table = method.table(volume)
        visible = method.query(latent, table, mask.keep)
        masked = (method.mask_token[0] + table)[mask.masked]
        seen.same("out.decoder_query", torch.cat([visible, masked], 1))
        everything = method.predict_all(batch)
        seen.same("out.decoder_pred", everything)
        only = method.decoder(visible, method.mask_token[0] + table, mask.masked, method.bridge(hidden))
        assert torch.allclose(only, everything[:, visible.shape[1] :], atol=1e-5)  # the shortcut of the last block
        seen.same("out.target", method.target(volume, mask.masked))
        seen.same("out.patchify", patchify_3d(volume, c["patch_size"]), 0.0)
        shown = method.reconstruct(batch)
        seen.same("out.recon", patchify_3d(shown["reconstructed"], c["patch_size"]))
        seen.same("out.masked_input", patchify_3d(shown["masked"], c["patch_size"]), 0.0)
    if c.get("pos_embed_type", "sincos") == "sincos":
        table = sincos_3d(c["enc_dim"], method.vit.patch_embed.grid_size)
        assert torch.allclose(method.vit.pos_embed[0], table, atol=1e-6)
    seen.done()


def ours(name: str) -> str:
    """Parameter names of the official model to those of the method."""
    if name == "encoder_pos_embed":
        return "vit.pos_embed"
    return f"vit.{name.removeprefix('encoder.')}" if name.startswith("encoder.") else name


def volume_vit(fixture):
    c = fixture.config
    patch = c["patch_size"]
    return weights.load(
        "volume_vit_tiny_patch16_96",
        pretrained=False,
        image_size=tuple(c["img_size"]),
        patch_size=tuple(patch) if isinstance(patch, list) else (patch,) * 3,
        in_chans=c["in_channels"],
        arch_kwargs={
            "embed_dim": c["hidden_size"],
            "depth": c["num_layers"],
            "num_heads": c["num_heads"],
            "mlp_ratio": c["mlp_dim"] / c["hidden_size"],
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            "norm_eps": 1e-5,
        },
        say=quiet,
    )


@pytest.mark.parametrize("path", files("hi_end_mae.unetr"), ids=lambda p: p.stem)
def test_unetr(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    model = UNETR(volume_vit(fixture), c["out_channels"], feature_size=c["feature_size"])
    model.vit.pos_embed.requires_grad_(True)
    assert model.load_official(fixture.group("weights.")) == len(fixture.group("weights."))
    volume = fixture["in.volume"]
    logits = model(volume)
    loss = dice_ce_loss(logits, fixture["in.label"][:, 0], **PAPER)
    loss.backward()
    seen.same("out.logits", logits)
    seen.same("out.loss", loss)
    with torch.no_grad():
        flat = [one.flatten(2).transpose(1, 2) for one in model.maps(volume)]
        seen.same("out.vit", flat[-1])
        for layer, one in zip(model.layers, flat, strict=False):
            seen.same(f"out.vit_hidden_{layer}", one)
        assert torch.allclose(tokens.encode(model.vit, volume).patches, flat[-1], atol=1e-6)
    for name in fixture.group("grad."):
        seen.same(f"grad.{name}", official_gradient(model, name, fixture[f"grad.{name}"]))
    seen.done()


def official_gradient(model: UNETR, name: str, like: torch.Tensor) -> torch.Tensor:
    """Our gradient under a MONAI name and in its shape."""
    new = name
    for a, b in (
        ("patch_embedding.patch_embeddings.1.", "patch_embed.proj."),
        ("patch_embedding.position_embeddings", "pos_embed"),
        ("out_proj", "proj"),
        ("mlp.linear", "mlp.fc"),
    ):
        new = new.replace(a, b)
    grad = model.get_parameter(new).grad
    return grad.permute(0, 2, 3, 4, 1).reshape(like.shape) if name.endswith("patch_embeddings.1.weight") else grad


@pytest.mark.parametrize("path", files("hi_end_mae.eval"), ids=lambda p: p.stem)
def test_evaluation(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    logits, label = fixture["in.logits"].clone().requires_grad_(), fixture["in.label"][:, 0]
    loss = dice_ce_loss(logits, label, **PAPER)
    loss.backward()
    seen.same("out.dice_ce", loss)
    seen.same("grad.logits", logits.grad)
    dice = dice_loss(logits, label, **PAPER)
    seen.same("out.dice_only", dice)
    seen.same("out.ce_only", loss - dice, 1e-5)

    predicted, truth = logits.argmax(1).numpy(), label.long().numpy()
    counts = np.stack([confusion(y, p, c["num_classes"]) for y, p in zip(truth, predicted, strict=True)])
    cases = dice_cases(counts)
    assert np.array_equal(np.isnan(cases), fixture["out.dice_nan_mask"].numpy().astype(bool))
    seen.left.discard("out.dice_nan_mask")
    seen.same("out.dice_per_sample_class", torch.from_numpy(np.nan_to_num(cases, nan=-1.0)))
    value, volumes = mean_dice(cases, background=True)
    seen.same("out.dice_aggregate", torch.tensor([value]))
    seen.same("out.dice_not_nans", torch.tensor(float(volumes)))
    # What the released trainer reports: the last validation volume alone.
    seen.same("out.official_val_acc", torch.tensor(volume_means(cases, background=True)[-1]))

    ramp = fixture["in.sw_ramp"]

    def predictor(p: torch.Tensor) -> torch.Tensor:
        return torch.cat([p * ramp + p.mean(dim=(2, 3, 4), keepdim=True), p**2 - ramp], 1)

    for windows in (1, c["sw_batch_size"], 5):
        merged = sliding_windows(
            predictor, fixture["in.sw_volume"], c["roi_size"], overlap=c["overlap"], windows=windows
        )
        seen.same("out.sw_constant", merged)

    s = c["finetune_schedule"]
    ends = {"start": s["warmup_start_lr"], "end": s["eta_min"]}
    rates = [
        per_epoch_lr(e, lr=s["base_lr"], warmup=s["warmup_epochs"], epochs=s["max_epochs"], **ends)
        for e in range(s["max_epochs"])
    ]
    seen.same("out.finetune_lr", torch.tensor(rates, dtype=torch.float64))
    p = c["pretrain_schedule"]
    rates = [
        warmup_cosine(e, lr=p["base_lr"], min_lr=0.0, warmup=p["warmup_epochs"], epochs=p["epochs"])
        for e in fixture["in.pretrain_epochs"].tolist()
    ]
    seen.same("out.pretrain_lr", torch.tensor(rates, dtype=torch.float64))
    seen.done()
