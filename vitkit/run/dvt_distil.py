"""DVT's third stage: a ViT learns to give by itself what it gives with the denoiser behind it.

Source: Jiawei-Yang/Denoising-ViT (commit 82704df), main_distillation.py: the same loss on whole pictures resized to a square,
mirrored at random; AdamW 1e-5 on all weights, the rate of stage 2's rule, 5 epochs of ImageNet-1k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vitkit import tokens
from vitkit.clean.dvt import denoiser_rate, feature_loss
from vitkit.data.images import Images
from vitkit.data.transforms import to_channels
from vitkit.passport import Preprocess
from vitkit.run.batches import batches_of, epoch_steps, prepare_for
from vitkit.run.config import Config
from vitkit.run.folder import RunFolder
from vitkit.run.loop import fit
from vitkit.run.progress import Progress

FOLDER = "stage3"


@dataclass(frozen=True)
class WholeView:
    """uint8 (C, H, W) of any size to (C, *image_size): both sides resized, nothing cut off, mirrored at random."""

    preprocess: Preprocess
    hflip: bool

    def __call__(self, image: Tensor) -> Tensor:
        size = list(self.preprocess.image_size)
        image = to_channels(image, self.preprocess.in_chans)
        image = TF.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return image.flip(-1).contiguous() if self.hflip and torch.rand(()) < 0.5 else image.contiguous()


class Distillation(nn.Module):
    """`vit` trains, all of it; `teacher`, a ViT with a denoiser, stays as it is and is not part of what is saved."""

    def __init__(self, vit: nn.Module, teacher: nn.Module, rates: dict[str, Any]):
        super().__init__()
        self.vit = vit.requires_grad_(True)
        self.teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: no child
        self.rates = rates

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            target = tokens.encode(self.teacher[0], batch["image"]).patches
        losses = feature_loss(tokens.encode(self.vit, batch["image"]).patches, target)
        return {"loss": losses["l2"] + losses["cosine"], **losses}

    def before_step(self, now: Any, groups: list[dict]) -> None:
        for group in groups:
            group["lr"] = denoiser_rate(now.step, **self.rates)

    def param_groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
        """Everything decays, as in stage 2."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]


def distil(
    fabric: Any, vit: nn.Module, teacher: nn.Module, images: Images, epochs: int, config: Config, folder: RunFolder
) -> Any:
    """Train `vit` in place to give the patches of `teacher` on `images`; resumes from its own checkpoint."""
    from dataclasses import replace

    train, machine = replace(config.train, epochs=epochs), config.machine
    steps, drop_last = epoch_steps(len(images), machine, fabric.world_size)
    updates, lr = -(-steps // train.accumulate) * epochs, float(train.lr)
    rates = {"lr": lr, "min_lr": min(train.min_lr, lr), "warmup": round(0.15 * updates), "total": updates}
    preprocess = vit.passport.preprocess
    place = RunFolder(folder.path / FOLDER)
    place.path.mkdir(exist_ok=True)
    batches = batches_of(
        images,
        WholeView(preprocess, train.hflip),
        machine,
        max_bad=train.max_bad,
        rank=fabric.global_rank,
        world=fabric.world_size,
        drop_last=drop_last,
    )
    quiet = machine.quiet or not fabric.is_global_zero
    with Progress(steps * epochs, machine.batch_size, steps_per_epoch=steps, quiet=quiet) as progress:
        return fit(
            Distillation(vit, teacher.to(fabric.device), rates),
            batches,
            train=train,
            machine=machine,
            fabric=fabric,
            steps_per_epoch=steps,
            prepare=prepare_for(preprocess, fabric.device),
            folder=place,
            progress=progress,
        )
