"""PCA: what a ViT tells apart, as colours: three principal components of the patch tokens of a whole gallery. No training.

Paper: the pictures of Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024
(arXiv 2304.07193), figure 1.

What happens, and where: `fit` finds the principal axes of the patch tokens of all pictures together, so that equal colours
mean equal features in every picture; `colours` shows three components as red, green and blue, each stretched between its
2nd and 98th percentile. `foreground` divides patches at Otsu's threshold of the first component; the side with fewer
patches on the pictures' edges is the foreground, and axes fitted to it alone show parts of objects. `nearest` finds the
patches most alike (cosine) in all pictures; `compact` packs features into a few bytes a patch for that on a web page.

Differs from the paper: one basis and threshold for the whole gallery instead of one a group of pictures, and an automatic
threshold instead of one set by hand.

Cost: a forward pass, and one D x D eigenvalue problem for the gallery.

    vitkit explain vit_small_patch14_dinov2.lvd142m photos/
    vitkit.explain.pca.fit([vitkit.explain.pca.features(vit, images).flatten(0, 2)])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, DataError
from vitkit.explain.shared import evaluating


@dataclass(frozen=True)
class Settings:
    """Principal components of patch tokens."""

    layer: int = -1
    """block whose output is shown (after the final norm); negative counts from the last"""
    components: int = 3
    """principal axes"""

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ConfigError(f"components is {self.components}", fix="a positive number, e.g. 3")


@dataclass(frozen=True)
class Basis:
    """Principal axes: `mean` (D,), `axes` (D, k), and `explained` (k,), the share of the variance along each."""

    mean: Tensor
    axes: Tensor
    explained: Tensor

    def project(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., k)."""
        return (features.to(self.mean.dtype) - self.mean) @ self.axes


@torch.no_grad()
def features(vit: nn.Module, images: Tensor, settings: Settings = Settings()) -> Tensor:
    """Patch tokens (B, *grid, D), float32, after the norm that makes them comparable."""
    with evaluating(vit) as vit:
        out = tokens.encode(vit, images, layers=[settings.layer])
        return tokens.dense(vit, out.taps[0]).patches.float().unflatten(1, out.grid)


def fit(parts: Sequence[Tensor], settings: Settings = Settings()) -> Basis:
    """One basis for the patches (n_i, D) of several pictures, of any sizes. The eigenvalue problem is in float64.

    Signs are fixed by making each axis' largest loading positive, so that colours do not flip between runs.
    """
    x = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double()
    if len(x) < 2:
        raise DataError(f"principal components of {len(x)} patches", fix="at least two patches")
    mean = x.mean(0)
    x = x - mean
    values, vectors = torch.linalg.eigh(x.T @ x / (len(x) - 1))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    axes = vectors[:, : settings.components]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    explained = values[: settings.components] / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Basis(mean, axes * largest.sign(), explained)


def colours(projected: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Projected patches (*grid, >= 3) of each picture as uint8 (*grid, 3), on one scale for all; outside `masks` black."""
    if projected[0].shape[-1] < 3:
        raise ConfigError(f"{projected[0].shape[-1]} components make no colours", fix="components=3")
    shown = [part[..., :3] for part in projected]
    kept = masks if masks is not None else [torch.ones(part.shape[:-1], dtype=torch.bool) for part in shown]
    seen = torch.cat([part[mask] for part, mask in zip(shown, kept, strict=True)])
    if not len(seen):
        return [torch.zeros_like(part, dtype=torch.uint8) for part in shown]
    ordered = seen.sort(0).values
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.02, 0.98))
    scale = (high - low).clamp_min(torch.finfo(low.dtype).tiny)
    pictures = [((part - low) / scale).clamp(0, 1).mul(255).round().to(torch.uint8) for part in shown]
    return [picture * mask.unsqueeze(-1) for picture, mask in zip(pictures, kept, strict=True)]


def foreground(projected: Sequence[Tensor]) -> list[Tensor]:
    """Bool (h, w) masks of the pictures, from their first component and one threshold for all."""
    first = [part[..., 0] for part in projected]
    limit = otsu(torch.cat([part.flatten() for part in first]))
    high = [part > limit for part in first]
    edges = torch.cat([torch.cat([m[0], m[-1], m[:, 0], m[:, -1]]) for m in high]).double().mean()
    inside = torch.cat([m.flatten() for m in high]).double().mean()
    return high if edges <= inside else [~mask for mask in high]


def otsu(values: Tensor) -> float:
    """The threshold that leaves the least variance within the two groups that it makes."""
    ordered = values.flatten().double().sort().values
    sums = ordered.cumsum(0)[:-1]
    count = torch.arange(1, len(ordered), dtype=torch.float64, device=ordered.device)
    rest = len(ordered) - count
    between = count * rest * (sums / count - (ordered.sum() - sums) / rest) ** 2
    at = int(between.argmax()) if len(between) else 0
    return float((ordered[at] + ordered[min(at + 1, len(ordered) - 1)]) / 2)


def nearest(gallery: Tensor, queries: Tensor, k: int = 12) -> tuple[Tensor, Tensor]:
    """Cosine similarity (Q, k) and row (Q, k) of the patches of `gallery` (M, D) most like each of `queries` (Q, D)."""
    gallery, queries = (torch.nn.functional.normalize(part.float(), dim=-1) for part in (gallery, queries))
    return (queries @ gallery.T).topk(min(k, len(gallery)), dim=1)


def compact(rows: Tensor, dims: int = 48) -> tuple[Tensor, float]:
    """Features (M, D) as int8 (M, <= dims) whose scaled dot products (/ 127^2) approximate cosines, and the share kept.

    Unit vectors are projected on the principal axes of their second moments (no mean taken away: cosines need it), made
    unit vectors again and rounded. kept: mean squared length before that, 1 where nothing was lost.
    """
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    vectors = torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1)[:, : min(dims, unit.shape[1])]
    small = unit @ vectors
    kept = float(small.square().sum(1).mean())
    small = torch.nn.functional.normalize(small, dim=-1)
    return small.mul(127).round().to(torch.int8), min(kept, 1.0) if math.isfinite(kept) else 0.0
