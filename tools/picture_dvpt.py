"""Makes docs/img/dvpt.png: handwritten digits, and where the prompts of a DVPT run read. tools/picture_dvpt.py CHECKPOINT

CHECKPOINT: weights of a small ViT, e.g. timm's deit_tiny_patch16_224. The digits are scikit-learn's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import vitkit
from vitkit import tokens
from vitkit.data import read
from vitkit.data.transforms import eval_view

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "dvpt.png"
LAYERS = (2, 5, 8, 11)


def reading(vit: torch.nn.Module, images: Tensor) -> list[Tensor]:
    """Share of every patch in what the prompts read (B, h, w), mean over prompts, times the number of patches: 1 is an
    even share. For each of LAYERS."""
    stream, found = tokens.embed(vit, images), []
    for index, block in enumerate(vit.blocks):
        if index in LAYERS:
            x = tokens.attend(block, stream.x)
            bottleneck, count, prefix = block.dvpt
            z = bottleneck.down(x)
            patches = z[:, count + prefix :]
            weights = (z[:, :count] @ patches.transpose(1, 2) * x.shape[-1] ** -0.5).softmax(-1)
            found.append((weights.mean(1) * patches.shape[1]).unflatten(1, stream.grid))
        stream = tokens.run(vit, stream, index, index + 1)
    return found


def main(checkpoint: str) -> None:
    folder = Path(tempfile.mkdtemp()) / "run"
    budget = {"labels_per_class": 10, "epochs": 12, "warmup_epochs": 1.0, "batch_size": 20, "eval_every": 6, "lr": 1e-2}
    own = {"prompts": 10, "image_size": 96, "hflip": False, "crop_scale": (0.8, 1.0), "head": "bn_linear"}
    vitkit.adapt("dvpt", model=checkpoint, data="digits", out=folder, workers=0, quiet=True, **budget, **own)
    model = vitkit.load(folder, say=None)
    digits = read("digits", say=None).part("test")
    view = eval_view(model.passport.preprocess)
    rows = [int((digits.labels == label).nonzero()[0][0]) for label in (0, 2, 3, 4, 7, 8)]
    pixels = torch.stack([view(digits.decode(row)) for row in rows])
    with torch.no_grad():
        shares = reading(model.vit, model.passport.preprocess.normalise(pixels))
    high = max(float(share.max()) for share in shares)
    figure, axes = plt.subplots(1 + len(LAYERS), len(rows), figsize=(6.4, 5.6), dpi=120, layout="constrained")
    for column, picture in enumerate(pixels):
        axes[0][column].imshow(picture.permute(1, 2, 0))
        for line, share in enumerate(shares, start=1):
            shown = axes[line][column].imshow(share[column], cmap="viridis", vmin=0, vmax=high)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for line, layer in enumerate(LAYERS, start=1):
        axes[line][0].set_ylabel(f"block {layer}", fontsize=8)
    figure.colorbar(shown, ax=axes[1:], shrink=0.6, label="share of what the prompts read (1 = even)")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main(sys.argv[1])
