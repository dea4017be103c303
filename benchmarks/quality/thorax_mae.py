"""Masked autoencoding in-domain on real chest X-rays, against the same ViT from scratch, at mask ratios 0.75 and 0.9.

Data: `nih_cxr64` (ChestX-ray14 at 64 px; 582 training, 69 validation, 283 test images, split by patient) and scikit-learn's
digits. Pre-training sees training images without labels. Judged by a linear
probe on frozen mean-pooled patch features (every regularisation at once, validation picks) and by full fine-tuning, with few
labels and with all; test images are read once a run. Raw-pixel targets, as in the thorax recipe.
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
from vitkit.evaluate import linear, metrics
from vitkit.evaluate.features import features
from vitkit.evaluate.statistics import mean_interval
from vitkit.run.parallel import side_by_side

SMALL = {"pretrained": False, "workers": 0, "in_chans": 1, "quiet": True, "model": "vit_tiny_patch16_224"}
XRAY = {**SMALL, "image_size": 64, "patch_size": 8, "arch_kwargs": {"embed_dim": 96, "depth": 4, "num_heads": 3}}
DIGITS = {**SMALL, "image_size": 32, "patch_size": 8, "arch_kwargs": {"embed_dim": 64, "depth": 4, "num_heads": 4}}
DECODER = {"decoder_depth": 2, "decoder_heads": 4}
# 2040 steps on digits, enough to leave the plateau of the per-position mean; longer is better.
PRE_DIGITS = {**DECODER, "decoder_dim": 48, "mask_ratio": 0.75, "lr": 2e-3, "batch_size": 64, "epochs": 120,
              "warmup_epochs": 5.0, "crop_scale": (0.8, 1.0), "hflip": False, "eval_every": 60}  # fmt: skip
PRE_XRAY = {**DECODER, "decoder_dim": 64, "lr": 1.5e-3, "batch_size": 64, "epochs": 90, "warmup_epochs": 8.0,
            "crop_scale": (0.5, 1.0), "eval_every": 45}  # fmt: skip
TUNE = {"pool": "avg", "epochs": 15, "warmup_epochs": 2.0, "batch_size": 32, "layer_decay": 0.75, "drop_path": 0.0,
        "randaug": None, "hflip": False, "crop_scale": (0.6, 1.0), "eval_every": 4, "lr": 1e-3}  # fmt: skip


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "MAE pre-training beats the same ViT from scratch on few labels, and its reconstruction of held-out images beats both "
        "the per-position mean (at 0.6 of its error or less on digits, 0.75) and the mean of the visible patches."
    )
    result = Result("thorax_mae", "quality", claim, options.quick)
    folder = Path(tempfile.mkdtemp())
    seeds = range(1 if options.quick else 3)
    tasks = [(kind, seed, str(folder), options.quick) for kind in ("xrays", "digits") for seed in seeds]
    found: dict[str, dict[str, list[float]]] = {"digits": {}, "xrays": {}}
    try:
        for index, values in side_by_side(one_seed, tasks):
            kind, seed = tasks[index][:2]
            print(f"  {kind}, seed {seed} done", flush=True)
            for name, value in values.items():
                found[kind].setdefault(name, []).append(value)
    finally:
        shutil.rmtree(folder)
    means = {kind: {name: mean_interval(values) for name, values in each.items()} for kind, each in found.items()}
    holds = report_digits(result, means["digits"], len(seeds))
    holds &= report_xrays(result, means["xrays"], len(seeds))
    return result.finish(options.quick or holds)


def one_seed(kind: str, seed: int, folder: str, quick: bool) -> dict[str, float]:
    """Every figure of one seed on one data set."""
    return {"digits": digits, "xrays": xrays}[kind](Path(folder), seed, quick)


def digits(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    """Reconstruction, probes on few labels and fine-tuning on 100, from MAE and from random weights."""
    images = read("digits", say=None)
    out = folder / f"digits-{seed}"
    few = {"max_steps": 20} if quick else {}
    run = vitkit.pretrain("mae", data="digits", out=out, seed=seed, **{**DIGITS, **PRE_DIGITS, **few})
    found = dict(run.metrics)
    split = images.split
    for start, model in (("MAE", pooled(out)), ("random", pooled(None, DIGITS, seed))):
        x, y = features(model, images), images.labels
        for count in (3, 10, None):
            rows = images.part("train") if count is None else images.part("train").few(count, seed)
            train = rows_of(images, rows)
            probe = linear.fit(x[train], y[train], x[split == "val"], y[split == "val"], n_classes=10)
            score = metrics.accuracy(y[split == "test"], probe.scores(x[split == "test"]))
            found[f"probe {count or 'all'} {start}"] = score
    tuned = {**TUNE, "epochs": 2} if quick else {**TUNE, "epochs": 100, "batch_size": 33, "eval_every": 10}
    for start, model in (("MAE", {"model": out, "workers": 0, "quiet": True}), ("random", DIGITS)):
        run = vitkit.adapt(
            "full",
            data="digits",
            out=folder / f"tune-{start}-{seed}",
            seed=seed,
            labels_per_class=10,
            **{**model, **tuned},
        )
        found[f"tuned {start}"] = run.metrics["accuracy"]
    return found


def report_digits(result: Result, mean: dict, seeds: int) -> bool:
    loss, baselines = mean["held-out loss"], ("per-position mean of training images", "mean of the visible patches")
    result.table(
        "Digits, mask ratio 0.75: squared error of hidden patches of held-out images",
        ["prediction", "error", "interval over seeds"],
        [[name, mean[key].value, span(mean[key])] for name, key in
         (("MAE", "held-out loss"), (baselines[0], baselines[0]), (baselines[1], baselines[1]))],
        "standardised pixels; the same masks for all three",
    )  # fmt: skip
    rows = [[f"linear probe, {label}", *pair(mean, f"probe {key} ")] for label, key in
            (("30 labels", 3), ("100 labels", 10), ("1097 labels", "all"))]  # fmt: skip
    rows.append(["fine-tuned on 100 labels", *pair(mean, "tuned ")])
    columns = ["judged by", "random weights", "interval", "MAE", "interval"]
    result.table("Digits: test accuracy (500 images)", columns, rows, f"{seeds} seeds")
    gain = mean["probe 10 MAE"].value - mean["probe 10 random"].value
    tuned = mean["tuned MAE"].value - mean["tuned random"].value
    result.note(f"digits: error {loss.value / mean[baselines[0]].value:.2f} of the per-position mean's (gate 0.6); probe at "
                f"100 labels {100 * gain:+.1f} points (gate +15); fine-tuned {100 * tuned:+.1f} points (gate +8)")  # fmt: skip
    return (
        loss.value <= 0.6 * mean[baselines[0]].value
        and loss.value < mean[baselines[1]].value
        and gain > 0
        and tuned > 0
    )


def xrays(folder: Path, seed: int, quick: bool) -> dict[str, float]:
    """Reconstruction at two mask ratios; probes and fine-tuning from both and from random weights."""
    table = data("nih_cxr64") / "labels.csv"
    findings, healthy = read(table, say=None), read(table, label_columns=["no_finding"], say=None)
    found: dict[str, float] = {}
    starts: dict[str, Any] = {"random": pooled(None, XRAY, seed)}
    for ratio in (0.75, 0.9):
        out = folder / f"xray-{ratio}-{seed}"
        settings = {**XRAY, **PRE_XRAY, "mask_ratio": ratio, **({"max_steps": 5} if quick else {})}
        run = vitkit.pretrain("mae", data=table, out=out, seed=seed, **settings)
        found |= {f"{ratio} {name}": value for name, value in run.metrics.items()}
        starts[str(ratio)] = pooled(out)
    for start, model in starts.items():
        x = features(model, findings)
        for name, images in (("14 findings", findings), ("any finding", healthy)):
            for labels, value in few_label_probes(x, images, seed).items():
                found[f"{name} {labels} {start}"] = value
    for start in starts:
        model = XRAY if start == "random" else {"model": folder / f"xray-{start}-{seed}", "workers": 0, "quiet": True}
        tuned = {**TUNE, "epochs": 1} if quick else TUNE
        run = vitkit.adapt(
            "full",
            data=table,
            label_columns=["no_finding"],
            out=folder / f"cxr-{start}-{seed}",
            seed=seed,
            **{**model, **tuned},
        )
        found[f"tuned {start}"] = run.metrics["mean_auc"]
    return found


def few_label_probes(x: np.ndarray, images: Any, seed: int) -> dict[str, float]:
    """Mean AUC on the test images of probes on 100 random training images and on all."""
    y, split = images.labels, images.split
    train, val, test = (np.flatnonzero(split == name) for name in ("train", "val", "test"))
    few = np.random.default_rng(seed).permutation(train)[:100]
    scores = {}
    for name, rows in (("100 labels", few), ("582 labels", train)):
        probe = linear.fit(x[rows], y[rows], x[val], y[val])
        scores[name] = metrics.mean_auc(y[test], probe.scores(x[test]))
    return scores


def report_xrays(result: Result, mean: dict, seeds: int) -> bool:
    baselines = ("per-position mean of training images", "mean of the visible patches")
    rows = [[ratio, *(mean[f"{ratio} {key}"].value for key in ("held-out loss", *baselines))] for ratio in (0.75, 0.9)]
    result.table("X-rays: squared error of hidden patches of held-out images", ["mask ratio", "MAE", *baselines], rows)
    lines = []
    for name in ("14 findings", "any finding"):
        for labels in ("100 labels", "582 labels"):
            key = f"{name} {labels} "
            lines.append(
                [f"probe: {name}, {labels}", *(f"{mean[key + s].value:.3f} ({span(mean[key + s])})" for s in STARTS)]
            )
    lines.append(
        [
            "fine-tuned: any finding, 582 labels",
            *(f"{mean['tuned ' + s].value:.3f} ({span(mean['tuned ' + s])})" for s in STARTS),
        ]
    )
    result.table(
        "X-rays: mean AUC on 283 test images",
        ["judged by", "random weights", "MAE, ratio 0.75", "MAE, ratio 0.9"],
        lines,
        f"{seeds} seeds, 95 % interval over seeds in brackets; ViT of 0.5 M weights, 64 px, patch 8, 582 images to learn from",
    )
    few = "any finding 100 labels "
    best = max(("0.75", "0.9"), key=lambda r: mean[few + r].value)
    gain = mean[few + best].value - mean[few + "random"].value
    ratios = mean[few + "0.9"].value - mean[few + "0.75"].value
    result.note(
        f"X-rays, 100 labels: MAE minus random {100 * gain:+.1f} points of AUC (ratio {best}); "
        f"ratio 0.9 minus 0.75: {100 * ratios:+.1f}"
    )
    beats = all(row[1] < min(row[2:]) for row in rows)
    return beats and gain > 0


STARTS = ("random", "0.75", "0.9")


def pooled(run: Path | None, settings: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """A frozen encoder whose feature is the mean of its patch tokens after the final norm."""
    if run is not None:
        vit = vitkit.weights.load(str(run), say=None)
    else:
        keys = ("pretrained", "in_chans", "image_size", "patch_size", "arch_kwargs")
        vit = vitkit.weights.load(settings["model"], seed=seed, say=None, **{key: settings[key] for key in keys})
    vit.global_pool = "avg"  # with the final norm kept: the mean of normalised patch tokens
    return vit.eval()


def rows_of(images: Any, part: Any) -> np.ndarray:
    """Positions in `images` of the pictures of `part`."""
    where = {name: i for i, name in enumerate(images.names)}
    return np.array([where[name] for name in part.names])


def pair(mean: dict, key: str) -> list[Any]:
    return [cell for start in ("random", "MAE") for cell in (mean[key + start].value, span(mean[key + start]))]


def span(interval: Any) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}" if interval.low == interval.low else "one seed"


if __name__ == "__main__":
    sys.exit(main())
