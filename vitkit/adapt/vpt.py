"""VPT-deep: adapt a frozen ViT by learned prompt tokens in front of the class token at every block, and a new head.

Paper: Jia et al., "Visual Prompt Tuning", ECCV 2022 (arXiv 2203.12119); initialisation and recipe as the baseline in
AdaptFormer's code (`vpt_on`), whose author used one prompt for images.

What happens, and where: before block i its prompts (1, P, D) are put in front, after it they are dropped. So they are
nothing but keys and values of that block's attention (`PromptSteps.extra_keys`), and are computed as such: once a batch,
without queries, projection and MLP. No dropout, no positions; rotary attention leaves them unrotated.

Differs from the paper: no prompt dropout and no learned projection of prompts, as in AdaptFormer's baseline.

Cost: P more keys a block; P D floats a block are trained and saved.

    vitkit adapt vpt --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/vpt --prompts 5
    vitkit.adapt("vpt", model="vit_small_patch14_dinov2.lvd142m", data="photos/", out="runs/vpt", prompts=5)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit.errors import ConfigError
from vitkit.parts.adaptation import Adaptation
from vitkit.parts.blocks import Steps, extend, join_keys
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
    """Visual prompt tuning, deep."""

    prompts: int = 1
    """prompt tokens a block (`vpt_num`)"""

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"prompts is {self.prompts}", fix="at least 1")


class PromptSteps(Steps):
    """Block whose attention also looks at learned prompts."""

    prompts: nn.Parameter  # (1, P, D)

    def extra_keys(self) -> Tensor:
        return join_keys(super().extra_keys(), self.prompts[0])


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Add prompts to every block of `vit` in place and return it."""
    for block in vit.blocks:
        extend(block, PromptSteps)
        block.prompts = nn.Parameter(
            nn.init.xavier_uniform_(torch.empty(1, settings.prompts, vit.embed_dim)).to(block.norm1.weight.device)
        )
    return vit


def trains(name: str) -> bool:
    """Prompts train; the trunk does not."""
    return name.endswith(".prompts")


def load_official(vit: nn.Module, extras: dict[str, Tensor]) -> None:
    """Take prompts (`embeddings.i`) of a checkpoint in the layout of AdaptFormer's VPT baseline."""
    for index, block in enumerate(vit.blocks):
        value = extras.get(f"embeddings.{index}")
        if value is None:
            raise ConfigError(
                f"the checkpoint has no embeddings.{index}", fix="prompts and trunk of one VPT checkpoint"
            )
        if value.shape != block.prompts.shape:
            raise ConfigError(f"embeddings.{index} is {tuple(value.shape)}", fix=f"prompts={value.shape[1]}")
        with torch.no_grad():
            block.prompts.copy_(value)


class VPT(Adaptation):
    """A frozen ViT, its prompts and a new head for `task`."""

    def __init__(
        self,
        vit: nn.Module,
        settings: Settings = Settings(),
        *,
        task: Task,
        classify: Classify = Classify(head="bn_linear"),
    ):
        super().__init__(vit, settings, task=task, classify=classify, inject=inject, trains=trains)
