"""Hugging Face's Dinov2Model loads by path, with its own preprocessing, and gives the same tokens."""

from __future__ import annotations

import json

import pytest
import torch

from vitkit import tokens, weights
from vitkit.errors import WeightsError


def dinov2(width: int = 24, depth: int = 2, registers: int = 0, swiglu: bool = False) -> dict[str, torch.Tensor]:
    """Random tensors by the names of transformers' Dinov2Model."""
    draw = torch.Generator().manual_seed(0)
    rand = lambda *shape: 0.2 * torch.randn(*shape, generator=draw)  # noqa: E731
    named = {
        "embeddings.cls_token": rand(1, 1, width),
        "embeddings.mask_token": rand(1, width),
        "embeddings.position_embeddings": rand(1, 17, width),
        "embeddings.patch_embeddings.projection.weight": rand(width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": rand(width),
        "layernorm.weight": rand(width),
        "layernorm.bias": rand(width),
    }
    if registers:
        named["embeddings.register_tokens"] = rand(1, registers, width)
    inner = (
        {"weights_in": (128, width), "weights_out": (width, 64)} if swiglu else {"fc1": (96, width), "fc2": (width, 96)}
    )
    for i in range(depth):
        front = f"encoder.layer.{i}."
        layers = {f"attention.attention.{part}": (width, width) for part in ("query", "key", "value")}
        layers |= {"attention.output.dense": (width, width)} | {f"mlp.{name}": shape for name, shape in inner.items()}
        for name, (rows, columns) in layers.items():
            named |= {f"{front}{name}.weight": rand(rows, columns), f"{front}{name}.bias": rand(rows)}
        for j in (1, 2):
            named |= {f"{front}norm{j}.weight": rand(width), f"{front}norm{j}.bias": rand(width)}
            named[f"{front}layer_scale{j}.lambda1"] = rand(width)
    return named


@pytest.mark.parametrize("registers, swiglu", [(0, False), (2, False), (0, True)])
@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_a_dinov2_model_loads(tmp_path, registers, swiglu, prefix):
    named = dinov2(registers=registers, swiglu=swiglu)
    weights.save_state(tmp_path / "model.safetensors", {prefix + name: value for name, value in named.items()})
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "image_size": 56, "patch_size": 14}))
    processor = {"image_mean": [0.5307] * 3, "image_std": [0.2583] * 3, "resample": 3, "do_center_crop": True}
    processor |= {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    vit = weights.load(tmp_path, say=None).eval()
    found = vit.passport.preprocess
    assert found.mean == (0.5307,) * 3 and found.std == (0.2583,) * 3 and found.crop_pct == 56 / 64
    assert vit.num_prefix_tokens == 1 + registers
    qkv = [named[f"encoder.layer.1.attention.attention.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(vit.blocks[1].attn.qkv.weight, torch.cat(qkv))
    assert torch.equal(vit.extras["mask_token"], named["embeddings.mask_token"])
    assert vit.passport.feature.positions == ("timm" if registers else "dinov2")
    assert torch.isfinite(tokens.encode(vit, torch.randn(1, 3, 42, 56)).all).all()


def test_its_numbers_are_those_of_transformers(tmp_path):
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    theirs = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    vit = weights.load(tmp_path, say=None).eval()
    with torch.no_grad():
        assert torch.allclose(tokens.encode(vit, x).all, theirs(x).last_hidden_state, atol=1e-5)


def test_a_part_of_the_attention_is_missing(tmp_path):
    named = dinov2()
    del named["encoder.layer.0.attention.attention.key.weight"]
    weights.save_state(tmp_path / "model.safetensors", named)
    with pytest.raises(WeightsError, match=r"key\.weight is not"):
        weights.load(tmp_path / "model.safetensors", arch_kwargs={"num_heads": 2}, say=None)
