"""Makes docs/img/videomae_v2.png: what dual masking shows and asks for, on two of scikit-learn's digits that move."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from vitkit.data import read
from vitkit.parts.tube_masks import draw

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "videomae_v2.png"
LINES = ("video", "encoder\nsees", "decoder\npredicts", "in the\nloss")
GRID, SIZE, GREY = (6, 8, 8), (2, 4, 4), 0.45


def main() -> None:
    digits = read("digits", kind="video", say=None)
    video = (
        torch.stack([digits.decode(row).read(range(0, 24, 2))[:, 0] for row in (4, 31)]).float() / 255
    )  # (2, 12, 32, 32)
    mask = draw(torch.tensor([3, 8]), 2, GRID, mask_ratio=0.9, decoder_mask_ratio=0.5, device=torch.device("cpu"))
    counted = [decode[hidden > 0] for decode, hidden in zip(mask.decode, mask.hidden, strict=True)]
    shown = [spread(mask.keep), spread(mask.decode), torch.cat([spread(one[None]) for one in counted])]
    lines = (video, *(torch.where(one, video, GREY) for one in shown))
    steps = range(0, 12, 2)
    figure, axes = plt.subplots(len(LINES), 2 * len(steps), figsize=(9.4, 3.5), dpi=110, layout="constrained")
    for line, (words, pictures) in enumerate(zip(LINES, lines, strict=True)):
        for column, axis in enumerate(axes[line]):
            clip, at = divmod(column, len(steps))
            axis.imshow(pictures[clip, steps[at]], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if line == 0:
                axis.set_title(f"step {at + 1}", fontsize=7)
        axes[line][0].set_ylabel(words, fontsize=7)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET)


def spread(tubes: Tensor) -> Tensor:
    """Indices (B, K) of tubes as a mask (B, T, H, W) of pixels."""
    mask = (
        torch.zeros(len(tubes), GRID[0] * GRID[1] * GRID[2], dtype=torch.bool).scatter_(1, tubes, True).view(-1, *GRID)
    )
    for axis, step in enumerate(SIZE):
        mask = mask.repeat_interleave(step, 1 + axis)
    return mask


if __name__ == "__main__":
    main()
