"""AdaptFormer: adapt a frozen ViT with a small bottleneck beside every MLP (about 1 % extra weights) and a new head.

Paper: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022
(arXiv 2205.13535). Official code: ShoufaChen/AdaptFormer.

What happens, and where: Adapter(x) = s * up(dropout(relu(down(x)))) (`Adapter`). Parallel: x2 = x1 + MLP(LN(x1)) +
Adapter(x1), on the residual stream x1 itself (`ParallelAdapter`). Sequential: with m = MLP(LN(x1)),
x2 = x1 + m + Adapter(m) (`SequentialAdapter`). The up projection starts at zero, so the adapted model equals the
pre-trained one at step 0. The adapter stands outside drop-path and layer scale in the parallel form.

Differs from the paper: its figure feeds LN(x1) to the adapter; the authors' code feeds x1 and the author calls the code
correct (issue 9), so x1 is the default and `layernorm="in"` is offered. Scores are picked on validation, not on test.

Cost: forward +1.4 % at r = 64, D = 768; a step costs about 2/3 of full fine-tuning, since frozen weights need no
gradients; 2 D r + r + D floats a block are trained and saved.

    vitkit adapt adaptformer --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/a
    vitkit.adapt("adaptformer", model="vit_small_patch14_dinov2.lvd142m", data="photos/", out="runs/a")
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitkit.errors import ConfigError
from vitkit.parts.adaptation import Adaptation
from vitkit.parts.blocks import Steps, extend
from vitkit.settings import Classify, Task, check_choices

RECIPE = {
    "epochs": 100,  # main_image.py defaults; the README command leaves them
    "warmup_epochs": 20.0,
    "optimizer": "sgd",  # momentum 0.9, weight decay 0
    "blr": 0.1,  # x effective batch / 256
    "weight_decay": 0.0,
    "batch_size": 128,
    "crop_scale": (0.08, 1.0),
    "head": "bn_linear",
}


@dataclass(frozen=True)
class Settings:
    """AdaptFormer."""

    bottleneck: int = 64
    """width r of the adapter (`ffn_num`, paper section 4.1)"""
    scale: float | Literal["learnable"] = 0.1
    """factor s on the adapter's output; learnable starts at 1 (`adapter_scalar`; 0.1 best in the paper's ablation)"""
    option: Literal["parallel", "sequential"] = "parallel"
    """beside the MLP, or on its output (`ffn_option`; parallel better in the paper)"""
    layernorm: Literal["none", "in", "out"] = "none"
    """LayerNorm on the adapter's input or output (`adapter_layernorm_option`; the official configs use none)"""
    dropout: float = 0.1
    """dropout inside the adapter, in training (0.1 in the image model)"""
    layers: tuple[int, ...] | Literal["all"] = "all"
    """blocks that get an adapter; the paper finds the later half better than the first"""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.bottleneck < 1:
            raise ConfigError(f"bottleneck is {self.bottleneck}", fix="a positive width, e.g. 64")


class Adapter(nn.Module):
    """Bottleneck D -> r -> D (models/adapter.py). Parameter names are the official ones."""

    def __init__(self, dim: int, settings: Settings = Settings()):
        super().__init__()
        self.option = settings.layernorm
        if settings.layernorm != "none":
            self.adapter_layer_norm_before = nn.LayerNorm(dim)  # eps 1e-5, not the trunk's
        self.scale = nn.Parameter(torch.ones(1)) if settings.scale == "learnable" else float(settings.scale)
        self.down_proj = nn.Linear(dim, settings.bottleneck)
        self.dropout = nn.Dropout(settings.dropout)
        self.up_proj = nn.Linear(settings.bottleneck, dim)
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), plus `residual` where given."""
        if self.option == "in":
            inner = self.adapter_layer_norm_before(x)
        else:
            inner = x
        out = self.up_proj(self.dropout(self.down_proj(inner).relu())) * self.scale
        if self.option == "out":
            out = self.adapter_layer_norm_before(out)
        return out if residual is None else out + residual


class ParallelAdapter(Steps):
    """Block whose output gains Adapter(x1), x1 being the residual stream after attention."""

    adaptmlp: Adapter

    def transform(self, x: Tensor) -> Tensor:
        return super().transform(x) + self.adaptmlp(x)


class SequentialAdapter(Steps):
    """Block whose MLP branch m becomes m + Adapter(m)."""

    adaptmlp: Adapter

    def mlp_branch(self, x: Tensor) -> Tensor:
        branch = super().mlp_branch(x)
        return self.adaptmlp(branch, residual=branch)


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Add adapters to `vit` in place and return it; its outputs do not change until they are trained."""
    depth = len(vit.blocks)
    layers = range(depth) if settings.layers == "all" else settings.layers
    for index in layers:
        if not -depth <= index < depth:
            raise ConfigError(f"layers names block {index}", fix=f"the ViT has blocks 0..{depth - 1}")
        block = vit.blocks[index]
        extend(block, ParallelAdapter if settings.option == "parallel" else SequentialAdapter)
        block.adaptmlp = Adapter(vit.embed_dim, settings).to(block.norm1.weight.device)
    return vit


def trains(name: str) -> bool:
    """Adapters train; the trunk does not."""
    return ".adaptmlp." in name


def load_official(vit: nn.Module, extras: dict[str, Tensor]) -> None:
    """Take adapters (`blocks.i.adaptmlp.*`) of an official checkpoint, e.g. `vit.extras` after `weights.load`."""
    own = {name: value for name, value in extras.items() if ".adaptmlp." in name}
    expected = {name for name in vit.state_dict() if ".adaptmlp." in name}
    if set(own) != expected:
        odd = sorted(set(own) ^ expected)
        raise ConfigError(
            f"the checkpoint's adapters do not fit these settings: {len(odd)} tensors differ, e.g. {odd[0]}",
            fix="use the layernorm, scale and layers that the checkpoint was trained with",
        )
    vit.load_state_dict(own, strict=False)


class AdaptFormer(Adaptation):
    """A frozen ViT, its adapters and a new head for `task`."""

    def __init__(
        self,
        vit: nn.Module,
        settings: Settings = Settings(),
        *,
        task: Task,
        classify: Classify = Classify(head="bn_linear"),
    ):
        super().__init__(vit, settings, task=task, classify=classify, inject=inject, trains=trains)
