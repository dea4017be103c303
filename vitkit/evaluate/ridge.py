"""Ridge regression on frozen features for every penalty and many targets at once, and how numbers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def ridge(
    x: np.ndarray,
    y: np.ndarray,
    vx: np.ndarray,
    vy: np.ndarray,
    tx: np.ndarray,
    penalties: Sequence[float],
    *,
    refit: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions (T, P) for `tx`, the chosen penalty (P,), and validation errors (penalties, P), of targets y (N, P).

    Minimises mean((y - xw - b)^2) + penalty * |w|^2 on features standardised by the training images; each target's
    penalty has the lowest squared error on (vx, vy), of equal ones the larger. refit: once more on both, so chosen.
    """
    path = _Path.of(x, y)
    errors = np.stack([np.square(path.predict(vx, np.full(y.shape[1], p)) - vy).mean(0) for p in penalties])
    flipped = errors[::-1]
    best = len(penalties) - 1 - flipped.argmin(0)
    chosen = np.asarray(penalties, float)[best]
    if refit:
        path = _Path.of(np.concatenate([x, vx]), np.concatenate([y, vy]))
    return path.predict(tx, chosen), chosen, errors


@dataclass(frozen=True)
class _Path:
    """Ridge solutions for every penalty: the smaller of Gram and kernel matrix in its own basis."""

    mean: np.ndarray
    scale: np.ndarray
    middle: np.ndarray  # (P,)
    basis: np.ndarray  # (D, r)
    values: np.ndarray  # (r,)
    found: np.ndarray  # (r, P)

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> _Path:
        x, y = np.asarray(x, float), np.asarray(y, float)
        mean, deviation = x.mean(0), x.std(0)
        scale = np.where(deviation > 1e-8 * max(1.0, deviation.max()), deviation, 1.0)
        x, middle, n = (x - mean) / scale, y.mean(0), len(x)
        y = y - middle
        if x.shape[1] <= n:
            values, basis = np.linalg.eigh(x.T @ x / n)
            return cls(mean, scale, middle, basis, values.clip(0), basis.T @ (x.T @ y / n))
        values, rotation = np.linalg.eigh(x @ x.T / n)
        return cls(mean, scale, middle, x.T @ rotation / n, values.clip(0), rotation.T @ y)

    def predict(self, x: np.ndarray, penalty: np.ndarray) -> np.ndarray:
        """(T, P), a penalty a target."""
        inside = (np.asarray(x, float) - self.mean) / self.scale @ self.basis
        return inside @ (self.found / (self.values[:, None] + penalty)) + self.middle


def r2(y: np.ndarray, said: np.ndarray) -> float:
    """1 - squared error / squared deviation from the mean; below 0 where the mean would have done better."""
    total = np.square(y - y.mean()).sum()
    return float(1 - np.square(y - said).sum() / total) if total > 0 else float("nan")


def mae(y: np.ndarray, said: np.ndarray) -> float:
    """Mean absolute error, in the column's own unit."""
    return float(np.abs(y - said).mean())


def correlation(y: np.ndarray, said: np.ndarray) -> float:
    """Pearson's r; NaN where one of the two never varies."""
    a, b = y - y.mean(), said - said.mean()
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum() / size) if size > 0 else float("nan")
