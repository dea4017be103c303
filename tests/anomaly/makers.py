"""Drawn parts in MVTec AD's layout: a bright square on stripes; defects are dark discs on the square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def part(seed: int, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    """uint8 (H, W, 3) of a good part."""
    rng = np.random.default_rng(seed)
    height, width = size
    picture = np.zeros((height, width, 3)) + 60 + 20 * np.sin(np.arange(width) / 2 + rng.uniform(0, 6))[None, :, None]
    top, left = height // 4 + rng.integers(-2, 3), width // 4 + rng.integers(-2, 3)
    picture[top : top + height // 2, left : left + width // 2] = 180
    return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


def broken(seed: int, size: tuple[int, int] = (40, 40)) -> tuple[np.ndarray, np.ndarray]:
    """A part with a disc in its middle, and the mask (H, W) bool of it."""
    picture = part(seed, size)
    rng = np.random.default_rng(1000 + seed)
    y, x = size[0] // 2 + rng.integers(-4, 5), size[1] // 2 + rng.integers(-4, 5)
    rows, columns = np.ogrid[: size[0], : size[1]]
    mask = (rows - y) ** 2 + (columns - x) ** 2 <= 16
    picture[mask] = (20, 10, 10)
    return picture, mask


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def mvtec(root: Path, good: int = 12, test: int = 3, *, masks: bool = True, size: tuple[int, int] = (40, 40)) -> Path:
    """train/good, test/good, test/disc and, if asked for, ground_truth/disc."""
    for i in range(good):
        save(root / f"train/good/{i:03d}.png", part(i, size))
    for i in range(test):
        save(root / f"test/good/{i:03d}.png", part(500 + i, size))
        picture, mask = broken(600 + i, size)
        save(root / f"test/disc/{i:03d}.png", picture)
        if masks:
            save(root / f"ground_truth/disc/{i:03d}_mask.png", mask)
    return root
