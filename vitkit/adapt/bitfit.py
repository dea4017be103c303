"""BitFit: adapt a ViT by training its biases only, and a new head.

Paper: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
ACL 2022 (arXiv 2106.10199).

What happens, and where: every parameter named bias trains (`trains`), norms' included; nothing is added.

Differs from the paper: vision trunk and head, nothing else.

Cost: no gradients for matrices, about 0.1 % of the weights trained and saved.

    vitkit adapt bitfit --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/bitfit
    vitkit.adapt("bitfit", model="vit_small_patch14_dinov2.lvd142m", data="photos/", out="runs/bitfit")
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitkit.parts.adaptation import Adaptation
from vitkit.settings import Classify, Task

RECIPE = {"epochs": 50, "warmup_epochs": 5.0, "optimizer": "adamw", "blr": 2e-3, "weight_decay": 0.0, "batch_size": 128}


@dataclass(frozen=True)
class Settings:
    """BitFit: nothing to set beyond the shared settings."""


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Nothing is added."""
    return vit


def trains(name: str) -> bool:
    """Biases train, the separate q and v biases of EVA's attention among them."""
    return name.endswith("bias")


class BitFit(Adaptation):
    """A ViT whose biases train, and a new head for `task`."""

    def __init__(self, vit: nn.Module, settings: Settings = Settings(), *, task: Task, classify: Classify = Classify()):
        super().__init__(vit, settings, task=task, classify=classify, inject=inject, trains=trains)
