"""Makes docs/img/ear.png: a texture, foreign patches in it, and what EAR makes of them. tools/picture_ear.py CHECKPOINT

CHECKPOINT: weights of a small ViT, e.g. timm's deit_tiny_patch16_224. The texture is the roof in scikit-learn's sample
photograph china.jpg, the patches are petals of flower.jpg.
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
from vitkit.data.transforms import eval_view
from vitkit.run.anomaly_page import as_picture, overlay
from vitkit.run.anomaly_predict import load_detector

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "ear.png"
SIDE, COUNT = 64, 120
ROOF = (slice(150, 330), slice(60, 560))  # rows and columns of china.jpg


def pieces(count: int, seed: int) -> list[np.ndarray]:
    """Random squares of the roof."""
    china = load_sample_images().images[0][ROOF]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        top, left = rng.integers(china.shape[0] - SIDE), rng.integers(china.shape[1] - SIDE)
        found.append(china[top : top + SIDE, left : left + SIDE])
    return found


def main(checkpoint: str) -> None:
    folder, rng = Path(tempfile.mkdtemp()), np.random.default_rng(3)
    flower = load_sample_images().images[1]
    for i, piece in enumerate(pieces(COUNT, 0)):
        target = folder / "data/train/good" / f"{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(piece).save(target)
    own = {"image_size": SIDE, "patch_size": 8, "filters": (16, 32, 64), "epochs": 25, "baselines": ("none",)}
    run = vitkit.anomaly(
        "ear",
        model=checkpoint,
        data=str(folder / "data"),
        out=str(folder / "run"),
        workers=0,
        quiet=True,
        batch_size=16,
        **own,
    )
    method, vit = load_detector(run.path)
    limit = float(vit.extras["anomaly.ear.limit"][0])
    view, rows = eval_view(vit.passport.preprocess), []
    for i, piece in enumerate(pieces(6, 1)):
        picture = piece.copy()
        if i:
            top, left = rng.integers(12, SIDE - 26, 2)
            y, x = rng.integers(100, 260), rng.integers(200, 400)
            picture[top : top + 12, left : left + 14] = flower[y : y + 12, x : x + 14]
        pixels = view(torch.from_numpy(picture).permute(2, 0, 1))
        out = method.inspect(vit.passport.preprocess.normalise(pixels[None]))
        base = as_picture(pixels)
        cells = [base, as_picture(out["input"][0]), as_picture(out["restored"][0])]
        cells.append(overlay(base, out["map"][0, 0].numpy(), 2 * limit))
        rows.append((cells, float(out["score"]), float(out["score"]) > limit))
    words = ("picture", "seen", "restored", "map")
    figure, axes = plt.subplots(len(words), len(rows), figsize=(6.6, 4.9), dpi=110, layout="constrained")
    for column, (cells, score, alarm) in enumerate(rows):
        for line, cell in enumerate(cells):
            axes[line][column].imshow(cell)
            axes[line][column].set(xticks=[], yticks=[])
        axes[0][column].set_title(f"{score:.2f}{' alarm' if alarm else ''}", fontsize=8)
    for line, word in enumerate(words):
        axes[line][0].set_ylabel(word, fontsize=8)
    figure.suptitle(f"Score of each piece; above {limit:.2f} is an alarm (first piece: nothing pasted)", fontsize=8)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main(sys.argv[1])
