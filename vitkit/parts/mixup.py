"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch with its mirror image in order, labels alike."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(images: Tensor, labels: Tensor, *, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """`images` (B, C, H, W) or videos (B, C, T, H, W), and soft or multi-label `labels` (B, K), mixed with the reversed batch;
    where both alphas are positive one of the two is drawn with equal chance. Uses torch's global generator."""
    cut = cutmix > 0 and (mixup <= 0 or bool(torch.rand(()) < 0.5))
    alpha = cutmix if cut else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = images.flip(0)
    if cut:
        images, share = _paste(images, other, share)
    else:
        images = images * share + other * (1 - share)
    return images, labels * share + labels.flip(0) * (1 - share)


def _paste(images: Tensor, other: Tensor, share: float) -> tuple[Tensor, float]:
    """Paste a random box of area 1 - share; returns the share that is really left after clipping at the border."""
    height, width = images.shape[-2:]
    side = (1 - share) ** 0.5
    h, w = int(height * side), int(width * side)
    row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom = max(row - h // 2, 0), min(row + h // 2, height)
    left, right = max(column - w // 2, 0), min(column + w // 2, width)
    images = images.clone()
    images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)
