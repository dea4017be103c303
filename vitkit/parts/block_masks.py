"""Block-wise masks of BEiT, as DINOv2 draws them for iBOT: rectangles until the asked number of patches is hidden.

Source: DINOv2, data/masking.py and data/collate.py. The order of draws from Python's generator is the official one, so
that a seed gives the official masks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

TRIES = 10


def block_mask(
    rng: random.Random,
    grid: Sequence[int],
    count: int,
    *,
    least: int = 4,
    most: float | None = None,
    aspect: float = 0.3,
) -> np.ndarray:
    """bool (rows, columns) with at most `count` patches hidden in rectangles of `least` to `most` patches each.

    Each rectangle has area ~ U(least, what is left) and log aspect ~ U(log aspect, -log aspect) and must add between one
    and as many patches as are left; drawing ends when `TRIES` attempts in a row add nothing.
    """
    rows, columns = grid
    mask = np.zeros((rows, columns), dtype=bool)
    most = rows * columns if most is None else most
    hidden = 0
    while hidden < count:
        added = _rectangle(rng, mask, least, min(count - hidden, most), aspect)
        if not added:
            break
        hidden += added
    return mask


def _rectangle(rng: random.Random, mask: np.ndarray, least: float, room: float, aspect: float) -> int:
    """Hide one rectangle in place; how many patches that added."""
    rows, columns = mask.shape
    for _ in range(TRIES):
        area = rng.uniform(least, room)
        ratio = math.exp(rng.uniform(math.log(aspect), math.log(1 / aspect)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height >= rows or width >= columns:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        piece = mask[top : top + height, left : left + width]
        new = int(height * width - piece.sum())
        if 0 < new <= room:
            piece[:] = True
            return new
    return 0


def smallest_block(patches: int) -> int:
    """Smallest rectangle: the official 4 patches, fewer on grids where a tenth of the image is hardly that many."""
    return min(4, max(1, patches // 16))


def batch_masks(
    rng: random.Random,
    images: int,
    grid: Sequence[int],
    *,
    share: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> np.ndarray:
    """bool (images, rows * columns): int(images * share) images are masked, the i-th by a ratio drawn from the i-th of
    as many equal slices of `ratio`; then all are shuffled."""
    patches = math.prod(grid)
    least, masked = smallest_block(patches), int(images * share)
    steps = np.linspace(*ratio, masked + 1)
    found = []
    for low, high in pairwise(steps):
        count = int(patches * rng.uniform(low, high))
        found.append(block_mask(rng, grid, count, least=least, most=ratio[1] * patches))
    found += [np.zeros(tuple(grid), dtype=bool) for _ in range(images - masked)]
    rng.shuffle(found)
    return np.stack(found).reshape(images, patches)
