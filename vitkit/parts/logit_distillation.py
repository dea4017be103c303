"""A trained classifier teaches another: the student's loss is its divergence from the teacher's class probabilities.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531). VideoMAE V2's small
models were made by distillation from its giant one, whose code and loss are not published; this is the usual form.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError


class Teacher:
    """A frozen classifier. It is no part of the student's module: neither trained nor saved, and on the student's device."""

    def __init__(self, vit: nn.Module):
        self.vit = vit.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Class scores (B, C) of normalised images."""
        if next(self.vit.parameters()).device != images.device:
            self.vit.to(images.device)
        return tokens.logits(self.vit, images)


def load_teacher(ref: str | Path, student: nn.Module, classes: Sequence[str]) -> Teacher:
    """The adapted model `ref` as a teacher of `student`. Raises ConfigError where it predicts other classes or sees other
    pixels than the student does."""
    from vitkit import weights

    vit: Any = weights.load(ref, num_classes=None, say=None)
    if not vit.num_classes:
        raise ConfigError(f"the teacher {ref} has no head", fix="a run of vitkit adapt, or an adapted checkpoint")
    if vit.num_classes != len(classes) or (vit.passport.classes and list(vit.passport.classes) != list(classes)):
        raise ConfigError(
            f"the teacher {ref} predicts {vit.num_classes} classes that are not the {len(classes)} of the data",
            fix="a teacher that was adapted to these classes",
        )
    passport = getattr(student, "passport", None)
    seen = passport.preprocess.differences(vit.passport.preprocess) if passport is not None else []
    if seen:
        raise ConfigError(
            f"the teacher {ref} sees other pixels: {'; '.join(seen)}", fix="the same image_size, mean and std"
        )
    return Teacher(vit)


def distillation_loss(scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher / T || student / T), mean over the batch; both (B, C)."""
    student, target = (x.float() / temperature for x in (scores, teacher))
    each = F.kl_div(student.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
    return each * temperature**2
