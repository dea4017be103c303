"""A DINOv2 batch: crops in the order in which losses pair them, and the masks of its large ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vitkit.parts.block_masks import batch_masks


@dataclass(frozen=True)
class Crops:
    """`large` (2B, C, H, W): first view of every image, then second. `small` (L B, C, h, w): crop by crop."""

    large: Tensor
    small: Tensor | None
    local: int  # L

    @property
    def images(self) -> int:
        return len(self.large) // 2


@dataclass(frozen=True)
class Masks:
    """`hidden` (2B, N) bool; `index`: hidden patches in the flat order of all; `weight`: 1 / hidden patches of the image."""

    hidden: Tensor
    index: Tensor
    weight: Tensor


def split(batch: dict[str, Tensor]) -> Crops:
    """Crops of a batch as `data.multicrop.MultiCrop` makes them; one image alone stands for both of its large crops."""
    first = batch["image"]
    large = torch.cat([first, batch.get("image_2", first)])
    small = batch.get("image_local")
    if small is None:
        return Crops(large, None, 0)
    return Crops(large, small.transpose(0, 1).flatten(0, 1), small.shape[1])


def draw_masks(
    batch: dict[str, Tensor],
    crops: Crops,
    grid: tuple[int, ...],
    share: float,
    ratio: tuple[float, float],
    shared: bool = True,
) -> Masks:
    """`batch["masks"]` (2B, N), or masks drawn for the images of all processes from their seeds, of which each takes its own:
    several processes then mask what one with the whole batch would. Without `shared` this process is alone."""
    device = crops.large.device
    if "masks" in batch:
        return masks_of(batch["masks"].to(device))
    seeds = batch.get("seed")
    if seeds is None:
        every, start = [int(torch.randint(2**62, ()))], 0
        total = crops.images
    else:
        every, start = _everybody(seeds) if shared else (seeds.tolist(), 0)
        total = len(every)
    rng = random.Random(" ".join(map(str, every)))
    drawn = batch_masks(rng, 2 * total, grid, share=share, ratio=ratio)
    mine = drawn.reshape(2, total, -1)[:, start : start + crops.images].reshape(2 * crops.images, -1)
    return masks_of(torch.from_numpy(np.ascontiguousarray(mine)), device)


def masks_of(hidden: Tensor, device: torch.device | None = None) -> Masks:
    """Indices and weights of masks (2B, N); worked out where the masks are, so that a GPU need not be waited for."""
    index = hidden.flatten().nonzero().flatten()
    counts = hidden.sum(1).clamp_min(1)
    weight = (1 / counts).unsqueeze(1).expand_as(hidden)[hidden]
    device = hidden.device if device is None else device
    return Masks(hidden.to(device), index.to(device), weight.to(device))


def _everybody(seeds: Tensor) -> tuple[list[int], int]:
    """Seeds of the images of all processes, in their order, and where this process's begin."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return seeds.tolist(), 0
    found: list[Tensor] = [torch.empty_like(seeds) for _ in range(dist.get_world_size())]
    dist.all_gather(found, seeds)
    return torch.cat(found).tolist(), len(seeds) * dist.get_rank()
