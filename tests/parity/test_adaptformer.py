"""AdaptFormer and its VPT baseline against ShoufaChen/AdaptFormer, every recorded tensor."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block

from vitkit import tokens, weights
from vitkit.adapt import adaptformer, vpt
from vitkit.parts.optim import build_optimizer
from vitkit.parts.schedules import warmup_cosine
from vitkit.settings import Classify, Task

from .conftest import Compared, files, read, relative


def scale_of(value: str):
    return "learnable" if value == "learnable_scalar" else float(value)


def load(fixture, folder):
    """The official checkpoint through the public loader, and the method with its adapters or prompts and head in place."""
    c = fixture.config
    keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes")
    config = {key: c[key] for key in keys} | {"global_pool": "avg" if c["global_pool"] else "token"}
    vit = weights.load(fixture.checkpoint(folder, config), num_classes=0, say=lambda text: None)
    extras = dict(vit.extras)
    task, classify = Task("single", tuple(str(i) for i in range(c["num_classes"]))), Classify(head="bn_linear")
    if c["vpt_on"]:
        method = vpt.VPT(vit, vpt.Settings(prompts=c["vpt_num"]), task=task, classify=classify)
        vpt.load_official(method.vit, extras)
    else:
        settings = adaptformer.Settings(
            bottleneck=c["ffn_num"],
            scale=scale_of(c["scalar"]),
            option=c["ffn_option"],
            layernorm=c["layernorm"],
            dropout=0.0,
        )
        method = adaptformer.AdaptFormer(vit, settings, task=task, classify=classify)
        adaptformer.load_official(method.vit, extras)
    head = fixture.group("weights.head.")
    method.vit.head.load_state_dict(head)
    return method


def official_name(name: str) -> str:
    """Our parameter names in the official layout."""
    if name.endswith(".prompts"):
        return f"embeddings.{name.split('.')[1]}"
    return name


def block_outputs(method, images) -> list[torch.Tensor]:
    """Token outputs of the first and the last block; with VPT the prompts stand in front, as recorded: they go through
    timm's own block as full tokens, which is also what our cheaper form must agree with."""
    vit, found = method.vit, []
    stream = tokens.embed(vit, images)
    for index, block in enumerate(vit.blocks):
        whole = None
        if hasattr(block, "prompts"):
            whole = Block.forward(block, torch.cat([block.prompts.expand(len(images), -1, -1), stream.x], dim=1))
        stream = tokens.run(vit, stream, index, index + 1)
        if whole is not None:
            assert relative(stream.x, whole[:, block.prompts.shape[1] :]) <= 1e-6
        found.append(stream.x if whole is None else whole)
    return [found[0], found[-1]]


PARTS = [*files("adaptformer.cls"), *files("adaptformer.gap_seq"), *files("adaptformer.vpt")]


@pytest.mark.parametrize("path", PARTS, ids=lambda p: p.stem)
def test_model_gradients_and_two_steps(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    method = load(fixture, tmp_path).eval()
    images, labels = fixture["in.x"], fixture["in.y"]
    with torch.no_grad():
        first, last = block_outputs(method, images)
        seen.same("out.block0", first)
        seen.same("out.block_last", last)
        seen.same("out.features", tokens.feature(method.vit, images))
        seen.same("out.logits", method({"image": images, "label": labels})["logits"])

    trained = {name: p for name, p in method.vit.named_parameters() if p.requires_grad}
    assert {official_name(name) for name in trained} == set(fixture.group("grad."))
    frozen = {name: p.clone() for name, p in method.vit.named_parameters() if not p.requires_grad}
    optimizer = build_optimizer(method.param_groups(0.0), name="sgd", lr=c["lr"], momentum=0.9)
    method.train()
    for step in (1, 2):
        optimizer.zero_grad()
        loss = method({"image": images, "label": labels})["loss"]
        loss.backward()
        seen.same("out.train_loss" if step == 1 else "out.train_loss2", loss)
        if step == 1:
            for name, parameter in trained.items():
                seen.same(f"grad.{official_name(name)}", parameter.grad)
        optimizer.step()
    for name, parameter in trained.items():
        seen.same(f"out.after2.{official_name(name)}", parameter)
    norm = method.vit.head[0]
    seen.same("out.after2.bn_running_mean", norm.running_mean)
    seen.same("out.after2.bn_running_var", norm.running_var)
    method.eval()
    with torch.no_grad():
        seen.same("out.logits_after2", method({"image": images, "label": labels})["logits"])
    assert all(torch.equal(p, frozen[n]) for n, p in method.vit.named_parameters() if n in frozen)
    seen.done()


@pytest.mark.parametrize("path", files("adaptformer.adapter"), ids=lambda p: p.stem)
def test_adapter_and_schedule(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    x = fixture["in.x"]
    for name, options in c["adapters"].items():
        settings = adaptformer.Settings(
            bottleneck=c["bottleneck"],
            scale=scale_of(options["adapter_scalar"]),
            layernorm=options["adapter_layernorm_option"],
            dropout=0.0,
        )
        adapter = adaptformer.Adapter(c["d_model"], settings)
        adapter.load_state_dict(fixture.group(f"weights.{name}."))
        with torch.no_grad():
            seen.same(f"out.{name}.no_residual", adapter(x))
            seen.same(f"out.{name}.residual_self", adapter(x, residual=x))
            seen.same(f"out.{name}.residual_given", adapter(x, residual=fixture["in.residual"]))
    s = c["sched"]
    rates = [
        warmup_cosine(e, lr=s["lr"], min_lr=s["min_lr"], warmup=s["warmup_epochs"], epochs=s["epochs"])
        for e in fixture["in.epochs"].tolist()
    ]
    seen.same("out.lr", torch.tensor(rates))
    seen.done()
