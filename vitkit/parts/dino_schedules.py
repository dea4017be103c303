"""DINOv2's schedules as functions of the optimiser step: nothing to save, nothing to restore.

Source: DINOv2, utils/utils.py (`CosineScheduler`) and train/train.py (`build_schedulers`).
"""

from __future__ import annotations

import math


def cosine(step: float, *, base: float, final: float, total: float, warmup: float = 0, start: float = 0.0) -> float:
    """Linear from `start` to `base` in `warmup` steps, both ends included, then half a cosine that would reach `final` at
    step `total`; from there on `final`."""
    if step < warmup:
        return start + (base - start) * (step / (warmup - 1) if warmup > 1 else 0.0)
    if step >= total:
        return final
    return final + (base - final) / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def linear(step: float, *, start: float, final: float, warmup: float) -> float:
    """Linear from `start` to `final` in `warmup` steps, both ends included, then `final`: the teacher's temperature."""
    return cosine(step, base=final, final=final, total=warmup, warmup=warmup, start=start)


def last_layer_lr(step: float, lr: float, frozen: float) -> float:
    """The rate `lr` of the step, or 0 in the first `frozen` ones, in which the prototypes stay as they are."""
    return 0.0 if step < frozen else lr
