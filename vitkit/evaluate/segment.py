"""Segmentation with a frozen ViT: feature maps are computed once, a decoder is trained on them, validation picks its rate.

    images = vitkit.data.read("scans/")                                # images/ and masks/, with splits
    found = segment.fit(vit, images, decoder="unet")
    found.scores["test_iou"], found.predict(pixels)

The protocol of the radiology benchmark (Baharoon et al., arXiv 2312.02366): SGD with momentum 0.9, no weight decay, cosine to
0 by step, soft Dice loss, learning rate from a grid by validation, the final decoder trained afresh on train + validation.
What is not taken over: the Jaccard that ignores false positives on background (`masks.legacy_jaccard`); rates are picked by
the true foreground IoU (`masks.mean_iou`). Rotations are left out: the official image and mask rotations agree only by
re-seeded global generators, and features are cached. `flips` caches mirrored copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitkit import tokens
from vitkit.data.images import Images
from vitkit.data.transforms import to_channels
from vitkit.dense.decoders import DECODERS
from vitkit.dense.losses import dice_ce_loss, dice_loss
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import masks as overlap
from vitkit.evaluate.rescale import min_max

RATES = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dice": dice_loss, "dice_ce": dice_ce_loss}
Make = Callable[[int, int], nn.Module]  # (feature width, classes) -> decoder


@dataclass(frozen=True)
class Training:
    """How a decoder is trained on cached feature maps."""

    rates: tuple[float, ...] = RATES
    """learning rates tried; one value needs no validation"""
    epochs: int = 50
    """passes over the training images, for each rate and for the final decoder"""
    batch_size: int = 16
    """images a step (the benchmark uses 128)"""
    loss: str = "dice"
    """dice, or dice_ce"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum 0.9 (radiology benchmark), or adamw with weight decay 1e-4 (DINOv3 medical benchmark)"""
    refit: bool = True
    """train the final decoder on train + validation"""
    flips: bool = False
    """cache a copy of every training image mirrored left to right"""
    seed: int = 0
    """of the decoder's first weights and the order of images"""

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates {self.rates} must be positive", fix=f"for example {RATES}")
        if self.loss not in LOSSES or self.optimizer not in ("sgd", "adamw"):
            raise ConfigError(f"loss {self.loss!r}, optimizer {self.optimizer!r}", fix="dice or dice_ce; sgd or adamw")
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"{self.epochs} epochs of batches of {self.batch_size}", fix="at least 1 of each")


@dataclass
class Cached:
    """Feature maps of the last n blocks in half precision (N, n, D, h, w) and masks (N, H, W) uint8."""

    maps: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.maps)

    def joined(self, other: Cached) -> Cached:
        return Cached(torch.cat([self.maps, other.maps]), torch.cat([self.masks, other.masks]))


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

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> Tensor:
        """Class numbers (B, *size) of pixels (B, C, *size), uint8 or in [0, 1]."""
        if self.vit is None:
            raise ConfigError("this decoder was trained on maps alone", fix="predict_maps(found.decoder, cached)")
        maps = _maps(self.vit, _prepared(self.vit, pixels, self.rescale), self.decoder.needs)
        return self.decoder(maps, self.size).argmax(1)


def fit(
    vit: nn.Module,
    images: Images,
    masks: Sequence[np.ndarray] | None = None,
    *,
    decoder: str | Make = "unet",
    image_size: int | tuple[int, int] | None = None,
    rescale: bool = False,
    training: Training = Training(),
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
    if needs > len(tokens.require_vit(vit).blocks):
        raise ConfigError(f"this decoder reads {needs} blocks of a ViT with {len(vit.blocks)}", fix="decoder=linear")
    parts = {}
    for split in ("train", "val", "test"):
        rows = np.flatnonzero(images.split == split)
        if len(rows):
            flips = training.flips and split == "train"
            parts[split] = cache(vit, images, rows, needs, size, masks, rescale, flips, batch_size)
    if "train" not in parts:
        raise DataError(f"{images.name}: no training images", fix="vitkit check --data ... shows the splits")
    classes = n_classes or _classes(parts)
    found = fit_maps(parts["train"], parts.get("val"), make=make, n_classes=classes, training=training)
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
    training: Training = Training(),
) -> Segmenter:
    """As `fit`, on feature maps that are there already."""
    make = _maker(make)
    if val is None and len(training.rates) > 1:
        raise DataError("several learning rates and no validation images", fix="give a val split, or one rate")
    table = []
    trained = None
    for rate in training.rates:
        trained = train_decoder(train, make, n_classes, rate, training)
        if val is not None:
            table.append((rate, score(trained, val, n_classes)["iou"]))
    best = max(table, key=lambda pair: -1.0 if math.isnan(pair[1]) else pair[1])[0] if table else training.rates[0]
    found = Segmenter(None, nn.Identity(), best, n_classes, tuple(train.masks.shape[1:]), table=table)  # type: ignore[arg-type]
    if table:
        found.scores["val_iou"] = dict(table)[best]
    if val is not None and training.refit:
        trained = train_decoder(train.joined(val), make, n_classes, best, training)
    elif len(training.rates) > 1:
        trained = train_decoder(train, make, n_classes, best, training)
    assert trained is not None
    found.decoder = trained
    return found


def train_decoder(data: Cached, make: Make, n_classes: int, rate: float, training: Training) -> nn.Module:
    """One decoder, trained from its first weights on cached maps; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(training.seed)
        decoder = make(data.maps.shape[2], n_classes).train()
    order = torch.Generator().manual_seed(training.seed)
    if training.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(decoder.parameters(), lr=rate, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=1e-4)
    # a last batch of one image would give batch norm nothing to normalise by
    full = max(1, math.ceil(len(data) / training.batch_size) - (len(data) % training.batch_size == 1 < len(data)))
    loss, total, step = LOSSES[training.loss], full * training.epochs, 0
    for _ in range(training.epochs):
        for rows in torch.randperm(len(data), generator=order).split(training.batch_size)[:full]:
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
            maps = list(data.maps[rows].float().unbind(1))
            value = loss(decoder(maps, tuple(data.masks.shape[1:])), data.masks[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            step += 1
    return decoder.eval()


@torch.inference_mode()
def predict_maps(decoder: nn.Module, data: Cached, batch_size: int = 32) -> np.ndarray:
    """Class numbers (N, *size) uint8 of cached maps."""
    size = tuple(data.masks.shape[1:])
    found = [decoder(list(part.float().unbind(1)), size).argmax(1) for part in data.maps.split(batch_size)]
    return torch.cat(found).to(torch.uint8).numpy()


def score(decoder: nn.Module, data: Cached, n_classes: int) -> dict[str, float]:
    """{"iou", "dice"} of the foreground classes over all pixels, and the benchmark's own "legacy_jaccard"."""
    y, said = data.masks.numpy(), predict_maps(decoder, data)
    return {
        "iou": overlap.mean_iou(y, said, n_classes),
        "dice": overlap.mean_dice(y, said, n_classes),
        "legacy_jaccard": overlap.legacy_jaccard(y, said, n_classes),
    }


@torch.inference_mode()
def cache(
    vit: nn.Module,
    images: Images,
    rows: np.ndarray,
    needs: int,
    size: tuple[int, int],
    masks: Sequence[np.ndarray] | None = None,
    rescale: bool = False,
    flips: bool = False,
    batch_size: int = 16,
) -> Cached:
    """Feature maps and masks of some images, both at `size`. Images bicubic, masks by nearest."""
    training = [m for m in vit.modules() if m.training]
    found, truth = [], []
    try:
        vit.eval()
        for start in range(0, len(rows), batch_size):
            pairs = [_pair(vit, images, int(row), masks, size) for row in rows[start : start + batch_size]]
            pixels, target = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
            for mirrored in (False, True)[: 1 + flips]:
                x = pixels.flip(-1) if mirrored else pixels
                maps = _maps(vit, _prepared(vit, x, rescale), needs)
                found.append(torch.stack(maps, 1).half().cpu())
                truth.append(target.flip(-1) if mirrored else target)
    finally:
        for module in training:
            module.training = True
    return Cached(torch.cat(found), torch.cat(truth))


def _pair(vit: nn.Module, images: Images, row: int, masks, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    image = to_channels(images.decode(row), vit.passport.preprocess.in_chans)
    mask = images.mask(row) if masks is None else torch.as_tensor(np.asarray(masks[row]))
    if image.shape[1:] != mask.shape:
        raise DataError(
            f"{images.path(row)} is {tuple(image.shape[1:])}, its mask {tuple(mask.shape)}",
            fix="a mask has the size of its image",
        )
    image = F.resize(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return image, F.resize(mask[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0].to(torch.uint8)


def _prepared(vit: nn.Module, pixels: Tensor, rescale: bool) -> Tensor:
    x = min_max(pixels) if rescale else pixels
    return vit.passport.preprocess.normalise(x.to(next(vit.parameters()).device))


def _maps(vit: nn.Module, x: Tensor, needs: int) -> list[Tensor]:
    return tokens.maps(vit, x, layers=needs)


def _maker(decoder: str | Make) -> Make:
    if not isinstance(decoder, str):
        return decoder
    if decoder not in DECODERS:
        raise ConfigError(f"decoder is {decoder!r}", fix=f"one of {', '.join(DECODERS)}, or a function")
    return DECODERS[decoder]


def _classes(parts: dict[str, Cached]) -> int:
    return max(2, 1 + max(_highest(part) for part in parts.values()))


def _highest(part: Cached) -> int:
    known = part.masks[part.masks != overlap.UNKNOWN]
    return int(known.max()) if known.numel() else 0
