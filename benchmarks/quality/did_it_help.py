"""`vitkit compare A B --data D`: is the verdict right where the answer is known?

Models: DeiT-Ti/16 (ImageNet-1k), the same architecture with random weights, and DeiT-Ti with noise added to its weights
(each tensor: `HURT` or `HARDLY` times its own deviation). Data: `clothing` (photographs, 10 classes, 205 test images) and
`nih_cxr64` (chest X-rays, 14 findings, 283 test images). Each case is judged with labels (linear probe decides) and without
(found again in another view decides), by nothing but the outcome that `compare` returns.

Cases: random -> DeiT (helped), DeiT -> DeiT with noise (hurt), DeiT -> itself (same). False alarms: pairs of DeiT models with
so little noise that they are as good as each other; and pairs of real answers that were exchanged image by image with a fair
coin, so that nothing but chance is left, through the same decision rule.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitkit
from benchmarks.common import Result, arguments, data
from vitkit import weights
from vitkit.data import read
from vitkit.evaluate import linear
from vitkit.evaluate.features import features
from vitkit.run import helped_gain
from vitkit.run.parallel import side_by_side

HURT, HARDLY = 0.5, 0.02
SETS = {"clothing": ("clothing", "clothing/test", 96), "nih_cxr64": ("nih_cxr64", "nih_cxr64", 64)}
EXPECTED = {"random -> DeiT": "better", "DeiT -> DeiT + noise": "worse", "DeiT -> itself": "same"}
OPPOSITE = {"better": "worse", "worse": "better"}
COMMON = {"general": "none", "workers": 0, "quiet": True, "shots": 0}


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "On photographs the verdict is right in every known case and seed (helped, hurt, the same model twice), with labels "
        "and without; on X-rays, where the models differ less, it is never the opposite of the truth or of the verdict with "
        "labels; and at most 10 % of comparisons between equally good models are called different."
    )
    result = Result("did_it_help", "quality", claim, options.quick)
    seeds, nulls = (1, 2) if options.quick else (3, 6)
    known: list[list[Any]] = []
    null: dict[str, list[list[Any]]] = {}
    exchanged: dict[str, float] = {}
    for _, (name, rows, pairs, rate) in side_by_side(study, [(name, seeds, nulls, options.quick) for name in SETS]):
        known += rows
        null[name], exchanged[name] = pairs, rate
    known.sort(key=lambda row: (row[0], row[1], row[2], row[3]))
    result.table(
        "Known cases",
        ["data", "labels", "case", "seed", "verdict", "gain", "low", "high", "p", "right"],
        known,
        "gain of the measure that decides (accuracy, mean AUC, or share found again), with its 95 % interval",
    )
    alarms = [[name, kind, *counts] for name, pairs in null.items() for kind, *counts in pairs]
    columns = ["data", "labels", "pairs", "called different"]
    result.table("Equally good models", columns, alarms, "the pairs share models, so they are not independent")
    result.table(
        "Answers exchanged by a fair coin",
        ["data", "replicates", "called different"],
        [[name, 200 if options.quick else 1000, rate] for name, rate in exchanged.items()],
        "random weights against DeiT-Ti, linear probe, accuracy or mean hits; the nominal rate is 5 %",
    )
    wrong = [row for row in known if row[0] == "clothing" and not row[9]]
    opposite = [row for row in known if row[4] == OPPOSITE.get(EXPECTED[row[2]])]
    said = {(row[0], row[2], row[3], row[1]): row[4] for row in known}
    contradictions = [
        key for key, verdict in said.items() if key[3] == "no" and OPPOSITE.get(verdict) == said.get((*key[:3], "yes"))
    ]
    tried, called = sum(row[2] for row in alarms), sum(row[3] for row in alarms)
    result.note(f"photographs: {len(wrong)} wrong of {sum(row[0] == 'clothing' for row in known)} verdicts")
    result.note(
        f"opposite verdicts: {len(opposite)}; label-free verdicts against those with labels: {len(contradictions)}"
    )
    result.note(f"equally good models: {called} of {tried} pairs called different; exchanged answers: {exchanged}")
    fine = not wrong and not opposite and not contradictions
    return result.finish(options.quick or (fine and called <= 0.1 * tried and max(exchanged.values()) <= 0.10))


def study(name: str, seeds: int, nulls: int, quick: bool) -> tuple[str, list[list[Any]], list[list[Any]], float]:
    """Known cases, false alarms and exchanged answers on one data set."""
    labelled, plain, size = SETS[name]
    size = size * 2 // 3 // 16 * 16 if quick else size
    folder = Path(tempfile.mkdtemp())
    given = {
        "yes": {"data": data(labelled), "out": folder / "yes", "view_images": 20},  # labels decide: few views do
        "no": {"data": data(plain), "out": folder / "no", "label_columns": [], "view_images": 300},
    }
    try:
        deit, rows = model(size), []
        for seed in range(seeds):
            cases = {"random -> DeiT": (model(size, pretrained=False, seed=seed), deit)}
            cases["DeiT -> DeiT + noise"] = (deit, noisy(size, HURT, seed))
            if seed == 0:
                cases["DeiT -> itself"] = (deit, deit)
            for case, (a, b) in cases.items():
                for labels, settings in given.items():
                    found = vitkit.compare(a, b, **settings, **COMMON)
                    main = found["rows"][0]
                    figures = [main[key] for key in ("gain", "low", "high", "p")]
                    rows.append(
                        [name, labels, case, seed, found["outcome"], *figures, found["outcome"] == EXPECTED[case]]
                    )
                    print(f"  {name}, labels {labels}, {case}, seed {seed}: {found['outcome']}", flush=True)
        alike = [noisy(size, HARDLY, 100 + seed) for seed in range(nulls)]
        pairs = []
        for labels, settings in given.items():
            outcomes = [vitkit.compare(a, b, **settings, **COMMON)["outcome"] for a, b in combinations(alike, 2)]
            pairs.append([labels, len(outcomes), sum(one in ("better", "worse") for one in outcomes)])
        rate = exchange(model(size, pretrained=False, seed=0), deit, data(labelled), folder / "yes" / "cache", quick)
    finally:
        shutil.rmtree(folder)
    return name, rows, pairs, rate


def exchange(a: Any, b: Any, where: Path, cache: Path, quick: bool) -> float:
    """Share of replicates in which two models that differ by chance alone are called different.

    Replicates redraw the test images too, so that the rate is not that of one set. X-rays have several findings: there the
    share of findings that a probe gets right stands for the answer, as one number an image.
    """
    images = read(where)
    split, y = images.split, images.labels
    scores = []
    for vit in (a, b):
        x = np.asarray(features(vit, images, cache=cache))
        probe = linear.fit(x[split == "train"], y[split == "train"], x[split == "val"], y[split == "val"])
        scores.append(probe.scores(x[split == "test"]))
    truth = y[split == "test"]
    if images.task == "single":
        hits = [(one.argmax(1) == truth).astype(float) for one in scores]
    else:
        hits = [np.nanmean((one >= 0.5) == (truth == 1), axis=1) for one in scores]
    rng, called, replicates = np.random.default_rng(0), 0, 200 if quick else 1000
    for _ in range(replicates):
        drawn = rng.integers(0, len(truth), len(truth))
        swap = rng.random(len(truth)) < 0.5
        first = np.where(swap, hits[1][drawn], hits[0][drawn])
        second = np.where(swap, hits[0][drawn], hits[1][drawn])
        called += helped_gain.gain_of_means("linear", "hits", first, second, None).proven
    return called / replicates


def model(size: int, *, pretrained: bool = True, seed: int = 0) -> Any:
    file = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    return weights.load(str(file), image_size=size, pretrained=pretrained, seed=seed, say=None).eval()


def noisy(size: int, amount: float, seed: int) -> Any:
    """DeiT-Ti with Gaussian noise of `amount` times the deviation of each weight tensor."""
    vit = model(size)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in vit.parameters():
            if weight.ndim > 1:
                weight.add_(amount * weight.std() * torch.randn(weight.shape, generator=draw))
    return vit


if __name__ == "__main__":
    sys.exit(main())
