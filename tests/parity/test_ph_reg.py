"""ph_reg: views, averaging, student, loss, gradients and one step against 0raiser0/PH-Reg, every recorded tensor."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitkit import tokens, weights
from vitkit.clean.ph_reg import PHReg, Settings, distillation, epoch_rate
from vitkit.parts import shifted_views as views
from vitkit.parts.cover_crop import CoverCrop
from vitkit.parts.optim import build_optimizer
from vitkit.passport import Preprocess

from .conftest import Compared, files, read

PART = {"query": 0, "key": 1, "value": 2}


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("path", files("ph_reg.views"), ids=lambda p: p.stem)
def test_views(path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    side = c["resolution"] // c["patch_size"]
    limits = views.shift_limits((side, side), c["shift_frac"])
    pool = views.offset_pool(c["seed"], c["counts"] * views.POOL, limits)
    seen.same("out.offset_pool", torch.from_numpy(pool)[None].float(), 0.0)
    seen.same("out.flip", torch.from_numpy(views.draw_flips(c["seed"], c["counts"])), 0.0)
    first = fixture["in.fps_first"].reshape(-1).numpy()
    seen.same("out.fps_index", torch.from_numpy(views.farthest_points(pool[None], c["counts"], first)), 0.0)
    want = fixture["out.fps_index2"]
    found = views.farthest_points(fixture["in.pool2"].numpy(), want.shape[1], want[:, 0].numpy())
    seen.same("out.fps_index2", torch.from_numpy(found), 0.0)
    for number, shift in enumerate(fixture["in.shifts"].tolist()):
        seen.same(f"out.shifted{number}", views.shift_pixels(fixture["in.shift_image"], shift, -7.0), 0.0)
    preprocess = Preprocess(image_size=(c["resolution"],) * 2)
    image = preprocess.normalise(CoverCrop(preprocess, central=True)(fixture["in.pil_image"].permute(2, 0, 1)))
    seen.same("out.image", image)
    offsets, flips = fixture["in.offsets"], fixture["in.flip"]
    white = (1 - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)
    patch = (c["patch_size"],) * 2
    seen.same("out.shifted_images", views.view_pixels(image[None], offsets[None], flips[None], patch, white)[0])
    cells = views.view_cells(offsets, flips, (side, side))
    seen.same("out.shifted_idxs", places(cells, side).reshape(-1, 2, side, side).float(), 0.0)
    seen.done()


def places(cells: torch.Tensor, columns: int) -> torch.Tensor:
    """(..., 2, N) row and column of flat cells, -1 for holes."""
    found = torch.stack([cells.div(columns, rounding_mode="floor"), cells % columns], -2)
    return torch.where((cells < 0).unsqueeze(-2), -1, found)


def offsets_of(idxs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets (B, V, 2) and flip bits (B, V) from the recorded places (B, V, 2, P, P) of every view."""
    batch, count, _, side, _ = idxs.shape
    shifts, flips = torch.zeros(batch, count, 2, dtype=torch.int64), torch.zeros(batch, count, dtype=torch.int64)
    for b in range(batch):
        for v in range(count):
            rows, columns = idxs[b, v].long()
            i, j = (int(k) for k in torch.nonzero(rows >= 0)[0])
            falls = [bool(row[k + 1] < row[k]) for row, k in ((r, k) for r in columns for k in range(side - 1))
                     if row[k] >= 0 and row[k + 1] >= 0]  # fmt: skip
            flips[b, v] = int(any(falls))
            at = side - 1 - j if any(falls) else j
            shifts[b, v] = torch.tensor([int(rows[i, j]) - i, int(columns[i, j]) - at])
    return shifts, flips


def official_of(model: PHReg, name: str, grad: bool) -> torch.Tensor:
    """The parameter (or its gradient) that the authors call `name`."""
    get = (lambda p: p.grad) if grad else (lambda p: p.detach())
    vit, inner = model.vit, name.removeprefix("model.")
    if inner == "registers":
        return get(vit.reg_token)
    if inner == "embeddings.position_embeddings":
        row = vit.parametrizations.cls_token[0].row
        return torch.cat([get(row), get(vit.pos_embed)], 1)
    if inner.startswith("embeddings.patch_embeddings.projection."):
        return get(vit.patch_embed.proj.get_parameter(inner.rpartition(".")[2]))
    _, _, number, rest = inner.split(".", 3)
    block = vit.blocks[int(number)]
    if rest.startswith("attention.attention."):
        _, _, part, kind = rest.split(".")
        return get(block.attn.qkv.get_parameter(kind)).chunk(3)[PART[part]]
    for theirs, ours in (("attention.output.dense", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
                         ("layer_scale2.lambda1", "ls2.gamma")):  # fmt: skip
        rest = rest.replace(theirs, ours)
    return get(block.get_parameter(rest))


@pytest.mark.parametrize("path", files("ph_reg.distill"), ids=lambda p: p.stem)
def test_distillation(path, tmp_path, resave):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    state = fixture.group("weights.")
    (tmp_path / "teacher").mkdir()
    torch.save(
        {name: value for name, value in state.items() if name != "registers"}, tmp_path / "teacher" / "model.pth"
    )
    # transformers resamples positions to the new size; DINOv2's own rule is what a bare Dinov2Model file gets.
    vit = weights.load(tmp_path / "teacher" / "model.pth", arch_kwargs=c["dinov2"], positions="mae", say=quiet)
    method = PHReg(vit, Settings(registers=c["num_registers"], views=c["counts"], shift_frac=c["shift_frac"])).train()
    with torch.no_grad():
        method.vit.reg_token.copy_(state["registers"])
    frozen = {name: value.clone() for name, value in method.named_parameters() if not value.requires_grad}
    images = fixture["in.images"]
    offsets, flips = offsets_of(fixture["in.shifted_idxs"])
    grid = tokens.grid_of(vit, images.shape[2:])
    cells = views.view_cells(offsets, flips, grid)
    want = fixture["in.shifted_idxs"].flatten(3).long()
    assert torch.equal(places(cells, grid[1]), want)
    patch = vit.patch_embed.patch_size
    pixels = views.view_pixels(images, offsets, flips, patch, method.blank)
    assert torch.allclose(pixels[..., :: patch[0], :: patch[1]], fixture["in.shifted_images_corner"], atol=1e-6)

    seen.same("out.teacher_view_tokens", method.view_tokens(images, offsets, flips, cells).all)
    target = method.target(images, offsets, flips)
    seen.same("out.teacher_clean", target)
    with torch.no_grad():
        student = tokens.encode(method.vit, images)
    count = c["num_registers"]
    theirs = torch.cat([student.prefix[:, 1:], student.prefix[:, :1], student.patches], 1)  # registers stand in front
    seen.same("out.student_tokens", theirs)
    cosine, mse = distillation(target, student.patches)
    seen.same("out.loss_cos", cosine)
    seen.same("out.loss_mse", mse)
    batch = {"image": images, "offsets": offsets, "flips": flips}
    out = method(batch)
    seen.same("out.loss", out["loss"])
    out["loss"].backward()
    names = fixture.group("grad.")
    for name in names:
        seen.same(f"grad.{name}", official_of(method, name, grad=True))
    trainable = {name for name in c["trainable"] if not name.endswith("key.bias")}
    assert trainable == set(names)
    fused = [name for name in c["trainable"] if ".attention.attention." in name]
    rows = 1  # of the class token's position, a parameter of its own here
    assert sum(p.requires_grad for p in method.parameters()) == len(c["trainable"]) - len(fused) * 2 // 3 + rows

    groups = method.param_groups(c["weight_decay"])
    optimizer = build_optimizer(groups, name="adamw", lr=c["lr"], betas=(0.9, 0.999))
    optimizer.step()
    for name in fixture.group("out.after_step."):
        seen.same(f"out.after_step.{name}", official_of(method, name, grad=False))
    rates = fixture["out.lr_by_epoch"]
    settings = Settings()
    seen.same("out.lr_by_epoch", torch.tensor([epoch_rate(k, c["lr"], settings) for k in range(len(rates))]))
    seen.done()
    assert all(torch.equal(value, frozen[name]) for name, value in method.named_parameters() if name in frozen)

    finished = method.finish()
    assert finished.num_prefix_tokens == count + 1 and not any("parametriz" in name for name in finished.state_dict())


@pytest.mark.parametrize("path", files("ph_reg.distill"), ids=lambda p: p.stem)
def test_the_authors_student_file_loads(path, tmp_path):
    """Registers beside a Dinov2Model, each tensor twice under the aliases that their module has."""
    fixture = read(path)
    state = fixture.group("weights.")
    for name in list(state):
        for inner, alias in (("model.embeddings.", "embed."), ("model.encoder.", "encoder."),
                             ("model.layernorm.", "layernorm.")):  # fmt: skip
            if name.startswith(inner):
                state[alias + name.removeprefix(inner)] = state[name]
    torch.save(state, tmp_path / "distilled_dinov2_weights_30.pth")
    said: list[str] = []
    vit = weights.load(
        tmp_path / "distilled_dinov2_weights_30.pth", arch_kwargs=fixture.config["dinov2"], say=said.append
    )
    assert vit.num_reg_tokens == fixture.config["num_registers"] and vit.passport.feature.positions == "mae"
    assert any("PH-Reg student" in line for line in said)
    with torch.no_grad():
        found = tokens.encode(vit.eval(), fixture["in.images"])
    want, count = fixture["out.student_tokens"], fixture.config["num_registers"]
    got = torch.cat([found.prefix[:, 1:], found.prefix[:, :1], found.patches], 1)
    assert float((got - want).abs().max() / want.abs().max()) < 2e-5 and count == found.prefix.shape[1] - 1


def test_the_rate_of_a_step_is_theirs():
    """All steps of an epoch but its first have the rate that was set after that first step."""
    method = SimpleNamespace(settings=Settings(), rate=None)
    group = {"lr": 0.0}
    seen = []
    for epoch in (0.0, 0.25, 0.5, 1.0, 1.25, 99.75, 100.0):
        now = SimpleNamespace(epoch=epoch, lr=1e-4)
        PHReg.before_step(method, now, [group])
        seen.append(group["lr"])
    each = [max(1e-4 * 0.05 ** (k / 100), 5e-6) for k in (0, 1, 1, 1, 2, 100, 100)]
    assert seen == pytest.approx([1e-4, *each[1:]]) and math.isclose(seen[-1], 5e-6)
    assert np.isclose(epoch_rate(200, 1e-4), 5e-6) and epoch_rate(3, 1e-6) == 1e-6
