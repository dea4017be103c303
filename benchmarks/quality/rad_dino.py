"""DINOv2 continued on chest X-rays from general weights, and a careful against a naive continuation of good weights.

In-domain: a ViT of 0.5 M weights, pre-trained by MAE on photographs (`tiny_imagenet`, grey, 64 px), goes on with DINOv2 on the
582 training X-rays of `nih_cxr64`, with KoLeo and without. Judged on frozen features: kNN and linear probe of sex
and view (283 test images, patients apart; the 14 findings are beside them, but 64 px and few labels leave them near
chance), and a linear decoder of lungs on patch tokens (`cxr_covid`).

Continuation: DeiT-Ti goes on with DINOv2 naively (fresh heads, everything trains from the first step at the default rate) and
guarded, in as many steps, on the same X-rays, judged by probes of sex and view, and on 900 photographs of clothing, judged by
kNN and linear probe on 205 test images. The X-rays were added after the photographs had shown no loss; that they show one was
seen on validation images.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import vitkit
from benchmarks.common import Result, arguments, data
from vitkit.data import read
from vitkit.evaluate import knn, linear, metrics, segment
from vitkit.evaluate.features import features
from vitkit.evaluate.statistics import mean_interval
from vitkit.run.parallel import side_by_side

ARCH = {"embed_dim": 96, "depth": 4, "num_heads": 3}
GREY = {"model": "vit_tiny_patch16_224", "pretrained": False, "in_chans": 1, "image_size": 64, "patch_size": 8}
QUIET = {"workers": 0, "quiet": True, "accelerator": "cpu"}
GENERAL = {**GREY, **QUIET, "arch_kwargs": ARCH, "decoder_dim": 64, "decoder_heads": 4, "mask_ratio": 0.75, "lr": 1.5e-3,
           "batch_size": 64, "epochs": 12, "warmup_epochs": 2.0, "crop_scale": (0.5, 1.0), "eval_every": 12}  # fmt: skip
HEADS = {"prototypes": 1024, "head_hidden": 256, "bottleneck_dim": 64}
# Large crops of half of the picture or more, as RAD-DINO has them; X-rays are not mirrored; no stochastic depth in 4 blocks.
IN_DOMAIN = {**QUIET, **HEADS, "guard": False, "local_crops": 4, "local_size": 32, "local_scale": (0.2, 0.5), "hflip": False,
             "crop_scale": (0.5, 1.0), "drop_path": 0.0, "lr": 1e-3, "batch_size": 64, "epochs": 20, "warmup_epochs": 2.0,
             "colour": 0.5, "eval_every": 20}  # fmt: skip
CONTINUED: dict[str, Any] = {
    **QUIET, "prototypes": 2048, "head_hidden": 512, "bottleneck_dim": 128, "image_size": 112, "local_crops": 4,
    "batch_size": 16, "epochs": 2, "eval_every": 1,
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {"X-rays": {"epochs": 4, "hflip": False}, "clothing": {}}
KINDS = ("init", "KoLeo", "no KoLeo")
STARTS = ("original", "naive", "guarded")


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "Continued in-domain, a general ViT gains at least 3 points in the mean of its CLS probes and does not lose in lungs; "
        "KoLeo keeps images apart; on X-rays a naive continuation of DeiT-Ti loses at least 2 points in the mean of its kNN "
        "probes, a guarded one none (at most 1), and on photographs a guarded one does not, either."
    )
    result = Result("rad_dino", "quality", claim, options.quick)
    folder = Path(tempfile.mkdtemp())
    seeds = range(1 if options.quick else 3)
    found: dict[str, dict[str, list[float]]] = {"in_domain": {}, **{name: {} for name in SETS}}
    try:
        few = {"max_steps": 5} if options.quick else {}
        vitkit.pretrain("mae", data=data("tiny_imagenet"), out=folder / "general", **{**GENERAL, **few})
        tasks = [(part, kind, seed, str(folder), options.quick) for part, kinds in
                 (("in_domain", KINDS), *((name, STARTS) for name in SETS)) for kind in kinds for seed in seeds]  # fmt: skip
        for index, values in side_by_side(one, tasks):
            part, kind, seed = tasks[index][:3]
            print(f"  {part}, {kind}, seed {seed}: {values}", flush=True)
            for name, value in values.items():
                found[part].setdefault(f"{name} {kind}", []).append(value)
    finally:
        shutil.rmtree(folder)
    means = {part: {name: mean_interval(values) for name, values in each.items()} for part, each in found.items()}
    holds = report_in_domain(result, means["in_domain"], len(seeds))
    holds &= report_continued(result, {name: means[name] for name in SETS}, len(seeds))
    return result.finish(options.quick or holds)


def one(part: str, kind: str, seed: int, folder: str, quick: bool) -> dict[str, float]:
    """Every figure of one seed of one contestant."""
    if part == "in_domain":
        return in_domain(kind, seed, Path(folder), quick)
    return continued(part, kind, seed, Path(folder), quick)


# ---------------------------------------------------------------- in-domain


def in_domain(kind: str, seed: int, folder: Path, quick: bool) -> dict[str, float]:
    start = folder / "general"
    if kind != "init":
        out = folder / f"{kind}-{seed}"
        more = {"koleo_weight": 0.0} if kind == "no KoLeo" else {}
        more |= {"max_steps": 5} if quick else {}
        vitkit.pretrain(
            "dinov2", model=start, data=data("nih_cxr64") / "labels.csv", out=out, seed=seed, **{**IN_DOMAIN, **more}
        )
        start = out
    vit = vitkit.weights.load(str(start), say=None).eval()
    return probes(vit) | {"lungs": lungs(vit, seed, quick)}


def probes(vit: Any) -> dict[str, float]:
    """Test AUC of kNN and linear probes on the class token, and how far an image is from its nearest neighbour."""
    import pandas as pd

    table = data("nih_cxr64") / "labels.csv"
    images, columns = read(table, say=None), pd.read_csv(table)
    x, split = features(vit, images), np.asarray(images.split)
    train, val, test = (np.flatnonzero(split == name) for name in ("train", "val", "test"))
    found = {}
    for name, y in (("sex", columns.sex == "M"), ("view", columns["view"] == "AP")):
        y = y.to_numpy().astype(np.int64)
        probe = linear.fit(x[train], y[train], x[val], y[val], n_classes=2)
        votes = knn.scores(x[train], y[train], x[test], n_classes=2)
        for what, scores in (("linear", probe.scores(x[test])), ("kNN", votes)):
            found[f"{what}, {name}"] = float(metrics.auc_each(np.eye(2)[y[test]], scores)[1])
    found["CLS probes"] = float(np.mean(list(found.values())))
    y = images.labels
    probe = linear.fit(x[train], y[train], x[val], y[val])
    found["linear, 14 findings"] = float(metrics.mean_auc(y[test], probe.scores(x[test])))
    unit = x[test] / np.linalg.norm(x[test], axis=1, keepdims=True)
    near = unit @ unit.T
    np.fill_diagonal(near, -1)
    found["distance"] = float(np.sqrt(np.maximum(2 - 2 * near.max(1), 0)).mean())
    return found


def lungs(vit: Any, seed: int, quick: bool) -> float:
    """Foreground IoU of a linear decoder on frozen patch tokens at 128 px, test images."""
    images = read(data("cxr_covid") / "labels.csv", mask_column="lung_mask", say=None)
    settings = segment.Settings(rates=(1e-2, 5e-2), epochs=2 if quick else 20, seed=seed)
    found = segment.fit(vit, images, decoder="linear", image_size=128, rescale=True, settings=settings)
    return found.scores["test_iou"]


def report_in_domain(result: Result, mean: dict, seeds: int) -> bool:
    names = [
        "CLS probes",
        "kNN, sex",
        "kNN, view",
        "linear, sex",
        "linear, view",
        "linear, 14 findings",
        "lungs",
        "distance",
    ]
    rows = [
        [name, *(f"{mean[f'{name} {kind}'].value:.3f} ({span(mean[f'{name} {kind}'])})" for kind in KINDS)]
        for name in names
    ]
    note = f"{seeds} seeds, 95 % interval over seeds in brackets; one general start, whose probes do not vary"
    columns = ["test images", "general start (MAE)", "DINOv2 on X-rays", "without KoLeo"]
    result.table(
        "In-domain: AUC of probes of sex and view and their mean, foreground IoU, nearest neighbour",
        columns,
        rows,
        note,
    )
    gain = {name: mean[f"{name} KoLeo"].value - mean[f"{name} init"].value for name in names}
    apart = mean["distance KoLeo"].value, mean["distance no KoLeo"].value
    result.note(
        f"in-domain: CLS probes {100 * gain['CLS probes']:+.1f} points (gate +3), lungs {100 * gain['lungs']:+.1f} points of "
        f"IoU (gate 0); nearest neighbours at {apart[0]:.2f} with KoLeo, {apart[1]:.2f} without"
    )
    return gain["CLS probes"] >= 0.03 and gain["lungs"] >= 0 and apart[0] > max(apart[1], 0.1)


# ---------------------------------------------------------------- continuation


def continued(name: str, kind: str, seed: int, folder: Path, quick: bool) -> dict[str, float]:
    start = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    source = data("nih_cxr64") / "labels.csv" if name == "X-rays" else data("clothing")
    if kind == "original":
        vit = vitkit.weights.load(start, image_size=CONTINUED["image_size"], say=None)
    else:
        out = folder / f"{name}-{kind}-{seed}"
        more = {"max_steps": 5, "epochs": 1} if quick else {}
        settings = {**CONTINUED, **SETS[name], **more, "guard": kind == "guarded"}
        vitkit.pretrain("dinov2", model=start, data=source, out=out, seed=seed, **settings)
        vit = vitkit.weights.load(str(out), say=None)
    if name == "X-rays":
        found = probes(vit.eval())
        kinds = {what: [found[f"{what}, {label}"] for label in ("sex", "view")] for what in ("kNN", "linear")}
        return found | {f"{what}, mean": float(np.mean(values)) for what, values in kinds.items()}
    images = read(data("clothing"), say=None)
    x, y, split = features(vit.eval(), images), images.labels, np.asarray(images.split)
    train, val, test = (np.flatnonzero(split == part) for part in ("train", "val", "test"))
    probe = linear.fit(x[train], y[train], x[val], y[val], n_classes=10)
    votes = knn.scores(x[train], y[train], x[test], n_classes=10)
    return {
        "kNN": float(metrics.accuracy(y[test], votes)),
        "linear probe": float(metrics.accuracy(y[test], probe.scores(x[test]))),
    }


def report_continued(result: Result, means: dict[str, dict], seeds: int) -> bool:
    holds = True
    for name, what, judged in (
        ("X-rays", "test AUC", ("kNN, sex", "kNN, view", "kNN, mean", "linear, sex", "linear, view", "linear, mean")),
        ("clothing", "test accuracy", ("kNN", "linear probe")),
    ):
        mean = means[name]
        rows = [
            [one, *(f"{mean[f'{one} {kind}'].value:.3f} ({span(mean[f'{one} {kind}'])})" for kind in STARTS)]
            for one in judged
        ]
        note = f"{seeds} seeds; the same steps for both, the guarded run spends the first epoch on its heads"
        result.table(f"Continuing DeiT-Ti on {name}: {what}", ["judged by", *STARTS], rows, note)
        key = "kNN, mean" if name == "X-rays" else "kNN"
        change = {kind: mean[f"{key} {kind}"].value - mean[f"{key} original"].value for kind in STARTS[1:]}
        gate = " (gate -2)" if name == "X-rays" else " (no gate)"
        result.note(
            f"{name}, {key}: naive {100 * change['naive']:+.1f} points{gate}, guarded {100 * change['guarded']:+.1f} (gate -1)"
        )
        holds &= change["guarded"] >= -0.01 and (name != "X-rays" or change["naive"] <= -0.02)
    return holds


def span(interval: Any) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}" if interval.low == interval.low else "one seed"


if __name__ == "__main__":
    sys.exit(main())
