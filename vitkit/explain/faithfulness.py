"""Is a map worth looking at? Deletion and insertion curves, random controls, and a test with randomised weights.

Petsiuk et al., "RISE", BMVC 2018 (arXiv 1806.07421): pixels are ranked by the map; *deletion* sets the highest to 0 in the
model's normalised space, a chunk at a time, *insertion* puts them back into a blurred image; a good map makes the class'
probability fall early (small area) or rise early (large area). Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS
2018 (arXiv 1810.03292): a map that stays the same when the weights are randomised explains the image, not the model.

A map function is f(vit, images (B, C, H, W) normalised, target (B,) or None) -> (B, h, w), larger = more important.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import ConfigError
from vitkit.explain.shared import evaluating, predict, targets_of

MapFunction = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
KERNEL, SIGMA = 11, 5.0  # of the blurred image from which insertion starts


@dataclass(frozen=True)
class Curves:
    """Probability of the class after each step, (B, S + 1): step 0 is the start, step S has changed every pixel."""

    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> Tensor:
        """(B,), smaller is better."""
        return area(self.deletion)

    @property
    def insertion_area(self) -> Tensor:
        """(B,), larger is better."""
        return area(self.insertion)

    @property
    def gap(self) -> Tensor:
        """(B,) insertion minus deletion area."""
        return self.insertion_area - self.deletion_area


def area(curve: Tensor) -> Tensor:
    """Trapezoid area (B,) under curves (B, points) on [0, 1]."""
    return (curve.sum(-1) - curve[..., 0] / 2 - curve[..., -1] / 2) / (curve.shape[-1] - 1)


@torch.no_grad()
def curves(
    vit: nn.Module,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor | None = None,
    *,
    rows: int = 1,
    batch_size: int = 16,
    task: str = "single",
    progress: Callable[[int], object] | None = None,
) -> dict[str, Curves]:
    """Deletion and insertion curves of several `maps` (B, h, w) of the same normalised `images` (B, C, H, W).

    target: (B,) class whose probability is followed; by default the predicted one. rows: pixel rows' worth of pixels a step
    (1 as in RISE; more is proportionally cheaper and coarser). Steps of all images run together in batches; the three
    ends that maps share (image, zeros, blurred image) run once. progress: called with the images of every batch.
    """
    check(images, rows)
    size = (images.shape[2], images.shape[3])
    for name, one in maps.items():
        if one.ndim != 3 or len(one) != len(images) or not torch.isfinite(one).all():
            raise ConfigError(f"map {name}: shape {tuple(one.shape)}", fix=f"finite (B, h, w) for {len(images)} images")
    with evaluating(vit):
        blur = blurred(images)
        score = _scorer(vit, task, batch_size, progress)
        whole = torch.cat([predict(vit, part, task) for part in images.split(batch_size)])
        asked = targets_of(whole, target)
        ends = {
            "image": whole.gather(1, asked[:, None]),
            "nothing": predict(vit, torch.zeros_like(images[:1]), task)[0, asked][:, None],  # the same for every image
            "blurred": score(blur, asked)[:, None],
        }
        steps, chunk = steps_of(size, rows), rows * size[1]
        found = {}
        for name, one in maps.items():
            rank = ranks(one, size)  # (B, H, W): 0 is the most important pixel
            inner = {}
            for kind in ("deletion", "insertion"):
                start = images if kind == "insertion" else torch.zeros_like(images)
                rest = blur if kind == "insertion" else images
                inner[kind] = _inner(score, start, rest, rank, asked, steps, chunk, batch_size)
            found[name] = Curves(
                torch.cat([ends["image"], inner["deletion"], ends["nothing"]], 1),
                torch.cat([ends["blurred"], inner["insertion"], ends["image"]], 1),
            )
    return found


def forwards(count: int, size: tuple[int, int], maps: int, rows: int = 1) -> int:
    """Images that `curves` reports to its progress."""
    return count * (1 + 2 * maps * (steps_of(size, rows) - 1))


def check(images: Tensor, rows: int) -> None:
    """Refuse what has no curve."""
    height, width = images.shape[-2:]
    if images.ndim != 4 or min(height, width) <= KERNEL // 2:
        raise ConfigError(
            f"insertion of images of shape {tuple(images.shape)}", fix=f"(B, C, H, W) with sides above {KERNEL // 2}"
        )
    if not 1 <= rows <= height:
        raise ConfigError(f"rows is {rows} for images {height} pixels high", fix=f"1..{height}")


def steps_of(size: tuple[int, int], rows: int) -> int:
    """Steps until every pixel is changed."""
    return math.ceil(size[0] / rows)


def blurred(images: Tensor) -> Tensor:
    """Normalised images behind a Gaussian of 11 x 11 pixels and sigma 5, edges mirrored."""
    from torchvision.transforms.v2.functional import gaussian_blur

    return gaussian_blur(images, [KERNEL, KERNEL], [SIGMA, SIGMA])


def ranks(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """Place (B, H, W) of every pixel in the order of the map (B, h, w) enlarged bilinearly; ties in reading order."""
    pixels = F.interpolate(saliency[:, None].float(), size=size, mode="bilinear", align_corners=False)
    order = pixels.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place).unflatten(1, size)


def random_maps(count: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """The control: independent random values (count, *grid), as coarse as the maps that they are compared with."""
    return torch.rand(count, *grid, generator=torch.Generator().manual_seed(seed))


def _scorer(
    vit: nn.Module, task: str, batch_size: int, progress: Callable[[int], object] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    def score(images: Tensor, classes: Tensor) -> Tensor:
        """Probability (n,) of each image's class."""
        parts = []
        for x, y in zip(images.split(batch_size), classes.split(batch_size), strict=True):
            parts.append(predict(vit, x, task).gather(1, y[:, None])[:, 0])
            if progress is not None:
                progress(len(x))
        return torch.cat(parts)

    return score


def _inner(
    score: Callable[[Tensor, Tensor], Tensor],
    changed: Tensor,
    rest: Tensor,
    rank: Tensor,
    asked: Tensor,
    steps: int,
    chunk: int,
    batch_size: int,
) -> Tensor:
    """Scores (B, steps - 1) of `rest` with the first 1, 2, ... chunks of pixels taken from `changed`."""
    count = len(rest)
    pairs = torch.arange(count * (steps - 1), device=rest.device)
    found = []
    for part in pairs.split(batch_size):
        image, step = part.div(steps - 1, rounding_mode="floor"), part % (steps - 1) + 1
        taken = (rank[image] < (step * chunk)[:, None, None]).unsqueeze(1)
        found.append(score(torch.where(taken, changed[image], rest[image]), asked[image]))
    return torch.cat(found).view(count, steps - 1) if found else rest.new_zeros(count, 0)


# ---------------------------------------------------------------- randomised weights


def randomise(vit: nn.Module, depth: int | None = None, seed: int = 0) -> nn.Module:
    """A copy of `vit` with the values of its tensors shuffled from the top: head, final norms and the last `depth` blocks;
    everything where `depth` is None. Shuffling keeps the size of all values, so that activations stay in range.

    Each tensor's order follows from its name and `seed`: a deeper randomisation contains the shallower one.
    """
    random = copy.deepcopy(vit)
    blocks = len(vit.blocks)
    top = tuple(f"blocks.{index}." for index in range(blocks - (depth or 0), blocks))
    if depth is not None and not 0 <= depth <= blocks:
        raise ConfigError(f"depth is {depth}", fix=f"0..{blocks} blocks, or None for every weight")
    with torch.no_grad():
        for name, parameter in random.named_parameters():
            if depth is None or name.startswith((*top, "head", "fc_norm", "norm.", "attn_pool")):
                digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return random


def weight_check(
    vit: nn.Module,
    images: Tensor,
    function: MapFunction,
    target: Tensor | None = None,
    *,
    depths: tuple[int | None, ...] = (1, None),
    maps: Tensor | None = None,
    seed: int = 0,
) -> dict[int | None, Tensor]:
    """Rank correlation (B,) between each image's map and the one of `vit` with its last `depth` blocks randomised.

    depths: as for `randomise`; 1 = last block and head, None = everything. maps: the maps of `vit` where they are known.
    nan where a map is constant. Near 0 is right for everything randomised; near 1 means that the map ignores the weights.
    """
    known = function(vit, images, target) if maps is None else maps
    return {depth: rank_correlation(known, function(randomise(vit, depth, seed), images, target)) for depth in depths}


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation (B,) of maps (B, ...) image by image, ties sharing their mean rank; nan for constant maps."""
    from scipy.stats import rankdata

    x, y = (rankdata(one.detach().flatten(1).cpu().double().numpy(), axis=1) for one in (a, b))
    x, y = (one - one.mean(1, keepdims=True) for one in (x, y))
    norms = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return torch.from_numpy(np.where(norms > 0, (x * y).sum(1) / np.where(norms > 0, norms, 1), np.nan))
