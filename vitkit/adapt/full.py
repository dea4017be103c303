"""Full fine-tuning: every weight trains, with layer-wise learning-rate decay, drop path and RandAugment.

Recipe: Xiao et al., "Delving into Masked Autoencoders for Multi-Label Thorax Disease Classification", WACV 2023
(arXiv 2210.12843), table of section 4: layer decay 0.55, RandAugment magnitude 6 and drop path 0.2 are the three knobs
it calls significant. Official code: lambert-x/medical_mae (main_finetune_chestxray.py), a fork of facebookresearch/mae.

What happens, and where: parameter groups by depth (`parts.optim.layer_decay_groups`): scale of layer i is
decay^(depth + 1 - i); binary cross-entropy over labels or cross-entropy over classes (`parts.heads.class_loss`). With
`pool=avg` patch tokens are averaged and normalised by a new `fc_norm`, and the final norm is dropped
(`parts.heads.set_pooling`), as MAE's fine-tuning does.

Differs from the paper: the model is chosen on validation images, not on the test set. `hflip` can be switched off.

Cost: forward, backward to activations and to weights; optimiser state for every weight.

    vitkit adapt full --model runs/mae --data labels.csv --out runs/full --pool avg
    vitkit.adapt("full", model="runs/mae", data="labels.csv", out="runs/full", pool="avg")
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitkit.parts.adaptation import Adaptation
from vitkit.settings import Classify, Task

RECIPE = {
    "epochs": 75,  # medical_mae FINETUNE.md, ViT on ChestX-ray14
    "warmup_epochs": 5.0,
    "optimizer": "adamw",
    "blr": 2.5e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "layer_decay": 0.55,
    "drop_path": 0.2,
    "randaug": "rand-m6-mstd0.5-inc1",
    "batch_size": 128,
    "head": "linear",
}


@dataclass(frozen=True)
class Settings:
    """Full fine-tuning: nothing to set beyond the shared settings."""


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Nothing is added."""
    return vit


def trains(name: str) -> bool:
    """Everything trains."""
    return True


class Full(Adaptation):
    """A ViT and a new head for `task`, all trainable."""

    def __init__(self, vit: nn.Module, settings: Settings = Settings(), *, task: Task, classify: Classify = Classify()):
        super().__init__(vit, settings, task=task, classify=classify, inject=inject, trains=trains)
