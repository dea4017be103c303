"""Decoders on a frozen ViT: linear, U-Net-style and light ones on feature maps that are computed once, rate by validation.

Paper: Baharoon et al., arXiv 2312.02366 (linear and U-Net decoder, code MohammedSB/DINOv2ForRadiology), and Liu et al.,
arXiv 2509.06467 (the light convolutional decoder and the volume decoder, of which only the text is public).

What happens, and where: the last blocks' feature maps of every image are kept in half precision (`cache`); a decoder
(`vitkit.dense.decoders`) is trained on them for each learning rate by SGD with momentum 0.9, no weight decay, cosine to
0 by step and soft Dice loss (`train_decoder`); the best foreground IoU on validation wins (`fit_maps`). The protocols
of `vitkit evaluate` are called segment_linear, segment_unet, segment_light, segment_upernet and segment_pyramid.

Differs from the paper: rates are picked by the true foreground IoU, not by the Jaccard that ignores false positives on
background (`masks.legacy_jaccard`). Rotations are left out: the official image and mask rotations agree only by
re-seeded global generators, and features are cached. The final decoder is trained afresh on train + validation only
with `refit`.

Cost: 2 n D h w bytes an image for n blocks (0.2 MB for the linear decoder of a ViT-S/14 at 224 px, 1 MB for a
U-Net); a pass of the decoder over the training images for each rate and epoch.

    vitkit evaluate --model vit_small_patch14_dinov2.lvd142m --data scans/ --protocols segment_unet --out runs/masks
    vitkit.evaluate(model="vit_small_patch14_dinov2.lvd142m", data="scans/", protocols="segment_unet", out="runs/masks")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.data.images import Images
from vitkit.dense.decoders import DECODERS
from vitkit.dense.losses import dice_ce_loss, dice_loss
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import masks as overlap
from vitkit.evaluate.feature_maps import Cached, cache, highest_class, prepared, require_depth

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dice": dice_loss, "dice_ce": dice_ce_loss}
Make = Callable[[int, int], nn.Module]  # (feature width, classes) -> decoder
OnStep = Callable[[int, Tensor], None]  # (images in the step, its loss)


@dataclass(frozen=True)
class Settings:
    """How a decoder is trained on cached feature maps."""

    rates: tuple[float, ...] = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
    """learning rates tried; one value needs no validation"""
    epochs: int = 50
    """passes over the training images, for each rate and for the final decoder"""
    batch_size: int = 16
    """images a step (the benchmark uses 128)"""
    loss: str = "dice"
    """dice, or dice_ce"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum 0.9 (radiology benchmark), or adamw with weight decay 1e-4 (DINOv3 medical benchmark)"""
    refit: bool = False
    """train the final decoder again on train + validation, as published"""
    flips: bool = False
    """cache a copy of every training image mirrored left to right"""
    seed: int = 0
    """of the decoder's first weights and the order of images"""

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates {self.rates} must be positive", fix="for example (1e-3, 1e-2)")
        if self.loss not in LOSSES or self.optimizer not in ("sgd", "adamw"):
            raise ConfigError(f"loss {self.loss!r}, optimizer {self.optimizer!r}", fix="dice or dice_ce; sgd or adamw")
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"{self.epochs} epochs of batches of {self.batch_size}", fix="at least 1 of each")


@dataclass
class Segmenter:
    """A frozen ViT with a trained decoder. `scores`: what the splits were worth; `table`: (rate, validation IoU)."""

    vit: nn.Module | None
    decoder: nn.Module
    rate: float
    n_classes: int
    size: tuple[int, int]
    rescale: bool = False
    table: list[tuple[float, float]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    def predict(self, pixels: Tensor) -> Tensor:
        """Class numbers (B, *size) of pixels (B, C, *size), uint8 or in [0, 1]."""
        if self.vit is None:
            raise ConfigError("this decoder was trained on maps alone", fix="predict_maps(found.decoder, cached)")
        with torch.inference_mode():
            x = prepared(self.vit, pixels, self.rescale)
            return self.decoder(tokens.maps(self.vit, x, layers=self.decoder.needs), self.size).argmax(1)


def fit(
    vit: nn.Module,
    images: Images,
    masks: Sequence[np.ndarray] | None = None,
    *,
    decoder: str | Make = "unet",
    image_size: int | tuple[int, int] | None = None,
    rescale: bool = False,
    settings: Settings = Settings(),
    n_classes: int | None = None,
    batch_size: int = 16,
) -> Segmenter:
    """Train a decoder on the images of split "train", pick its rate on "val", and score "val" and "test" once.

    masks: class numbers (H, W) of every image in order, where `images` has none of its own.
    decoder: "linear", "unet", "light", or a function (feature width, classes) -> module with `needs` (vitkit.dense.decoders).
    image_size: of pixels and masks, by default the model's. rescale: stretch each channel to [0, 1] first (`rescale.min_max`).
    """
    size = image_size or tuple(vit.passport.preprocess.image_size)
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    make = _maker(decoder)
    needs = make(8, 2).needs if not isinstance(decoder, str) else DECODERS[decoder].needs
    require_depth(vit, needs)
    parts = {}
    for split in ("train", "val", "test"):
        rows = np.flatnonzero(images.split == split)
        if len(rows):
            flips = settings.flips and split == "train"
            parts[split] = cache(
                vit, images, rows, needs, size, masks, rescale=rescale, flips=flips, batch_size=batch_size
            )
    if "train" not in parts:
        raise DataError(f"{images.name}: no training images", fix="vitkit check --data ... shows the splits")
    classes = n_classes or highest_class(*parts.values()) + 1
    device = next(vit.parameters()).device
    found = fit_maps(parts["train"], parts.get("val"), make=make, n_classes=classes, settings=settings, device=device)
    found.vit, found.size, found.rescale = vit, size, rescale
    if "test" in parts:
        found.scores |= {f"test_{k}": v for k, v in score(found.decoder, parts["test"], classes).items()}
    return found


def fit_maps(
    train: Cached,
    val: Cached | None = None,
    *,
    make: Make | str = "unet",
    n_classes: int,
    settings: Settings = Settings(),
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Segmenter:
    """As `fit`, on feature maps that are there already. With one rate nothing is chosen, and `val` only joins a refit."""
    make = _maker(make)
    if val is None and len(settings.rates) > 1:
        raise DataError("several learning rates and no validation images", fix="give a val split, or one rate")
    table, best, chosen = [], None, settings.rates[0]
    for rate in settings.rates:
        trained = train_decoder(train, make, n_classes, rate, settings, device=device, on_step=on_step)
        value = -1.0 if val is None else score(trained, val, n_classes)["iou"]
        table += [] if val is None else [(rate, value)]
        if best is None or (-1.0 if math.isnan(value) else value) > best[0]:
            best, chosen = (-1.0 if math.isnan(value) else value, trained), rate
    assert best is not None
    decoder = best[1]
    if val is not None and settings.refit:
        both = train.joined(val)
        decoder = train_decoder(both, make, n_classes, chosen, settings, device=device, on_step=on_step)
    size = (int(train.masks.shape[1]), int(train.masks.shape[2]))
    found = Segmenter(None, decoder, chosen, n_classes, size, table=table)
    if table:
        found.scores["val_iou"] = dict(table)[chosen]
    return found


def train_decoder(
    data: Cached,
    make: Make,
    n_classes: int,
    rate: float,
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> nn.Module:
    """One decoder, trained from its first weights on cached maps; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        decoder = make(data.maps.shape[2], n_classes).train().to(device)
    order = torch.Generator().manual_seed(settings.seed)
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(decoder.parameters(), lr=rate, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=1e-4)
    steps = steps_an_epoch(len(data), settings)
    loss, total, step = LOSSES[settings.loss], steps * settings.epochs, 0
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(data), generator=order).split(settings.batch_size)[:steps]:
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
            maps = list(data.maps[rows].to(device).float().unbind(1))
            value = loss(decoder(maps, tuple(data.masks.shape[1:])), data.masks[rows].to(device))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            step += 1
            if on_step is not None:
                on_step(len(rows), value.detach())
    return decoder.eval()


def steps_an_epoch(n: int, settings: Settings) -> int:
    """Batches of `n` images; a last batch of one image is left out, as it gives batch norm nothing to normalise by."""
    return max(1, math.ceil(n / settings.batch_size) - (n % settings.batch_size == 1 < n))


def predict_maps(decoder: nn.Module, data: Cached, batch_size: int = 32) -> np.ndarray:
    """Class numbers (N, *size) uint8 of cached maps."""
    return np.concatenate(list(_predicted(decoder, data, batch_size)))


def _predicted(decoder: nn.Module, data: Cached, batch_size: int) -> Iterator[np.ndarray]:
    device, size = next(decoder.parameters()).device, tuple(data.masks.shape[1:])
    for part in data.maps.split(batch_size):
        with torch.inference_mode():
            said = decoder(list(part.to(device).float().unbind(1)), size).argmax(1).to(torch.uint8).cpu().numpy()
        yield said


def score(decoder: nn.Module, data: Cached, n_classes: int) -> dict[str, float]:
    """{"iou", "dice"} of the foreground classes over all pixels, and the benchmark's own "legacy_jaccard"."""
    y, said = data.masks.numpy(), predict_maps(decoder, data)
    return {
        "iou": overlap.mean_iou(y, said, n_classes),
        "dice": overlap.mean_dice(y, said, n_classes),
        "legacy_jaccard": overlap.legacy_jaccard(y, said, n_classes),
    }


def _maker(decoder: str | Make) -> Make:
    if not isinstance(decoder, str):
        return decoder
    if decoder not in DECODERS:
        raise ConfigError(f"decoder is {decoder!r}", fix=f"one of {', '.join(DECODERS)}, or a function")
    return DECODERS[decoder]
