"""Values that change over training, as functions of the (fractional) epoch: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def warmup_cosine(epoch: float, *, lr: float, min_lr: float, warmup: float, epochs: float) -> float:
    """Linear from 0 over `warmup` epochs, then half a cosine to `min_lr` at `epochs`, evaluated at each iteration.

    Source: util/lr_sched.py of facebookresearch/mae, used unchanged by AdaptFormer and medical_mae.
    """
    if epoch < warmup:
        return lr * epoch / warmup
    if epochs <= warmup:
        return lr
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def scaled_lr(blr: float, effective_batch: int, rule: str = "linear") -> float:
    """Base rate x effective batch / 256 ("linear"), or x sqrt(effective batch / 1024) ("sqrt", as DINOv2); effective =
    batch x accumulation x processes."""
    return blr * math.sqrt(effective_batch / 1024) if rule == "sqrt" else blr * effective_batch / 256
