"""Pictures that are slices of volumes: labels, splits and features of whole volumes.

A volume's feature is the mean of its slices' features, as the radiology and DINOv3 medical benchmarks do (arXiv 2312.02366,
2509.06467), so neither the order of slices nor their number matters. Slices of one volume never lie in two splits.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from vitkit.data.images import Images
from vitkit.errors import DataError


@dataclass(frozen=True, eq=False)
class Volumes:
    """`units`: one row a volume, standing at its first slice; `number` (N,): the volume of each of the `slices`."""

    slices: Images
    units: Images
    number: np.ndarray

    @cached_property
    def _of_row(self) -> dict[int, int]:
        return {int(row): i for i, row in enumerate(self.units.rows)}

    def slices_of(self, part: Images) -> tuple[Images, np.ndarray]:
        """The slices of some volumes, and (n,) the row in `part` that each belongs to."""
        place = np.full(len(self.units), -1)
        for at, row in enumerate(part.rows.tolist()):
            place[self._of_row[row]] = at
        owner = place[self.number]
        return self.slices.subset(owner >= 0), owner[owner >= 0]

    def pooled(self, x: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """Rows (n, F) of slices averaged by volume."""
        from vitkit.evaluate.pooling import mean_over

        rows = torch.from_numpy(np.asarray(x, dtype=np.float64))
        return mean_over(rows, torch.from_numpy(owner), int(owner.max()) + 1).numpy().astype(x.dtype)


def volumes_of(images: Images, say: Callable[[str], None]) -> Volumes | None:
    """The volumes that labelled pictures are slices of; None where they are single pictures, or labelled slice by slice.

    Raises DataError where slices of one volume lie in several splits.
    """
    from vitkit.data.scans import volumes

    numbers = volumes(images)
    if numbers is None or images.labels is None:
        return None
    number, place = numbers
    count = int(number.max()) + 1
    if count == len(images):
        return None
    order = np.lexsort((place, number))
    first = order[np.searchsorted(number[order], np.arange(count))]  # the first slice of each volume
    torn = np.flatnonzero(images.split != images.split[first][number])
    names = _names([images.names[i] for i in first.tolist()])
    if len(torn):
        where = sorted({str(one) for one in images.split[number == number[torn[0]]]})
        raise DataError(
            f"{images.name}: slices of the volume {names[number[torn[0]]]} lie in {' and '.join(where)}",
            fix="one split for all slices of a volume; without a split column they are kept together",
        )
    same = images.labels == images.labels[first][number]
    same |= np.isnan(images.labels) & np.isnan(images.labels[first][number]) if images.labels.ndim == 2 else False
    if not same.all():
        say(f"slices of one volume carry different labels: {len(images)} slices are scored, not {count} volumes")
        return None
    units = replace(images.subset(first), names=names)
    say(f"{count} volumes are scored; features are means over their {len(images)} slices")
    return Volumes(images, units, number)


def _names(first: list[str]) -> list[str]:
    """Names of volumes from those of their first slices: the file, else the folder, where these are different."""
    short = [name.rpartition("[")[0] if name.endswith("]") else os.path.dirname(name) or name for name in first]
    seen = Counter(short)
    return [a if seen[a] == 1 else b for a, b in zip(short, first, strict=True)]
