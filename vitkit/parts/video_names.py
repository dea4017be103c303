"""Names of VideoMAE's blocks and timm's: biases of queries and values apart, layer scale, cosine attention's scale."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_GAMMA = re.compile(r"\.gamma_([12])$")
_LAYER_SCALE = re.compile(r"\.ls([12])\.gamma$")


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors of blocks by timm's names. The key bias is zero; with cosine attention, where it would matter,
    there is none (vitkit.parts.cosine_attention)."""
    cosine = any(name.endswith("attn.scale") for name in tensors)
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("attn.scale"):
            named[name.removesuffix("scale") + "q_norm.scale"] = value.flatten()
        elif name.endswith(("attn.q_bias", "attn.v_bias")) and cosine:
            named[re.sub(r"attn\.([qv])_bias$", r"attn.qkv.\1_bias", name)] = value
        elif name.endswith("attn.q_bias"):
            v_bias = tensors[name.replace("q_bias", "v_bias")]
            named[name.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v_bias])
        elif not name.endswith("attn.v_bias"):
            named[_GAMMA.sub(r".ls\1.gamma", name)] = value
    return named


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_timm`. A key bias that training moved is left out: attention does not depend on it."""
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("attn.q_norm.scale"):
            named[name.replace("q_norm.scale", "scale")] = value.view(-1, 1, 1)
        elif name.endswith("attn.qkv.bias"):
            named[name.replace("qkv.bias", "q_bias")], _, named[name.replace("qkv.bias", "v_bias")] = value.chunk(3)
        else:
            name = re.sub(r"attn\.qkv\.([qv])_bias$", r"attn.\1_bias", name)
            named[_LAYER_SCALE.sub(r".gamma_\1", name)] = value
    return named
