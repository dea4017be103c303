"""Pictures of patch features: their principal components as colours, and their norms, of one model or of two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from vitkit.evaluate.cleanliness import Measured

SIDE = 224  # pixels of the shorter side of a picture of patches, at least


def side_by_side(
    models: Mapping[str, Measured], pictures: Sequence[Tensor]
) -> tuple[list[list[tuple[np.ndarray, str]]], list[str]]:
    """(rows of (picture, caption), column titles): each picture (C, H, W) uint8, then colours and norms of each model.

    Colours are one basis and one scale for all models of one width, so that equal colours mean equal features; norms share
    one scale, dark for the lowest and bright for the highest of the first model.
    """
    from vitkit.explain import pca

    found = list(models.values())
    if not pictures:
        return [], []
    widths = {one.maps.shape[-1] for one in found}
    together = [pca.fit([one.maps.flatten(0, 1) for one in found])] * len(found) if len(widths) == 1 else None
    bases = together or [pca.fit([one.maps.flatten(0, 1)]) for one in found]
    projected = [list(b.project(one.maps.unflatten(1, one.grid))) for b, one in zip(bases, found, strict=True)]
    painted = pca.colours([part[..., :3] for model in projected for part in model])
    count = len(pictures)
    rows: list[list[tuple[np.ndarray, str]]] = [[(_page(image), "image")] for image in pictures]
    low, high = _range(found[0])
    for index, one in enumerate(found):
        norms = one.norms if one.raw is None else one.raw
        for row in range(count):
            colours = painted[index * count + row].numpy()
            values = norms[one.shown[row]].reshape(one.grid)
            heat = _heat((values - low) / max(high - low, 1e-12))
            rows[row].append((_enlarged(colours), "components"))
            rows[row].append((_enlarged(heat), f"{values.min():.3g} to {values.max():.3g}"))
    titles = ["image", *(f"{name}: {what}" for name in models for what in ("three components", "norms"))]
    return rows, titles


def _range(one: Measured) -> tuple[float, float]:
    norms = (one.norms if one.raw is None else one.raw)[one.shown]
    return float(norms.min()), float(norms.max())


def _page(image: Tensor) -> np.ndarray:
    array = image.permute(1, 2, 0).numpy()
    return np.repeat(array, 3, 2) if array.shape[2] == 1 else array


def _enlarged(patches: np.ndarray) -> np.ndarray:
    """(h, w, 3) with every patch as a square of pixels."""
    times = max(1, -(-SIDE // min(patches.shape[:2])))
    return patches.repeat(times, 0).repeat(times, 1)


def _heat(values: np.ndarray) -> np.ndarray:
    """(h, w) in [0, 1] to uint8 (h, w, 3)."""
    from matplotlib import colormaps

    return (colormaps["viridis"](np.clip(values, 0, 1))[..., :3] * 255).round().astype(np.uint8)
