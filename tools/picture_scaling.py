"""Draws docs/img/scaling.png: a scaling study of two small ViTs on scikit-learn's digits.

    python tools/picture_scaling.py

Both are pre-trained by MAE on the training digits first; it takes a few minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import vitkit

OUT = Path(__file__).resolve().parent.parent / "docs" / "img" / "scaling.png"
SIZES = (8, 16, 24, 32, 48)
WIDTHS = {"small": 32, "large": 96}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for name, width in WIDTHS.items():
            out = Path(folder) / name
            vitkit.pretrain(
                "mae", model="vit_tiny_patch16_224", pretrained=False, data="digits", out=out, image_size=32, patch_size=8,
                arch_kwargs={"embed_dim": width, "depth": 4, "num_heads": width // 16}, epochs=15, batch_size=64, lr=1e-3,
                mask_ratio=0.75, decoder_dim=32, decoder_heads=2, hflip=False, eval_every=15, quiet=True)  # fmt: skip
            models.append(out)
        found = vitkit.scaling(
            models=models, sizes=SIZES, data="digits", out=Path(folder) / "study", protocols="linear", quiet=True
        )
    draw(found)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB\n{found['verdict']}")


def draw(found: dict[str, Any]) -> None:
    """Score by input size, and against FLOPs with the Pareto front."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), dpi=110, sharey=True)
    cells = [cell for cell in found["cells"] if cell["protocol"] == found["decided_by"]]
    for name, colour in zip(WIDTHS, ("#2b6cb0", "#c05621"), strict=True):
        own = [cell for cell in cells if cell["model"] == name]
        sizes, values, low, high = ([cell[key] for cell in own] for key in ("size", "value", "low", "high"))
        axes[0].fill_between(sizes, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.18, lw=0)
        label = f"{name}, {own[0]['parameters'] / 1e6:.2f} million parameters"
        axes[0].plot(sizes, [100 * v for v in values], "o-", color=colour, ms=4, label=label)
        flops = [cell["flops"] / 1e6 for cell in own]
        axes[1].plot(flops, [100 * v for v in values], "o-", color=colour, ms=4)
        on = [i for i, cell in enumerate(own) if [name, cell["size"]] in found["front"]]
        axes[1].plot([flops[i] for i in on], [100 * values[i] for i in on], "o", ms=11, mfc="none", color="black")
    axes[0].set(xlabel="input size, px", ylabel="accuracy of the linear probe, %", xticks=SIZES)
    axes[1].set(xlabel="MFLOPs of one image", xscale="log", title="ringed: nothing cheaper is as good")
    axes[0].set_ylim(bottom=100 * min(cell["low"] for cell in cells) - 5)  # room for the legend
    axes[0].legend(frameon=False, loc="lower right", fontsize=8)
    axes[0].set_title("digits, made for 32 px")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(OUT)


if __name__ == "__main__":
    main()
