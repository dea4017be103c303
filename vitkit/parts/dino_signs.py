"""Figures that a DINOv2 step logs so that the collapse doctor (vitkit.run.collapse) can tell what goes wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.parts.dino_head import DINOHead
from vitkit.parts.dino_losses import Targets, nearest_distance

SAME = 3e-6  # distance of unit rows below which two images are one to the model


@torch.no_grad()
def signs(method: Any, image: Tensor, targets: Targets) -> dict[str, Tensor]:
    """Of one view's features (B, D) and all targets of this process:

    target_entropy: of a single target, in shares of ln K; prototypes_used: exp of the mean target's entropy; nearest: mean
    distance to the nearest other image; twins: share of images without any; rank: directions that the batch spreads over;
    teacher_gap: relative distance of the student's to the teacher's head; teacher_step: what the teacher's last step was.
    """
    sharp, used = targets.statistics()
    near = nearest_distance(F.normalize(image.float(), dim=-1))
    student, teacher = first_layer(method.dino_head), first_layer(method.teacher_dino_head)
    return {
        "target_entropy": sharp,
        "prototypes_used": torch.exp(used * math.log(method.dino_head.prototypes)),
        "nearest": near.mean(),
        "twins": (near < SAME).float().mean(),
        "rank": participation_rank(image),
        "teacher_gap": (student - teacher).norm() / student.norm(),
        "teacher_step": method.teacher_step,
    }


def first_layer(head: DINOHead) -> Tensor:
    """Weights that move in every step of every phase: what signs of teacher and student are read from."""
    return (head.mlp if isinstance(head.mlp, nn.Linear) else head.mlp[0]).weight  # type: ignore[return-value]


def participation_rank(x: Tensor) -> Tensor:
    """(sum of the covariance's eigenvalues)^2 / sum of their squares of rows (n, D): how many directions a batch spreads
    over, from 1 to min(n - 1, D); needs no decomposition. 0 when all rows are equal."""
    x = x.detach().float()
    x = x - x.mean(0)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    return gram.trace().square() / gram.square().sum().clamp_min(1e-30)
