"""Makes docs/img/evaluate.png: protocols on scikit-learn's handwritten digits with a small ViT pre-trained on them. Minutes.

python tools/picture_evaluate.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import vitkit
from vitkit.run.measured import WORDS

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "evaluate.png"
PROTOCOLS = ("knn", "linear", "linear_grid", "few_shot", "lora", "full")
SMALL = {"embed_dim": 96, "depth": 4, "num_heads": 4, "patch_size": 4}


def measure(folder: Path) -> dict:
    """Pre-train by masked autoencoding, evaluate, and read what was found."""
    common = {"data": "digits", "image_size": 16, "seed": 0, "quiet": True}
    model = {"model": "VisionTransformer", "arch_kwargs": SMALL, "pretrained": False}
    mae = {
        "epochs": 30,
        "warmup_epochs": 3.0,
        "decoder_dim": 64,
        "decoder_depth": 1,
        "decoder_heads": 4,
        "hflip": False,
    }
    vitkit.pretrain("mae", **model, **common, **mae, out=str(folder / "mae"))
    full = {
        "blr": 8e-3,
        "layer_decay": 0.9,
        "drop_path": 0.0,
        "randaug": None,
    }  # the recipes are for large ViTs, pre-trained for long
    training = {"hflip": False, "crop_scale": [0.8, 1.0], "full": full, "lora": {"blr": 1.6e-2}}
    settings = {
        "epochs": 12,
        "batch_size": 32,
        "training": training,
        "grid_rates": (0.01, 0.1, 0.5, 1.0),
        "grid_epochs": 50,
    }
    shots = {"shots": (1, 2, 5, 10, 20), "protocols": ",".join(PROTOCOLS)}
    vitkit.evaluate(model=str(folder / "mae"), **common, **settings, **shots, out=str(folder / "protocols"))
    return json.loads((folder / "protocols" / "results.json").read_text())["protocols"]


def draw(found: dict) -> None:
    """Ordered bars with intervals, and the few-shot curve beside them."""
    figure, (bars, curve) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(1.25, 1), layout="constrained")
    ranked = sorted((name for name in found if name != "few_shot"), key=lambda name: found[name]["value"])
    values = [found[name]["value"] for name in ranked]
    ends = [[found[name]["value"] - found[name]["low"] for name in ranked],
            [found[name]["high"] - found[name]["value"] for name in ranked]]  # fmt: skip
    bars.barh([WORDS[name] for name in ranked], values, xerr=ends, color="#1f6ab0", error_kw={"capsize": 3, "lw": 1})
    for i, name in enumerate(ranked):
        cost = f"{found[name]['trained']:,} trained\n{max(1, found[name]['seconds']):.0f} s"
        bars.text(1.02, i, cost, va="center", color="0.35", size=7)
    bars.set_xlim(0, 1)
    bars.set_title("accuracy, 95 % over test images", fontsize=9)
    for head, words, colour in (("linear", "linear probe", "#1f6ab0"), ("knn", "kNN", "#d1700b")):
        k, mean, low, high = zip(*found["few_shot"]["lines"][head], strict=True)
        curve.plot(k, mean, "o-", color=colour, ms=4, label=words)
        curve.fill_between(k, low, high, color=colour, alpha=0.2)
    curve.set_xscale("log", base=2)
    curve.set_xticks(k, [f"{one:g}" for one in k])
    curve.set_xlabel("labelled images a class")
    curve.set_title("few-shot: accuracy, 95 % over draws", fontsize=9)
    curve.legend(frameon=False, fontsize=8)
    for axes in (bars, curve):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        draw(measure(Path(folder)))
    print(TARGET)
