"""Makes docs/img/prompt_cam.png, a trait panel of a small Prompt-CAM run: tools/picture_prompt_cam.py CHECKPOINT

CHECKPOINT: weights of a small ViT, e.g. timm's deit_tiny_patch16_224. The images are faded cuts of scikit-learn's two sample
photographs, each with one of six small marks in it; the mark is the class. (At full contrast, from two photographs only,
the small trunk did not learn the marks in as many steps.)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vitkit
from benchmarks.quality.prompt_cam import MARKS, SIZE, plant
from vitkit.data import read
from vitkit.data.transforms import eval_view
from vitkit.explain import traits

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "prompt_cam.png"
COUNTS = {"train": 900, "val": 90, "test": 60}
SHOWN = "cross"
FADE = 0.5  # contrast that is left


def main(checkpoint: str) -> None:
    folder = Path(tempfile.mkdtemp())
    write(folder / "marks")
    budget = {"epochs": 8, "warmup_epochs": 1.0, "batch_size": 32, "eval_every": 8, "optimizer": "adamw", "lr": 2e-3}
    own = {"start": 10, "prompt_dropout": 0.0, "drop_path": 0.0, "image_size": SIZE, "crop_scale": (0.9, 1.0)}
    where = {"model": checkpoint, "data": folder / "marks", "out": folder / "run", "workers": 0, "hflip": False}
    run = vitkit.explain("prompt_cam", **where, **budget, **own)
    print(run.summary["metrics"])
    model = vitkit.load(folder / "run", say=None)
    images = read(folder / "marks", say=None).part("test")
    wanted = model.classes.index(SHOWN)
    images = images.subset(np.flatnonzero(images.labels == wanted))
    view = eval_view(model.passport.preprocess)
    pixels = torch.stack([view(images.decode(i)) for i in range(len(images))])
    ((_, picture),) = traits.panels(model.vit, pixels, [wanted], model.classes, [wanted] * len(images))
    Image.fromarray(picture).quantize(128).save(TARGET, optimize=True)


def write(folder: Path) -> None:
    """Random cuts of both photographs with a mark each: train/, val/ and test/, a folder a class."""
    china, flower = (torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in load_sample_images().images)
    generator = torch.Generator().manual_seed(0)
    for split, count in COUNTS.items():
        cuts = torch.stack([cut((china, flower)[i % 2], generator) for i in range(count)])
        kinds = torch.arange(count) // 2 % len(MARKS)
        marked, _ = plant(cuts, kinds, generator)
        for i, kind in enumerate(kinds.tolist()):
            place = folder / split / MARKS[kind] / f"{i:04d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(marked[i].permute(1, 2, 0).numpy()).save(place)


def cut(photograph: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random square of 150 to 400 pixels at SIZE pixels."""
    side = int(torch.randint(150, 401, (), generator=generator))
    top, left = (int(torch.randint(0, n - side + 1, (), generator=generator)) for n in photograph.shape[1:])
    part = photograph[None, :, top : top + side, left : left + side].float()
    small = torch.nn.functional.interpolate(part, (SIZE, SIZE), mode="bilinear", antialias=True)
    return (FADE * small[0] + (1 - FADE) * 110).round().to(torch.uint8)


if __name__ == "__main__":
    main(*sys.argv[1:])
