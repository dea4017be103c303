"""Makes docs/img/benchmark.svg from benchmarks/results/quality/backbones.json: a panel a data set, a row a protocol, a dot
with its interval a backbone."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"random": "#9a9a9a", "MAE": "#d9822b", "DeiT-Ti": "#1f6fb4", "DeiT-Ti + MAE": "#1a9e8f"}


def main() -> None:
    tables = json.loads((ROOT / "benchmarks/results/quality/backbones.json").read_text())["tables"]
    heights = [len(table["rows"]) + 1.2 for table in tables]
    figure, axes = plt.subplots(len(tables), 1, figsize=(8, 0.42 * sum(heights)), height_ratios=heights)
    for axis, table in zip(axes, tables, strict=True):
        panel(axis, table)
    handles = [plt.Line2D([], [], marker="o", ls="", color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, ncols=len(handles), loc="upper center", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    plt.rcParams.update({"svg.hashsalt": "vitkit", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure.savefig(ROOT / "docs/img/benchmark.svg", metadata={"Date": None})


def panel(axis, table: dict) -> None:
    """One data set."""
    kinds = [column for column in table["columns"][1:] if column != "interval"]
    for row, (protocol, *cells) in enumerate(table["rows"]):
        for i, kind in enumerate(kinds):
            value, span = cells[2 * i], cells[2 * i + 1]
            if value == "":
                continue
            low, high = (float(word) for word in span.split(" to "))
            y = -row + 0.14 * (len(kinds) / 2 - 0.5 - i)
            axis.plot([low, high], [y, y], color=COLOURS[kind], lw=1.2, alpha=0.6)
            axis.plot(value, y, "o", color=COLOURS[kind], ms=4.5)
        axis.text(-0.01, -row, protocol, transform=axis.get_yaxis_transform(), ha="right", va="center", fontsize=8.5)
    axis.set_yticks([])
    axis.set_ylim(-len(table["rows"]) + 0.5, 0.5)
    axis.set_title(f"{table['title']} ({table['note']})", fontsize=9.5, loc="left")
    axis.grid(axis="x", color="#e3e3e3")
    axis.set_axisbelow(True)
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
