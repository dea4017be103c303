"""Makes docs/img/ph_reg.png: photographs before and after PH-Reg, as a ViT sees them. tools/picture_ph_reg.py CHECKPOINT

CHECKPOINT: weights of a ViT, e.g. timm's deit_tiny_patch16_224. The photographs are the two of scikit-learn,
cut into tiles: the ViT is cleaned on some and shown on others.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import vitkit
from vitkit import weights
from vitkit.data import read
from vitkit.evaluate.cleanliness import Settings, before_after

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "ph_reg.png"
SIZE, TILE = 224, 300


def tiles(folder: Path) -> Path:
    """Overlapping tiles of the left part of both photographs for training, two of the right part for the picture."""
    for number, photo in enumerate(load_sample_images().images):
        height, width = photo.shape[:2]
        for split in ("train", "test"):
            (folder / split).mkdir(parents=True, exist_ok=True)
        tops = np.linspace(0, height - TILE, 4).round().astype(int)
        for row, top in enumerate(tops):
            for column, left in enumerate(np.linspace(0, width - 2 * TILE, 3).round().astype(int)):
                part = photo[top : top + TILE, left : left + TILE]
                Image.fromarray(part).save(folder / "train" / f"{number}-{row}-{column}.png")
        for row, top in enumerate(tops[[0, -1]]):
            Image.fromarray(photo[top : top + TILE, width - TILE :]).save(folder / "test" / f"{number}-{row}.png")
    return folder


def main(checkpoint: str) -> None:
    folder = Path(tempfile.mkdtemp())
    data, run = tiles(folder / "tiles"), folder / "run"
    own = {
        "image_size": SIZE,
        "keep_targets": True,
        "registers": 4,
        "lr": 3e-4,
        "warmup_epochs": 5.0,
        "precision": "bf16",
    }
    own |= {"epochs": 40, "eval_every": 40, "decay_epochs": 40}
    vitkit.clean("ph_reg", model=checkpoint, data=data, out=run, workers=0, quiet=True, **own)
    before = weights.load(checkpoint, image_size=SIZE, say=None)
    found = before_after(before, weights.load(run, say=None), read(data, say=None), settings=Settings(shown=4))
    torch.set_grad_enabled(False)
    figure, axes = plt.subplots(len(found.pictures), 5, figsize=(8, 6.6), dpi=100, layout="constrained")
    for row, pictures in zip(axes, found.pictures, strict=True):
        for axis, (picture, _) in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], found.columns, strict=True):
        axis.set_title(title.replace(": ", ":\n"), fontsize=9)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET)
    Image.open(TARGET).convert("RGB").quantize(128).save(TARGET, optimize=True)  # a fifth of the bytes
    print(found.verdict)


if __name__ == "__main__":
    main(sys.argv[1])
