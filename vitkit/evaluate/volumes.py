"""Dice of segmented volumes: class by class, volume by volume, and a mean over volumes that can be trusted.

Counts are confusions (N, C, C) of N volumes (`masks.confusion`). As MONAI's DiceMetric has it, a class that a volume's truth
lacks is NaN there (also when it was predicted) and left out; means go over the classes of a volume, then over volumes.
The figure that Hi-End-MAE's script reports is that of its last validation volume with background: the last row here.
"""

from __future__ import annotations

import numpy as np


def dice_cases(counts: np.ndarray) -> np.ndarray:
    """Dice (N, C) of each class in each volume; NaN where the truth has none of it."""
    counts = np.asarray(counts, dtype=np.float64)
    hit = np.diagonal(counts, axis1=1, axis2=2)
    truth, said = counts.sum(2), counts.sum(1)
    return np.divide(2 * hit, truth + said, out=np.full(hit.shape, np.nan), where=truth > 0)


def volume_means(cases: np.ndarray, *, background: bool = False) -> np.ndarray:
    """Mean Dice (N,) over the classes that each volume has, without class 0 unless `background`; NaN where it has none."""
    used = np.asarray(cases)[:, 0 if background else 1 :]
    known = ~np.isnan(used)
    total = np.where(known, used, 0.0).sum(1)
    return np.divide(total, known.sum(1), out=np.full(len(used), np.nan), where=known.any(1))


def mean_dice(cases: np.ndarray, *, background: bool = False) -> tuple[float, int]:
    """(mean over volumes of `volume_means`, how many volumes count)."""
    means = volume_means(cases, background=background)
    known = ~np.isnan(means)
    return (float(means[known].mean()) if known.any() else float("nan")), int(known.sum())
