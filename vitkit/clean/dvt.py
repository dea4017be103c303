"""DVT: take patterns that depend on the position, not on the picture, out of a ViT's patch features.

Paper: Yang et al., "Denoising Vision Transformers", ECCV 2024 (arXiv 2401.02957). Official code: Jiawei-Yang/Denoising-ViT.

What happens, and where: stage 1 (vitkit.parts.decomposition) explains the features y of hundreds of crops of one picture by
y = F(place in the picture) + G(place in the view) + h(y), with F a hash grid and a small MLP; what F says over the whole
picture is its clean feature map. Stage 2 trains one transformer block with a position table, D(y) = Block(y + p)
(`Denoiser`), to map raw features to clean ones, loss mse + 1 - mean cosine (`DVT.forward`). `inject` puts D behind the
final norm of the ViT, so that `tokens.encode` gives clean patches; prefix tokens pass unchanged.

Differs from the paper: F's finest grid is matched to the crops (`max_resolution="auto"`; 1024 there, four times what the
crops can tell), and a step updates only the table rows that it used, their momentum caught up (`rows="touched"`; vitkit.
parts.row_adam). Which images train and which check stage 2 is drawn once. Stage 3, in the authors' code alone, distils the
pair into one ViT (`distil_epochs`; vitkit.run.dvt_distil).

Cost: stage 1 is `views` forward passes and `steps` steps a picture; stage 2 runs on stored features. Afterwards one block
more: 12 D^2 + N D weights.

    vitkit clean dvt --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/dvt --images 500
    vitkit.clean("dvt", model="vit_small_patch14_dinov2.lvd142m", data="photos/", out="runs/dvt", images=500)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, WeightsError
from vitkit.parts.blocks import mix_into
from vitkit.parts.positions import resample_positions, square_grid
from vitkit.settings import check_choices

RECIPE = {
    "epochs": 640,  # 50,000 iterations over 10,000 images, main_denoiser.py
    "warmup_epochs": 96.0,  # 15 % of them, as its scheduler is built
    "optimizer": "adamw",
    "batch_size": 128,  # 8 GPUs x 16
    "blr": 4e-4,  # 2e-4 x sqrt(batch / 256): the square root of 1024 / 256 is in it
    "lr_rule": "sqrt",
    "min_lr": 1e-6,
    "weight_decay": 1e-5,
    "eval_every": 20,
}


@dataclass(frozen=True)
class Settings:
    """Denoising ViT."""

    images: int = 10_000
    """pictures decomposed in stage 1, drawn with `seed` where there are more (10,000 of VOC, data/voc_train.txt)"""
    held_out: float = 0.1
    """share of them that stage 2 does not see and is checked on (no such check in the official code)"""
    views: int = 768
    """random crops of each picture (main_img_denoising.py)"""
    crop_area: tuple[float, float] = (0.1, 0.5)
    """area of a crop as a share of the picture (main_img_denoising.py)"""
    steps: int = 25_000
    """optimiser steps a picture in stage 1 (main_img_denoising.py; the paper says 20,000, the demo takes 10,000)"""
    pixels: int = 2048
    """patches drawn a step, with replacement (main_img_denoising.py)"""
    levels: int = 16
    """grids of the field (the script; the class default is 10)"""
    features: int = 8
    """features an entry of a grid (neural_feature_field.py)"""
    base_resolution: int = 16
    """cells of the coarsest grid along a side (neural_feature_field.py)"""
    max_resolution: int | Literal["auto"] = "auto"
    """cells of the finest (1024 there); auto = the samples along a side that the smallest crop has, rounded up to a power
    of two"""
    log2_table: int = 20
    """a grid has at most 2 to this power entries (neural_feature_field.py)"""
    rows: Literal["touched", "dense"] = "touched"
    """update the table's rows that a step used, or all in every step as the official optimiser"""
    field_lr: float = 0.01
    """peak rate of stage 1; warm-up over a tenth of the steps, then a cosine to a tenth of it (main_img_denoising.py)"""
    field_weight_decay: float = 1e-5
    """L2 of stage 1 (main_img_denoising.py; on GPUs its gradient scaling makes it act as 1e-8)"""
    freeze_after: float = 0.5
    """share of the steps after which G stands still and h learns (main_img_denoising.py)"""
    together: int | Literal["auto"] = "auto"
    """pictures decomposed at once; auto = 1 on a CPU, else what 8 GB of their features allow, at most 16"""
    blocks: int = 1
    """transformer blocks of the denoiser (online_denoiser.py)"""
    distil_epochs: int = 0
    """stage 3: passes over all training pictures that teach the ViT itself to give clean patches, all its weights (5 of
    ImageNet, main_distillation.py); 0 leaves the denoiser behind it"""
    grid: tuple[int, int] | None = None
    """patch rows and columns of the denoiser's position table; by default those of the model's own input size"""

    def __post_init__(self) -> None:
        check_choices(self)
        small = [
            n for n in ("images", "views", "steps", "pixels", "blocks", "features", "levels") if getattr(self, n) < 1
        ]
        if small:
            raise ConfigError(f"{small[0]} is {getattr(self, small[0])}", fix="1 or more")
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError(f"crop_area is {self.crop_area}", fix="shares of the area, 0 < low <= high <= 1")
        if self.distil_epochs < 0:
            raise ConfigError(f"distil_epochs is {self.distil_epochs}", fix="0, or passes over the training pictures")
        if not 0 < self.held_out < 1 or not 0 <= self.freeze_after <= 1:
            raise ConfigError(
                f"held_out is {self.held_out}, freeze_after {self.freeze_after}", fix="shares between 0 and 1"
            )
        for name in ("together", "max_resolution"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ConfigError(f"{name} is {value}", fix="auto, or 1 or more")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 2):
            raise ConfigError(f"grid is {self.grid}", fix="rows and columns of patches, e.g. 37,37")


class Denoiser(nn.Module):
    """Raw patch features to clean ones, (B, N, D) -> (B, N, D). Parameter names are the official ones."""

    def __init__(self, dim: int, grid: tuple[int, int], blocks: int = 1):
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, math.prod(grid), dim))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        made = [Block(dim, heads_of(dim), mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(blocks)]
        self.denoiser: nn.Module = made[0] if blocks == 1 else nn.Sequential(*made)

    def forward(self, x: Tensor, grid: tuple[int, ...] | None = None, keep: Tensor | None = None) -> Tensor:
        """`grid` of the patches (the table's own by default); `keep` (B, K): the indices of those that are there."""
        positions = resample_positions(self.pos_embed, grid or self.grid, prefix=0, rule="timm", old_grid=self.grid)
        return self.denoiser(x + (positions if keep is None else positions[0][keep]))


def heads_of(dim: int) -> int:
    """D // 64 heads, or the next smaller number that divides the width."""
    return next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)


class DenoisedViT:
    """ViT whose patches go through a denoiser behind the final norm; `tokens.finish` calls `refine`."""

    dvt: Denoiser

    def refine(self, found: tokens.Tokens) -> tokens.Tokens:
        return replace(found, patches=self.dvt(found.patches, found.grid, found.keep))

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """timm's own entry, with the same patches as `tokens.encode`."""
        if any(value is not None and value is not False for value in (*args, *kwargs.values())):
            raise ConfigError("a denoised ViT takes no attention mask and no causal order", fix="call it without")
        return tokens.encode(self, x).all  # type: ignore[arg-type]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "timm's forward_intermediates would pass the denoiser by", fix="vitkit.tokens.maps(vit, images, layers=...)"
        )


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Put a new denoiser behind the final norm of `vit`, in place, and return it."""
    if isinstance(vit, DenoisedViT):
        raise ConfigError("this ViT already carries a denoiser", fix="start from a ViT without it")
    grid = settings.grid or table_grid(vit)
    like = vit.blocks[0].norm1.weight
    mix_into(vit, DenoisedViT)
    vit.dvt = Denoiser(vit.embed_dim, grid, settings.blocks).to(like.device)
    return vit


def table_grid(vit: nn.Module) -> tuple[int, int]:
    """Patch rows and columns at the ViT's own input size; refuses a ViT whose patches make no picture."""
    vit = tokens.require_vit(vit)
    grid = tuple(vit.patch_embed.grid_size)
    if tokens.kind_of(vit) != "image" or len(grid) != 2:
        raise ConfigError(
            f"DVT cleans features of images, and this is a ViT of {tokens.kind_of(vit)}s", fix="a ViT of images"
        )
    if min(grid) < 2:
        raise ConfigError(
            f"this ViT has a grid of {grid[0]} x {grid[1]} patches, which is no dense feature map",
            fix="a larger --image_size or a smaller --patch_size",
        )
    return grid[0], grid[1]


def trains(name: str) -> bool:
    """The denoiser trains; the trunk does not."""
    return name.startswith("dvt.")


def feature_loss(predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Mean squared error, and 1 - mean cosine similarity over the last axis."""
    cosine = F.cosine_similarity(predicted, target, dim=-1).mean()
    return {"l2": F.mse_loss(predicted, target), "cosine": 1 - cosine}


def denoiser_rate(step: int, *, lr: float, min_lr: float, warmup: int, total: int) -> float:
    """The official rate of 0-based `step`: linear over `warmup` steps with both ends included, so that the peak comes twice,
    then a cosine, `min_lr` from `total` on."""
    if step >= total:
        return min_lr
    if step < warmup:
        return lr * step / max(1, warmup - 1)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class DVT(nn.Module):
    """Stage 2: a frozen ViT and the denoiser behind it. Needs no labels, but clean features to learn from: `forward` takes
    {"target": (B, h, w, D) clean features} with "raw" (B, h, w, D), or with "image" (B, C, H, W) to compute them from."""

    needs_labels = False
    job = "vitkit.run.dvt_jobs:dvt_job"

    def __init__(self, vit: nn.Module, settings: Settings = Settings()):
        super().__init__()
        self.vit = inject(vit, settings)
        self.settings = replace(settings, grid=self.vit.dvt.grid)
        for name, parameter in self.vit.named_parameters():
            parameter.requires_grad_(trains(name))
        self.rates: dict[str, Any] | None = (
            None  # lr, min_lr, warmup, total in steps: the official rule instead of the loop's
        )

    def train(self, mode: bool = True) -> DVT:
        """The trunk only gives features, so that its dropout stays off."""
        super().train(mode)
        self.vit.eval()
        self.vit.dvt.train(mode)
        return self

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raw = batch["raw"].float() if "raw" in batch else raw_features(self.vit, batch["image"])
        predicted = self.vit.dvt(raw.flatten(1, 2), tuple(raw.shape[1:3]))
        losses = feature_loss(predicted, batch["target"].float().flatten(1, 2))
        return {"loss": losses["l2"] + losses["cosine"], **losses}

    def before_step(self, now: Any, groups: list[dict]) -> None:
        if self.rates is not None:
            for group in groups:
                group["lr"] = denoiser_rate(now.step, **self.rates)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Everything decays, norms and biases too, as in the official code."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def finish(self) -> nn.Module:
        """The ViT that gives clean patches."""
        return self.vit


@torch.no_grad()
def raw_features(vit: nn.Module, images: Tensor) -> Tensor:
    """Patch features (B, h, w, D) behind the final norm, before a denoiser that `vit` may carry."""
    stream = tokens.run(vit, tokens.embed(vit, images))
    found = tokens.finish(vit, replace(stream, done=0))
    return found.patches.unflatten(1, found.grid)


def load_official(vit: nn.Module, tensors: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> nn.Module:
    """Put the denoiser of an official checkpoint behind `vit` and return it; `tensors` as `vitkit.weights.read_state` gives
    them, with or without the wrapper `denoiser`. `grid`: rows and columns of its position table where that is no square.

    Distilled checkpoints (`model.*`) are plain ViTs: `vitkit.weights.load` reads them.
    """
    own = {name: value for name, value in tensors.items() if not name.startswith("vit.")}
    table = own.get("pos_embed")
    if table is None or not any(name.startswith("denoiser.") for name in own):
        raise WeightsError(
            "this is no DVT denoiser: there is no pos_embed beside denoiser.*",
            fix="a *_denoised file of jjiaweiyang/DVT; distilled ones load with vitkit.weights.load",
        )
    if table.shape[-1] != vit.embed_dim:
        raise WeightsError(
            f"the denoiser is for features of width {table.shape[-1]}, and this ViT has {vit.embed_dim}",
            fix="load the ViT that it was trained on",
        )
    grid = grid or square_grid(table.shape[1])
    if grid is None or math.prod(grid) != table.shape[1]:
        raise WeightsError(
            f"a position table of {table.shape[1]} rows is no square grid", fix="give grid=(rows, columns) of the table"
        )
    numbers = {int(name.split(".")[1]) for name in own if name.split(".")[1:2] and name.split(".")[1].isdigit()}
    settings = Settings(blocks=max(numbers) + 1 if numbers else 1, grid=(int(grid[0]), int(grid[1])))
    inject(vit, settings)
    try:
        vit.dvt.load_state_dict(own)
    except RuntimeError as error:
        raise WeightsError(f"the denoiser does not fit: {error}", fix="an unchanged file of jjiaweiyang/DVT") from error
    if getattr(vit, "passport", None) is not None:
        vit.passport.steps.append({"method": "clean.dvt", "settings": vars(settings)})
    return vit
