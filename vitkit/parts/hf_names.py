"""Hugging Face's Dinov2Model (with registers or without) in the names of facebookresearch/dinov2, and its preprocessing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitkit.errors import WeightsError

HF_ANCHOR = "embeddings.patch_embeddings.projection.weight"
_FIXED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_IN_BLOCK = (
    ("attention.output.dense.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in.", "mlp.w12."),
    ("mlp.weights_out.", "mlp.w3."),
)
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_QKV = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)")
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def prefix_of(names: Mapping[str, Tensor]) -> str | None:
    """What stands in front of a Dinov2Model's names; None when the file holds none."""
    for name in names:
        if name == HF_ANCHOR or name.endswith("." + HF_ANCHOR):
            prefix = name.removesuffix(HF_ANCHOR)
            if f"{prefix}encoder.layer.0.layer_scale1.lambda1" in names:
                return prefix
    return None


def to_dinov2(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors by the authors' names: query, key and value stacked in that order; others (heads) keep theirs."""
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        inner = name.removeprefix(prefix)
        layer = _LAYER.fullmatch(inner)
        if inner in _FIXED:
            named[_FIXED[inner]] = value
        elif layer is None:
            named[name] = value
        elif (part := _QKV.fullmatch(layer[2])) is not None:
            if part[1] == "query":
                three = [name.replace(".query.", f".{which}.") for which in ("query", "key", "value")]
                absent = [one for one in three if one not in tensors]
                if absent:
                    raise WeightsError(f"{name} is there but {absent[0]} is not", fix="use the complete checkpoint")
                named[f"blocks.{layer[1]}.attn.qkv.{part[2]}"] = torch.cat([tensors[one] for one in three])
        else:
            rest = layer[2]
            for theirs, ours in _IN_BLOCK:
                rest = rest.replace(theirs, ours)
            named[f"blocks.{layer[1]}.{rest}"] = value
    return named


def processor_pixels(content: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing from a preprocessor_config.json: mean, std, interpolation and crop; what it leaves out is left out."""
    found: dict[str, Any] = {}
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if isinstance(content.get(theirs), list):
            found[ours] = tuple(content[theirs])
    if content.get("resample") in _FILTERS:
        found["interpolation"] = _FILTERS[content["resample"]]
    size, crop = content.get("size"), content.get("crop_size")
    short = size.get("shortest_edge") if isinstance(size, Mapping) else size
    side = crop.get("height") if isinstance(crop, Mapping) else crop
    if content.get("do_center_crop") and isinstance(short, int) and isinstance(side, int) and 0 < side <= short:
        found["crop_pct"] = side / short
    return found if {"mean", "std"} <= set(found) else {}
