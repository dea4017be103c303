"""Linear probe by gradient descent: a frozen ViT and a new head, trained on augmented images.

The baseline of AdaptFormer (arXiv 2205.13535, table 1) and MAE (arXiv 2111.06377, appendix A.1): batch normalisation
without affine parameters, then a linear layer. For the fast closed protocol on cached features, without augmentation,
see `vitkit evaluate --protocols linear`.

What happens, and where: `parts.adaptation.Adaptation` with nothing injected; only the head trains.

Differs from the paper: MAE's LARS with batch 16384 is offered (`--optimizer lars`), SGD as in AdaptFormer is the default.

Cost: one forward pass a step; no graph is kept for the trunk.

    vitkit adapt linear --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/linear
    vitkit.adapt("linear", model="vit_small_patch14_dinov2.lvd142m", data="photos/", out="runs/linear")
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitkit.parts.adaptation import Adaptation
from vitkit.settings import Classify, Task

RECIPE = {
    "epochs": 100,
    "warmup_epochs": 20.0,
    "optimizer": "sgd",
    "blr": 0.1,
    "weight_decay": 0.0,
    "batch_size": 128,
    "head": "bn_linear",
}


@dataclass(frozen=True)
class Settings:
    """Linear probe: nothing to set beyond the shared settings."""


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Nothing is added."""
    return vit


def trains(name: str) -> bool:
    """Only the head trains, and that is decided elsewhere."""
    return False


class Linear(Adaptation):
    """A frozen ViT and a new head for `task`."""

    def __init__(
        self,
        vit: nn.Module,
        settings: Settings = Settings(),
        *,
        task: Task,
        classify: Classify = Classify(head="bn_linear"),
    ):
        super().__init__(vit, settings, task=task, classify=classify, inject=inject, trains=trains)
