"""DINOv3's backbone against facebookresearch/dinov3, every recorded tensor; and the configurations that no fixture here
has (SwiGLU, separate norms, keys with bias, other patches) against a plain re-implementation of the sheet's formulas."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vitkit
from vitkit import tokens, weights
from vitkit.errors import ConfigError, WeightsError
from vitkit.parts.dinov3 import UntiedNorm

from .conftest import Compared, files, read, relative


def load(fixture, folder):
    """Meta's own keywords stand in config.json; the file is read as any checkpoint."""
    return weights.load(fixture.checkpoint(folder, fixture.config, wrapped=False), num_classes=0, say=None).eval()


def official_gradient(vit, name: str) -> torch.Tensor:
    """The gradient of our parameter that has Meta's name `name`."""
    own = dict(vit.named_parameters())
    if name.endswith("attn.qkv.bias") and name not in own:
        q, v = (own[name.replace("qkv.bias", f"{letter}_bias")].grad for letter in "qv")
        return torch.cat([q, torch.zeros_like(q), v])
    for theirs, ours in (
        ("storage_tokens", "reg_token"),
        (".ls1.gamma", ".gamma_1"),
        (".ls2.gamma", ".gamma_2"),
        (".mlp.w1.", ".mlp.fc1_g."),
        (".mlp.w2.", ".mlp.fc1_x."),
        (".mlp.w3.", ".mlp.fc2."),
        ("cls_norm.", "norm.prefix."),
    ):
        name = name.replace(theirs, ours)
    return own[name].grad


def compare(vit, fixture, seen) -> None:
    registers = vit.num_prefix_tokens - 1
    x = fixture["in.x"].clone().requires_grad_()
    out = tokens.encode(vit, x, layers=[-2, -1])
    seen.same("out.cls", out.prefix[:, 0])
    if "out.storage" in fixture.tensors:
        assert out.prefix.shape[1] - 1 == registers
        if registers:
            seen.same("out.storage", out.prefix[:, 1:])
        else:
            seen.left.discard("out.storage")
    seen.same("out.patch", out.patches)
    assert torch.equal(vit.forward_features(x), out.all)
    seen.same("out.prenorm", tokens.encode(vit, x, norm=False).all)
    for i, tap in enumerate(out.taps):
        seen.same(f"out.inter.{i}.map", tap.map)
        seen.same(f"out.inter.{i}.cls", tap.prefix[:, 0])
    masked = tokens.encode(vit, x, mask=fixture["in.mask"], mask_token=vit.extras["mask_token"])
    seen.same("out.masked.cls", masked.prefix[:, 0])
    seen.same("out.masked.patch", masked.patches)
    sin, cos = vit.rope.get_embed(shape=list(out.grid)).chunk(2, dim=-1)
    seen.same("out.rope_sin", sin)
    seen.same("out.rope_cos", cos)
    (out.prefix[:, 0].pow(2).sum() + out.patches.sin().sum()).backward()
    seen.same("grad.x", x.grad)
    for name in fixture.group("grad.w."):
        seen.same(f"grad.w.{name}", official_gradient(vit, name))


@pytest.mark.parametrize("path", files("dinov3_medical"), ids=lambda p: p.stem)
def test_every_recorded_tensor(path, tmp_path):
    fixture = read(path)
    seen = Compared(fixture)
    vit = load(fixture, tmp_path)
    compare(vit, fixture, seen)
    seen.done()
    theirs = fixture.config
    assert len(vit.blocks) == theirs["depth"] and vit.num_prefix_tokens == 1 + theirs["n_storage_tokens"]
    assert vit.global_pool == "token"
    again = weights.load(_saved(vit, tmp_path / "run"), num_classes=0, say=None).eval()
    assert torch.equal(tokens.encode(again, fixture["in.x"]).all, tokens.encode(vit, fixture["in.x"]).all)


def _saved(vit, folder):
    vitkit.weights.save_run(folder, vit)
    return folder


# ---------------------------------------------------------------- configurations without a fixture

CONFIGS = {
    "swiglu": {"ffn_layer": "swiglu64", "embed_dim": 48, "num_heads": 4},
    "untied, 2 registers, patch 8": {
        "untie_cls_and_patch_norms": True,
        "untie_global_and_local_cls_norm": True,
        "n_storage_tokens": 2,
        "patch_size": 8,
    },
    "swiglu, untied, keys with bias": {
        "ffn_layer": "swiglu",
        "ffn_ratio": 3.0,
        "mask_k_bias": False,
        "untie_cls_and_patch_norms": True,
    },
    "no registers, no layer scale, no biases": {
        "n_storage_tokens": 0,
        "layerscale_init": None,
        "qkv_bias": False,
        "ffn_bias": False,
        "proj_bias": False,
        "norm_layer": "layernorm",
    },
    "base 50, depth 3": {"pos_embed_rope_base": 50.0, "depth": 3, "embed_dim": 64, "num_heads": 2, "in_chans": 1},
}
DEFAULT = {
    "img_size": 64,
    "patch_size": 16,
    "in_chans": 3,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "ffn_ratio": 4.0,
    "qkv_bias": True,
    "layerscale_init": 1e-5,
    "norm_layer": "layernormbf16",
    "ffn_layer": "mlp",
    "ffn_bias": True,
    "proj_bias": True,
    "n_storage_tokens": 4,
    "mask_k_bias": True,
    "pos_embed_rope_base": 100.0,
    "pos_embed_rope_normalize_coords": "separate",
    "pos_embed_rope_dtype": "fp32",
    "untie_cls_and_patch_norms": False,
    "untie_global_and_local_cls_norm": False,
}


def made(change: dict) -> SimpleNamespace:
    """Random weights by Meta's names, an input, and what the formulas give: a fixture as `read` returns it."""
    c = DEFAULT | change
    draw = torch.Generator().manual_seed(len(str(change)))
    rand = lambda *shape: 0.3 * torch.randn(*shape, generator=draw)  # noqa: E731
    dim, side, head = c["embed_dim"], c["patch_size"], c["embed_dim"] // c["num_heads"]
    w = {"cls_token": rand(1, 1, dim), "mask_token": rand(1, dim)}
    if c["n_storage_tokens"]:
        w["storage_tokens"] = rand(1, c["n_storage_tokens"], dim)
    w["patch_embed.proj.weight"], w["patch_embed.proj.bias"] = rand(dim, c["in_chans"], side, side), rand(dim)
    w["rope_embed.periods"] = c["pos_embed_rope_base"] ** (2 * torch.arange(head // 4) / (head // 2))
    norms = ["norm"] + ["cls_norm"] * c["untie_cls_and_patch_norms"]
    norms += ["local_cls_norm"] * c["untie_global_and_local_cls_norm"]
    norms += [f"blocks.{i}.norm{j}" for i in range(c["depth"]) for j in (1, 2)]
    for name in norms:
        w |= {f"{name}.weight": 1 + rand(dim), f"{name}.bias": rand(dim)}
    hidden = int(dim * c["ffn_ratio"])
    if c["ffn_layer"] != "mlp":
        step = int(c["ffn_layer"].removeprefix("swiglu") or 8)
        hidden = -(-int(hidden * 2 / 3) // step) * step
    for i in range(c["depth"]):
        layers = {"attn.qkv": (3 * dim, dim, c["qkv_bias"]), "attn.proj": (dim, dim, c["proj_bias"])}
        if c["ffn_layer"] == "mlp":
            layers |= {"mlp.fc1": (hidden, dim, c["ffn_bias"]), "mlp.fc2": (dim, hidden, c["ffn_bias"])}
        else:
            layers |= {f"mlp.w{j}": (hidden, dim, c["ffn_bias"]) for j in (1, 2)}
            layers["mlp.w3"] = (dim, hidden, c["ffn_bias"])
        for name, (rows, columns, bias) in layers.items():
            w[f"blocks.{i}.{name}.weight"] = rand(rows, columns)
            if bias:
                w[f"blocks.{i}.{name}.bias"] = rand(rows)
        if c["qkv_bias"] and c["mask_k_bias"]:
            w[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim)
        if c["layerscale_init"] is not None:
            w |= {f"blocks.{i}.ls{j}.gamma": rand(dim) for j in (1, 2)}
    return SimpleNamespace(config=c, weights=w, x=rand(2, c["in_chans"], 4 * side, 3 * side))


def reference(case, x):
    """Prefix and patch tokens after the final norms, from Meta's tensors and the sheet's formulas alone."""
    c, w = case.config, case.weights
    heads, eps = c["num_heads"], {"layernorm": 1e-6, "layernormbf16": 1e-5}[c["norm_layer"]]
    norm = lambda name, t: F.layer_norm(t, t.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)  # noqa: E731
    linear = lambda name, t: F.linear(t, w[f"{name}.weight"], w.get(f"{name}.bias"))  # noqa: E731
    grid = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=c["patch_size"])
    height, width = grid.shape[2:]
    front = [w["cls_token"]] + ([w["storage_tokens"]] if c["n_storage_tokens"] else [])
    x = torch.cat([*(t.expand(len(x), -1, -1) for t in front), grid.flatten(2).transpose(1, 2)], 1)
    count = 1 + c["n_storage_tokens"]
    row, column = torch.meshgrid(
        2 * (torch.arange(height) + 0.5) / height - 1, 2 * (torch.arange(width) + 0.5) / width - 1, indexing="ij"
    )
    place = torch.stack([row, column], -1).view(-1, 2, 1)
    angle = (2 * math.pi * place / w["rope_embed.periods"]).flatten(1).tile(2)

    def turned(t):
        a, b = t[:, :, count:].chunk(2, -1)
        patches = t[:, :, count:] * angle.cos() + torch.cat([-b, a], -1) * angle.sin()
        return torch.cat([t[:, :, :count], patches], 2)

    for i in range(c["depth"]):
        at = f"blocks.{i}"
        bias = w.get(f"{at}.attn.qkv.bias")
        if bias is not None:
            bias = bias * w.get(f"{at}.attn.qkv.bias_mask", torch.ones(()))
        qkv = F.linear(norm(f"{at}.norm1", x), w[f"{at}.attn.qkv.weight"], bias)
        q, k, v = qkv.view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k = turned(q), turned(k)
        mixed = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{at}.attn.proj", mixed) * w.get(f"{at}.ls1.gamma", torch.ones(()))
        z = norm(f"{at}.norm2", x)
        if c["ffn_layer"] == "mlp":
            z = linear(f"{at}.mlp.fc2", F.gelu(linear(f"{at}.mlp.fc1", z)))
        else:
            z = linear(f"{at}.mlp.w3", F.silu(linear(f"{at}.mlp.w1", z)) * linear(f"{at}.mlp.w2", z))
        x = x + z * w.get(f"{at}.ls2.gamma", torch.ones(()))
    front = norm("cls_norm" if c["untie_cls_and_patch_norms"] else "norm", x[:, :count])
    return front, norm("norm", x[:, count:])


def opened(case, folder, config=None):
    folder.mkdir(exist_ok=True)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in case.weights.items()}}, folder / "checkpoint.pth")
    (folder / "config.json").write_text(json.dumps(case.config if config is None else config))
    return weights.load(folder / "checkpoint.pth", num_classes=0, say=None).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_other_configurations(name, tmp_path):
    case = made(CONFIGS[name])
    vit = opened(case, tmp_path)
    with torch.no_grad():
        out = tokens.encode(vit, case.x, layers=[0])
        front, patches = reference(case, case.x)
        assert relative(out.prefix, front) <= 2e-5
        assert relative(out.patches, patches) <= 2e-5
        assert torch.equal(vit.forward_features(case.x), out.all)
    left = {"mask_token"} | {k for k in case.weights if k.startswith("local_cls_norm")}
    assert set(vit.extras) == {f"backbone.{k}" for k in left} or set(vit.extras) == left
    again = weights.load(_saved(vit, tmp_path / "run"), num_classes=0, say=None).eval()
    assert torch.equal(tokens.encode(again, case.x).all, out.all)
    if case.config["untie_cls_and_patch_norms"]:
        assert isinstance(again.norm, UntiedNorm)


@pytest.mark.parametrize("name", ("swiglu", "untied, 2 registers, patch 8"))
def test_tensors_alone_prove_the_architecture(name, tmp_path):
    case = made(CONFIGS[name])
    with torch.no_grad():
        assert relative(tokens.encode(opened(case, tmp_path, {}), case.x).patches, reference(case, case.x)[1]) <= 2e-5


@pytest.mark.parametrize("broken", ("eps", "registers", "axes", "keys"))
def test_what_breaks_is_noticed(broken, tmp_path):
    """The sheet's broken versions differ from ours by more than the tolerance."""
    case = made({"mask_k_bias": True})
    if broken == "eps":
        case.config["norm_layer"] = "layernorm"
        case.x = 1e-3 * case.x
    vit = opened(case, tmp_path)
    if broken == "eps":
        case.config["norm_layer"] = "layernormbf16"
    for block in vit.blocks if broken == "registers" else []:
        block.attn.num_prefix_tokens = 1
        break
    if broken == "axes":
        vit.rope.grid_indexing = "xy"
    if broken == "keys":
        case.weights = {k: v for k, v in case.weights.items() if not k.endswith("bias_mask")}
    with torch.no_grad():
        theirs = reference(case, case.x)[1]
        if broken == "registers":
            with pytest.raises(RuntimeError):
                tokens.encode(vit, case.x)
        else:
            assert relative(tokens.encode(vit, case.x).patches, theirs) > 2e-5


def test_periods_rounded_to_bfloat16_stay_so(tmp_path):
    case = made({})
    exact = opened(case, tmp_path / "a")
    case.weights["rope_embed.periods"] = case.weights["rope_embed.periods"].bfloat16()
    rounded = opened(case, tmp_path / "b")
    assert exact.passport.feature.rope == "float32" and rounded.passport.feature.rope == "bfloat16"
    assert torch.equal(rounded.rope.periods, exact.rope.periods.bfloat16().float())
    case.weights["rope_embed.periods"] = case.weights["rope_embed.periods"].float()
    with torch.no_grad():
        assert relative(tokens.encode(rounded, case.x).patches, reference(case, case.x)[1]) <= 2e-5


def test_biases_that_are_all_zero_load_into_timms_model_without_them(tmp_path):
    case = made({"embed_dim": 384, "num_heads": 6, "depth": 12})
    for name, value in case.weights.items():
        if name.endswith("qkv.bias"):
            value.zero_()
        elif value.ndim == 2:
            value.mul_(0.2)  # twelve layers of large random weights would amplify rounding
    torch.save(case.weights, tmp_path / "x.pth")
    vit = weights.load(tmp_path / "x.pth", arch="vit_small_patch16_dinov3", num_classes=0, say=None).eval()
    with torch.no_grad():
        assert relative(tokens.encode(vit, case.x).patches, reference(case, case.x)[1]) <= 2e-5
    case.weights["blocks.3.attn.qkv.bias"][0] = 1.0
    torch.save(case.weights, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="q_bias"):
        weights.load(tmp_path / "x.pth", arch="vit_small_patch16_dinov3", num_classes=0, say=None)
    vit = weights.load(tmp_path / "x.pth", arch="vit_small_patch16_dinov3_qkvb", num_classes=0, say=None).eval()
    with torch.no_grad():
        assert relative(tokens.encode(vit, case.x).patches, reference(case, case.x)[1]) <= 2e-5


def test_what_cannot_be_read_says_so(tmp_path):
    case = made({})
    with pytest.raises(WeightsError, match="normalize_coords is 'max'"):
        opened(case, tmp_path, case.config | {"pos_embed_rope_normalize_coords": "max"})
    with pytest.raises(WeightsError, match="norm_layer is 'rmsnorm'"):
        opened(case, tmp_path, case.config | {"norm_layer": "rmsnorm"})
    with pytest.raises(WeightsError, match="rotary periods are those of 3"):
        opened(case, tmp_path, case.config | {"num_heads": 4})
    case.weights["rope_embed.periods"][1] += 1
    with pytest.raises(WeightsError, match="do not follow from a base"):
        opened(case, tmp_path)


def test_prompts_that_run_along_are_refused_with_separate_norms(tmp_path):
    from vitkit.adapt import dvpt

    vit = opened(made(CONFIGS["untied, 2 registers, patch 8"]), tmp_path)
    dvpt.inject(vit, dvpt.Settings(prompts=2, bottleneck=4, share_every=1))
    with pytest.raises(ConfigError, match="separate norms"):
        tokens.encode(vit, torch.zeros(1, 3, 16, 16))
