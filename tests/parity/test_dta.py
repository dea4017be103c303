"""DTA's toolbox variant and its JPEG against OpenTAI/taiadv, every recorded tensor."""

from __future__ import annotations

import pytest
import torch

from vitkit import tokens, weights
from vitkit.attack.dta import DTA, Settings
from vitkit.attack.pgd import gradient_of
from vitkit.parts.jpeg import jpeg

from .conftest import Compared, files, read, relative

# What builds the trunk, out of all that the metadata say; the rest is the attack's.
TRUNK = (
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps", "qkv_bias",
    "init_values", "class_token", "reg_tokens", "no_embed_class", "pre_norm",
)  # fmt: skip


def toolbox(fixture, folder) -> DTA:
    c = fixture.config
    path = fixture.checkpoint(folder, {key: c[key] for key in TRUNK if key in c})
    vit = weights.load(path, num_classes=0, say=lambda text: None)
    settings = Settings(
        eps=c["epsilon"],
        steps=c["num_steps"],
        step_size=c["step_size"],
        layer="output",
        objective="flat",
        param="tanh",
    )
    return DTA(vit, settings)


@pytest.mark.parametrize("path", files("dta.featattack"), ids=lambda p: p.stem)
def test_feature_attack_and_jpeg(path, tmp_path):
    fixture = read(path)
    seen = Compared(fixture)
    attack = toolbox(fixture, tmp_path)
    x, eps = fixture["in.x"], attack.settings.eps
    vit, prepare = attack.encoders[0].eval(), attack.prepare[0]

    cost = attack.cost(x)  # the toolbox maximises minus the mean cosine
    gradient, _ = gradient_of(lambda noise: cost((x + eps * noise.tanh()).clamp(0, 1)), fixture["in.noise0"])
    seen.same("grad.noise_step0", -gradient / len(x))

    noise = fixture["in.noise0"].clone()
    crafted = attack.crafted(x, noise=noise)
    assert (-crafted.costs.mean(1) - fixture["out.loss_per_step"]).abs().max() <= 1e-4
    seen.same("out.loss_per_step", -crafted.costs.mean(1))
    # Adam's first steps are sign-like: an entry whose gradient is nearly zero turns rounding into a visible step.
    for key, ours in (("out.x_adv", crafted.pixels), ("out.noise_final", noise)):
        error = (ours - fixture[key]).abs() / fixture[key].abs().max()
        assert (error <= 1e-4).float().mean() >= 0.999, key
        seen.left.discard(key)
    with torch.no_grad():
        seen.same("out.feat_clean", tokens.encode(vit, prepare(x)).all)
        ours = tokens.encode(vit, prepare(crafted.pixels)).all
        assert relative(ours, fixture["out.feat_adv"]) <= 1e-4  # of images that differ by what is allowed above
        seen.same("out.feat_adv", tokens.encode(vit, prepare(fixture["out.x_adv"])).all)

    pixels = fixture["in.jpeg_x"].clone().requires_grad_()
    out = jpeg(pixels, fixture.config["jpeg_quality"])
    seen.same("out.jpeg", out)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    seen.same(
        "grad.jpeg_x", pixels.grad, 4e-5
    )  # 3 (x - round x)^2 magnifies rounding; the same order of sums gives 2e-7
    seen.done()


CONFIGS = [
    {"img_size": [32, 48], "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0},
    {"img_size": [64, 32], "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "init_values": 0.1},
    {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "class_token": False},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c['img_size']}-{c['depth']}")
def test_other_configs_equal_a_plain_loop(config, tmp_path):
    """The same code from other metadata, against ten lines over timm's own model."""
    from timm.models.vision_transformer import VisionTransformer

    from .conftest import Fixture

    torch.manual_seed(0)
    plain = VisionTransformer(**config, num_classes=0, global_pool="" if "class_token" in config else "token").eval()
    fixture = Fixture(
        tmp_path,
        {**config, "epsilon": 0.02, "step_size": 0.3, "num_steps": 3, "global_pool": ""},
        {f"weights.{name}": value for name, value in plain.state_dict().items()},
    )
    size = config["img_size"] if isinstance(config["img_size"], list) else [config["img_size"]] * 2
    x, start = torch.rand(2, 3, *size), torch.rand(2, 3, *size) * 2 - 1
    attack = toolbox(fixture, tmp_path)
    ours = attack.crafted(x, noise=start.clone())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    noise = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([noise], lr=0.3, maximize=True)
    for _ in range(3):
        changed = (x + 0.02 * noise.tanh()).clamp(0, 1)
        a, b = (plain.forward_features((image - mean) / std).flatten(1) for image in (x, changed))
        optimizer.zero_grad()
        (-torch.nn.functional.cosine_similarity(a, b, dim=1).mean()).backward()
        optimizer.step()
    error = (ours.pixels - (x + 0.02 * noise.tanh()).clamp(0, 1)).abs()
    assert (error <= 1e-4).float().mean() >= 0.999
