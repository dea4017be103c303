"""What models say about the patches of pictures, and what the pictures themselves hold there: features, pixels, masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from vitkit import tokens
from vitkit.data.images import Images
from vitkit.errors import WeightsError
from vitkit.evaluate.feature_maps import picture, prepared


@dataclass
class Seen:
    """Patch features (n, N, D) of some images, and their norms before the final norm (n, N), where the model has one."""

    features: np.ndarray
    raw: np.ndarray | None
    grid: tuple[int, ...]


@torch.no_grad()
def seen(
    vit: nn.Module,
    images: Images,
    rows: np.ndarray,
    size: tuple[int, int],
    batch_size: int,
    rolled: tuple[tuple[int, ...], int] | None = None,
) -> Seen:
    """rolled: (grid, seed): each picture is rolled by a random number of whole patches along both axes."""
    features, raw = [], []
    grid: tuple[int, ...] = ()
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        pixels = torch.stack([_pixels(vit, images, int(row), size, rolled) for row in some])
        out, before, grid = patch_features(vit, prepared(vit, pixels, False))
        if not torch.isfinite(out).all():
            raise WeightsError(
                f"the model gives features that are not finite, in the batch that begins with {images.path(int(some[0]))}",
                fix="check the weights",
            )
        features.append(out.cpu().numpy())
        raw += [] if before is None else [before.cpu().numpy()]
    return Seen(np.concatenate(features), np.concatenate(raw) if raw else None, grid)


def patch_features(vit: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    """Patch features (B, N, D) as a dense head reads them, their norms (B, N) before the final norm, and the grid. The
    norms are None where the model has no final norm, or is no plain ViT."""
    if not isinstance(vit, tokens.ViT):
        features = tokens.maps(vit, x)[-1]
        return features.flatten(2).transpose(1, 2).float(), None, tuple(features.shape[2:])
    stream = tokens.run(vit, tokens.embed(vit, x))
    out = tokens.dense(vit, tokens.finish(vit, stream))
    normed = not isinstance(vit.norm, nn.Identity) or not isinstance(vit.fc_norm, nn.Identity)
    raw = tokens.finish(vit, stream, norm=False).patches.float().norm(dim=-1) if normed else None
    return out.patches.float(), raw, out.grid


def _pixels(vit: nn.Module, images: Images, row: int, size: tuple[int, int], rolled: Any) -> Tensor:
    image = picture(vit, images, row, size)
    if rolled is None:
        return image
    grid, seed = rolled
    shift = np.random.default_rng((seed, row)).integers(0, grid)
    return image.roll([int(s) * (side // n) for s, side, n in zip(shift, size, grid, strict=True)], (1, 2))


def patch_colours(images: Images, rows: np.ndarray, size: tuple[int, int], grid: tuple[int, ...]) -> np.ndarray:
    """(n, N, up to 48) pixels of every patch, shrunk to 4 x 4 at most."""
    small = tuple(min(4, side // n) for side, n in zip(size, grid, strict=True))
    found = []
    for row in rows:
        image = images.decode(int(row)).float()
        image = torch.nn.functional.interpolate(
            image[None], size=[n * s for n, s in zip(grid, small, strict=True)], mode="bilinear", antialias=True
        )
        found.append(torch.nn.functional.unfold(image, small, stride=small)[0].T.numpy() / 255)
    return np.stack(found)


def mask_of(images: Images, row: int, side: list[int]) -> np.ndarray:
    """(H, W) class numbers at the size of the features' picture, 255 = unknown."""
    return resize(images.mask(row)[None], side, interpolation=InterpolationMode.NEAREST_EXACT)[0].numpy()


@contextmanager
def evaluating(vit: nn.Module, device: torch.device | str) -> Iterator[nn.Module]:
    """`vit` in eval mode on `device`; afterwards where and as it was."""
    training, home = [module for module in vit.modules() if module.training], next(vit.parameters()).device
    try:
        yield vit.eval().to(device)
    finally:
        vit.to(home)
        for module in training:
            module.training = True
