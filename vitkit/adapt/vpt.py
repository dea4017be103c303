"""VPT-deep: adapt a frozen ViT by learned prompt tokens in front of the class token at every block, and a new head.

Paper: Jia et al., "Visual Prompt Tuning", ECCV 2022 (arXiv 2203.12119); initialisation and recipe as the baseline in
AdaptFormer's code (`vpt_on`), whose author used one prompt for images.

What happens, and where: before block i its prompts (1, P, D) are put in front, after it they are dropped
(`PromptSteps`). No dropout, no positions; rotary attention leaves them unrotated.

Differs from the paper: no prompt dropout and no learned projection of prompts, as in AdaptFormer's baseline.

Cost: P more tokens a block; P D floats a block are trained and saved.

    vitkit adapt vpt --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/vpt --prompts 5
    vitkit.adapt("vpt", model="vit_small_patch14_dinov2.lvd142m", data="photos/", out="runs/vpt", prompts=5)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import ConfigError
from vitkit.parts.adaptation import Adaptation
from vitkit.parts.blocks import Steps, add_prefix_tokens, extend
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
    """Block that works on its prompts and the tokens, and hands on the tokens alone."""

    prompts: nn.Parameter  # (1, P, D)

    def entering(self, x: Tensor) -> Tensor:
        return super().entering(torch.cat([self.prompts.expand(x.shape[0], -1, -1), x], dim=1))

    def forward_prompted(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The block's output with its prompts still in front, (B, P + T, D)."""
        mask = kwargs.get("attn_mask")
        if mask is not None:  # everything may look at the prompts
            count = self.prompts.shape[1]
            kwargs["attn_mask"] = F.pad(mask, (count, 0, count, 0), value=1 if mask.dtype == torch.bool else 0)
        return super().forward(self.entering(x), **kwargs)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.forward_prompted(x, **kwargs)[:, self.prompts.shape[1] :]


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Add prompts to every block of `vit` in place and return it."""
    for block in vit.blocks:
        extend(block, PromptSteps)
        block.prompts = nn.Parameter(
            nn.init.xavier_uniform_(torch.empty(1, settings.prompts, vit.embed_dim)).to(block.norm1.weight.device)
        )
        add_prefix_tokens(vit, block, settings.prompts)
    return vit


def trains(name: str) -> bool:
    """Prompts train; the trunk does not."""
    return name.endswith(".prompts")


def load_official(vit: nn.Module, extras: dict[str, Tensor]) -> None:
    """Take prompts (`embeddings.i`) of a checkpoint in the layout of AdaptFormer's VPT baseline."""
    for index, block in enumerate(vit.blocks):
        value = extras[f"embeddings.{index}"]
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
