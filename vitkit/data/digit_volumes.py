"""Volumes without files: scikit-learn's handwritten digits, moved through the slices of 16 x 16 x 16 voxels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .cases import Case
from .found import Found
from .images import Masks

SIDE = 16
COUNT = 600  # of the 1,797 digits: more would only take longer


@dataclass(eq=False)
class DigitVolumes:
    """One volume a row: a digit that wanders along both axes from slice to slice, ink 0 to 16. Its mask is the ink."""

    kind: str = "volume"
    in_memory: bool = True

    def name(self, row: int) -> str:
        return f"digits[{row}]"

    def stamp(self, row: int) -> str:
        return str(row)

    def raw(self, row: int) -> bytes | None:
        return None

    def grid(self, row: int) -> None:
        """There is no header."""

    def array(self, row: int) -> Any:
        return digit_volume(row)


class DigitMasks(DigitVolumes):
    """The ink of each volume."""

    def array(self, row: int) -> Any:
        return digit_volume(row).mask


@lru_cache(maxsize=COUNT)
def digit_volume(row: int) -> Case:
    """Digit `row` at twice its size, on a path that is a function of `row`."""
    image = np.kron(_digits()[row], np.ones((2, 2), np.int16))
    random = np.random.RandomState(row)
    start, step = random.uniform(-3, 3, 2), random.uniform(-0.35, 0.35, 2)
    slices = []
    for k in range(SIDE):
        a, b = np.rint(start + step * (k - SIDE / 2)).astype(int)
        slices.append(np.roll(image, (a, b), (0, 1)))
    data = np.stack(slices, axis=2)[None].astype(np.int16)
    return Case(f"digits[{row}]", data, (data[0] > 7).astype(np.uint8), np.eye(4))


@lru_cache(maxsize=1)
def _digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().images[:COUNT].astype(np.int16)


def read_digits() -> Found:
    """600 volumes with the masks of their ink."""
    store: Any = DigitVolumes()
    said = [
        f"scikit-learn's digits moved through {SIDE} slices: {COUNT} volumes of {SIDE} voxels a side, masks of the ink"
    ]
    names = [f"digits[{i}]" for i in range(COUNT)]
    return Found("digits", store, names, "mask", ["background", "ink"], masks=Masks(DigitMasks()), said=said)
