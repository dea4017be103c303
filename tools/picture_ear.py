"""Makes docs/img/ear.png: drawn washers, defects in them, and what EAR makes of them. tools/picture_ear.py CHECKPOINT

CHECKPOINT: weights of a small ViT, e.g. timm's deit_tiny_patch16_224.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import vitkit
from vitkit.data.transforms import eval_view
from vitkit.run.anomaly_page import as_picture, overlay
from vitkit.run.anomaly_predict import load_detector

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "ear.png"
SIDE, COUNT = 64, 60
DEFECTS = ("none", "spot", "notch", "scratch", "stain", "hole")


def washer(seed: int, defect: str = "none") -> np.ndarray:
    """uint8 (SIDE, SIDE, 3): a ring on brushed metal."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    centre = SIDE / 2 + rng.uniform(-2, 2, 2)
    r = np.hypot(y - centre[0], x - centre[1])
    angle = np.arctan2(y - centre[0], x - centre[1])
    picture = 70 + 12 * np.sin(y * 1.3 + rng.uniform(0, 6))
    ring = (r > 10) & (r < 23)
    picture = np.where(ring, 190 + 15 * np.cos(angle - 0.8), picture)
    at = rng.uniform(-np.pi, np.pi)
    py, px = centre[0] + 17 * np.sin(at), centre[1] + 17 * np.cos(at)
    near = np.hypot(y - py, x - px)
    if defect == "spot":
        picture[near < 3.5] = 40
    if defect == "notch":
        picture[ring & (np.abs((angle - at + np.pi) % (2 * np.pi) - np.pi) < 0.2)] = 75
    if defect == "scratch":
        picture[ring & (np.abs((y - py) - 0.6 * (x - px)) < 1.2)] = 245
    if defect == "stain":
        picture = np.where(ring, picture - 70 * np.exp(-((near / 5) ** 2)), picture)
    if defect == "hole":
        picture[(near > 2) & (near < 4)] = 30
    noisy = picture + rng.normal(0, 3, picture.shape)
    return np.repeat(np.clip(noisy, 0, 255).astype(np.uint8)[..., None], 3, 2)


def main(checkpoint: str) -> None:
    folder = Path(tempfile.mkdtemp())
    for i in range(COUNT):
        target = folder / "data/train/good" / f"{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(washer(i)).save(target)
    own = {"image_size": SIDE, "patch_size": 8, "filters": (8, 16, 32), "epochs": 40, "baselines": ("none",)}
    run = vitkit.anomaly(
        "ear",
        model=checkpoint,
        data=str(folder / "data"),
        out=str(folder / "run"),
        workers=0,
        quiet=True,
        batch_size=8,
        lr=2e-3,
        val_fraction=0.34,  # 20 parts certify 5 %
        **own,
    )
    method, vit = load_detector(run.path)
    limit = float(vit.extras["anomaly.ear.limit"][0])
    view, rows = eval_view(vit.passport.preprocess), []
    for i, defect in enumerate(DEFECTS):
        pixels = view(torch.from_numpy(washer(1000 + i, defect)).permute(2, 0, 1))
        out = method.inspect(vit.passport.preprocess.normalise(pixels[None]))
        base = as_picture(pixels)
        cells = [base, as_picture(out["input"][0]), as_picture(out["restored"][0])]
        cells.append(overlay(base, out["map"][0, 0].numpy(), 1.5 * limit))
        rows.append((defect, cells, float(out["score"])))
    words = ("picture", "seen", "restored", "map")
    figure, axes = plt.subplots(len(words), len(rows), figsize=(6.4, 4.6), dpi=100, layout="constrained")
    for column, (defect, cells, score) in enumerate(rows):
        for line, cell in enumerate(cells):
            axes[line][column].imshow(cell, interpolation="nearest")
            axes[line][column].set(xticks=[], yticks=[])
        axes[0][column].set_title(f"{defect}\n{score:.2f}{', alarm' if score > limit else ''}", fontsize=8)
    for line, word in enumerate(words):
        axes[line][0].set_ylabel(word, fontsize=8)
    figure.suptitle(f"Defect and score; scores above {limit:.2f} are alarms", fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(TARGET, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
