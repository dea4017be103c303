"""rad_dino: our DINOv2 against facebookresearch/dinov2, every recorded tensor of backbone, losses and a whole step."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from safetensors import safe_open

from vitkit import tokens, weights
from vitkit.parts import dino_losses
from vitkit.parts.block_masks import block_mask
from vitkit.parts.dino_batch import masks_of
from vitkit.parts.dino_groups import multipliers
from vitkit.parts.dino_head import head_from
from vitkit.parts.dino_schedules import cosine, last_layer_lr, linear
from vitkit.parts.positions import resample_positions
from vitkit.pretrain.dinov2 import DINOv2, Settings

from .conftest import Compared, files, read

# ---------------------------------------------------------------- backbone


def position_rule(config: dict) -> str:
    """Which of our rules DINOv2's two interpolation options are."""
    antialias, offset = config.get("interpolate_antialias", False), config.get("interpolate_offset", 0.1)
    return {(False, 0.1): "dinov2", (True, 0.0): "timm", (False, 0.0): "mae"}[antialias, float(offset)]


def load_backbone(fixture, folder, prefix="weights.", **config):
    keys = ("num_heads",)
    path = fixture.checkpoint(folder, {key: fixture.config[key] for key in keys} | config)
    torch.save(fixture.group(prefix), path)
    return weights.load(path, num_classes=0, say=None, positions=position_rule(fixture.config)).eval()


def official_gradient(vit, name: str) -> torch.Tensor:
    own = dict(vit.named_parameters())
    if name == "pos_embed" and own["pos_embed"].shape[1] == math.prod(vit.patch_embed.grid_size):
        return torch.cat(
            [own["cls_token"].grad, own["pos_embed"].grad], dim=1
        )  # registers: no row of its own for the class
    name = (
        name.replace("register_tokens", "reg_token").replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
    )
    return own[name].grad


def sizes_of(fixture) -> dict:
    size, patch = fixture.config["img_size"], fixture.config["patch_size"]
    return {"img_size": [size, size] if isinstance(size, int) else size, "patch_size": [patch, patch]}


@pytest.mark.parametrize("path", files("rad_dino.backbone"), ids=lambda p: p.stem)
def test_backbone(path, tmp_path):
    fixture = read(path)
    seen = Compared(fixture)
    vit = load_backbone(fixture, tmp_path, **sizes_of(fixture))
    assert len(vit.blocks) == fixture.config["depth"]
    x = fixture["in.x"].clone().requires_grad_()
    out = tokens.encode(vit, x, layers=[-2, -1])
    seen.same("out.cls", out.prefix[:, 0], 1e-5)
    seen.same("out.patch", out.patches, 1e-5)
    if "out.reg" in fixture.tensors:
        seen.same("out.reg", out.prefix[:, 1:], 1e-5)
    seen.same("out.prenorm", tokens.encode(vit, x, norm=False).all, 1e-5)
    for i, tap in enumerate(out.taps):
        seen.same(f"out.inter.{i}.map", tap.map, 1e-5)
        seen.same(f"out.inter.{i}.cls", tap.prefix[:, 0], 1e-5)
    token = vit.extras["mask_token"]
    masked = tokens.encode(vit, x, mask=fixture["in.mask"], mask_token=token)
    seen.same("out.masked.cls", masked.prefix[:, 0], 1e-5)
    seen.same("out.masked.patch", masked.patches, 1e-5)
    seen.same("out.native.cls", tokens.encode(vit, fixture["in.x_native"]).prefix[:, 0], 1e-5)
    table = fixture["weights.pos_embed"]
    rule, native = position_rule(fixture.config), tuple(vit.patch_embed.grid_size)
    seen.same("out.pos_interp", resample_positions(table, out.grid, prefix=1, rule=rule, old_grid=native), 1e-6)
    (out.prefix[:, 0].pow(2).sum() + out.patches.sin().sum()).backward()
    seen.same("grad.x", x.grad)
    for name in fixture.group("grad.w."):
        seen.same(f"grad.w.{name}", official_gradient(vit, name))
    seen.done()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("path", files("rad_dino.losses"), ids=lambda p: p.stem)
def test_losses(path):
    fixture = read(path)
    seen = Compared(fixture)
    temp = float(fixture["in.teacher_temp"])
    logits, center = fixture["in.teacher_logits"], fixture["in.center"]
    targets = dino_losses.centred(logits, center, temp)
    seen.same("out.softmax_center", targets.all())
    moved = center.clone()
    dino_losses.update_center(moved, logits)
    seen.same("out.center_after", moved)
    assert torch.equal(center, fixture["in.center"])
    seen.same("out.sinkhorn", dino_losses.sinkhorn(logits, temp).all())
    image_losses(fixture, seen, targets)
    patch_losses(fixture, seen, temp)
    x = fixture["in.koleo_x"].clone().requires_grad_()
    loss = dino_losses.koleo(x)
    loss.backward()
    seen.same("out.koleo", loss)
    seen.same("grad.koleo_x", x.grad)
    head = head_from(fixture.group("weights.head."))
    assert (1 if isinstance(head.mlp, torch.nn.Linear) else (len(head.mlp) + 1) // 2) == fixture.config["head_nlayers"]
    seen.same("out.head_y", head(fixture["in.head_x"]))
    schedules(fixture, seen)
    masks(fixture, seen)
    seen.done()


def entropy(student, targets, index, each):
    """Our chunked loss on logits that are given: its prototypes are the identity."""
    count = student.shape[1]
    part = dino_losses.Part(targets, index, each)
    return dino_losses.cross_entropy(student, torch.eye(count), torch.ones(count), [part])[0]


def image_losses(fixture, seen, targets) -> None:
    """Every student crop against both halves of the teacher's rows, mean over images."""
    count = len(fixture["in.student0"])
    names = sorted(name for name in fixture.tensors if name.startswith("in.student"))
    crops = [fixture[name].clone().requires_grad_() for name in names]
    rows = torch.arange(count)
    index = torch.stack([rows, rows + count], 1).repeat(len(crops), 1)
    loss = entropy(torch.cat(crops), targets, index, torch.full((count * len(crops),), 1 / count))
    loss.backward()
    seen.same("out.dino_loss", loss)
    for name, crop in zip(names, crops, strict=True):
        seen.same(name.replace("in.", "grad."), crop.grad)


def patch_losses(fixture, seen, temp) -> None:
    hidden = fixture["in.masks"]
    found, images = masks_of(hidden), len(hidden)
    seen.same("out.masks_weight", found.weight)
    targets = dino_losses.sinkhorn(fixture["in.ibot_teacher_logits"], temp)
    seen.same("out.ibot_sinkhorn", targets.all())
    student = fixture["in.ibot_student"].clone().requires_grad_()
    rows = torch.arange(len(student)).unsqueeze(1)
    loss = entropy(student, targets, rows, found.weight / images)
    loss.backward()
    seen.same("out.ibot_loss", loss)
    seen.same("grad.ibot_student", student.grad)
    dense = [fixture[f"in.dense_{side}"].flatten(0, 1)[found.index] for side in ("student", "teacher")]
    loss = entropy(dense[0], dino_losses.Targets(dense[1]), rows, found.weight / images)
    seen.same("out.ibot_dense_loss", loss)


def schedules(fixture, seen) -> None:
    c = fixture.config
    steps = range(len(fixture["out.sched.lr"]))
    each, total = c["epoch_len"], c["epoch_len"] * c["epochs"]
    peak = c["base_lr"] * math.sqrt(c["total_batch"] / 1024)
    rate = [cosine(i, base=peak, final=c["min_lr"], total=total, warmup=c["warmup_epochs"] * each) for i in steps]
    seen.same("out.sched.lr", torch.tensor(rate))
    frozen = c["freeze_last_layer_epochs"] * each
    seen.same("out.sched.last_layer_lr", torch.tensor([last_layer_lr(i, rate[i], frozen) for i in steps]))
    for name, key in (("wd", "wd"), ("momentum", "momentum")):
        start, end = c[key]
        seen.same(f"out.sched.{name}", torch.tensor([cosine(i, base=start, final=end, total=total) for i in steps]))
    start, end = c["teacher_temp"]
    warm = c["teacher_temp_warmup_epochs"] * each
    seen.same("out.sched.teacher_temp", torch.tensor([linear(i, start=start, final=end, warmup=warm) for i in steps]))


def masks(fixture, seen) -> None:
    c = fixture.config["blockmask"]
    rng = random.Random(c["python_random_seed"])
    drawn = [block_mask(rng, c["grid"], count, most=c["max_num_patches"]) for count in c["requested"]]
    assert torch.equal(torch.stack([torch.from_numpy(mask) for mask in drawn]), fixture["out.blockmask"].bool())
    seen.left.discard("out.blockmask")


# ---------------------------------------------------------------- a whole step


def load_step(fixture, folder, mode: str) -> DINOv2:
    c = fixture.config
    config = {"img_size": [c["gsize"]] * 2, "patch_size": [c["patch"]] * 2}
    vit = load_backbone(fixture, folder, "weights.student.backbone.", **config)
    settings = Settings(
        prototypes=c["K"], head_hidden=c["hid"], bottleneck_dim=c["bott"], ibot_head=c["sep"], ibot_prototypes=c["Ki"],
        head_layers=sum(n.endswith("weight") for n in fixture.group("weights.student.dino_head.mlp.")),
        centering=mode, student_temp=c["student_temp"], center_momentum=c["center_momentum"], local_crops=c["L"],
        dino_weight=c["loss_weights"]["dino"], ibot_weight=c["loss_weights"]["ibot"],
        koleo_weight=c["loss_weights"]["koleo"], patch_embed_lr=c["patch_embed_lr_mult"], guard=False,
    )  # fmt: skip
    method = DINOv2(vit, settings)
    method.load_official(fixture.group("weights."))
    method.temperature = float(fixture["in.teacher_temp"])
    return method.train()


def our_parameter(method: DINOv2, name: str) -> torch.nn.Parameter:
    if name == "backbone.mask_token":
        return method.mask_token
    return method.get_parameter(ours(name))


def ours(name: str) -> str:
    if name == "backbone.mask_token":
        return "mask_token"
    return name.replace("backbone.", "vit.").replace("register_tokens", "reg_token")


@pytest.mark.parametrize("path", files("rad_dino.ssl"), ids=lambda p: p.stem)
def test_a_whole_step(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    large = fixture["in.global_crops"].unflatten(0, (2, c["B"]))
    small = fixture["in.local_crops"].unflatten(0, (c["L"], c["B"])).transpose(0, 1)
    batch = {"image": large[0], "image_2": large[1], "image_local": small, "masks": fixture["in.masks"]}
    found = masks_of(fixture["in.masks"])
    seen.same("out.mask_indices_list", found.index)
    seen.same("out.masks_weight", found.weight)
    shown = {"dino_local_crops_loss": ("dino_local", 1.0), "dino_global_crops_loss": ("dino_global", 1.0)}
    shown |= {"koleo_loss": ("koleo", 0.5), "ibot_loss": ("ibot", 0.5)}  # half of what enters the total
    for mode in ("centering", "sinkhorn_knopp"):
        method = load_step(fixture, tmp_path, mode)
        out = method(batch)
        out["loss"].backward()
        for theirs, (name, factor) in shown.items():
            seen.same(f"out.{mode}.{theirs}", factor * out[name])
        for name in fixture.group(f"grad.{mode}."):
            seen.same(f"grad.{mode}.{name}", our_parameter(method, name).grad)
        if mode == "centering":
            seen.same("out.centering.dino_center_after", method.dino_center)
            seen.same("out.centering.ibot_center_after", method.ibot_center)
        assert all(p.grad is None for p in method.teacher.parameters())
    seen.done()


@pytest.mark.parametrize("path", files("rad_dino.ssl"), ids=lambda p: p.stem)
def test_parameter_groups(path, tmp_path):
    fixture = read(path)
    with safe_open(path, "pt") as file:
        wanted = json.loads(file.metadata()["param_groups"])
    c = fixture.config
    method = load_step(fixture, tmp_path, "centering")
    groups = method.param_groups(1.0, layer_decay=c["layerwise_decay"])
    found = {name: (g["lr_scale"], g["decay"], g["last_layer"]) for g in groups for name in g["names"]}
    assert found == {ours(name): pytest.approx(tuple(values)) for name, values in wanted.items()}
    assert multipliers("vit.norm.weight", c["depth"], layer_decay=0.5, patch_embed_lr=1.0) == (1.0, 0.0, False)
