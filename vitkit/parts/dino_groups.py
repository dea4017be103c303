"""Parameter groups of DINOv2: layer-wise learning rates, what is decayed, and which prototypes are held at first.

Source: DINOv2, utils/param_groups.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_FIRST = ("pos_embed", "patch_embed", "mask_token", "cls_token", "reg_token", "dist_token")


def multipliers(
    name: str, depth: int, *, layer_decay: float, patch_embed_lr: float, backbone_lr: float = 1.0
) -> tuple[float, float, bool]:
    """(learning-rate factor, weight-decay factor, is a last layer) of a parameter by its name in a `DINOv2` module."""
    trunk = name.startswith("vit.") or name == "mask_token"
    rate = backbone_lr if trunk else 1.0
    if trunk:
        layer = depth + 1
        if any(part in name for part in _FIRST):
            layer = 0
        elif ".blocks." in name:
            layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
        rate *= layer_decay ** (depth + 1 - layer)
        rate *= patch_embed_lr if "patch_embed" in name else 1.0
    plain = name.endswith(".bias") or "norm" in name or "gamma" in name
    return rate, 0.0 if plain else 1.0, "last_layer" in name


def parameter_groups(
    method: Any, weight_decay: float, *, layer_decay: float, patch_embed_lr: float, backbone_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters of equal treatment together. A group has "lr_scale", "decay" (weight decay at the start of its
    schedule), "last_layer", "trunk", and "names"."""
    depth = len(method.vit.blocks)
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, decay, last = multipliers(
            name, depth, layer_decay=layer_decay, patch_embed_lr=patch_embed_lr, backbone_lr=backbone_lr
        )
        trunk = name.startswith("vit.") or name == "mask_token"
        key = (rate, decay, last, trunk)
        fresh = {"params": [], "names": [], "lr_scale": rate, "decay": decay * weight_decay, "last_layer": last}
        group = groups.setdefault(key, {**fresh, "trunk": trunk, "weight_decay": decay * weight_decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def trains_in(vit: nn.Module, last: int) -> set[str]:
    """Names of the parameters of the last `last` blocks and of the final norm."""
    first = len(vit.blocks) - last
    found = set()
    for name, _ in vit.named_parameters():
        inside = name.startswith("blocks.") and int(name.split(".")[1]) >= first
        if inside or name.startswith(("norm.", "fc_norm.")):
            found.add(name)
    return found
