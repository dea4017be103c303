"""Parameter groups and optimisers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def weight_decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices are decayed, 1-D parameters and biases are not (MAE's rule)."""
    decay, rest = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            (rest if parameter.ndim <= 1 or name.endswith(".bias") else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def layer_id(name: str, depth: int) -> int:
    """Distance from the input for layer-wise decay: 0 embeddings, i + 1 block i, depth + 1 everything after.

    Source: util/lr_decay.py of facebookresearch/mae.
    """
    if name in ("cls_token", "dist_token", "reg_token", "pos_embed") or name.startswith(("patch_embed", "norm_pre")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_decay_groups(vit: nn.Module, *, weight_decay: float, layer_decay: float, prefix: str = "") -> list[dict]:
    """One group per (layer, decayed or not) with `lr_scale` = layer_decay ** (depth + 1 - layer); names kept in "names".

    No weight decay on 1-D parameters, position tables and class token (timm's `no_weight_decay`).
    """
    depth = len(vit.blocks)
    exempt = set(vit.no_weight_decay()) if hasattr(vit, "no_weight_decay") else set()
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in vit.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_id(name, depth)
        decayed = parameter.ndim > 1 and name not in exempt
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "names": [],
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(prefix + name)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise trust ratios for matrices, as MAE's linear probe uses it (util/lars.py).

    For parameters with more than one axis: d = g + wd p, then d *= trust |p| / |d| where both norms are positive.
    1-D parameters get neither decay nor trust ratio. mu = momentum mu + d; p -= lr mu.
    """

    def __init__(
        self,
        params: Iterable,
        *,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    size, step = p.norm(), update.norm()
                    trust = torch.where((size > 0) & (step > 0), group["trust_coefficient"] * size / step, 1.0)
                    update = update * trust
                momentum = self.state[p].setdefault("mu", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(update)
                p.add_(momentum, alpha=-group["lr"])
        return loss


def build_optimizer(
    groups: list[dict[str, Any]],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """`name` is "adamw", "sgd" or "lars". `weight_decay` comes with the groups; their `lr_scale` is applied per step."""
    clean = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    for group in clean:
        group.setdefault("lr_scale", 1.0)
    if name == "adamw":
        return torch.optim.AdamW(clean, lr=lr, betas=betas, fused=True)
    if name == "sgd":
        return torch.optim.SGD(clean, lr=lr, momentum=momentum)
    return LARS(clean, lr=lr, momentum=momentum)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
