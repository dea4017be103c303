"""LoRA: adapt a frozen ViT by low-rank updates of its attention projections, and a new head. Merges into the weights.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685). Implementation:
the peft library.

What happens, and where: W x becomes W x + (alpha / r) B A x for every targeted layer (peft's `inject_adapter_in_model`,
called in `inject`); B starts at zero, so the adapted model equals the pre-trained one at step 0. `merge` folds the
update into W exactly.

Differs from the paper: timm's fused qkv projection gets one update for q, k and v together. EVA's attention with
separate biases never calls its qkv layer, which silences LoRA there; its bias is moved into the layer first
(`parts.blocks.ensure_qkv_layer`).

Cost: r (in + out) floats a layer are trained and saved; nothing after merging.

    vitkit adapt lora --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/lora --rank 8
    vitkit.adapt("lora", model="vit_small_patch14_dinov2.lvd142m", data="photos/", out="runs/lora", rank=8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vitkit.errors import ConfigError
from vitkit.parts.adaptation import Adaptation
from vitkit.parts.blocks import ensure_qkv_layer
from vitkit.settings import Classify, Task

RECIPE = {"epochs": 50, "warmup_epochs": 5.0, "optimizer": "adamw", "blr": 2e-3, "weight_decay": 0.0, "batch_size": 128}


@dataclass(frozen=True)
class Settings:
    """Low-rank adaptation."""

    rank: int = 8
    """rank r of the update"""
    alpha: float = 16.0
    """the update is scaled by alpha / rank"""
    lora_dropout: float = 0.0
    """dropout on the input of the update"""
    targets: tuple[str, ...] | Literal["auto"] = "auto"
    """layers that get an update, by name ending; auto = the attention's query, key and value projections"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}", fix="at least 1")


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Add low-rank updates to `vit` in place and return it."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    if any(isinstance(module, LoraLayer) for module in vit.modules()):
        raise ConfigError("this ViT already carries LoRA", fix="merge it first (vitkit export), then adapt again")
    ensure_qkv_layer(vit)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft only divides by it
        lora_dropout=settings.lora_dropout,
        target_modules=list(target_layers(vit) if settings.targets == "auto" else settings.targets),
    )
    passport = getattr(vit, "passport", None)
    try:
        inject_adapter_in_model(config, vit)
    except ValueError as error:
        raise ConfigError(f"targets {settings.targets}: {error}", fix="e.g. qkv, attn.proj, mlp.fc1") from error
    if passport is not None:
        vit.passport = passport
    return vit


def target_layers(vit: nn.Module) -> tuple[str, ...]:
    """Names of the attention input projections of this ViT: fused or separate."""
    return ("qkv",) if getattr(vit.blocks[0].attn, "qkv", None) is not None else ("q_proj", "k_proj", "v_proj")


def merge(vit: nn.Module) -> nn.Module:
    """Fold every update into its layer and remove it: plain timm weights with the adapted model's outputs."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(vit.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(vit.get_submodule(parent), child, module.get_base_layer())
    return vit


def trains(name: str) -> bool:
    """The low-rank factors train."""
    return "lora_" in name


class LoRA(Adaptation):
    """A frozen ViT, low-rank updates and a new head for `task`."""

    def __init__(self, vit: nn.Module, settings: Settings = Settings(), *, task: Task, classify: Classify = Classify()):
        super().__init__(vit, settings, task=task, classify=classify, inject=inject, trains=trains)
