"""Makes docs/img/tov_vicreg.png from the quality benchmark's committed figures and one of its drawn streams."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from benchmarks.quality.tov_vicreg import CROSSING, DIGIT, SIDE, crossing

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "img" / "tov_vicreg.png"


def main() -> None:
    result = json.loads((ROOT / "benchmarks/results/quality/tov_vicreg.json").read_text(encoding="utf-8"))
    table = result["tables"][0]
    columns = table["columns"]
    names = [row[0] for row in table["rows"]]
    figure = plt.figure(figsize=(7.4, 3.6), dpi=130, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.9))
    ground = np.asarray(Image.fromarray(load_sample_image("china.jpg")).convert("L").resize((64, 64)), np.float32)
    digit = np.uint8(15.9 * load_digits().images[4])
    drawn = np.asarray(Image.fromarray(digit).resize((DIGIT, DIGIT), Image.Resampling.BILINEAR), np.float32)
    frames = crossing(0.7 * ground[20 : 20 + SIDE, 4 : 4 + SIDE], drawn, 0, np.random.default_rng(3))
    for place, t in zip(left.subplots(3, 2).flat, np.linspace(0, CROSSING - 1, 6).astype(int), strict=True):
        place.imshow(frames[t], cmap="gray", vmin=0, vmax=255)
        place.set(xticks=[], yticks=[])
        place.set_title(f"frame {t}", fontsize=7)
    axes = right.subplots(1, 2, sharey=True)
    for axis, name, label in (
        (axes[0], "direction", "direction right (share)"),
        (axes[1], "std", "deviation of embeddings"),
    ):
        values = [row[columns.index(name)] for row in table["rows"]]
        shown = [0.0 if value is None else value for value in values]
        colours = ["#1f5fa8" if arm == "TOV-VICReg" else "#999999" for arm in names]
        axis.barh(range(len(names)), shown, color=colours)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xlabel(label, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()  # both share it
    axes[0].axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
