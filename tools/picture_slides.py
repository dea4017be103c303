"""Makes docs/img/slides.png: drawn slides, the tiles that are kept, and where a slide head looks. tools/picture_slides.py
CHECKPOINT

CHECKPOINT: weights of a small ViT, e.g. timm's deit_tiny_patch16_224. The slides are drawn here: pink tissue with small
nuclei; every other slide has one spot of large, crowded ones.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import vitkit
from vitkit.evaluate.mil.pictures import kept_tiles
from vitkit.evaluate.mil.store import read_features

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "slides.png"
SIZE, TILE = (1536, 1152), 96


def draw(number: int, spot: bool) -> Image.Image:
    """A slide; with a spot of large nuclei somewhere in its tissue."""
    rng = np.random.default_rng(number)
    width, height = SIZE
    mask = Image.new("L", (width // 8, height // 8))
    pen = ImageDraw.Draw(mask)
    for _ in range(9):
        x, y = rng.uniform(30, width // 8 - 50), rng.uniform(25, height // 8 - 45)
        pen.ellipse([x - 20, y - 14, x + rng.uniform(14, 42), y + rng.uniform(12, 34)], fill=255)
    tissue = np.asarray(mask.filter(ImageFilter.GaussianBlur(2)).resize(SIZE, Image.Resampling.BICUBIC)) > 110
    grain = np.asarray(Image.fromarray(rng.integers(0, 256, (height // 6, width // 6), np.uint8)).resize(SIZE)) / 255.0
    pink = np.array([231, 168, 200]) - 38 * grain[..., None] * np.array([0.6, 1.0, 0.5])
    pixels = np.where(tissue[..., None], pink, 243).astype(np.uint8)
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    inside = np.argwhere(tissue)
    for y, x in inside[rng.integers(len(inside), size=len(inside) // 260)]:
        r = rng.uniform(2.0, 4.0)
        pen.ellipse([x - r, y - r, x + r, y + r], fill=tuple(int(v) for v in rng.normal((112, 72, 148), 9)))
    if spot:
        deep = np.argwhere(ndimage.binary_erosion(tissue[::8, ::8], iterations=6))
        cy, cx = 8 * deep[rng.integers(len(deep))]
        for dy, dx in rng.normal(0, 30, (110, 2)):
            r = rng.uniform(5.0, 8.5)
            pen.ellipse(
                [cx + dx - r, cy + dy - r, cx + dx + r, cy + dy + r],
                fill=tuple(int(v) for v in rng.normal((78, 38, 112), 8)),
            )
    return picture.filter(ImageFilter.GaussianBlur(0.7))


def make(folder: Path, count: int) -> None:
    """Slides, half of them with a spot, and labels.csv beside them; two slides a patient."""
    (folder / "slides").mkdir(parents=True)
    rows = ["slide,label,patient"]
    for number in range(count):
        spot = number // 2 % 2 == 1
        draw(number, spot).save(folder / "slides" / f"slide{number:02d}.png")
        rows.append(f"slide{number:02d},{'spot' if spot else 'none'},patient{number // 2}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main(checkpoint: str) -> None:
    home = Path(tempfile.mkdtemp())
    make(home, 60)
    settings = {"mpp": None, "size": TILE, "quiet": True}
    vitkit.slides.embed(model=checkpoint, data=home / "slides", out=home / "features", **settings)
    found = vitkit.slides.evaluate(
        features=home / "features", labels=home / "labels.csv", out=home / "run", seeds=2, epochs=40, positive="spot",
        heads="abmil,mean", quiet=True,
    )  # fmt: skip
    print(found["verdict"])
    (home / "new").mkdir()
    draw(1001, True).save(home / "new" / "new.png")
    vitkit.slides.embed(model=checkpoint, data=home / "new", out=home / "new_features", **settings)
    table = vitkit.slides.predict(home / "run", home / "new_features", heatmaps=home / "maps")
    slide = read_features(home / "new_features" / "new.safetensors")
    assert slide.size is not None
    shown = [
        ("a drawn slide", slide.thumbnail),
        ("tiles that are kept", kept_tiles(slide.thumbnail, slide.coords, slide.side, slide.size)),
        (f"where the head looks: p(spot) = {table.p_spot[0]:.2f}", np.asarray(Image.open(home / "maps" / "new.png"))),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.7), dpi=100, layout="constrained")
    for axis, (title, picture) in zip(axes, shown, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(TARGET, pil_kwargs={"optimize": True})
    print(TARGET, f"{TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
