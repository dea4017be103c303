"""Makes docs/img/hi_end_mae.png from a run of recipes/small/hi_end_mae_digits.yaml: tools/picture_hi_end_mae.py RUN

The volumes are scikit-learn's digits, moved through slices.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from vitkit import weights
from vitkit.data import read
from vitkit.data.volume_views import eval_view
from vitkit.pretrain.hi_end_mae import HiEndMAE, Settings

TARGET = Path(__file__).resolve().parent.parent / "docs" / "img" / "hi_end_mae.png"
SLICES = (1, 6, 10, 14)
LINES = ("volume", "seen", "predicted")


def main(run: str) -> None:
    vit = weights.load(run, say=None)
    made = vit.passport.lineage[-1]["settings"]
    names = Settings.__dataclass_fields__
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in made.items() if key in names}
    method = HiEndMAE(vit, Settings(**own)).eval()
    method.load_extras(vit.extras)
    digits, view = read("digits", kind="volume", say=None).part("test"), eval_view(vit.passport.preprocess)
    rows = [3, 20, 41]
    volumes = torch.stack([view(digits.decode(row)) for row in rows])
    shown = method.reconstruct({"image": volumes, "seed": torch.arange(len(rows))})
    hidden = torch.cat([method.show_hidden(m, v[None]) for m, v in zip(shown["mask"], volumes, strict=True)])
    lines = (shown["original"], hidden, shown["reconstructed"].clamp(0, 1))
    columns = len(rows) * len(SLICES)
    figure, axes = plt.subplots(len(LINES), columns, figsize=(9.6, 2.6), dpi=110, layout="constrained")
    for line, (words, volume) in enumerate(zip(LINES, lines, strict=True)):
        for column in range(columns):
            digit, at = divmod(column, len(SLICES))
            axis = axes[line][column]
            axis.imshow(volume[digit, 0, :, :, SLICES[at]], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if line == 0:
                axis.set_title(f"slice {SLICES[at]}", fontsize=7)
        axes[line][0].set_ylabel(words, fontsize=8)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main(sys.argv[1])
