"""UNETR segmentation: fine-tune a ViT of volumes inside a U-shaped network, on volumes with masks.

Paper: Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", WACV 2022 (arXiv 2103.10504), as Hi-End-MAE
fine-tunes it (arXiv 2502.08347). Official code: FengheTan9/Hi-End-MAE, downstream/.

What happens, and where: raw tokens of blocks 4, 7, 10 and the normalised output become feature maps that a convolutional
decoder joins from coarse to fine (`vitkit.dense.unetr.UNETR`); random crops, half of them around a voxel of some class; loss
Dice + cross-entropy, Dice with squared denominators over all classes with background (`vitkit.dense.losses`). Whole volumes
are segmented by overlapping windows whose logits are averaged (`vitkit.dense.volume_windows`); the epoch is chosen by the
mean Dice of all validation volumes without background, the test volumes are scored once, class by class, with intervals.

Differs from the paper: the class token and eps 1e-6 of the pre-trained encoder are kept, where the released code drops the
token and builds LayerNorms of 1e-5; the warm-up rises in every step, where theirs trains its first epoch at rate 0
(`per_epoch_lr`); the released script reports its last validation volume with background. Empty borders are not cropped away.
A class that a volume lacks is left out of its mean, as in MONAI.

Cost: the convolutions at full resolution dominate, with `feature_size` squared; memory grows with `crops` x crop volume.

    vitkit adapt unetr --model runs/hi --data hippocampus/ --out runs/seg
    vitkit.adapt("unetr", model="runs/hi", data="hippocampus/", out="runs/seg")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit.dense.losses import dice_ce_loss
from vitkit.dense.unetr import UNETR
from vitkit.dense.volume_windows import sliding_windows
from vitkit.errors import ConfigError

RECIPE = {
    "epochs": 500,  # downstream/main.py
    "warmup_epochs": 50.0,
    "optimizer": "adamw",
    "lr": 1e-4,  # the whole network, no layer decay, not scaled by the batch
    "weight_decay": 1e-5,
    "batch_size": 1,  # volumes, 4 crops of each
}


@dataclass(frozen=True)
class Settings:
    """UNETR on volumes with masks."""

    feature_size: int = 32
    """channels at full resolution; twice as many a level below (downstream/models)"""
    layers: tuple[int, ...] = (3, 6, 9)
    """three blocks, counted from 0, whose outputs are skips (unetr.py: hidden_states_out[3], [6], [9])"""
    crops: int = 4
    """random crops of `image_size` from each volume that is read (downstream/ loader)"""
    foreground: float = 0.5
    """share of crops around a voxel of some class (pos : neg 1 : 1 there)"""
    rotate90: float = 0.2
    """probability of quarter turns (downstream/ loader); flips follow `hflip`"""
    freeze: bool = False
    """train the decoder alone; the paper trains everything"""
    overlap: float = 0.5
    """of neighbouring windows when a whole volume is segmented (downstream/main.py)"""
    blend: Literal["constant", "gaussian"] = "constant"
    """how windows are averaged; gaussian trusts their middle more"""
    windows: int = 4
    """windows computed together; the result does not depend on it (1 there)"""
    volumes: int | None = None
    """train on this many of the labelled training volumes, drawn with `seed`"""

    def __post_init__(self) -> None:
        for name in ("feature_size", "crops", "windows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="at least 1")
        if self.volumes is not None and self.volumes < 1:
            raise ConfigError(f"volumes is {self.volumes}", fix="at least 1 training volume")
        for name in ("foreground", "rotate90"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="a share from 0 to 1")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap is {self.overlap}", fix="a share from 0 to below 1, e.g. 0.5")
        if self.blend not in ("constant", "gaussian"):
            raise ConfigError(f"blend is {self.blend!r}", fix="constant or gaussian")


class Segmentation(nn.Module):
    """`forward({"image": (B, C, a, b, c) normalised, "mask": (B, a, b, c) class numbers, 255 = unknown})` -> {"loss"}; crops
    of one volume may stand in an axis of their own, behind B. `segment` gives the logits of whole volumes."""

    needs_labels = False  # of whole volumes; it needs their masks
    job = "vitkit.run.volume_jobs:segment_job"
    kinds = ("volume",)

    def __init__(
        self, vit: nn.Module, settings: Settings = Settings(), *, classes: Sequence[str] = ("background", "class 1")
    ):
        super().__init__()
        self.settings, self.classes = settings, tuple(classes)
        self.net = UNETR(vit, len(self.classes), feature_size=settings.feature_size, layers=settings.layers)
        for parameter in vit.parameters():
            parameter.requires_grad_(not settings.freeze)
        if hasattr(vit, "head"):
            vit.head.requires_grad_(False)

    @property
    def vit(self) -> nn.Module:
        return self.net.vit

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, mask = batch["image"], batch["mask"]
        if image.ndim == 6:
            image, mask = image.flatten(0, 1), mask.flatten(0, 1)
        return {"loss": dice_ce_loss(self.net(image), mask, smooth=1e-6, over=0.0, squared=True)}

    @torch.no_grad()
    def segment(self, volumes: Tensor) -> Tensor:
        """Logits (B, classes, a, b, c) of normalised volumes of any size, by overlapping windows of the model's crop."""
        own = self.settings
        crop = self.vit.patch_embed.img_size
        return sliding_windows(self.net, volumes, crop, overlap=own.overlap, windows=own.windows, blend=own.blend)

    def views(self, preprocess: Any, train: Any) -> tuple[Any, Any]:
        """Augmented crops with their masks for training, the middle of a volume for a look."""
        from vitkit.data.volume_views import eval_view, finetune_view

        own, on = self.settings, train.augment
        view = finetune_view(
            preprocess,
            crops=own.crops,
            foreground=own.foreground,
            flip=0.2 if on else 0.0,
            rotate90=own.rotate90 if on else 0.0,
            intensity=0.1 if on else 0.0,
            hflip=train.hflip,
        )
        return view, eval_view(preprocess)

    def param_groups(self, weight_decay: float) -> list[dict]:
        from vitkit.parts.optim import weight_decay_groups

        return weight_decay_groups(self.named_parameters(), weight_decay)

    def finish(self) -> nn.Module:
        """The fine-tuned encoder, a timm ViT of volumes."""
        return self.vit

    def extras(self) -> dict[str, Tensor]:
        """The decoder, saved beside the encoder."""
        return self.net.head_state()


def per_epoch_lr(epoch: int, *, lr: float, warmup: float, epochs: float, start: float = 0.0, end: float = 0.0) -> float:
    """The released schedule (LinearWarmupCosineAnnealingLR stepped once an epoch): epoch 0 trains at `start`, the full rate is
    reached one epoch before the cosine to `end` starts."""
    if epoch < warmup:
        return start + (lr - start) * min(1.0, epoch / max(warmup - 1, 1))
    return end + (lr - end) / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
