"""Makes docs/img/prompt_cam.png: a trait panel of a small Prompt-CAM run. tools/picture_prompt_cam.py CHECKPOINT CLOTHING

CHECKPOINT: weights of a small ViT, e.g. timm's deit_tiny_patch16_224. CLOTHING: the folder of the free data set
"clothing-dataset-small" (train/, val/, test/, a folder a class).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vitkit
from vitkit.data import read
from vitkit.data.transforms import eval_view
from vitkit.explain import traits

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "prompt_cam.png"


def main(checkpoint: str, clothing: str) -> None:
    folder = Path(tempfile.mkdtemp()) / "run"
    budget = {"epochs": 8, "warmup_epochs": 1.0, "batch_size": 32, "eval_every": 4, "optimizer": "adamw", "lr": 2e-3}
    own = {"start": 10, "prompt_dropout": 0.0, "drop_path": 0.0, "image_size": 112}
    vitkit.explain("prompt_cam", model=checkpoint, data=clothing, out=folder, workers=0, quiet=True, **budget, **own)
    model = vitkit.load(folder, say=None)
    images = read(clothing, say=None).part("test")
    wanted = model.classes.index("shoes")
    images = images.subset(np.flatnonzero(images.labels == wanted)[:20])
    view = eval_view(model.passport.preprocess)
    pixels = torch.stack([view(images.decode(i)) for i in range(len(images))])
    ((_, picture),) = traits.panels(model.vit, pixels, [wanted], model.classes, [wanted] * len(images))
    Image.fromarray(picture).quantize(128).save(TARGET, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
