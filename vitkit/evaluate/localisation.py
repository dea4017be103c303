"""Where defects are: pixel AUROC and per-region overlap. Whether there are any: thresholds at a stated false-alarm rate.

PRO: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021: the overlap of each connected defect with what
exceeds a threshold, averaged over defects whatever their size, over thresholds up to a false-positive rate of 0.3, divided
by 0.3. As every defect's pixels share one unit of weight, that is a weighted ROC curve, and scikit-learn computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vitkit.errors import ConfigError, DataError

PRO_LIMIT = 0.3  # largest false-positive rate of the PRO curve, as published


def regions(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected defects of a mask (H, W), corners touching count: numbers 1.. (0 elsewhere), and how many there are."""
    from scipy import ndimage

    return ndimage.label(mask, structure=np.ones((3, 3), int))


def pixel_auroc(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> float | None:
    """AUROC over all pixels of all pictures; None where all are defective or none is."""
    from sklearn.metrics import roc_auc_score

    y, score = _flat(masks, maps)
    return float(roc_auc_score(y, score)) if y.any() and not y.all() else None


def pro(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], limit: float = PRO_LIMIT) -> float | None:
    """Area under the per-region overlap curve up to the false-positive rate `limit`, divided by it: 1 is perfect, limit / 2 is
    chance. None where all pixels are defective or none is."""
    from sklearn.metrics import roc_curve

    if not 0 < limit <= 1:
        raise ConfigError(f"a PRO curve up to {limit}", fix="a false-positive rate above 0 and at most 1, e.g. 0.3")
    y, score = _flat(masks, maps)
    if not y.any() or y.all():
        return None
    weight = np.concatenate([_region_weights(mask).ravel() for mask in masks])
    rate, overlap, _ = roc_curve(y, score, sample_weight=weight, drop_intermediate=True)
    at = float(np.interp(limit, rate, overlap))
    inside = rate < limit
    return float(np.trapezoid(np.append(overlap[inside], at), np.append(rate[inside], limit)) / limit)


def _region_weights(mask: np.ndarray) -> np.ndarray:
    """1 for good pixels, 1 / size of its defect for defective ones."""
    numbers, _ = regions(mask)
    sizes = np.bincount(numbers.ravel()).astype(float)
    sizes[0] = 1.0
    return 1 / sizes[numbers]


def _flat(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    for number, (mask, found) in enumerate(zip(masks, maps, strict=True)):
        if mask.shape != found.shape:
            raise DataError(f"picture {number}: a mask of {mask.shape} for an anomaly map of {found.shape}")
        if not np.isfinite(found).all():
            raise DataError(f"picture {number}: the anomaly map holds values that are no numbers")
    y = np.concatenate([np.asarray(mask, bool).ravel() for mask in masks]) if len(masks) else np.zeros(0, bool)
    score = np.concatenate([np.asarray(found, np.float32).ravel() for found in maps]) if len(maps) else np.zeros(0)
    return y, score


def threshold(good: np.ndarray, rate: float) -> tuple[float, float]:
    """(t, r): scores above t are alarms, and a new good part exceeds t with probability at most r.

    `good`: scores of good parts that were not trained on. t is the k-th smallest, k = ceil((n + 1)(1 - rate)), which is exact
    where new parts are like these (split conformal). Fewer than 1 / rate - 1 parts cannot certify it: then t is the largest
    and r = 1 / (n + 1) is what they can.
    """
    if not 0 < rate < 1:
        raise ConfigError(f"a false-alarm rate of {rate}", fix="a share above 0 and below 1, e.g. 0.05")
    values = np.sort(np.asarray(good, float))
    if not len(values) or not np.isfinite(values).all():
        raise DataError("a threshold needs scores of good parts, all of them numbers", fix="good parts in validation")
    n = len(values)
    k = math.ceil((n + 1) * (1 - rate) - 1e-9)
    return (float(values[k - 1]), rate) if k <= n else (float(values[-1]), 1 / (n + 1))
