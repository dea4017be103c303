"""Makes docs/img/dta.png: tools/picture_dta.py WEIGHTS (a ViT with ImageNet's head, e.g. DeiT-Ti).

The pictures are cuts of scikit-learn's two sample photographs; the attack sees the trunk alone, the labels are the head's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sklearn.datasets import load_sample_images

from vitkit import tokens, weights
from vitkit.attack.dta import DTA, Settings
from vitkit.run.class_names import ClassNames

CUTS = (
    ("china", 0, 427, 100, 527),
    ("china", 60, 360, 340, 640),
    ("flower", 0, 427, 120, 547),
    ("flower", 110, 310, 230, 430),
)
EPS = 8 / 255


def main(path: str) -> None:
    china, flower = load_sample_images().images
    whole = {"china": china, "flower": flower}
    cuts = [torch.from_numpy(whole[name][a:b, c:d].copy()).permute(2, 0, 1)[None] / 255 for name, a, b, c, d in CUTS]
    pixels = torch.cat(
        [torch.nn.functional.interpolate(cut, (224, 224), mode="bilinear", antialias=True) for cut in cuts]
    )
    vit = weights.load(path, num_classes=None, say=None).eval()
    attack = DTA(vit, Settings(eps=EPS))
    attack.search(pixels)
    changed = attack(pixels)
    figure, axes = plt.subplots(3, len(cuts), figsize=(7.6, 5.9), dpi=80)
    rows = (("clean", pixels), ("DTA, 8/255", changed), ("difference x 8", ((changed - pixels) * 8 + 0.5).clamp(0, 1)))
    for row, (title, shown) in zip(axes, rows, strict=True):
        row[0].set_ylabel(title)
        for place, picture in zip(row, shown, strict=True):
            place.imshow(picture.permute(1, 2, 0))
            place.set(xticks=[], yticks=[])
    for row, shown in zip(axes, (pixels, changed), strict=False):
        for place, text in zip(row, labels(vit, shown), strict=True):
            place.set_title(text, fontsize=9)
    figure.tight_layout()
    target = Path(__file__).resolve().parent.parent / "docs" / "img" / "dta.png"
    figure.savefig(target)
    from PIL import Image

    Image.open(target).convert("RGB").quantize(96, method=Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


@torch.no_grad()
def labels(vit: torch.nn.Module, pixels: torch.Tensor) -> list[str]:
    """The most likely class of each picture and its probability."""
    scores = tokens.logits(vit, vit.passport.preprocess.normalise(pixels)).softmax(-1)
    names = ClassNames.of(vit, lambda text: None).names
    return [f"{names[int(i)]} {float(p):.0%}" for p, i in zip(*scores.max(-1), strict=True)]


if __name__ == "__main__":
    main(sys.argv[1])
