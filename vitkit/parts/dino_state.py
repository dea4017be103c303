"""What a DINOv2 method is made of and keeps: frozen copies, released heads, official names.

Official names (SSLMetaArch): `student.backbone.*`, `student.dino_head.*`, `student.ibot_head.*`, the same under `teacher.`,
`dino_loss.center`, `ibot_patch_loss.center`. Backbones are read by `vitkit.layouts`, which knows their variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.parts.dino_groups import trains_in
from vitkit.parts.dino_head import DINOHead, head_from

HEADS = ("dino_head", "ibot_head")
CENTERS = {"dino_center": "dino_loss.center", "ibot_center": "ibot_patch_loss.center"}


@dataclass
class Given:
    """What a checkpoint brings beside its backbone: heads, mask token and centres, and sentences about them."""

    heads: dict[str, DINOHead] = field(default_factory=dict)
    mask_token: Tensor | None = None
    centers: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def given(vit: nn.Module, file: str | None) -> Given:
    """Heads from `file`, else those beside the backbone in its checkpoint (`vit.extras`)."""
    extras: Mapping[str, Tensor] = getattr(vit, "extras", {})
    found = Given()
    for name in HEADS:
        inside = {n.removeprefix(f"{name}."): v for n, v in extras.items() if n.startswith(f"{name}.")}
        if inside and file is None:
            found.heads[name] = _fitting(head_from(inside, f"{name} of the checkpoint"), vit, name)
            found.notes.append(f"{name} goes on from the checkpoint ({found.heads[name].prototypes} prototypes)")
    if file is not None:
        from vitkit.parts.statefiles import read_state

        if not Path(file).is_file():
            raise WeightsError(f"heads: {file} does not exist", fix="a file such as RAD-DINO's dino_head.safetensors")
        tensors = {n.removeprefix("dino_head."): v.float() for n, v in read_state(Path(file))[0].items()}
        found.heads["dino_head"] = _fitting(head_from(tensors, file), vit, file)
        found.notes.append(f"dino_head goes on from {file} ({found.heads['dino_head'].prototypes} prototypes)")
    token = extras.get("mask_token")
    if token is not None and token.numel() == vit.embed_dim:  # type: ignore[operator]  # a method's ViT has it
        found.mask_token = token.reshape(1, -1)
    found.centers = {own: extras[theirs] for own, theirs in CENTERS.items() if theirs in extras and found.heads}
    return found


def heads(vit: Any, settings: Any, found: Given) -> tuple[DINOHead, DINOHead | None]:
    """The image's head and, where they have one of their own, the patches': a checkpoint's, or new ones."""

    def new(prototypes: int) -> DINOHead:
        s = settings
        sizes = {"hidden_dim": s.head_hidden, "bottleneck_dim": s.bottleneck_dim, "layers": s.head_layers}
        return DINOHead(vit.embed_dim, prototypes, **sizes)

    image = found.heads.get("dino_head") or new(settings.prototypes)
    if not settings.ibot_head and "ibot_head" not in found.heads:
        return image, None
    count = settings.prototypes if settings.ibot_prototypes == "auto" else settings.ibot_prototypes
    return image, found.heads.get("ibot_head") or new(count)


def _fitting(head: DINOHead, vit: Any, what: str) -> DINOHead:
    first = head.mlp if isinstance(head.mlp, nn.Linear) else head.mlp[0]
    if first.in_features != vit.embed_dim:
        raise WeightsError(
            f"{what} is for a backbone {first.in_features} wide, and this one is {vit.embed_dim}",
            fix="heads and backbone of one checkpoint",
        )
    return head


@torch.no_grad()
def fill(method: Any, found: Given) -> None:
    """Mask token and centres of a checkpoint into a method whose heads already are the checkpoint's."""
    if found.mask_token is not None:
        method.mask_token.copy_(found.mask_token)
    for name, value in found.centers.items():
        if value.numel() == getattr(method, name).numel():
            getattr(method, name).copy_(value.view_as(getattr(method, name)))


def is_released(vit: nn.Module) -> bool:
    """Whether a ViT has weights worth guarding: anything but random ones."""
    passport = getattr(vit, "passport", None)
    return passport is not None and passport.base.get("kind") not in (None, "random")


def require(settings: Any, images: int, batch_size: int, world: int) -> None:
    """Raise where a run could not learn: one image, or too few in a step for what its losses compare."""
    step = min(batch_size * world, images)
    if images < 2:
        raise DataError(
            f"{images} training image: the loss compares images with each other",
            fix="a folder of many images (hundreds to begin with)",
        )
    if settings.koleo_weight and step // world < 2:
        raise ConfigError(
            f"batch_size {batch_size}: KoLeo needs the nearest other image of a batch, and there is none",
            fix="batch_size of 2 or more a process (64 or more to learn well), or koleo_weight=0",
        )
    if settings.centering == "sinkhorn_knopp" and step < 4:
        raise ConfigError(
            f"{step} images a step are too few for Sinkhorn, which shares {settings.prototypes:,} prototypes among them",
            fix="batch_size of 4 or more (64 or more to learn well), or centering=centering",
        )


def wants_guard(vit: nn.Module, settings: Any, found: Given) -> bool:
    """As asked; on its own, for released weights without heads."""
    return is_released(vit) and not found.heads if settings.guard == "auto" else bool(settings.guard)


def frozen(module: Any) -> Any:
    """A copy in evaluation mode that never trains."""
    return deepcopy(module).requires_grad_(False).eval()


def unfreeze(vit: nn.Module, settings: Any) -> None:
    """Let only what the settings name train: all, the last blocks and the final norm, or low-rank updates."""
    if settings.unfreeze == "all":
        return
    if settings.unfreeze == "lora":
        from vitkit.adapt import lora

        lora.inject(vit, lora.Settings(rank=settings.lora_rank, alpha=2.0 * settings.lora_rank))
        for name, parameter in vit.named_parameters():
            parameter.requires_grad_(lora.trains(name))
        return
    depth = len(vit.blocks)  # type: ignore[arg-type]
    if int(settings.unfreeze) > depth:
        raise ConfigError(
            f"unfreeze is {settings.unfreeze} blocks, and the ViT has {depth}", fix=f"1 to {depth}, or all"
        )
    names = trains_in(vit, int(settings.unfreeze))
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(name in names)


def leave_unused_out(vit: nn.Module) -> None:
    """What only pools or classifies gets no gradient here."""
    dense = isinstance(vit.norm, nn.Identity)  # then fc_norm makes the tokens' features
    for name, parameter in vit.named_parameters():
        if name.startswith(("head", "attn_pool.")) or (name.startswith("fc_norm.") and not dense):
            parameter.requires_grad_(False)


def pairs(method: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(teacher's, student's) tensors that differ over training, in one order."""
    teacher: list[Tensor] = []
    student: list[Tensor] = []
    for own, theirs in (
        (method.vit, method.teacher),
        (method.dino_head, method.teacher_dino_head),
        (method.ibot_head, method.teacher_ibot_head),
    ):
        if own is None:
            continue
        copies = dict(theirs.named_parameters())
        for name, parameter in own.named_parameters():
            if parameter.requires_grad:
                student.append(parameter.detach())
                teacher.append(copies[name])
    return teacher, student


def plain(vit: nn.Module) -> nn.Module:
    """A trained backbone as timm has it: low-rank updates merged."""
    from vitkit.adapt import lora
    from vitkit.parts.blocks import restore_qkv_biases

    if any("lora_" in name for name, _ in vit.named_parameters()):
        lora.merge(vit)
        restore_qkv_biases(vit)
    return vit


def official_extras(method: Any) -> dict[str, Tensor]:
    found = {f"dino_head.{n}": v for n, v in method.teacher_dino_head.state_dict().items()}
    if method.teacher_ibot_head is not None:
        found |= {f"ibot_head.{n}": v for n, v in method.teacher_ibot_head.state_dict().items()}
    found["mask_token"] = method.mask_token.detach()
    return found | {theirs: getattr(method, own) for own, theirs in CENTERS.items()}


@torch.no_grad()
def load_official(method: Any, tensors: Mapping[str, Tensor]) -> None:
    """Into a method of the same sizes; raises WeightsError naming what is missing."""
    from vitkit import layouts

    for side, vit in (("student", method.vit), ("teacher", method.teacher)):
        backbone = _under(tensors, f"{side}.backbone.")
        reading = layouts.read(backbone)
        own = {name: value for name, value in vit.state_dict().items() if not name.startswith("head")}
        missing = sorted(set(own) - set(reading.vit))
        if missing:
            raise WeightsError(
                f"{side}.backbone lacks {len(missing)} tensors, e.g. {missing[0]}", fix="the whole state"
            )
        vit.load_state_dict(reading.vit, strict=False)
        if side == "student" and "mask_token" in reading.extras:
            method.mask_token.copy_(reading.extras["mask_token"].reshape(1, -1))
        for name in HEADS:
            head = getattr(method, name if side == "student" else f"teacher_{name}")
            if head is not None:
                head.load_state_dict(_under(tensors, f"{side}.{name}."))
    for own_name, theirs in CENTERS.items():
        if theirs in tensors:
            getattr(method, own_name).copy_(tensors[theirs].view_as(getattr(method, own_name)))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not found:
        raise WeightsError(f"no tensor is called {prefix}*", fix="the state of a DINOv2 training run")
    return found
