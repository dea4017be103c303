"""ear: no official code exists; its building blocks against those of RIAD-PyTorch (first author) and of DINO."""

from __future__ import annotations

import json

import pytest
import torch

from vitkit import tokens, weights
from vitkit.anomaly import obfuscation, scores
from vitkit.anomaly.unet import UNet
from vitkit.explain import attention

from .conftest import Compared, files, read

PATHS = files("ear.parts")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_every_recorded_tensor(path, tmp_path):
    fixture = read(path)
    seen = Compared(fixture)
    losses(fixture, seen)
    inpainting(fixture, seen)
    saliency(fixture, seen, tmp_path)
    seen.done()


def losses(fixture, seen: Compared) -> None:
    c, y = fixture.config, fixture["in.y"]

    def hat() -> torch.Tensor:
        return fixture["in.y_hat"].clone().requires_grad_()

    y_hat = hat()
    loss = scores.msgms_loss(y, y_hat, c["num_scales"])
    loss.backward()
    seen.same("out.msgms", loss)
    seen.same("grad.msgms", y_hat.grad)
    with torch.no_grad():
        found = scores.anomaly_map(y, y_hat, c["num_scales"])
    seen.same("out.msgms_map", found)
    seen.same("out.score", scores.image_score(found))
    measures = {
        "ssim": scores.ssim_map,
        "l2": lambda a, b: (a - b).square(),
        "l1": lambda a, b: (a - b).abs(),
    }
    for name, difference in measures.items():
        y_hat = hat()
        each = scores.per_image(difference(y, y_hat))
        each.sum().backward()
        seen.same(f"out.{name}", each)
        seen.same(f"grad.{name}", y_hat.grad)


def inpainting(fixture, seen: Compared) -> None:
    c = fixture.config
    unet = UNet(c["channels"], c["filters"][1:], c["ksize"])
    unet.load_official(fixture.group("weights.unet."))
    unet.eval()
    with torch.no_grad():
        latent, skips = unet.encode(fixture["in.x"])
        seen.same("out.unet_latent", latent)
        seen.same("out.unet", unet.decode(latent, skips))
        assert torch.equal(unet(fixture["in.x"]), unet.decode(latent, skips))


def saliency(fixture, seen: Compared, folder) -> None:
    c = fixture.config
    path = folder / "dino_backbone.pth"
    torch.save(fixture.group("weights.dino."), path)
    (folder / "config.json").write_text(json.dumps(c["dino"]))
    vit = weights.load(path, positions="dinov2", say=None).eval()
    image = fixture["in.image"]
    assert list(image.shape[2:]) == list(c["dino_input"])
    with torch.no_grad():
        seen.same("out.last_attn", tokens.attention_maps(vit, image)[0])
    heads = attention.by_head(vit, image)[0]  # (heads, h, w)
    seen.same("out.cls_attn", heads.flatten(1))
    mask = obfuscation.salient(heads, "mass", c["mass"])
    assert torch.equal(mask, fixture["out.mass_mask"])
    seen.left.discard("out.mass_mask")
    seen.same("out.cls_attn_up", obfuscation.enlarge(heads.unsqueeze(0), c["dino_input"])[0])
