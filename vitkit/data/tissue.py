"""Where an overview of a slide shows tissue.

Tissue is what is coloured: Otsu's threshold (1979) on the saturation of the overview, then small specks and holes are
removed. The threshold is kept between 15 and 60 of 255, as Otsu's always finds two classes, also where there is tissue only
or none; pixels darker than 25 are pen or scanner border, never tissue.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

CELL = 16  # overview pixels along a tile's side; specks and holes below an eighth of its area are removed


def tissue_mask(picture: np.ndarray) -> np.ndarray:
    """bool (h, w): where an RGB overview (h, w, 3) shows tissue."""
    low, high = picture.min(-1).astype(np.int16), picture.max(-1).astype(np.int16)
    saturation = (255 * (high - low) // np.maximum(high, 1)).astype(np.uint8)
    mask = (saturation > np.clip(otsu(saturation), 15, 60)) & (high >= 25)
    disk = ndimage.generate_binary_structure(2, 1)
    mask = ndimage.binary_opening(mask, disk)
    mask = ndimage.binary_closing(np.pad(mask, 2, mode="edge"), disk, iterations=2)[2:-2, 2:-2]
    mask = _without_small(mask, CELL**2 // 8)
    return ~_without_small(~mask, CELL**2 // 8)


def otsu(values: np.ndarray) -> int:
    """Threshold of uint8 values (background <= threshold) with the largest variance between the two classes."""
    counts = np.bincount(values.reshape(-1), minlength=256).astype(float)
    below, total = np.cumsum(counts), counts.sum()
    mass = np.cumsum(counts * np.arange(256))
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (mass[-1] * below / total - mass) ** 2 / (below * (total - below))
    return int(np.nanargmax(np.where(np.isfinite(between), between, -1)))


def _without_small(mask: np.ndarray, least: int) -> np.ndarray:
    """`mask` without connected parts of fewer than `least` pixels."""
    parts, _ = ndimage.label(mask)
    keep = np.bincount(parts.reshape(-1)) >= least
    keep[0] = False
    return keep[parts]
