"""What explanations share: a ViT in evaluation mode, the class asked about, and the score that it gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError


@contextmanager
def evaluating(vit: nn.Module) -> Iterator[tokens.ViT]:
    """`vit` with dropout and batch statistics off, whatever mode it is in; afterwards every part is as it was."""
    checked = tokens.require_vit(vit)
    training = [module for module in vit.modules() if module.training]
    vit.eval()
    try:
        yield checked
    finally:
        for module in training:
            module.training = True


def has_head(vit: nn.Module) -> bool:
    """Whether the ViT scores classes (timm keeps an Identity where there is no head)."""
    return getattr(vit, "num_classes", 0) > 0


def require_head(vit: nn.Module) -> None:
    """Raise ConfigError where there is no class to ask about."""
    if not has_head(vit):
        raise ConfigError(
            "this model has no classification head, so there is no class to ask about",
            fix="adapt it first (vitkit adapt linear ...), load it with num_classes=None, or look at its attention",
        )


def targets_of(scores: Tensor, target: Tensor | None) -> Tensor:
    """(B,) class indices: `target`, or the class with the highest of `scores` (B, C) where it is None."""
    if target is None:
        return scores.argmax(1)
    target = torch.as_tensor(target, device=scores.device)
    if target.shape != scores.shape[:1] or target.is_floating_point():
        raise ConfigError(
            f"target of shape {tuple(target.shape)} and type {target.dtype} for {len(scores)} images",
            fix="one whole class index an image, (B,) int64, or None for the predicted class",
        )
    if len(target) and (int(target.min()) < 0 or int(target.max()) >= scores.shape[1]):
        wrong = int(target.max()) if int(target.max()) >= scores.shape[1] else int(target.min())
        raise ConfigError(
            f"class {wrong} does not exist", fix=f"the head has {scores.shape[1]} classes, 0..{scores.shape[1] - 1}"
        )
    return target.long()


@torch.no_grad()
def predict(vit: nn.Module, images: Tensor, task: str = "single") -> Tensor:
    """Class probabilities (B, C): softmax where an image has one label, sigmoid where it may have several."""
    require_head(vit)
    scores = tokens.logits(vit, images).float()
    return scores.sigmoid() if task == "multi" else scores.softmax(-1)
