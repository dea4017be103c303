"""What configs say about a ViT: timm's config.json, flat keywords, and the arguments that authors' scripts saved."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vitkit.errors import WeightsError, nearest

BARE = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
_ZOO = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
_ZOO["huge"] = (1280, 32, 16)
_SYNONYMS = {
    "image_size": "img_size",
    "in_channels": "in_chans",
    "num_channels": "in_chans",
    "layer_norm_eps": "norm_eps",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_register_tokens": "reg_tokens",
    "num_reg_tokens": "reg_tokens",
    "activation": "act_layer",
    "use_fc_norm": "fc_norm",
    "license": "licence",
    "label_names": "classes",
}
PIXELS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "window", "spacing", "frame_stride")
# Kept for callers (a decoder's heads are not in its shapes); they say nothing about the trunk.
_OTHER: tuple[str, ...] = (
    "decoder_embed_dim",
    "decoder_depth",
    "decoder_num_heads",
    "norm_pix_loss",
    "mask_ratio",
    "num_classes",
)
_OTHER += ("classes", "task", "licence")
_EXTRA_KEYS = ("norm_eps", "mlp_layer", "act_layer", "attn_layer", "untied_norms", "kind")


@dataclass
class Said:
    """What a config says: `arch` a timm name or bare class (or None), `kwargs` canonical constructor keywords, `pixels`
    about preprocessing, `other` for callers, `unused` keys that mean nothing here."""

    where: str = ""
    arch: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    pixels: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    timm: bool = False  # written by timm, so timm's rules apply
    zoo: bool = False  # keywords from an author's model name, which MoCo v3 uses with other heads


def parse_config(content: Mapping[str, Any], where: str, *, strict: bool = False) -> Said:
    """Read a config.json (timm's or flat) or a dict of keywords. `strict`: an unknown key raises WeightsError."""
    said = Said(where)
    flat = dict(content)
    pretrained = flat.pop("pretrained_cfg", None)
    if isinstance(pretrained, Mapping):
        said.timm = True
        keep = (*PIXELS, "license")
        flat = {**{k: pretrained[k] for k in keep if pretrained.get(k) is not None}, **flat}
        size = pretrained.get("input_size")
        if size is not None:
            said.pixels["image_size"] = [int(size[1]), int(size[2])]
        flat.pop("num_features", None)
    flat.update(flat.pop("model_args", None) or {})
    if "n_storage_tokens" in flat:
        from vitkit.parts import dinov3

        flat = dinov3.config(flat, where)
    name = flat.pop("architecture", None) or flat.pop("arch", None)
    if isinstance(name, str):
        said.arch = known_arch(name)
        if said.arch is None:
            said.unused.append("architecture")
    for key, value in flat.items():
        key = _SYNONYMS.get(key, key)
        if key in PIXELS:
            said.pixels[key] = value
        elif key in _OTHER:
            said.other[key] = value
        elif key in _keywords():
            said.kwargs |= _canonical(key, value, where)
        elif key == "mlp_dim" or key == "intermediate_size":
            said.kwargs["mlp_hidden"] = int(value)
        elif strict:
            close = nearest(key, [*_keywords(), *_SYNONYMS])
            raise WeightsError(
                f"{where}: unknown key {key!r}",
                fix=f"did you mean {close[0]!r}?" if close else "keywords of timm's VisionTransformer",
            )
        else:
            said.unused.append(key)
    hidden = said.kwargs.pop("mlp_hidden", None)
    if hidden is not None and "embed_dim" in said.kwargs:
        said.kwargs["mlp_ratio"] = mlp_ratio(hidden, said.kwargs["embed_dim"])
    return said


def parse_args(args: Mapping[str, Any], where: str) -> Said:
    """What an author's training script saved about itself: `args.model` or `args.arch` in the names of MAE, the thorax
    fork, AdaptFormer, DeiT, DINO or timm. Training settings are ignored."""
    said = Said(where)
    said.other = {key: args[key] for key in ("norm_pix_loss", "mask_ratio") if key in args}
    for key in ("model", "arch", "model_name"):
        name = args.get(key)
        if not isinstance(name, str):
            continue
        zoo = zoo_model(name)
        if zoo is not None:
            said.where = f"{where} ({key}={name})"
            said.zoo, said.kwargs = True, {k: v for k, v in zoo.items() if not k.startswith("decoder")}
            said.other |= {k: v for k, v in zoo.items() if k.startswith("decoder")}
            return said
        said.arch = known_arch(name)
        if said.arch is not None:
            said.where = f"{where} ({key}={name})"
            return said
    return said


def zoo_model(name: str) -> dict[str, Any] | None:
    """Keywords of a model of MAE's zoo and its forks by its official name, e.g. `mae_vit_small_patch16_dec512d2b_448`,
    `mae_vit_huge_patch14`, `vit_base_patch16`, DINO's `vit_small`. None for other names."""
    found = re.fullmatch(r"mae_vit_(\w+?)_patch(\d+)(?:_dec(\d+)d(\d+)b)?(?:_(\d+))?", name)
    if found and found[1] in _ZOO:
        width, depth, heads = _ZOO[found[1]]
        decoder = {"decoder_embed_dim": int(found[3] or 512), "decoder_depth": int(found[4] or 8)}
        trunk = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": [int(found[2])] * 2}
        return trunk | decoder | {"decoder_num_heads": 16}
    found = re.fullmatch(r"(?:vit|deit)_(\w+?)(?:_patch(\d+))?", name)
    if found and found[1] in _ZOO:
        width, depth, heads = _ZOO[found[1]]
        trunk = {"embed_dim": width, "depth": depth, "num_heads": heads}
        return trunk | ({"patch_size": [int(found[2])] * 2} if found[2] else {})
    return None


def known_arch(name: str) -> str | None:
    """`name` as timm or this module can build it (without a "timm/" in front), or None."""
    name = name.removeprefix("timm/")
    return name if name in BARE or zoo().is_model(name.split(".")[0]) else None


def zoo() -> Any:
    """timm, with the models registered that it does not have (vitkit.backbones)."""
    import timm

    import vitkit.backbones  # noqa: F401  # its import registers them

    return timm


def mlp_ratio(hidden: int, width: int) -> float:
    """A ratio for which timm's int(width * ratio) is `hidden` exactly, whole or plain where possible."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


@lru_cache(maxsize=1)
def _keywords() -> frozenset[str]:
    """Every architecture keyword that a config may hold: those of timm's two classes, without drop rates and factories."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    names = {name for c in (VisionTransformer, Eva) for name in inspect.signature(c.__init__).parameters}
    factories = {name for name in names if name.endswith(("_layer", "_fn", "_rate"))}
    ours = {"self", "device", "dtype", "num_classes", "dynamic_img_size", "weight_init", "fix_init"}
    return frozenset((names - factories - ours) | set(_EXTRA_KEYS))


def _canonical(key: str, value: Any, where: str) -> dict[str, Any]:
    """One keyword in canonical JSON form: sizes as [height, width], MAE's boolean `global_pool` in timm's words."""
    if key in ("img_size", "patch_size"):
        sides = [value, value] if isinstance(value, int) else list(value) if isinstance(value, list | tuple) else []
        if len(sides) not in (2, 3) or not all(isinstance(side, int) and side > 0 for side in sides):
            fix = "a number of pixels, [height, width], or three sides for volumes and videos"
            raise WeightsError(f"{where}: {key} is {value!r}", fix=fix)
        return {key: sides}
    if key == "global_pool" and isinstance(value, bool):
        return {"global_pool": "avg", "fc_norm": True} if value else {"global_pool": "token", "fc_norm": False}
    if key == "kind" and value not in ("image", "volume", "video"):
        raise WeightsError(f"{where}: kind is {value!r}", fix="image, volume or video")
    if key == "act_layer" and isinstance(value, str):
        return {key: value.lower()}
    if key == "init_values" and not value:
        return {}
    return {key: value}
