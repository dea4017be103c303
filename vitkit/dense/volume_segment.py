"""Segmentation of volumes with a frozen ViT: slices through the 2-D trunk once, a light 3-D decoder over the stacked maps.

    found = volume_segment.fit(vit, volumes, masks, split, size=96)
    found.scores["test_dice"], found.predict(volume)

The protocol of the DINOv3 medical benchmark's text (Liu et al., arXiv 2509.06467): every axial slice is repeated to three
channels and goes through the frozen trunk; maps of several depths are stacked to (D, C, h, w) and decoded by shallow 3-D
convolutions with skips and progressive upsampling (`decoders.VolumeDecoder`); Dice + cross-entropy, AdamW, cosine. The text
gives neither widths nor what is chosen how: here the learning rate is picked by the Dice of the validation volumes, and
test volumes are scored once. Rotations and flips of the text are left out, because features are cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitkit import tokens
from vitkit.dense.decoders import VolumeDecoder
from vitkit.dense.losses import dice_ce_loss
from vitkit.errors import ConfigError, DataError
from vitkit.explain.shared import evaluating


@dataclass(frozen=True)
class Training:
    """How a volume decoder is trained on cached maps."""

    rates: tuple[float, ...] = (1e-4, 1e-3)
    """learning rates of AdamW tried (the paper's is 1e-4); one value needs no validation"""
    epochs: int = 20
    """passes over the training volumes"""
    batch_size: int = 2
    """volumes a step; their losses are averaged, so that depths may differ"""
    width: int = 64
    """channels of the decoder"""
    levels: int = 3
    """last blocks whose maps are read"""
    weight_decay: float = 1e-4
    """AdamW's"""
    seed: int = 0
    """of first weights and order"""

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates {self.rates} must be positive", fix="for example (1e-4, 1e-3)")
        for name in ("epochs", "batch_size", "width", "levels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="at least 1")


@dataclass
class VolumeSegmenter:
    """A frozen ViT with a trained decoder. `table`: (rate, validation Dice). `cases`: counts (C, C) of each test volume."""

    vit: nn.Module
    decoder: VolumeDecoder
    size: tuple[int, int]
    rate: float
    n_classes: int
    table: list[tuple[float, float]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    cases: np.ndarray | None = None

    def predict(self, volume: np.ndarray) -> np.ndarray:
        """Class numbers (S, H, W) uint8 of a volume (S, H, W), uint8."""
        maps = volume_maps(self.vit, volume, self.size, self.decoder.needs)
        return predict_maps(self.decoder, maps, volume.shape)


@torch.inference_mode()
def volume_maps(
    vit: nn.Module, volume: np.ndarray, size: int | tuple[int, int], levels: int, *, batch_size: int = 32
) -> Tensor:
    """Maps (levels, S, D, h, w), oldest first, in half precision, of a volume (S, H, W), uint8; slices resized to `size`."""
    if volume.ndim != 3 or volume.dtype != np.uint8:
        raise DataError(
            f"a volume is {volume.dtype} of shape {volume.shape}",
            fix="uint8 (S, H, W), e.g. vitkit.data.volume.to_uint8",
        )
    side = [size, size] if isinstance(size, int) else list(size)
    found = []
    with evaluating(vit):
        channels, device = vit.passport.preprocess.in_chans, next(vit.parameters()).device
        for part in torch.from_numpy(np.ascontiguousarray(volume)).split(batch_size):
            pixels = F.resize(part[:, None], side, interpolation=InterpolationMode.BICUBIC, antialias=True)
            x = vit.passport.preprocess.normalise(pixels.expand(-1, channels, -1, -1).to(device))
            found.append(torch.stack(tokens.maps(vit, x, layers=levels)).half().cpu())
    return torch.cat(found, 1)


def fit(
    vit: nn.Module,
    volumes: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    split: Sequence[str],
    *,
    size: int | tuple[int, int] | None = None,
    training: Training = Training(),
    n_classes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VolumeSegmenter:
    """Train on volumes of split "train", pick the rate on "val", score "val" and "test" at the masks' own size.

    volumes: uint8 (S, H, W) of any sizes; masks: class numbers of the same shapes, 255 = unknown.
    """
    side = size or tuple(vit.passport.preprocess.image_size)
    side = (side, side) if isinstance(side, int) else (side[0], side[1])
    for i, (volume, mask) in enumerate(zip(volumes, masks, strict=True)):
        if volume.shape != mask.shape:
            raise DataError(f"volume {i} is {volume.shape}, its mask {mask.shape}", fix="a mask has its volume's shape")
    maps = []
    for i, volume in enumerate(volumes):
        maps.append(volume_maps(vit, volume, side, training.levels))
        if progress is not None:
            progress(i + 1, len(volumes))
    rows = {name: [i for i, one in enumerate(split) if one == name] for name in ("train", "val", "test")}
    classes = n_classes or 1 + max(int(np.where(mask == 255, 0, mask).max()) for mask in masks)
    found = fit_maps(vit, maps, masks, rows, side, max(2, classes), training)
    if rows["test"]:
        found.cases = counts(found.decoder, maps, masks, rows["test"], found.n_classes)
        found.scores["test_dice"] = mean_dice(found.cases)
    return found


def fit_maps(
    vit: nn.Module,
    maps: Sequence[Tensor],
    masks: Sequence[np.ndarray],
    rows: dict[str, list[int]],
    size: tuple[int, int],
    n_classes: int,
    training: Training,
) -> VolumeSegmenter:
    """As `fit`, from maps that are there already; test volumes are not looked at."""
    if not rows["train"]:
        raise DataError("no training volumes", fix='name some of the split "train"')
    if not rows["val"] and len(training.rates) > 1:
        raise DataError("several learning rates and no validation volumes", fix="give a val split, or one rate")
    best: tuple[float, float, VolumeDecoder] | None = None
    table = []
    for rate in training.rates:
        decoder = train_decoder(
            [maps[i] for i in rows["train"]], [masks[i] for i in rows["train"]], n_classes, rate, training
        )
        value = mean_dice(counts(decoder, maps, masks, rows["val"], n_classes)) if rows["val"] else math.nan
        if rows["val"]:
            table.append((rate, value))
        if best is None or value > best[0]:
            best = (-1.0 if math.isnan(value) else value, rate, decoder)
    assert best is not None
    found = VolumeSegmenter(vit, best[2], size, best[1], n_classes, table)
    if table:
        found.scores["val_dice"] = dict(table)[best[1]]
    return found


def train_decoder(
    maps: Sequence[Tensor], masks: Sequence[np.ndarray], n_classes: int, rate: float, training: Training
) -> VolumeDecoder:
    """One decoder from its first weights; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(training.seed)
        decoder = VolumeDecoder(maps[0].shape[2], n_classes, width=training.width, levels=training.levels).train()
    order = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=training.weight_decay)
    total, step = math.ceil(len(maps) / training.batch_size) * training.epochs, 0
    truth = [torch.from_numpy(np.ascontiguousarray(mask)).long()[None] for mask in masks]
    for _ in range(training.epochs):
        for some in torch.randperm(len(maps), generator=order).split(training.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            for i in some.tolist():
                logits = decoder([level[None].float() for level in maps[i]], tuple(truth[i].shape[1:]))
                (dice_ce_loss(logits, truth[i]) / len(some)).backward()
            optimizer.step()
            step += 1
    return decoder.eval()


@torch.inference_mode()
def predict_maps(decoder: VolumeDecoder, maps: Tensor, shape: Sequence[int]) -> np.ndarray:
    """Class numbers (S, H, W) uint8."""
    return decoder([level[None].float() for level in maps], tuple(shape))[0].argmax(0).to(torch.uint8).numpy()


def counts(
    decoder: VolumeDecoder, maps: Sequence[Tensor], masks: Sequence[np.ndarray], rows: Sequence[int], n_classes: int
) -> np.ndarray:
    """Voxel counts (N, C, C) of each volume in `rows`: row = true class, column = predicted."""
    from vitkit.evaluate.masks import confusion

    return np.stack([confusion(masks[i], predict_maps(decoder, maps[i], masks[i].shape), n_classes) for i in rows])


def mean_dice(cases: np.ndarray) -> float:
    """Dice of each volume, mean over its foreground classes, mean over volumes; a class that a volume lacks and that is not
    predicted there is left out."""
    hit = np.diagonal(cases, axis1=1, axis2=2)[:, 1:].astype(float)
    total = (cases.sum(1) + cases.sum(2))[:, 1:]
    each = np.divide(2 * hit, total, out=np.full(hit.shape, np.nan), where=total > 0)
    known = ~np.isnan(each)
    means = [row[keep].mean() for row, keep in zip(each, known, strict=True) if keep.any()]
    return float(np.mean(means)) if means else math.nan
