"""Overlap of predicted and true masks over a whole data set, class by class.

`metrics.iou` and `metrics.dice` are means over images of everything that is not background. Here pixels of all images are
counted together and classes kept apart, as the radiology benchmark (arXiv 2312.02366) and most segmentation tables do.

Masks are class numbers (..., H, W); pixels whose truth is 255 are left out. A class that neither occurs nor is predicted is
NaN and left out of means.
"""

from __future__ import annotations

import numpy as np

from vitkit.data.images import UNKNOWN
from vitkit.errors import DataError


def confusion(y: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Pixel counts (C, C): row = true class, column = predicted."""
    y, predicted = np.asarray(y), np.asarray(predicted)
    if y.shape != predicted.shape:
        raise DataError(f"masks {y.shape} and predictions {predicted.shape} do not fit together", fix="one shape")
    known = y != UNKNOWN
    truth, said = y[known].astype(np.int64), predicted[known].astype(np.int64)
    for name, values in (("mask", truth), ("prediction", said)):
        if values.size and (values.max() >= n_classes or values.min() < 0):
            raise DataError(
                f"a {name} has class {int(values.max())} of {n_classes}", fix="class numbers 0..C-1, 255 = unknown"
            )
    return np.bincount(truth * n_classes + said, minlength=n_classes**2).reshape(n_classes, n_classes)


def confusions(y: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """`confusion` of every image of (N, H, W): (N, C, C). Sums of it give the figures of any selection of images."""
    y, predicted = np.asarray(y), np.asarray(predicted)
    return np.stack([confusion(a, b, n_classes) for a, b in zip(y, predicted, strict=True)])


def table_iou(tables: np.ndarray) -> float:
    """`mean_iou` from confusions (N, C, C)."""
    return _mean(_iou(np.asarray(tables).sum(0, dtype=float))[1:])


def class_iou_of(tables: np.ndarray) -> np.ndarray:
    """`class_iou` from confusions (N, C, C)."""
    return _iou(np.asarray(tables).sum(0, dtype=float))


def table_dice(tables: np.ndarray) -> float:
    """`mean_dice` from confusions (N, C, C)."""
    return _mean(_dice(np.asarray(tables).sum(0, dtype=float))[1:])


def class_iou(y: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """TP / (TP + FP + FN) of every class (C,), background included."""
    return _iou(confusion(y, predicted, n_classes).astype(float))


def class_dice(y: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of every class (C,), background included."""
    return _dice(confusion(y, predicted, n_classes).astype(float))


def mean_iou(y: np.ndarray, predicted: np.ndarray, n_classes: int, *, background: bool = False) -> float:
    """Mean IoU over classes, without class 0 unless `background`. Painting background as foreground costs: false
    positives count wherever they are."""
    return _mean(class_iou(y, predicted, n_classes)[0 if background else 1 :])


def mean_dice(y: np.ndarray, predicted: np.ndarray, n_classes: int, *, background: bool = False) -> float:
    """Mean Dice over classes, without class 0 unless `background`: the benchmark's Dice metric."""
    return _mean(class_dice(y, predicted, n_classes)[0 if background else 1 :])


def legacy_jaccard(y: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    """The benchmark's Jaccard, for comparison with its tables only: pixels whose truth is background are dropped
    altogether, so false positives on them are free and an image painted all foreground scores 1."""
    y = np.asarray(y)
    return _mean(_iou(confusion(np.where(y == 0, UNKNOWN, y), predicted, n_classes).astype(float))[1:])


def _iou(table: np.ndarray) -> np.ndarray:
    hit = np.diag(table)
    return _ratio(hit, table.sum(0) + table.sum(1) - hit)


def _dice(table: np.ndarray) -> np.ndarray:
    return _ratio(2 * np.diag(table), table.sum(0) + table.sum(1))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)


def _mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")
