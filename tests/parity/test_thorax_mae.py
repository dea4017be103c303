"""thorax_mae: our MAE and fine-tuning against lambert-x/medical_mae, every recorded tensor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vitkit import tokens, weights
from vitkit.adapt.full import Full
from vitkit.evaluate import metrics
from vitkit.parts.heads import FeatureNorm, class_loss
from vitkit.parts.optim import LARS, build_optimizer, layer_decay_groups, set_lr
from vitkit.parts.positions import resample_positions
from vitkit.parts.schedules import warmup_cosine
from vitkit.pretrain.mae import MAE, Settings, normalise_patches, patchify
from vitkit.settings import Classify, Task

from .conftest import Compared, files, read

ENCODER = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps")


def quiet(_: str) -> None:
    pass


def load_mae(fixture, folder, **settings) -> MAE:
    c = fixture.config
    path = fixture.checkpoint(folder, {key: c[key] for key in ENCODER if key in c})
    vit = weights.load(path, say=quiet)
    method = MAE(
        vit,
        Settings(
            mask_ratio=c["mask_ratio"],
            decoder_dim=c["decoder_embed_dim"],
            decoder_depth=c["decoder_depth"],
            decoder_heads=c["decoder_num_heads"],
            decoder_mlp_ratio=c["mlp_ratio"],
            **settings,
        ),
    )
    method.load_extras(vit.extras)
    return method


@pytest.mark.parametrize("path", files("thorax_mae.mae"), ids=lambda p: p.stem)
def test_pretraining(path, tmp_path):
    fixture = read(path)
    seen = Compared(fixture)
    method = load_mae(fixture, tmp_path, norm_pix_loss=True)
    for parameter in method.parameters():
        parameter.requires_grad_(True)  # the recorded gradients are of every weight asked for
    images = fixture["in.imgs"].clone().requires_grad_()
    batch = {"image": images, "noise": fixture["in.noise"]}
    loss = method(batch)["loss"]
    loss.backward()
    mask = method.mask(batch)
    assert mask.keep.shape[1] == fixture.config["len_keep"]
    seen.same("out.loss_norm_pix", loss)
    seen.same("grad.imgs", images.grad)
    for name in fixture.group("grad."):
        if name != "imgs":
            seen.same(f"grad.{name}", parameter_of(method, name).grad)
    with torch.no_grad():
        latent = tokens.encode(method.vit, images, keep=mask.keep)
        prediction = method.decoder.all_patches(latent, mask)
        seen.same("out.latent", latent.all)
        seen.same("out.pred", prediction)
        seen.same("out.patchify", patchify(images, method.vit.patch_embed.patch_size), 0.0)
        # What we predict for hidden patches alone is the official prediction of those patches.
        hidden = mask.masked.unsqueeze(-1).expand(-1, -1, prediction.shape[-1])
        assert torch.allclose(method.decoder(latent, mask), prediction.gather(1, hidden), atol=1e-5)
    assert torch.equal(mask.binary, fixture["out.mask"]) and torch.equal(mask.restore, fixture["out.ids_restore"])
    seen.left -= {"out.mask", "out.ids_restore"}
    raw = load_mae(fixture, tmp_path, norm_pix_loss=False)
    seen.same("out.loss_pixel", raw(batch)["loss"])
    seen.done()


@pytest.mark.parametrize("path", files("thorax_mae.mae"), ids=lambda p: p.stem)
def test_pretraining_goes_on_with_the_checkpoints_decoder(path, tmp_path):
    fixture = read(path)
    method = load_mae(fixture, tmp_path)
    fresh = MAE(method.vit, method.settings)
    assert "goes on from the checkpoint" in fresh.adopt(method.vit.extras)
    assert all(torch.equal(value, fixture["weights." + name]) for name, value in fresh.extras().items())
    deeper = MAE(method.vit, replace(method.settings, decoder_depth=fixture.config["decoder_depth"] + 1))
    assert f"decoder_depth={fixture.config['decoder_depth']}" in deeper.adopt(method.vit.extras)


def parameter_of(method: MAE, name: str) -> torch.nn.Parameter:
    if name == "mask_token":
        return method.decoder.mask_token
    if name.startswith("decoder_"):
        return method.decoder.get_parameter(name.removeprefix("decoder_"))
    return method.vit.get_parameter(name)


def test_normalised_targets_use_the_unbiased_variance():
    target = torch.randn(2, 3, 12)
    want = (target - target.mean(-1, keepdim=True)) / (target.var(-1, unbiased=True, keepdim=True) + 1e-6) ** 0.5
    assert torch.allclose(normalise_patches(target), want)


def load_classifier(fixture, folder) -> Full:
    c = fixture.config
    config = {key: c[key] for key in (*ENCODER, "qkv_bias") if key in c}
    config |= {"global_pool": "avg" if c["global_pool"] else "token", "num_classes": c["num_classes"]}
    vit = weights.load(fixture.checkpoint(folder, config), num_classes=None, say=quiet)
    head = vit.head.state_dict()
    task = Task("multi", tuple(f"finding {i}" for i in range(c["num_classes"])))
    method = Full(vit, task=task, classify=Classify(head="linear"))
    method.vit.head.load_state_dict(head)
    return method


@pytest.mark.parametrize("path", files("thorax_mae.finetune"), ids=lambda p: p.stem)
def test_finetuning(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    method = load_classifier(fixture, tmp_path)
    vit = method.vit
    images, targets = fixture["in.imgs"], fixture["in.targets"]
    out = method({"image": images, "label": targets})
    out["loss"].backward()
    seen.same("out.features", tokens.feature(vit, images))
    seen.same("out.logits", out["logits"])
    seen.same("out.loss_bce", out["loss"])
    seen.same("out.loss_soft_bce", class_loss(out["logits"], fixture["in.soft_targets"]))
    for name in fixture.group("grad."):
        seen.same(f"grad.{name}", vit.get_parameter(name).grad)

    groups = layer_decay_groups(vit, weight_decay=c["weight_decay"], layer_decay=c["layer_decay"])
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert set(scale) == set(c["param_names"])
    seen.same("out.lrd.lr_scale", torch.tensor([scale[name] for name in c["param_names"]]))
    seen.same("out.lrd.weight_decay", torch.tensor([decay[name] for name in c["param_names"]]))

    def lr(epoch: float) -> float:
        return warmup_cosine(epoch, lr=c["lr"], min_lr=c["min_lr"], warmup=c["warmup_epochs"], epochs=c["epochs"])

    seen.same("out.sched_lr", torch.tensor([lr(e) for e in fixture["in.sched_epochs"].tolist()]))

    assert c["adamw"]["eps"] == 1e-8
    optimizer = build_optimizer(groups, name="adamw", lr=c["lr"], betas=tuple(c["adamw"]["betas"]))
    for epoch in c["step_epochs"]:
        set_lr(optimizer, lr(epoch))
        optimizer.zero_grad()
        method({"image": images, "label": targets})["loss"].backward()
        optimizer.step()
    for name in fixture.group("out.step2."):
        seen.same(f"out.step2.{name}", vit.get_parameter(name))
    seen.same("out.step2_loss", method({"image": images, "label": targets})["loss"])

    labels, scores = fixture["in.auc_labels"].numpy(), fixture["in.auc_scores"].numpy()
    seen.same("out.auc_each", torch.as_tensor(metrics.auc_each(labels, scores)))
    seen.same("out.auc_mean", torch.as_tensor(metrics.mean_auc(labels, scores)))

    table = fixture["in.ckpt_pos_embed"]
    rows = fixture["out.interp_pos_embed"].shape[1] - 1
    side = math.isqrt(rows)
    grid = vit.patch_embed.grid_size if math.prod(vit.patch_embed.grid_size) == rows else (side, side)
    seen.same("out.interp_pos_embed", resample_positions(table, grid, prefix=1, rule="mae"), 0.0)

    probe(fixture, seen)
    seen.done()


def probe(fixture, seen: Compared) -> None:
    """MAE's linear probe: normalisation without affine parameters, a linear layer, two LARS steps."""
    c = fixture.config["lars"]
    weight, bias = fixture["in.probe_weight"], fixture["in.probe_bias"]
    norm, linear = FeatureNorm(weight.shape[1]), torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    optimizer = LARS(linear.parameters(), **c)
    for _ in range(2):
        optimizer.zero_grad()
        class_loss(linear(norm(fixture["in.probe_features"])), fixture["in.probe_targets"]).backward()
        optimizer.step()
    seen.same("out.probe_weight_step2", linear.weight)
    seen.same("out.probe_bias_step2", linear.bias)
    seen.same("out.probe_running_mean", norm.running_mean)
    seen.same("out.probe_running_var", norm.running_var)
