"""Folders of small NIfTI volumes with masks, written when a test asks for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def ball(size: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball whose upper half is class 2, the lower class 1, in noise: (int16 voxels, uint8 mask)."""
    random = np.random.default_rng(seed)
    centre = [side / 2 + random.uniform(-1, 1) for side in size]
    at = np.meshgrid(*map(np.arange, size), indexing="ij")
    inside = sum((a - c) ** 2 for a, c in zip(at, centre, strict=True)) < (min(size) / 3) ** 2
    mask = np.where(inside, np.where(at[2] > centre[2], 2, 1), 0).astype(np.uint8)
    data = 200 + 400 * inside + 200 * (mask == 2) + random.normal(0, 20, size)
    return data.astype(np.int16), mask


def volume_set(root: Path, *, count: int = 6, size: tuple[int, int, int] = (10, 12, 9), split: bool = False) -> Path:
    """images/ and labels/ of `count` volumes; with `split` an index.csv: the last two val and test, the rest train."""
    rows = ["split,image,mask"]
    for i in range(count):
        data, mask = ball(size, i)
        nifti(root / "images" / f"case{i}.nii.gz", data)
        nifti(root / "labels" / f"case{i}.nii.gz", mask)
        part = "train" if i < count - 2 else "val" if i == count - 2 else "test"
        rows.append(f"{part},images/case{i}.nii.gz,labels/case{i}.nii.gz")
    if split:
        (root / "index.csv").write_text("\n".join(rows) + "\n")
    return root
