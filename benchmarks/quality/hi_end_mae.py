"""Hi-End-MAE on real MRI volumes: does it learn, must the encoder drive, and does it help where few volumes are labelled?

Data: `hippocampus3d` (Medical Segmentation Decathlon, Task04; 80 training, 15 validation, 25 test volumes,
about 35 x 50 x 36 mm).
A ViT of 10 blocks, 96 wide, crops of 32 x 48 x 32 in patches of 8. Pre-training sees the training volumes without masks.
The encoder's part: the trained decoder reads keys and values of another volume of the batch, all with the same visible places,
so that only the content is wrong. Segmentation: UNETR on 8 labelled volumes, from pre-trained weights and from the very
weights that pre-training began with; volumes, steps and rate are the same for both, the weights of the last step are scored
once on the test volumes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import vitkit
from benchmarks.common import Result, arguments, data
from vitkit import weights
from vitkit.data import read
from vitkit.data.volume_views import eval_view
from vitkit.evaluate.statistics import mean_interval
from vitkit.pretrain.hi_end_mae import HiEndMAE, Settings
from vitkit.run.parallel import side_by_side

MODEL = {"model": "volume_vit_tiny_patch16_96", "pretrained": False, "image_size": (32, 48, 32), "patch_size": 8,
         "arch_kwargs": {"embed_dim": 96, "depth": 10, "num_heads": 3}}  # fmt: skip
DECODER = {"decoder_dim": 48, "decoder_heads": 2}
# All volumes lie alike, so that nothing is turned or mirrored.
PRE = {**DECODER, "positions": "sincos", "mask_ratio": 0.75, "crops": 1, "rotate90": 0.0, "hflip": False, "batch_size": 16,
       "epochs": 120, "lr": 2e-3, "warmup_epochs": 6.0, "eval_every": 40, "workers": 0, "quiet": True}  # fmt: skip
TUNE = {"volumes": 8, "feature_size": 8, "crops": 1, "rotate90": 0.0, "hflip": False, "batch_size": 2, "epochs": 40,
        "lr": 1e-3, "warmup_epochs": 2.0, "eval_every": 40, "overlap": 0.0, "windows": 8, "workers": 0,
        "quiet": True}  # fmt: skip
GATE = 0.9  # of the error of predicting zero


def main() -> int:
    options = arguments(__doc__)
    claim = (
        f"Held-out hidden patches are predicted with less than {GATE} of the error of predicting zero; keys and values of "
        "other volumes raise the loss in every seed; with 8 labelled volumes UNETR from pre-trained weights has a higher Dice "
        "than from the weights that pre-training began with, in every seed."
    )
    result = Result("hi_end_mae", "quality", claim, options.quick)
    folder = Path(tempfile.mkdtemp())
    seeds = range(1 if options.quick else 3)
    found: dict[str, list[float]] = {}
    try:
        for index, values in side_by_side(one_seed, [(seed, str(folder), options.quick) for seed in seeds]):
            print(f"  seed {seeds[index]} done", flush=True)
            for name, value in values.items():
                found.setdefault(name, []).append(value)
    finally:
        shutil.rmtree(folder)
    return result.finish(report(result, found, len(seeds)) or options.quick)


def one_seed(seed: int, folder: str, quick: bool) -> dict[str, float]:
    """Every figure of one seed."""
    root, home = data("hippocampus3d"), Path(folder)
    few = {"max_steps": 10} if quick else {}
    begun = start(seed, home / f"start-{seed}")
    again = {"model": begun, "image_size": MODEL["image_size"]}
    run = vitkit.pretrain("hi_end_mae", data=root, out=home / f"pre-{seed}", seed=seed, **{**again, **PRE, **few})
    found = {
        "held-out": run.metrics["held-out loss"],
        "zero": run.metrics["predicting zero"],
        **driving(run.path, root),
    }
    tune = {**TUNE, **({"epochs": 2, "eval_every": 2} if quick else {})}
    for name, model in (("pre-trained", run.path), ("random", begun)):
        tuned = vitkit.adapt("unetr", model=model, data=root, out=home / f"{name}-{seed}", seed=seed, **tune)
        found[f"{name} dice"] = tuned.metrics["dice"]
        found[f"{name} anterior"], found[f"{name} posterior"] = classes(tuned)
    return found


def start(seed: int, folder: Path) -> Path:
    """The weights that pre-training begins with, as a run: fixed positions, its own initialisation."""
    keys = ("pretrained", "image_size", "patch_size", "arch_kwargs")
    vit = weights.load(MODEL["model"], seed=seed, say=None, **{key: MODEL[key] for key in keys})
    torch.manual_seed(seed)
    HiEndMAE(vit, Settings(**DECODER))
    vit.pos_embed.requires_grad_(False)
    weights.save_run(folder, vit)
    return folder


@torch.inference_mode()
def driving(run: Path, root: Path) -> dict[str, float]:
    """Loss on the test volumes with their own keys and values, with those of the next volume, and with none (zeros)."""
    vit = weights.load(run, say=None)
    method = HiEndMAE(vit, Settings(**DECODER)).eval()
    method.load_extras(vit.extras)
    images = read(root, kind="volume", say=None).part("test")
    view = eval_view(vit.passport.preprocess)
    volumes = vit.passport.preprocess.normalise(torch.stack([view(images.decode(i)) for i in range(len(images))]))
    patches = vit.patch_embed.num_patches
    sums = {"own": 0.0, "swapped": 0.0, "zeroed": 0.0}
    for draw in range(4):
        noise = torch.rand(1, patches, generator=torch.Generator().manual_seed(draw)).expand(len(volumes), -1)
        batch = {"image": volumes, "noise": noise}
        mask = method.mask(batch)
        _, hidden = method.encode(volumes, mask.keep)
        target, own = method.target(volumes, mask.masked), method.bridge(hidden)
        for name, memory in (
            ("own", own),
            ("swapped", [kv.roll(1, 0) for kv in own]),
            ("zeroed", [torch.zeros_like(kv) for kv in own]),
        ):
            predicted = method.predict_all(batch, memory)[:, -target.shape[1] :]
            sums[name] += float(F.mse_loss(predicted, target)) / 4
    return sums


def classes(run: Any) -> list[float]:
    """Dice of the two halves of the hippocampus."""
    return [row[1] for row in run.summary["tables"][0]["rows"][1:]]


def report(result: Result, found: dict[str, list[float]], seeds: int) -> bool:
    mean = {name: mean_interval(values) for name, values in found.items()}
    rows = [[words, mean[key].value, span(mean[key])] for words, key in
            (("Hi-End-MAE, validation volumes", "held-out"), ("predicting zero, validation volumes", "zero"),
             ("Hi-End-MAE, test volumes", "own"), ("... keys and values of another volume", "swapped"),
             ("... keys and values zero", "zeroed"))]  # fmt: skip
    result.table(
        "Squared error of hidden patches, mask ratio 0.75 (normalised patches)",
        ["prediction", "error", "interval over seeds"], rows,
        "another volume of the test set with the same visible places: only the content differs",
    )  # fmt: skip
    rows = [[f"Dice, {part}", *(cell for start in ("random", "pre-trained") for cell in
             (mean[f"{start} {key}"].value, span(mean[f"{start} {key}"])))]
            for part, key in (("no background", "dice"), ("anterior", "anterior"), ("posterior", "posterior"))]  # fmt: skip
    columns = ["25 test volumes", "random weights", "interval", "pre-trained", "interval"]
    result.table("UNETR on 8 labelled volumes, 160 steps", columns, rows, f"{seeds} seeds, 95 % intervals over seeds")
    gains = [a - b for a, b in zip(found["pre-trained dice"], found["random dice"], strict=True)]
    rises = [a - b for a, b in zip(found["swapped"], found["own"], strict=True)]
    share = mean["held-out"].value / mean["zero"].value
    result.note(
        f"error {share:.2f} of predicting zero (gate {GATE}); another volume's keys and values: {min(rises):+.3f} to "
        f"{max(rises):+.3f}; Dice pre-trained minus random: {', '.join(f'{100 * gain:+.1f}' for gain in gains)} points"
    )
    return share < GATE and min(rises) > 0 and min(gains) > 0


def span(interval: Any) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}" if interval.low == interval.low else "one seed"


if __name__ == "__main__":
    sys.exit(main())
