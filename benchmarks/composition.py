"""Does everything compose? Every adaptation on every kind of ViT: trained one step, saved, reloaded, used to predict,
explained, attacked through its public trunk, and adapted once more.

`python -m benchmarks.composition` writes benchmarks/results/composition/matrix.json, which the documentation shows as a
table; tests/test_composition.py runs the same cells. Random weights on drawn pictures: what is shown is that the parts
fit, to the last bit where that is promised.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitkit
from benchmarks.common import Result, arguments
from vitkit import tokens, weights
from vitkit.run import verbs

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "DINOv3-style": ("vit_small_patch16_dinov3", {}),
    "no class token": ("vit_base_patch16_siglip_gap_224", {}),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("adapt", {}),
    "full": ("adapt", {"randaug": None}),
    "lora": ("adapt", {"rank": 2}),
    "vpt": ("adapt", {"prompts": 3}),
    "adaptformer": ("adapt", {"bottleneck": 4}),
    "dvpt": ("adapt", {"prompts": 4, "bottleneck": 4, "share_every": 2, "gate_init": 0.1}),
    "prompt_cam": ("explain", {}),
}
SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3}
ONE_STEP = {
    "epochs": 1,
    "max_steps": 1,
    "batch_size": 8,
    "lr": 0.01,
    "workers": 0,
    "accelerator": "cpu",
    "quiet": True,
}
STEPS = ("train", "reload", "predict", "explain", "attack", "adapt again")


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "Every adaptation works on every kind of ViT: trained, saved, reloaded to equal predictions, explained, attacked "
        "through its public trunk, and the input of a further adaptation."
    )
    result = Result("matrix", "composition", claim, options.quick)
    rows, holds = [], True
    for method in METHODS:
        row = [method]
        for family in FAMILIES:
            with tempfile.TemporaryDirectory() as folder:
                found = check(method, family, Path(folder))
            failed = [name for name in STEPS if found.get(name) != "ok"]
            row.append("all" if not failed else f"{failed[0]}: {found[failed[0]]}")
            holds &= not failed
            print(f"  {method} on {family}: {row[-1]}", flush=True)
        rows.append(row)
    note = f"all: {', '.join(STEPS)}; ViTs of width {SMALL['embed_dim']} and {SMALL['depth']} blocks at 32 px"
    result.table("Adaptations on kinds of ViT", ["method", *FAMILIES], rows, note)
    return result.finish(holds)


def check(method: str, family: str, folder: Path) -> dict[str, str]:
    """What each of `STEPS` gave: "ok", or the error's words; the first failure ends it."""
    cell = Cell(method, family, folder)
    found: dict[str, str] = {}
    for name in STEPS:
        step: Callable[[], None] = getattr(cell, name.replace(" ", "_"))
        try:
            step()
        except Exception as error:  # the table says what did not work, whatever it was
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            break
        found[name] = "ok"
    return found


class Cell:
    """One adaptation of one ViT, taken through everything."""

    def __init__(self, method: str, family: str, folder: Path):
        self.method, self.folder, self.run = method, folder, folder / "run"
        self.verb, self.own = METHODS[method]
        arch, kwargs = FAMILIES[family]
        vit = weights.load(
            arch, pretrained=False, arch_kwargs={**SMALL, **kwargs}, image_size=32, patch_size=8, say=None
        )
        with torch.no_grad():  # layer scale starts near zero in some families, which would hide the blocks
            for parameter in vit.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        self.base = folder / "base"
        weights.save_run(self.base, vit)
        self.data = pictures(folder / "pictures.npz")

    def train(self) -> None:
        settings = {"model": self.base, "data": self.data, "out": self.run}
        verbs.train(self.verb, self.method, {**settings, **ONE_STEP, **self.own})

    def reload(self) -> None:
        import pandas as pd

        table = pd.read_csv(self.run / "predictions.csv")
        again = self.scores()
        columns = [name for name in table.columns if name.startswith("p(")]
        worst = float(np.abs(table[columns].to_numpy() - again).max())
        assert worst <= 2e-6, f"predictions differ by {worst:.1e} from those written after training"

    def predict(self) -> None:
        model = vitkit.load(self.run, say=None)
        x = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(2))
        pixels = model.passport.preprocess.normalise(x)
        with torch.no_grad():
            ours, timms = tokens.logits(model.vit, pixels), model.vit(pixels)
        assert ours.shape == (3, 3) and torch.isfinite(ours).all()
        assert torch.allclose(ours, timms, atol=1e-5, rtol=1e-5), "the model called as timm's gives other scores"

    def explain(self) -> None:
        found = vitkit.explain(self.run, self.data, out=self.folder / "explained", images=2, quiet=True, workers=0)
        assert Path(found["report"]).is_file()
        maps = np.load(self.folder / "explained" / "maps.npz")
        assert maps.files, "no maps were written"
        assert all(np.isfinite(maps[name]).all() for name in maps.files if maps[name].dtype.kind == "f")

    def attack(self) -> None:
        out = self.folder / "attacked"
        found = vitkit.attack(self.run, data=self.data, out=out, eps="8/255", steps=2, quiet=True, workers=0)
        assert Path(found["report"]).is_file()

    def adapt_again(self) -> None:
        settings = {"model": self.run, "data": self.data, "out": self.folder / "again"}
        vitkit.adapt("linear", **settings, **ONE_STEP)
        further = vitkit.load(self.folder / "again", say=None)
        assert further.predict(self.data).scores.shape[1] == 3

    def scores(self) -> np.ndarray:
        from vitkit.data import read

        model = vitkit.load(self.run, say=None)
        return model.predict(read(self.data, say=None).part("test")).scores


def pictures(path: Path) -> str:
    """Noise whose brightness is its class: 24 to train, 6 to validate, 12 to test, 32 px, colour."""
    rng = np.random.default_rng(0)
    content = {}
    for split, count in {"train": 24, "val": 6, "test": 12}.items():
        labels = np.arange(count) % 3
        level = np.array([60, 120, 180])[labels][:, None, None, None]
        noise = level + rng.normal(0, 30, (count, 32, 32, 3))
        content |= {f"x_{split}": np.clip(noise, 0, 255).astype(np.uint8), f"y_{split}": labels}
    np.savez(path, **content)
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
