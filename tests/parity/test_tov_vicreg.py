"""tov_vicreg: losses, gradients, batch-norm statistics, backbone, two LARS steps and schedule of mgoulao/TOV-VICReg."""

from __future__ import annotations

import pytest
import torch

from vitkit import tokens, weights
from vitkit.parts.optim import build_optimizer, set_lr
from vitkit.parts.schedules import scaled_lr, warmup_cosine
from vitkit.pretrain.tov_vicreg import RECIPE, Settings, TOVVICReg

from .conftest import Compared, files, read

BIAS = 1e-4  # a bias takes the raw gradient in LARS: rounding of the first step is amplified in the second


def quiet(_: str) -> None:
    pass


def load(fixture, folder) -> TOVVICReg:
    """The authors' training checkpoint through the loader that users call."""
    c = fixture.config
    config = {key: c[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "img_size") if key in c}
    vit = weights.load(fixture.checkpoint(folder, config), say=quiet)
    assert vit.passport.feature.positions == "dinov2"
    settings = Settings(
        sim_coeff=c["sim_coeff"],
        std_coeff=c["std_coeff"],
        cov_coeff=c["cov_coeff"],
        temporal_coeff=c["temporal_coeff"],
        mlp=c["mlp"],
        project_neighbours=True,
    )
    method = TOVVICReg(vit, settings)
    assert "go on from the checkpoint" in method.adopt(vit.extras)
    return method.train()


def inputs(fixture, grad: bool = False) -> dict[str, torch.Tensor]:
    keys = {"image": "x", "image_y": "y", "image_z": "z", "image_w": "w"}
    batch = {key: fixture[f"in.{name}"].clone().requires_grad_(grad) for key, name in keys.items()}
    return {**batch, "order": fixture["in.perm_label"]}


def official(method: TOVVICReg, name: str) -> torch.Tensor:
    """The parameter or buffer that the authors call `name`."""
    name = name.replace("backbone.", "vit.", 1)
    return method.get_parameter(name) if name in dict(method.named_parameters()) else method.get_buffer(name)


@pytest.mark.parametrize("path", files("tov_vicreg"), ids=lambda p: p.stem)
def test_losses_gradients_and_statistics(path, tmp_path):
    fixture = read(path)
    c, seen = fixture.config, Compared(fixture)
    method = load(fixture, tmp_path)
    batch = inputs(fixture, grad=True)
    assert list(batch["image"].shape[-2:]) == c["input"]
    out = method(batch)
    out["loss"].backward()
    for name in ("temporal", "invariance", "variance", "covariance"):
        seen.same(f"out.{name}_loss", out[name])
    seen.same("out.loss", out["loss"])
    for key, name in (("image", "x"), ("image_y", "y"), ("image_z", "z"), ("image_w", "w")):
        seen.same(f"grad.{name}", batch[key].grad)
    for name in fixture.group("grad.w."):
        seen.same(f"grad.w.{name}", official(method, name).grad)
    for name in fixture.group("out.after_fwd."):
        seen.same(f"out.after_fwd.{name}", official(method, name))

    vit, images = method.vit.eval(), fixture["in.x"]
    with torch.no_grad():
        seen.same("out.cls", method.represent(images))
        seen.same("out.last_attn", tokens.attention_maps(vit, images[:2])[0])
        count = len(fixture.group("out.inter."))
        taps = tokens.encode(vit, images[:2], layers=range(-count, 0)).taps
        for index, tap in enumerate(taps):
            seen.same(f"out.inter.{index}", tap.all)

    two_steps(fixture, seen, load(fixture, tmp_path))
    epochs = fixture["in.sched_epoch"].tolist()
    top = scaled_lr(RECIPE["blr"], RECIPE["batch_size"])
    rule = {"lr": top, "min_lr": 0.0, "warmup": RECIPE["warmup_epochs"], "epochs": RECIPE["epochs"]}
    seen.same("out.sched_lr", torch.tensor([warmup_cosine(epoch, **rule) for epoch in epochs]))
    seen.done()


def two_steps(fixture, seen: Compared, method: TOVVICReg) -> None:
    c = fixture.config
    groups = method.param_groups(c["lars_wd"])
    optimizer = build_optimizer(groups, name="lars", lr=c["lars_lr"], momentum=c["lars_momentum"])
    assert all(group["trust_coefficient"] == c["trust"] for group in optimizer.param_groups)
    set_lr(optimizer, c["lars_lr"])
    batch = inputs(fixture)
    for step in range(2):
        optimizer.zero_grad()
        loss = method(batch)["loss"]
        seen.same(f"out.lars.loss{step}", loss)
        loss.backward()
        optimizer.step()
    for group in ("w2", "bn2"):
        for name in fixture.group(f"out.lars.{group}."):
            value = official(method, name)
            seen.same(f"out.lars.{group}.{name}", value, BIAS if value.ndim == 1 else 2e-5)
