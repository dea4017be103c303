"""Fitting pre-trained tensors to other channels, patch sizes and grids: each rule stated, none applied silently."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitkit.backbones.embed3d import PatchEmbed3d
from vitkit.errors import WeightsError
from vitkit.parts.positions import resample_positions
from vitkit.passport import Preprocess
from vitkit.tokens import kind_of

ViT = Any  # a timm VisionTransformer or Eva: torch's own types say nothing about a module's attributes


@dataclass(frozen=True)
class Geometry:
    """What a caller asks the native input to be; None leaves it as the weights have it. Sizes as (height, width), or with
    three sides for volumes and videos; one number is the side of a square, a cube, or of a video's frames."""

    image_size: int | Sequence[int] | None = None
    in_chans: int | None = None
    patch_size: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if value is not None:
                sides = (value,) if isinstance(value, int) else tuple(value)
                if len(sides) > 3 or not sides or not all(isinstance(side, int) and side > 0 for side in sides):
                    fix = "a number of pixels, (height, width), or three sides for volumes and videos"
                    raise WeightsError(f"{name} is {value!r}", fix=fix)
                object.__setattr__(self, name, sides)
        if self.in_chans is not None and self.in_chans < 1:
            raise WeightsError(f"in_chans is {self.in_chans}", fix="at least 1")

    def given(self) -> dict[str, Any]:
        """Only what was asked, as JSON types."""
        asked = {name: getattr(self, name) for name in ("image_size", "in_chans", "patch_size")}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asked.items() if v is not None}

    def changes(self, native: ViT) -> dict[str, Any]:
        """Constructor keywords that differ from those of `native`. Raises WeightsError for impossible sizes."""
        embed = native.patch_embed
        own_patch = tuple(getattr(embed, "patch_size", None) or ())
        own_size = tuple(embed.img_size)
        changed: dict[str, Any] = {}
        asked_patch = self._sides("patch_size", own_patch, native)
        if asked_patch is not None and asked_patch != own_patch:
            if not _plain(native):
                raise WeightsError(
                    f"patch_size={self.patch_size} with a {type(embed).__name__}, whose patches are not one convolution",
                    fix="keep its patch size",
                )
            changed["patch_size"] = [*asked_patch]
        if self.in_chans is not None and self.in_chans != native.in_chans:
            changed["in_chans"] = self.in_chans
        size: tuple[int, ...] = self._sides("image_size", own_size, native) or own_size
        patch: tuple[int, ...] = asked_patch or own_patch
        for pixels, step in zip(size, patch, strict=True) if patch else ():
            if pixels % step:
                near = max(step, round(pixels / step) * step)
                raise WeightsError(
                    f"image size {tuple(size)} is not a multiple of the patch size {tuple(patch)}",
                    fix=f"use a multiple, e.g. {near} instead of {pixels}",
                )
        if tuple(size) != own_size:
            changed["img_size"] = list(size)
        return changed

    def _sides(self, name: str, own: tuple[int, ...], native: ViT) -> tuple[int, ...] | None:
        """What was asked, one number a side of the model's input; a single number leaves a video's first axis alone."""
        asked: tuple[int, ...] | None = getattr(self, name)
        axes = len(native.patch_embed.img_size)
        if asked is None or len(asked) == axes:
            return asked
        if len(asked) == 1:
            video = kind_of(native) == "video"
            return (own[0], *asked * (axes - 1)) if video else asked * axes
        raise WeightsError(
            f"{name} is {asked} for a model whose input has {axes} axes", fix=f"one number, or {axes} of them"
        )


def adapt_tensors(
    state: Mapping[str, Tensor], native: ViT, target: ViT, *, rule: str, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Trunk tensors that fit `native`, made to fit `target` (both may be on the meta device)."""
    state = dict(state)
    conv = f"{(getattr(native, 'pretrained_cfg', None) or {}).get('first_conv') or 'patch_embed.proj'}.weight"
    if native.in_chans != target.in_chans:
        state[conv] = adapt_channels(state[conv], target.in_chans)
        say(_channel_words(native.in_chans, target.in_chans))
    old_patch, new_patch = (tuple(getattr(m.patch_embed, "patch_size", None) or ()) for m in (native, target))
    if old_patch != new_patch:
        from timm.layers import resample_patch_embed

        if len(new_patch) == 3:
            raise WeightsError(
                f"the weights have patches of {_x(old_patch)}, not {_x(new_patch)}, and kernels with three axes are not "
                "resized",
                fix="keep the patch size, or pretrained=False",
            )
        state[conv] = resample_patch_embed(state[conv], list(new_patch))
        say(f"patch size {_x(old_patch)} to {_x(new_patch)}: kernel resized by the pseudo-inverse rule (FlexiViT)")
    old_grid, new_grid = tuple(native.patch_embed.grid_size), tuple(target.patch_embed.grid_size)
    if old_grid != new_grid:
        if "pos_embed" in state:
            table = state["pos_embed"]
            prefix = table.shape[1] - math.prod(old_grid)
            state["pos_embed"] = resample_positions(table, new_grid, prefix=prefix, rule=rule, old_grid=old_grid)
            say(f"position table {_x(old_grid)} to {_x(new_grid)}: {_RULE_WORDS[rule]}")
        else:
            say(f"grid {_x(old_grid)} to {_x(new_grid)}: rotary positions follow it, nothing to resample")
    return state


_RULE_WORDS = {
    "timm": "timm's rule (bicubic, antialiased)",
    "mae": "MAE's rule (bicubic, no antialiasing)",
    "dinov2": "DINOv2's rule (bicubic, no antialiasing, scale factor (new + 0.1) / old)",
    "trilinear": "trilinear",
    "video": "bicubic in every time step, then linear along time",
    "rebuild": "a fresh sinusoid",
}


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch kernel (D, C, ...) for `channels` inputs: summed for 1, else repeated and scaled by C / channels."""
    own = weight.shape[1]
    if channels == own:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    times = -(-channels // own)
    repeated = torch.cat([weight] * times, dim=1)[:, :channels]
    return repeated * (own / channels)


def adapt_pixels(pixels: Preprocess, channels: int) -> Preprocess:
    """Mean and std that go with `adapt_channels`: averaged for 1 channel, else repeated in order."""
    own = pixels.in_chans
    if channels == own:
        return pixels

    def fit(values: tuple[float, ...]) -> tuple[float, ...]:
        return (sum(values) / own,) if channels == 1 else tuple(values[i % own] for i in range(channels))

    return replace(pixels, mean=fit(pixels.mean), std=fit(pixels.std), channels="")


def _channel_words(own: int, new: int) -> str:
    if new == 1:
        return f"{own} channels to 1: patch kernel summed over channels, mean and std averaged"
    return f"{own} channels to {new}: patch kernel repeated and scaled by {own}/{new}, mean and std repeated"


def _plain(vit: ViT) -> bool:
    from timm.layers import PatchEmbed

    return type(vit.patch_embed) in (PatchEmbed, PatchEmbed3d)


def _x(sides: Sequence[int]) -> str:
    return "x".join(str(side) for side in sides)
