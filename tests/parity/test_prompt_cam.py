"""Prompt-CAM against Imageomics/Prompt_CAM, every recorded tensor."""

from __future__ import annotations

import pytest
import torch

from vitkit import tokens, weights
from vitkit.explain import class_heads
from vitkit.explain.prompt_cam import PromptCAM, Settings, lagging_lr, load_official
from vitkit.parts.optim import build_optimizer
from vitkit.settings import Classify, Task

from .conftest import Compared, files, read

KEYS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values")


def load(fixture, folder) -> PromptCAM:
    """The official checkpoint through the public loader, its prompts and scorer taken over by the method."""
    c = fixture.config
    config = {key: c[key] for key in KEYS if c.get(key) is not None}
    vit = weights.load(fixture.checkpoint(folder, config), num_classes=None, say=lambda text: None)
    extras = {**vit.extras, "head.weight": vit.head.weight, "head.bias": vit.head.bias}
    task = Task("single", tuple(str(i) for i in range(c["num_classes"])))
    method = PromptCAM(vit, Settings(prompt_dropout=0.0), task=task, classify=Classify())
    load_official(method.vit, extras)
    return method


def official(vit, name: str, of=lambda p: p) -> torch.Tensor:
    """A parameter (or `of` it) under the authors' name; prompts of all blocks are one table there."""
    if name == "vpt.prompt_embeddings":
        rows = [getattr(block, "helper_prompts", getattr(block, "class_prompts", None)) for block in vit.blocks]
        return torch.stack([of(row) for row in rows])
    return of(vit.get_parameter(name))


@pytest.mark.parametrize("path", files("prompt_cam"), ids=lambda p: p.stem)
def test_scores_maps_ranking_and_two_steps(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    method = load(fixture, tmp_path).eval()
    vit, images, labels = method.vit, fixture["in.x"], fixture["in.y"]
    count = c["num_classes"]
    with torch.no_grad():
        seen.same("out.logits", tokens.logits(vit, images))
        for whole in (vit(images), vit.forward_head(tokens.encode(vit, images).all)):
            assert (whole - fixture["out.logits"]).abs().max() <= 2e-5 * fixture["out.logits"].abs().max()
        seen.same("out.attn_last", class_heads.class_attention(vit, images))
        maps = torch.stack([class_heads.class_maps(vit, images, i) for i in range(count)], dim=2)
        side = tokens.grid_of(vit, images.shape[-2:])
        assert maps.shape[-2:] == side
        seen.same("out.attn_patch", maps.flatten(-2))

    target, heads = int(fixture["in.target_cls"]), fixture["in.blur_heads"].tolist()
    blurred = class_heads.blurred_scores(vit, images, target, heads)
    seen.same("out.logits_blurred", blurred)
    attention = class_heads.evidence(vit, images, target).attention.clone()
    attention[:, heads] = 1 / attention.shape[-1]
    seen.same("out.attn_blurred_target", attention)
    single = [class_heads.blurred_scores(vit, images[:1], target, [head]) for head in range(c["num_heads"])]
    seen.same("out.single_blur_prob", torch.cat(single).softmax(1)[:, target])
    ranks = class_heads.rank_heads(vit, images, fixture["in.rank_target"])
    assert torch.equal(ranks, fixture["out.head_rank_most_to_least"])
    seen.left.discard("out.head_rank_most_to_least")

    trained = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert sum(vit.get_parameter(name).numel() for name in trained) == c["depth"] * count * c["embed_dim"] + (
        c["embed_dim"] + 1
    )
    groups = method.param_groups(0.001)
    optimizer = build_optimizer(groups, name="sgd", lr=c["lr"], momentum=0.9)
    method.train()
    for step in (1, 2):
        optimizer.zero_grad()
        loss = method({"image": images, "label": labels})["loss"]
        loss.backward()
        seen.same("out.train_loss" if step == 1 else "out.train_loss2", loss)
        if step == 1:
            for name in fixture.group("grad."):
                seen.same(f"grad.{name}", official(vit, name, lambda p: p.grad))
        optimizer.step()
    for name in fixture.group("out.after2."):
        seen.same(f"out.after2.{name}", official(vit, name))
    method.eval()
    with torch.no_grad():
        seen.same("out.logits_after2", method({"image": images, "label": labels})["logits"])

    s = c["sched"]
    rates = lagging_lr(
        lr=s["lr"],
        lr_min=s["lr_min"],
        warmup=s["warmup_epoch"],
        warmup_lr=s["warmup_lr_init"],
        epochs=s["epoch"],
    )
    seen.same("out.lr_used_per_epoch", torch.tensor(rates))
    seen.done()
