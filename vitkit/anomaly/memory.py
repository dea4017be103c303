"""A memory of normal patches: features of a frozen ViT, thinned out, and the distance to the nearest one.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022 (arXiv 2106.08265), on a ViT's blocks
in place of a ResNet's stages. Neighbourhoods of 3 x 3 patches are averaged, blocks normalised and put side by side, and
greedy k-centre keeps the patches that cover the others best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.anomaly.scores import gaussian_blur
from vitkit.errors import DataError

BLOCK = 1 << 24  # distances held at once (64 MiB)


def patch_features(vit: nn.Module, images: Tensor, layers: Sequence[int]) -> Tensor:
    """(B, len(layers) D, h, w): taps after `layers`, each normalised per patch and averaged over 3 x 3 patches."""
    taps = tokens.encode(vit, images, layers=layers, norm=False).taps
    found = []
    for tap in taps:
        x = F.layer_norm(tap.patches, tap.patches.shape[-1:])
        found.append(x.transpose(1, 2).unflatten(2, tap.grid))
    return F.avg_pool2d(torch.cat(found, dim=1), 3, stride=1, padding=1, count_include_pad=False)


def middle_layers(depth: int) -> tuple[int, ...]:
    """Blocks at half and three quarters of the depth, as the method takes middle stages."""
    return tuple(dict.fromkeys((max(0, depth // 2 - 1), max(0, 3 * depth // 4 - 1))))


def k_centre(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """Indices (count,) of rows of `x` (N, D): after a random first one always the row farthest from those chosen.

    Holds N distances, never N x D differences: |a - b|^2 = |a|^2 + |b|^2 - 2 a b.
    """
    count = min(count, len(x))
    chosen = torch.empty(count, dtype=torch.int64)
    chosen[0] = int(torch.randint(len(x), (), generator=torch.Generator().manual_seed(seed)))
    squares = torch.linalg.vecdot(x, x)
    distance = torch.full_like(squares, torch.inf)
    for i in range(count):
        centre = x[chosen[i]]
        new = torch.addmv(squares + squares[chosen[i]], x, centre, alpha=-2)
        distance = torch.minimum(distance, new)
        distance[chosen[i]] = -torch.inf
        if i + 1 < count:
            chosen[i + 1] = int(distance.argmax())
    return chosen.to(x.device)


def nearest(x: Tensor, bank: Tensor) -> Tensor:
    """(N,) Euclidean distance of each row of `x` (N, D) to the nearest row of `bank` (K, D)."""
    squares = torch.linalg.vecdot(bank, bank)
    step = max(1, BLOCK // len(bank))
    found = [torch.addmm(squares, part, bank.T, alpha=-2).amin(1) for part in x.split(step)]
    return (torch.cat(found) + torch.linalg.vecdot(x, x)).clamp_min(0).sqrt()


class PatchMemory:
    """`PatchMemory.of(vit, batches)` learns from normal images; `inspect(images)` is large where patches are unlike them."""

    def __init__(self, vit: nn.Module, bank: Tensor, layers: Sequence[int], smooth: float = 4.0):
        self.vit, self.bank, self.layers, self.smooth = vit, bank, tuple(layers), smooth

    @classmethod
    @torch.inference_mode()
    def of(
        cls, vit: nn.Module, batches: Iterable[Tensor], *, share: float = 0.1, most: int = 10_000, seed: int = 0
    ) -> PatchMemory:
        """Keep `share` of the patches of normalised images, at most `most`."""
        layers = middle_layers(len(vit.blocks))
        rows = [patch_features(vit, images, layers).permute(0, 2, 3, 1).flatten(0, 2) for images in batches]
        if not rows:
            raise DataError("no normal images to remember")
        x = torch.cat(rows)
        return cls(vit, x[k_centre(x, min(most, max(1, round(share * len(x)))), seed)], layers)

    @torch.inference_mode()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images to "map" (B, 1, H, W), distances interpolated between patch centres and smoothed as published (4
        pixels), and "score" (B,), the largest distance."""
        found = patch_features(self.vit, images, self.layers)
        distance = nearest(found.permute(0, 2, 3, 1).flatten(0, 2), self.bank).view(len(images), 1, *found.shape[2:])
        smooth = gaussian_blur(F.interpolate(distance, size=images.shape[2:], mode="bilinear"), self.smooth)
        return {"map": smooth, "score": distance.flatten(1).amax(1)}
