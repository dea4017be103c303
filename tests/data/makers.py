"""Small data sets on disk, made when a test asks for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def texture(seed: int, height: int = 48, width: int = 48, channels: int = 3) -> np.ndarray:
    """Smooth random blobs with detail: pictures that differ as photographs do."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    array = np.asarray(coarse, dtype=np.float64) * 0.8 + rng.integers(0, 52, (height, width, 1))
    array = array.clip(0, 255).astype(np.uint8)
    return array if channels == 3 else array[..., 0]


def picture(path: Path, seed: int = 0, height: int = 48, width: int = 48, channels: int = 3, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(texture(seed, height, width, channels)).save(path, **options)
    return path


def class_folders(root: Path, counts: dict[str, int], prefix: str = "", start: int = 0) -> Path:
    """root/[prefix/]<class>/<n>.png"""
    seed = start
    for name, n in counts.items():
        for i in range(n):
            picture(root / prefix / name / f"{i:03d}.png", seed)
            seed += 1
    return root


def table(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def pictures(folder: Path, n: int) -> list[str]:
    """p0.png, p1.png, ... in `folder`; their names."""
    return [picture(folder / f"p{i}.png", i, 16, 16).name for i in range(n)]
