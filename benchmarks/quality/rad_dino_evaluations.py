"""RAD-DINO's evaluations on real data: dense heads on frozen patches, metadata probes with chance, and a report writer.

Trunk everywhere: DeiT-Ti/16 trained on ImageNet-1k, frozen, 96 px. Lungs: `cxr_covid` X-rays with a lung mask (138
training, 28 validation, 26 test, split by patient); every decoder on the same cached maps, the same passes, the rate
picked by validation IoU; UPerNet and pyramid 32 channels wide. Metadata: view, sex and age of `nih_cxr64` (934 X-rays, 243
patients), each scored in 5 folds of whole patients; beside them 20 columns that are the same for all images of a patient and
otherwise drawn at random, half numbers and half classes, to see how often a probe finds what is not there. Writer: captions
of `flickr8k_mini` (140 images, 700 captions; 50 test images) and clinical notes of `cxr_covid` (first 50 words), a GPT-2 of 2
blocks and width 128 from nothing; best epoch by validation loss. Test splits are read once; nothing was searched on them.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial

import numpy as np
import torch

from benchmarks.common import Result, arguments, data
from vitkit import weights
from vitkit.data import read
from vitkit.dense.decoders import DECODERS, WIDE
from vitkit.evaluate import metadata, segment
from vitkit.evaluate.features import features
from vitkit.evaluate.statistics import mean_interval
from vitkit.run.parallel import side_by_side

SIZE, WIDTH = 96, 32
HEADS = ("linear", "unet", "upernet", "pyramid")
RATES, EPOCHS = (2e-2, 1e-1), 12
COLUMNS = ("view", "sex", "age")
NOISE = 20
WRITERS = {  # table, column, passes, words
    "captions": ("flickr8k_mini/captions.csv", "caption", 20, 30),
    "notes": ("cxr_covid/labels.csv", "clinical_notes", 15, 50),
}
FIGURES = ("rouge_l", "rouge_l other image", "rouge_l nearest image", "rouge_l most frequent", "bleu4")
LOST = "nats a token lost with another image"


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "On lung masks UPerNet and the simple feature pyramid beat the linear decoder by more than 3 points of IoU and are "
        "at most 2 points below the U-Net decoder; the view of an X-ray is known beyond chance from frozen features, while of "
        "20 random patient-wise columns at most 3 pass p < 0.05; a writer's true captions are less expected with another "
        "image than with their own."
    )
    result = Result("rad_dino_evaluations", "quality", claim, options.quick)
    torch.set_num_threads(1)
    seeds = range(1) if options.quick else range(3)
    holds = [dense(result, seeds, options.quick), columns(result, options.quick)]
    holds.append(writers(result, seeds, options.quick))
    return result.finish(options.quick or all(holds))


def trunk():
    path = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    return weights.load(str(path), image_size=SIZE, num_classes=0, say=None).eval()


def span(values: list[float]) -> str:
    found = mean_interval(values)
    return f"{found.low:.3f} to {found.high:.3f}" if len(values) > 1 else "one seed"


# ---------------------------------------------------------------- dense heads


def decode(name: str, seed: int, quick: bool) -> dict[str, float]:
    """Scores of one decoder from one seed."""
    images = read(data("cxr_covid") / "labels.csv", mask_column="lung_mask", say=None)
    settings = segment.Settings(
        rates=RATES[-1:] if quick else RATES, epochs=2 if quick else EPOCHS, batch_size=16, seed=seed, refit=True
    )
    make = partial(DECODERS[name], width=WIDTH) if name in WIDE else DECODERS[name]
    make_ = Made(make, DECODERS[name].needs)
    found = segment.fit(trunk(), images, decoder=make_, rescale=True, settings=settings)
    size = sum(p.numel() for p in found.decoder.parameters())
    return {"iou": found.scores["test_iou"], "dice": found.scores["test_dice"], "rate": found.rate, "size": size}


class Made:
    """A decoder's constructor that says how many maps it reads."""

    def __init__(self, make, needs: int):
        self.make, self.needs = make, needs

    def __call__(self, dim: int, classes: int):
        return self.make(dim, classes)


def dense(result: Result, seeds: range, quick: bool) -> bool:
    tasks = [(name, seed, quick) for seed in seeds for name in reversed(HEADS)]
    each: dict[str, list[dict]] = {name: [] for name in HEADS}
    for index, found in side_by_side(decode, tasks):
        print(f"  {tasks[index][0]} decoder, seed {tasks[index][1]}: {found}", flush=True)
        each[tasks[index][0]].append(found)
    rows, iou = [], {}
    for name, found in each.items():
        iou[name] = float(np.mean([one["iou"] for one in found]))
        dice = float(np.mean([one["dice"] for one in found]))
        rates = ", ".join(f"{one['rate']:g}" for one in found)
        rows.append([name, iou[name], span([one["iou"] for one in found]), dice, found[0]["size"], rates])
    names = ["decoder", "IoU", "95 % interval over seeds", "Dice", "parameters", "rates picked"]
    result.table("Lungs on 26 test X-rays, frozen DeiT-Ti/16 at 96 px", names, rows)
    new = [iou[name] for name in WIDE]
    return min(new) > iou["linear"] + 0.03 and min(new) > iou["unet"] - 0.02


# ---------------------------------------------------------------- metadata


def columns(result: Result, quick: bool) -> bool:
    images = read(data("nih_cxr64") / "labels.csv", label_columns=[], keep_columns=COLUMNS, say=None)
    x = np.asarray(features(trunk(), images))
    settings = metadata.Settings(folds=5, permutations=20 if quick else 200)
    rows, view = [], 1.0
    for name in COLUMNS:
        found = metadata.measure(
            x, metadata.parse(name, list(images.columns[name])), images.split, images.group, settings
        )
        main = found.metrics[found.main]
        top = float(np.quantile(found.chance, 0.95))
        rows.append([name, found.main, main.value, f"{main.low:.3f} to {main.high:.3f}", top, found.p])
        view = found.p if name == "view" else view
    names = ["column", "figure", "value", "95 % interval (patients)", "chance, 95 %", "p"]
    note = "Chance: the figure below which 95 % of fits to values exchanged between patients stay."
    result.table("Metadata of 934 X-rays of 243 patients from 192 frozen values", names, rows, note)
    small = noise(x, images, metadata.Settings(folds=5, permutations=39))
    result.note(f"of {NOISE} random patient-wise columns {small} have p < 0.05")
    return view < 0.05 and small <= 3


def noise(x: np.ndarray, images, settings: metadata.Settings) -> int:
    """Random columns, constant within a patient, that a probe claims to know."""
    patient = np.unique(images.group, return_inverse=True)[1]
    small = 0
    for i in range(NOISE):
        rng = np.random.default_rng(i)
        if i % 2:
            values = rng.integers(0, 2, patient.max() + 1)[patient]
            column = metadata.Column(f"random {i}", "class", values, ("a", "b"))
        else:
            column = metadata.Column(f"random {i}", "number", rng.normal(size=patient.max() + 1)[patient])
        small += metadata.measure(x, column, images.split, images.group, settings).p < 0.05
    return small


# ---------------------------------------------------------------- writer


def write(name: str, seed: int, quick: bool) -> dict[str, float]:
    """Figures of one writer from one seed."""
    import vitkit

    file, column, epochs, words = WRITERS[name]
    table = data(file.split("/")[0]) / file.split("/")[1]
    path = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    with tempfile.TemporaryDirectory() as out:
        run = vitkit.caption(
            model=str(path),
            data=str(table),
            text_column=column,
            out=f"{out}/run",
            image_size=SIZE,
            epochs=1 if quick else epochs,
            max_words=words,
            lm_layers=2,
            lm_width=128,
            lm_vocabulary=1000,
            seed=seed,
            workers=0,
            accelerator="cpu",
            quiet=True,
        )
        return {m["name"]: m["value"] for m in run.summary["metrics"]}


def writers(result: Result, seeds: range, quick: bool) -> bool:
    tasks = [(name, seed, quick) for seed in seeds for name in WRITERS]
    each: dict[str, list[dict]] = {name: [] for name in WRITERS}
    for index, found in side_by_side(write, tasks):
        print(f"  {tasks[index][0]}, seed {tasks[index][1]}: {found}", flush=True)
        each[tasks[index][0]].append(found)
    rows = []
    for name, found in each.items():
        means = [float(np.mean([one[key] for one in found])) for key in FIGURES]
        lost = [one[LOST] for one in found]
        rows.append(
            [name, *means, float(np.mean(lost)), span(lost), float(np.mean([o["distinct texts"] for o in found]))]
        )
    names = [
        "texts",
        "ROUGE-L written",
        "for another image",
        "nearest image's",
        "most frequent",
        "BLEU-4",
        LOST,
        "95 % interval over seeds",
        "distinct",
    ]
    note = "Above 0 nats lost, the writer looks at the image: the true text is less expected with another one."
    result.table("A small GPT-2 from nothing on frozen patch tokens, test images", names, rows, note)
    lost = [one[LOST] for one in each["captions"]]
    return mean_interval(lost).low > 0 if len(lost) > 1 else lost[0] > 0


if __name__ == "__main__":
    sys.exit(main())
