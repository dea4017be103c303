"""Makes docs/img/rad_dino.png: a photograph, the crops that a DINOv2 step cuts from it, and what is hidden from the student.

The photograph is scikit-learn's sample image.
"""

from __future__ import annotations

import random
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_images

from vitkit.data.multicrop import MultiCrop
from vitkit.parts.block_masks import batch_masks
from vitkit.passport import Preprocess

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "rad_dino.png"
GRID, PATCH = (14, 14), 16


def main() -> None:
    photograph = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
    random.seed(5)
    torch.manual_seed(5)
    views = MultiCrop(Preprocess(image_size=(224, 224)), local_size=(96, 96), local_crops=8)(photograph)
    masks = batch_masks(random.Random(1), 4, GRID)
    mask = torch.from_numpy(masks[masks.any(1).argmax()]).reshape(GRID)
    hidden = views["image"].clone()
    hidden[:, mask.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)] = 128
    figure = plt.figure(figsize=(6.6, 4.3), dpi=80, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.9, 1.25))
    axes = top.subplots(1, 4, width_ratios=(1.45, 1, 1, 1))
    shown = (
        (photograph, "the picture"),
        (views["image"], "large crop 1\n(teacher)"),
        (hidden, "large crop 1\n(student)"),
        (views["image_2"], "large crop 2\n(teacher)"),
    )
    for axis, (pixels, title) in zip(axes, shown, strict=True):
        axis.imshow(pixels.permute(1, 2, 0))
        axis.set_title(title, fontsize=8)
    small = bottom.subplots(1, 8)
    for axis, pixels in zip(small, views["image_local"], strict=True):
        axis.imshow(pixels.permute(1, 2, 0))
    bottom.suptitle("small crops (student alone)", fontsize=8)
    for axis in (*axes, *small):
        axis.set(xticks=[], yticks=[])
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
