"""Which tubes of a video are seen and which are predicted: VideoMAE V2's dual masking.

The encoder's tube mask hides the same places of every time step, so that a hidden patch cannot be copied from the frame
before. The decoder's running cell takes a share of each 2x2 cell of patches and moves on by one place a time step, so that
every place is predicted equally often over four steps.

Source: arXiv 2303.16727, section 3.2; OpenGVLab/VideoMAEv2, dataset/masking_generator.py. Shapes: B clips, T time steps of
tubes, S patches of a step, N = T S tubes, row-major; 1 = masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkit.errors import ConfigError
from vitkit.parts.masking import sample_noise

PHASES = 4  # of the running cell


@dataclass(frozen=True)
class DualMask:
    """`keep` (B, K): tubes that the encoder sees; `decode` (B, M): tubes that the decoder predicts; both ascending.
    `hidden` (B, M): 1 where a predicted tube was hidden from the encoder, which alone counts in the loss."""

    keep: Tensor
    decode: Tensor
    hidden: Tensor

    def to(self, device: torch.device) -> DualMask:
        return DualMask(*(x.to(device, non_blocking=True) for x in (self.keep, self.decode, self.hidden)))


def dual_mask(encoder: Tensor, decoder: Tensor | None = None) -> DualMask:
    """From masks (B, N) or (B, T, S), 1 = masked: the encoder sees the zeros of `encoder`, the decoder predicts the zeros
    of `decoder`, or without one every tube that the encoder does not see."""
    encoder = encoder.flatten(1).bool()
    keep = zeros_of(encoder, "encoder_mask")
    if decoder is None:
        decode = zeros_of(~encoder, "encoder_mask")
        return DualMask(keep, decode, torch.ones_like(decode, dtype=torch.float32))
    decode = zeros_of(decoder.flatten(1).bool(), "decoder_mask")
    return DualMask(keep, decode, encoder.gather(1, decode).float())


def zeros_of(mask: Tensor, name: str) -> Tensor:
    """Indices (B, K) of the zeros of `mask` (B, N), ascending; every row must have equally many."""
    counts = (~mask).sum(1)
    kept = int(counts[0])
    if not bool((counts == kept).all()) or not kept:
        raise ConfigError(
            f"{name} leaves {sorted(set(counts.tolist()))} tubes of the clips of one batch",
            fix="the same number, at least 1, in every clip",
        )
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]


def masked_count(places: int, ratio: float) -> int:
    """int(ratio * S) places are hidden: rounded on this side, where image MAE rounds the kept ones."""
    hidden = int(ratio * places)
    if not 0 < hidden < places:
        raise ConfigError(
            f"mask_ratio {ratio} hides {hidden} of the {places} patches of a frame",
            fix="a ratio that hides at least one and keeps at least one, larger frames or smaller patches",
        )
    return hidden


def tube_mask(noise: Tensor, steps: int, ratio: float) -> Tensor:
    """(B, steps, S) uint8 from `noise` (B, S): the int(ratio S) places of largest noise are hidden in every time step."""
    hidden = masked_count(noise.shape[1], ratio)
    order = noise.argsort(dim=1)
    mask = torch.zeros_like(noise, dtype=torch.uint8).scatter_(1, order[:, noise.shape[1] - hidden :], 1)
    return mask.unsqueeze(1).expand(-1, steps, -1)


def running_cells(ratio: float, grid: Sequence[int]) -> Tensor:
    """(4 phases, T, S) uint8: the decoder's mask. Of every 2x2 cell int(4 ratio) places are masked; place i (row-major) of
    phase q at time t is entry (i + q + t + 1) mod 4 of a queue of ones, then zeros."""
    steps, height, width = grid
    ones = int(PHASES * ratio)
    if not 0 < ones < PHASES:
        raise ConfigError(
            f"decoder_mask_ratio {ratio} masks {ones} of the 4 places of a cell", fix="0.25, 0.5 or 0.75; 0 for none"
        )
    if height % 2 or width % 2:
        raise ConfigError(
            f"the decoder's running cell needs an even number of patches each way, and a frame has {height}x{width}",
            fix="an image_size that is a multiple of twice the patch, or decoder_mask_ratio=0",
        )
    queue = torch.tensor([1] * ones + [0] * (PHASES - ones), dtype=torch.uint8)
    phase, time, place = torch.meshgrid(torch.arange(PHASES), torch.arange(steps), torch.arange(4), indexing="ij")
    cells = queue[(place + phase + time + 1) % PHASES].view(PHASES, steps, 2, 2)
    return cells.repeat(1, 1, height // 2, width // 2).flatten(2)


def draw(
    seeds: Tensor | None,
    batch: int,
    grid: Sequence[int],
    *,
    mask_ratio: float,
    decoder_mask_ratio: float,
    device: torch.device,
) -> DualMask:
    """Fresh masks of `batch` clips: functions of each clip's seed (B,) where given. Every clip draws its own phase.
    Made on the CPU and sent to `device`: counting them there would stop a GPU in every step."""
    places = math.prod(grid[1:])
    noise = sample_noise(None if seeds is None else seeds.cpu(), places + 1, batch, torch.device("cpu"))
    encoder = tube_mask(noise[:, :-1], grid[0], mask_ratio)
    decoder = None
    if decoder_mask_ratio:
        phases = (noise[:, -1] * PHASES).long().clamp_max(PHASES - 1)
        decoder = running_cells(decoder_mask_ratio, grid)[phases]
    return dual_mask(encoder, decoder).to(device)
