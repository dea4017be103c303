"""Makes docs/img/compare.svg from real comparisons on scikit-learn's digits: tools/picture_compare.py [work folder]

A small ViT with random weights and after 5, 20 and 60 epochs of `vitkit pretrain mae` on the training digits. Above: the last
against the first on the test digits. Below: all four over six disjoint parts of the digits.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import numpy as np

import vitkit
from vitkit.data import read
from vitkit.evaluate.ranking import rank
from vitkit.run.charts import bar_chart
from vitkit.run.helped_words import WORDS
from vitkit.run.ranking_chart import ranking_chart

OUT = Path(__file__).resolve().parent.parent / "docs" / "img" / "compare.svg"
ARCH = {"embed_dim": 64, "depth": 4, "num_heads": 4, "patch_size": 4}
MODEL = {"model": "VisionTransformer", "arch_kwargs": ARCH, "pretrained": False, "image_size": 32, "in_chans": 1}
DECODER = {"decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 4}
PARTS = 6
STYLE = """
:root { --page: #ffffff; --ink: #1d1c1a; --soft: #5d5a54; --rule: #e4e0d8; --line: #b9b3a7; --c0: #1f6cb5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16171a; --ink: #e9e7e2; --soft: #b3b0a8; --rule: #2d2f34; --line: #565961; --c0: #5fa4ee; }
}
text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.label { fill: var(--ink); } .mid { text-anchor: middle; } .end { text-anchor: end; }
.head { font-weight: 600; fill: var(--ink); }
.rule { stroke: var(--rule); } .axis { stroke: var(--line); } .line { stroke: var(--c0); stroke-width: 2; fill: none; }
.bar { fill: var(--c0); } .whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; }
"""


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    models = {"random": vitkit.load(MODEL["model"], **{k: v for k, v in MODEL.items() if k != "model"})}
    for epochs in (5, 20, 60):
        run = vitkit.pretrain(
            "mae", **MODEL, **DECODER, data="digits", epochs=epochs, out=work / f"mae{epochs}", quiet=True
        )
        models[f"MAE, {epochs} epochs"] = vitkit.load(run.path)
    first, *_, last = models.values()
    two = vitkit.compare(first, last, data="digits", out=work / "two", quiet=True)
    print(two["verdict"])
    many = vitkit.compare(*models.values(), data=parts(work), out=work / "many", quiet=True)
    print(many["verdict"])
    bars = [
        (WORDS[row["measure"]], *(round(100 * row[key], 1) for key in ("gain", "low", "high")))
        for row in two["rows"]
        if row["metric"] != "auc"
    ]
    scores = {
        name: [one["scores"][letter]["value"] for one in many["data"]]
        for letter, name in zip("ABCD", models, strict=True)
    }
    above = bar_chart(bars, title="Gain in points after 60 epochs of MAE, with 95 % intervals")
    below = ranking_chart(rank(scores), title="Average ranks over six parts of the digits")
    OUT.write_text(
        stacked(["Gain in points, 60 epochs of MAE against random weights", "Average ranks"], [above, below])
    )
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


def parts(work: Path) -> list[Path]:
    """Disjoint parts of the digits, each with its own training, validation and test images."""
    images = read("digits", say=lambda text: None)
    pixels = np.stack([images.decode(i)[0].numpy() for i in range(len(images))])
    found = []
    for n in range(PARTS):
        content = {}
        for split in ("train", "val", "test"):
            index = np.flatnonzero(images.split == split)[n::PARTS]
            content |= {f"x_{split}": pixels[index], f"y_{split}": images.labels[index]}
        found.append(work / f"part{n + 1}.npz")
        np.savez(found[-1], **content)
    return found


def stacked(titles: list[str], charts: list) -> str:
    """The wide drawings of the charts below each other, as one SVG file that brings its own style."""
    parts, top = [], 0.0
    for title, chart in zip(titles, charts, strict=True):
        drawing = re.search(r'<svg class="wide" viewBox="0 0 ([\d.]+) ([\d.]+)".*?</svg>', str(chart), re.DOTALL)
        assert drawing is not None
        width, height = float(drawing[1]), float(drawing[2])
        parts.append(f'<text class="head" x="0" y="{top + 14:.0f}">{title}</text>')
        parts.append(
            drawing[0].replace("<svg ", f'<svg y="{top + 30:.0f}" width="{width:.0f}" height="{height:.0f}" ', 1)
        )
        top += height + 54
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 -8 776 {top:.0f}" width="776" height="{top:.0f}">'
    page = f'<rect x="-8" y="-8" width="776" height="{top:.0f}" fill="var(--page)"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", page, *parts, "</svg>\n"])


if __name__ == "__main__":
    main()
