"""Makes docs/img/dvt.png: stage 1 of DVT on photographs that scikit-learn brings. tools/picture_dvt.py CHECKPOINT

CHECKPOINT: weights of a small ViT, e.g. timm's deit_tiny_patch16_224.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vitkit import weights
from vitkit.clean.dvt import Settings
from vitkit.explain import pca
from vitkit.run.dvt_stage1 import decompose, whole_picture

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "dvt.png"
SETTINGS = Settings(views=64, steps=500, pixels=1024)
TITLES = (
    "photograph",
    "DeiT-Ti's features",
    "the field: clean features",
    "the map of all views",
    "size of the residual",
)


def main() -> None:
    torch.set_num_threads(1)
    vit = weights.load(sys.argv[1], image_size=256, say=None).eval()
    photographs = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in load_sample_images().images]
    figure, axes = plt.subplots(len(photographs), 5, figsize=(11, 4.7), layout="constrained")
    for row, photograph in zip(axes, photographs, strict=True):
        picture = whole_picture(photograph, vit.passport.preprocess)
        raw, clean, model = decompose(vit, [picture], SETTINGS, seeds=[0], device=torch.device("cpu"), batch_size=16)
        with torch.no_grad():
            shared = model.artifacts[0].view_as(raw[0])
            residual = model.residual(raw.flatten(1, 2)).view_as(raw)[0].norm(dim=-1)
        basis = pca.fit([raw[0] - raw[0].mean((0, 1))])
        maps = [one - one.mean((0, 1)) for one in (raw[0], clean[0], shared)]
        shown = [pca.colours([basis.project(one)])[0] for one in maps]
        size = vit.passport.preprocess.image_size
        pixels = vit.passport.preprocess.denormalise(picture[None])[0].permute(1, 2, 0)
        row[0].imshow(pixels, extent=(0, size[1], size[0], 0))
        for axis, map_ in zip(row[1:4], shown, strict=True):
            axis.imshow(map_)
        row[4].imshow(residual, cmap="magma")
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=9)
    TARGET.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    image = Image.open(buffer).convert("RGB").quantize(200, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(TARGET, optimize=True)
    print(f"{TARGET} ({TARGET.stat().st_size // 1024} kB)")


if __name__ == "__main__":
    main()
