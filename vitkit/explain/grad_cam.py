"""Grad-CAM: which patches speak for a class, for any ViT with a head, however it was adapted. No training.

Paper: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017
(arXiv 1610.02391). Reference for ViTs: jacobgil/pytorch-grad-cam.

What happens, and where: a are the patch tokens that the last block's `norm1` puts out, g the gradient of the asked class'
logit with respect to them. With w_d the mean of g over all patches, the map is relu(sum_d w_d a_d) (`saliency`). The
logit is the head's own, so class token, average, attention and prompt read-outs all work.

Differs from the paper: it explains convolutional features; the place in a ViT follows pytorch-grad-cam's advice, since
after the last attention patch tokens of a class-token model have no gradient. Maps are left on the patch grid and are not
scaled to [0, 1]; scaled and enlarged they equal pytorch-grad-cam's.

Cost: one forward pass without a graph, one block and the head with it, and their backward pass: about 1.3 forward passes
for a ViT of 12 blocks, whichever weights are trainable.

    vitkit explain runs/a photos/ --maps grad_cam --classes cat,dog
    vitkit.explain.grad_cam.saliency(vit, images, torch.tensor([3, 3]))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import WeightsError
from vitkit.explain.attention import block_index
from vitkit.explain.shared import evaluating, require_head, targets_of


@dataclass(frozen=True)
class Settings:
    """Grad-CAM."""

    layer: int = -1
    """block whose normalised input is explained; negative counts from the last"""


def saliency(vit: nn.Module, images: Tensor, target: Tensor | None = None, settings: Settings = Settings()) -> Tensor:
    """Grad-CAM (B, *grid) of class `target` (B,), by default the predicted one; >= 0, not normalised."""
    require_head(vit)
    with evaluating(vit) as vit, torch.inference_mode(False), _without_checkpoints(vit):
        layer = block_index(vit, settings.layer)
        with torch.no_grad():
            stream = tokens.run(vit, tokens.embed(vit, images), 0, layer)
        with torch.enable_grad(), _leaf(vit.blocks[layer]) as found:
            grid = stream.grid
            scores = vit.forward_head(tokens.finish(vit, tokens.run(vit, stream, layer)).all)
            asked = targets_of(scores.detach(), target).clone()  # a caller's may be an inference tensor
            gradient = torch.autograd.grad(scores.gather(1, asked[:, None]).sum(), found[0])[0]
    activation, gradient = (_patches(part, grid) for part in (found[0].detach(), gradient))
    weights = gradient.mean(1, keepdim=True)  # (B, 1, D)
    return (activation * weights).sum(-1).relu().unflatten(-1, grid)


@contextmanager
def _without_checkpoints(vit: Any) -> Iterator[None]:
    """While open, blocks run once: one that is run again for its gradient would not meet the leaf of the first time."""
    again, vit.grad_checkpointing = vit.grad_checkpointing, False
    try:
        yield
    finally:
        vit.grad_checkpointing = again


@contextmanager
def _leaf(block: Any) -> Iterator[list[Tensor]]:
    """While open, what `block.norm1` puts out for tokens (B, T, D) is cut off from what came before and kept.

    The hook lives only as long as the call; extra keys pass norm1 as (E, D) and are left alone.
    """
    if not isinstance(getattr(block, "norm1", None), nn.Module):
        raise WeightsError(
            f"blocks of type {type(block).__name__} have no norm1", fix="use a ViT made of timm's Block or EvaBlock"
        )
    found: list[Tensor] = []

    def cut(_: nn.Module, __: tuple, out: Tensor) -> Tensor | None:
        if out.ndim != 3 or found:
            return None
        found.append(out.detach().requires_grad_())
        return found[0]

    handle = block.norm1.register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


def _patches(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The patch tokens of (B, T, D): they stand last."""
    count = 1
    for side in grid:
        count *= side
    return x[:, -count:]
