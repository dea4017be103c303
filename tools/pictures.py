"""Makes the pictures of the system pages from committed results and a finished demo: tools/pictures.py [runs/demo]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "img"


def adaptformer() -> None:
    """Accuracy with intervals over seeds against trained weights, one point a method."""
    result = json.loads((ROOT / "benchmarks/results/quality/adaptformer.json").read_text())
    table = result["tables"][0]
    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=160)
    for name, accuracy, interval, weights, *_ in table["rows"]:
        low, high = (float(value) for value in interval.split(" to "))
        colour = "#1f5fa8" if name.startswith("AdaptFormer") else "#777777"
        error = [[accuracy - low], [high - accuracy]]
        axes.errorbar([weights], [accuracy], yerr=error, fmt="o", color=colour, capsize=3, markersize=6)
        axes.annotate(name, (weights, accuracy), xytext=(9, -3), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xscale="log", xlabel="trained weights", ylabel="test accuracy")
    axes.set_xlim(right=4e7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.tight_layout()
    figure.savefig(IMAGES / "adaptformer.png")


def thorax_mae(demo: Path) -> None:
    """Held-out digits, what the model sees of them, and what it fills in."""
    folder = demo / "mae-seed0" / "pictures"
    group = json.loads((folder / "pictures.json").read_text())[0]
    rows = group["rows"][:6]
    cell, gap = 96, 6
    canvas = Image.new("RGB", (len(rows) * (cell + gap) - gap, 3 * (cell + gap) - gap), "white")
    for column, row in enumerate(rows):
        for line, (name, _) in enumerate(row):
            picture = Image.open(folder / name).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (column * (cell + gap), line * (cell + gap)))
    canvas.save(IMAGES / "thorax_mae.png", optimize=True)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    adaptformer()
    thorax_mae(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
