"""Meta's DINOv3 checkpoints as timm's `Eva`: names, the architecture that the tensors prove, and untied final norms.

Official code: facebookresearch/dinov3 @ 6876159a (models/vision_transformer.py). Every tensor has a place:

    storage_tokens -> reg_token        ls1.gamma, ls2.gamma -> gamma_1, gamma_2      mlp.w1, w2, w3 -> fc1_g, fc1_x, fc2
    qkv.bias       -> q_bias, v_bias; the key third is masked by `bias_mask` and must come out as zero. Where keys do
                      have a bias (mask_k_bias off) the fused bias is kept, which is timm's attn_type="rope"
    periods        -> checked: they give the base, the width of a head, and whether they were rounded to bfloat16
    norm, cls_norm -> `UntiedNorm`: one norm for patches, another for the class token and registers
    mask_token and local_cls_norm (training on local crops only) are put aside
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from vitkit.errors import ConfigError, WeightsError
from vitkit.parts.blocks import Steps, mix_into
from vitkit.parts.configs import mlp_ratio

Tensors = dict[str, Tensor]
PERIODS = "rope_embed.periods"
_BASES = (
    100.0,
    10000.0,
)  # bases in use: the one that gives the recorded periods exactly is taken, else it is solved for
_NORM_EPS = {"layernorm": 1e-6, "layernormbf16": 1e-5}
_KEYS = {"n_storage_tokens": "reg_tokens", "layerscale_init": "init_values", "pos_embed_rope_base": "rope_temperature"}
_SHAPES_TELL = ("ffn_ratio", "ffn_layer", "ffn_bias", "proj_bias", "mask_k_bias", "untie_cls_and_patch_norms")
_TRAINING = ("drop_path_rate", "untie_global_and_local_cls_norm", "pos_embed_rope_shift_coords")
_TRAINING += ("pos_embed_rope_jitter_coords", "pos_embed_rope_rescale_coords", "pos_embed_rope_dtype", "device")


def is_dinov3(names: Mapping[str, Any]) -> bool:
    """Whether these names are Meta's: timm keeps neither storage tokens nor rotary periods."""
    return "storage_tokens" in names or PERIODS in names


def to_timm(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors, dict[str, Any], list[str]]:
    """-> trunk by timm's names, tensors put aside, hints ("rotary", "rope"), notes for the user."""
    if "blocks.0.norm1.bias" not in tensors:
        raise WeightsError("this DINOv3 has norms without bias (rmsnorm)", fix="only LayerNorm models are built here")
    extras = {n: v for n, v in tensors.items() if n == "mask_token" or n.startswith("local_cls_norm.")}
    notes, vit = [], {}
    keys_biased, never_set = _biases(tensors, vit)
    if never_set:
        notes.append(f"{never_set} key-bias masks were never initialised: keys are taken to have no bias, as masked")
    for name, value in tensors.items():
        if name in extras or name == PERIODS or name.endswith((".qkv.bias", ".qkv.bias_mask")):
            continue
        vit[_NAMES.sub(lambda found: _RENAMED[found[0]], name)] = value
    for index in {int(name.split(".")[1]) for name in vit if name.startswith("blocks.")}:
        for layer in ("attn.proj", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"):  # timm always has these biases
            weight = vit.get(f"blocks.{index}.{layer}.weight")
            if weight is not None and f"blocks.{index}.{layer}.bias" not in vit:
                vit[f"blocks.{index}.{layer}.bias"] = weight.new_zeros(weight.shape[0])
    if "local_cls_norm.weight" in extras:
        notes.append("its norm for local crops is used in training only and kept aside")
    periods = tensors.get(PERIODS)
    if periods is None:
        raise WeightsError(f"the file has storage tokens but no {PERIODS}", fix="use the complete checkpoint")
    base, rope = _base(periods)
    if rope == "bfloat16":
        notes.append("its rotary periods were rounded to bfloat16; they are kept so")
    rotary = {"rope_temperature": base, "head_dim": 4 * len(periods), "attn_type": "rope" if keys_biased else "eva"}
    return vit, extras, {"rotary": rotary, "rope": rope}, notes


def _biases(tensors: Mapping[str, Tensor], vit: Tensors) -> tuple[bool, int]:
    """Put every qkv bias into `vit`; -> whether keys have one, how many masks are NaN (created, never initialised)."""
    found, never_set = {}, 0
    for name, bias in tensors.items():
        if not name.endswith(".qkv.bias"):
            continue
        mask = tensors.get(f"{name}_mask")
        if mask is not None and mask.isnan().any():
            mask, never_set = torch.ones_like(mask), never_set + 1
            mask[len(mask) // 3 : 2 * len(mask) // 3] = 0
        found[name] = bias if mask is None else bias * mask
    keys_biased = any(bool(bias.chunk(3)[1].any()) for bias in found.values())
    for name, bias in found.items():
        if keys_biased:
            vit[name] = bias
        else:
            q, _, v = bias.chunk(3)
            vit[name.replace("qkv.bias", "q_bias")], vit[name.replace("qkv.bias", "v_bias")] = q.clone(), v.clone()
    return keys_biased, never_set


def _base(periods: Tensor) -> tuple[float, str]:
    """The base of recorded periods base^(2j / (d / 2)), j = 0..d/4-1, and the precision that they were kept in."""
    count, given = len(periods), periods.float()
    steps = 2.0 * torch.arange(count, dtype=torch.float32) / (2 * count)
    guess = float(given[-1]) ** (1 / float(steps[-1])) if count > 1 and float(given[-1]) > 0 else _BASES[0]
    for base in (*_BASES, float(round(guess)), guess):
        exact = base**steps
        if torch.allclose(given, exact, rtol=1e-6, atol=0):
            return base, "float32"
        if torch.equal(given, exact.bfloat16().float()):
            return base, "bfloat16"
    raise WeightsError(
        f"the rotary periods {[round(p, 4) for p in given.tolist()[:4]]} do not follow from a base",
        fix="models with min_period and max_period are not built here",
    )


def facts(vit: Mapping[str, Tensor], hints: Mapping[str, Any], img_size: list[int] | None) -> dict[str, Any]:
    """Keywords of timm's `Eva` that the tensors prove. What they cannot tell: the eps of the norms (1e-5 as in every
    released model unless a config says otherwise) and the native image size (about 256 px)."""
    patch, rotary = vit["patch_embed.proj.weight"], hints["rotary"]
    width, sides = patch.shape[0], [int(side) for side in patch.shape[2:]]
    if width % rotary["head_dim"]:
        raise WeightsError(
            f"rotary periods for heads {rotary['head_dim']} wide do not fit a width of {width}",
            fix="use the periods that belong to these weights",
        )
    gated = "blocks.0.mlp.fc1_g.weight" in vit
    hidden = vit["blocks.0.mlp.fc1_g.weight" if gated else "blocks.0.mlp.fc1.weight"].shape[0]
    found: dict[str, Any] = {
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in vit if re.match(r"blocks\.\d+\.", name)),
        "num_heads": width // rotary["head_dim"],
        "patch_size": sides,
        "in_chans": patch.shape[1],
        "mlp_ratio": mlp_ratio(hidden, width),
        "qkv_bias": rotary["attn_type"] == "rope" or "blocks.0.attn.q_bias" in vit,
        "class_token": True,
        "reg_tokens": vit["reg_token"].shape[1] if "reg_token" in vit else 0,
        "norm_eps": 1e-5,
        "img_size": img_size or [max(1, 256 // side) * side for side in sides],
        "attn_type": rotary["attn_type"],
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": rotary["rope_temperature"],
        "rope_rotate_half": True,
        "global_pool": "token",
        "fc_norm": False,
    }
    if gated:
        found |= {"swiglu_mlp": True, "swiglu_align_to": 1}  # 1: the hidden width is exactly as the ratio gives it
    if "blocks.0.gamma_1" in vit:
        found["init_values"] = 1e-5
    if "norm.prefix.weight" in vit:
        found["untied_norms"] = True
    return found


def config(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Meta's keywords of DinoVisionTransformer in timm's words; raises WeightsError for what timm's model is not."""
    flat = dict(content)
    for key, only in (("pos_embed_rope_normalize_coords", "separate"), ("pos_embed_rope_min_period", None)):
        if flat.pop(key, only) != only:
            raise WeightsError(f"{where}: {key} is {content[key]!r}", fix=f"only {only!r} is built here")
    flat.pop("pos_embed_rope_max_period", None)
    for key in (*_SHAPES_TELL, *_TRAINING):
        flat.pop(key, None)
    norm = flat.pop("norm_layer", None)
    if norm is not None:
        if norm not in _NORM_EPS:
            raise WeightsError(f"{where}: norm_layer is {norm!r}", fix=f"one of {', '.join(_NORM_EPS)}")
        flat["norm_eps"] = _NORM_EPS[norm]
    return {_KEYS.get(key, key): value for key, value in flat.items()}


class UntiedNorm(LayerNorm):
    """A final norm for patches (its own weight and bias) and another, `prefix`, for the first `count` tokens."""

    def __init__(self, dim: int, count: int, eps: float):
        super().__init__(dim, eps=eps)
        self.prefix = LayerNorm(dim, eps=eps)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:  # (B, count + N, D)
        return torch.cat([self.prefix(x[:, : self.count]), super().forward(x[:, self.count :])], dim=1)


class UntiedNorms:
    """Mixin of a ViT with an `UntiedNorm`. Learned tokens that run along in front would be taken for its prefix, so they
    are refused rather than silently normalised by the wrong norm."""

    def _pos_embed(self, x: Tensor) -> Any:
        if isinstance(self.norm, UntiedNorm):  # type: ignore[attr-defined]  # pooling=avg takes it away
            entering = any(isinstance(b, Steps) and type(b).entering is not Steps.entering for b in self.blocks)  # type: ignore[attr-defined]
            if entering or hasattr(self, "front_prompts"):
                raise ConfigError(
                    "prompts that run along with the tokens do not go with this ViT's separate norms for class token and "
                    "patches",
                    fix="VPT, whose prompts stay inside a block, or an adapter",
                )
        return super()._pos_embed(x)  # type: ignore[misc]


def untie(vit: nn.Module) -> nn.Module:
    """Give a ViT's final norm a second set of weights for its prefix tokens."""
    old = vit.norm
    if not isinstance(old, nn.LayerNorm):
        raise WeightsError("untied_norms needs a final LayerNorm", fix="global_pool=token, fc_norm=False")
    vit.norm = UntiedNorm(math.prod(old.normalized_shape), vit.num_prefix_tokens, old.eps)
    mix_into(vit, UntiedNorms)
    return vit


_RENAMED = {
    "storage_tokens": "reg_token",
    ".ls1.gamma": ".gamma_1",
    ".ls2.gamma": ".gamma_2",
    ".mlp.w1.": ".mlp.fc1_g.",
    ".mlp.w2.": ".mlp.fc1_x.",
    ".mlp.w3.": ".mlp.fc2.",
    "cls_norm.": "norm.prefix.",
}
_NAMES = re.compile(r"^storage_tokens$|\.ls[12]\.gamma$|\.mlp\.w[123]\.|^cls_norm\.")
