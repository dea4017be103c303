"""Losses for masks: soft Dice, and Dice + cross-entropy, equal to MONAI's with softmax and one-hot targets.

Logits (B, C, *size), targets (B, *size) class numbers; 255 = unknown, which counts for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.data.images import UNKNOWN


def dice_loss(
    logits: Tensor, target: Tensor, *, smooth: float = 1e-5, over: float | None = None, squared: bool = False
) -> Tensor:
    """Mean over images and classes (background included) of 1 - (2 sum p g + s) / (sum p + sum g + s), p = softmax.

    over: another s above the line. squared: sums of p^2 and g^2 below it. Hi-End-MAE and UNETR take over=0, smooth=1e-6,
    squared=True.
    """
    known = target != UNKNOWN
    one_hot = F.one_hot(torch.where(known, target, 0).long(), logits.shape[1]).movedim(-1, 1)
    inside = known.unsqueeze(1)
    p, g = (logits.softmax(1) * inside).flatten(2), (one_hot * inside).flatten(2).to(logits.dtype)
    overlap = (p * g).sum(-1)  # (B, C)
    total = (p.square() if squared else p).sum(-1) + g.sum(-1)  # g is 0 or 1: its own square
    return (1 - (2 * overlap + (smooth if over is None else over)) / (total + smooth)).mean()


def dice_ce_loss(
    logits: Tensor, target: Tensor, *, smooth: float = 1e-5, over: float | None = None, squared: bool = False
) -> Tensor:
    """`dice_loss` + cross-entropy over known pixels, weights 1 and 1."""
    dice = dice_loss(logits, target, smooth=smooth, over=over, squared=squared)
    return dice + F.cross_entropy(logits, target.long(), ignore_index=UNKNOWN)
