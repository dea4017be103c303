"""`vitkit demo`: the main job on scikit-learn's bundled handwriting, without downloading anything.

For every seed: masked autoencoding of a small ViT on the unlabelled training digits, then a linear head, AdaptFormer and
full fine-tuning on a few labelled digits a class, from the pre-trained weights and from the random ones they started as,
and kNN and a linear probe on the frozen features of both. Everything lands in one report.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = 10  # labelled digits a class
TINY = {"embed_dim": 64, "depth": 4, "num_heads": 4}
MODEL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "arch_kwargs": TINY,
    "pretrained": False,
    "patch_size": 8,
    "image_size": 32,
    "in_chans": 1,
    "data": "digits",
    "workers": 0,
    "accelerator": "cpu",
    "quiet": True,
}
PRETRAIN = {
    "mask_ratio": 0.75, "decoder_dim": 48, "decoder_depth": 2, "decoder_heads": 4, "epochs": 90, "warmup_epochs": 5.0,
    "batch_size": 64, "lr": 2e-3, "crop_scale": (0.8, 1.0), "hflip": False, "eval_every": 15,
}  # fmt: skip
ADAPT = {"labels_per_class": LABELS, "epochs": 60, "warmup_epochs": 6.0, "batch_size": 50, "hflip": False,
         "crop_scale": (0.6, 1.0), "eval_every": 4}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"optimizer": "adamw", "lr": 1e-2},
    "adaptformer": {"optimizer": "adamw", "lr": 5e-3, "bottleneck": 16},
    "full": {"lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.0, "randaug": None},
}
NAMES = {"linear": "linear head", "adaptformer": "AdaptFormer", "full": "full fine-tuning"}
STARTS = {"mae": "pre-trained (MAE)", "random": "random weights"}


def run(out: Path, *, seeds: int = 3, quick: bool = False) -> Path:
    """Run (or finish) the demo in folder `out`; returns the report's path."""
    from vitkit.run.model import Run
    from vitkit.run.parallel import cores, side_by_side

    started = time.perf_counter()
    seeds = 1 if quick else seeds
    print(f"{2 * seeds} chains of runs on {min(cores(), 2 * seeds)} cores, into {out}", file=sys.stderr)
    # The chains that pre-train first: they are the longer ones.
    chains = [(str(out), seed, start, quick) for start in STARTS for seed in range(seeds)]
    found: dict[tuple[str, int], dict[str, dict]] = {}
    for index, measured in side_by_side(chain, chains):
        found[chains[index][2], chains[index][1]] = measured
    done = {(s, m): [Run(out / f"{s}-{m}-seed{seed}") for seed in range(seeds)] for s in STARTS for m in METHODS}
    frozen = {(s, p): [found[s, seed][p] for seed in range(seeds)] for s in STARTS for p in ("knn", "linear")}
    pretrained = [Run(out / f"mae-seed{seed}") for seed in range(seeds)]
    path = _report(out, pretrained, done, frozen, time.perf_counter() - started)
    print(f"finished in {(time.perf_counter() - started) / 60:.1f} min", file=sys.stderr)
    return path


def chain(folder: str, seed: int, start: str, quick: bool) -> dict[str, dict]:
    """All runs of one seed from one start, in a process of its own; returns the frozen-feature scores."""
    out = Path(folder)
    if start == "mae":
        _pretrain(out, seed, quick)
    for method in METHODS:
        _adapt(out, seed, start, method, quick)
    return _evaluate(out, seed, start)


def _pretrain(out: Path, seed: int, quick: bool) -> Any:
    from vitkit.run import verbs

    _say(f"seed {seed}: masked autoencoding on the unlabelled digits")
    settings = {**MODEL, **PRETRAIN, "seed": seed, "out": str(out / f"mae-seed{seed}")}
    return verbs.pretrain("mae", **{**settings, **({"epochs": 3} if quick else {})})


def _start(out: Path, seed: int, start: str) -> dict[str, Any]:
    """The settings that name the model to start from."""
    if start == "mae":
        own = {key: MODEL[key] for key in ("data", "workers", "accelerator", "quiet")}
        return {**own, "model": str(out / f"mae-seed{seed}"), "seed": seed}
    return {**MODEL, "seed": seed}


def _adapt(out: Path, seed: int, start: str, method: str, quick: bool) -> Any:
    from vitkit.run import verbs

    _say(f"seed {seed}: {NAMES[method]} on {LABELS} labels a class, from {STARTS[start]}")
    settings = {
        **_start(out, seed, start),
        **ADAPT,
        **METHODS[method],
        "out": str(out / f"{start}-{method}-seed{seed}"),
    }
    return verbs.adapt(method, **{**settings, **({"epochs": 2} if quick else {})})


def _evaluate(out: Path, seed: int, start: str) -> dict[str, dict]:
    from vitkit.run import verbs

    _say(f"seed {seed}: kNN and linear probe on frozen features, {STARTS[start]}")
    return verbs.evaluate(**_start(out, seed, start), labels_per_class=LABELS, protocols=("knn", "linear"))


def _report(out: Path, pretrained: Sequence[Any], done: dict, frozen: dict, seconds: float) -> Path:
    from vitkit.run.report import Report

    report = Report(
        "Digits from a few labels", subtitle="vitkit demo: scikit-learn's handwritten digits, nothing downloaded"
    )
    rows, means = _table(done, frozen)
    report.sentence(verdict(means))
    seeds = len(pretrained)
    report.table(
        "Test accuracy",
        ["start", "method", "accuracy", "95 % interval over seeds", "trained weights", "seconds"],
        rows,
        note=f"{LABELS} labelled digits a class; 500 test digits; {seeds} seeds of weights, labels and order. "
        "Scores are of the epoch with the best validation accuracy; the test digits are read once.",
    )
    report.curves(
        "Masked autoencoding: loss", _loss_curves(pretrained), x="epoch", y="squared error, standardised pixels"
    )
    report.curves("Validation accuracy while adapting", _accuracy_curves(done), x="epoch", y="accuracy")
    _pictures(report, pretrained[0])
    best = max(done, key=lambda key: means[key])
    summary = done[best][0].summary
    title = f"Confusion: {NAMES[best[1]]}, {STARTS[best[0]]}, seed 0"
    report.confusion(title, summary["confusion"]["matrix"], summary["confusion"]["classes"])
    report.details(
        "How it was run", {**MODEL, **PRETRAIN, **ADAPT, "minutes": round(seconds / 60, 1), "runs": str(out)}
    )
    path = out / "report.html"
    report.write(path)
    return path


def _table(done: dict, frozen: dict) -> tuple[list[list], dict]:
    from vitkit.evaluate.statistics import mean_interval

    rows, means = [], {}
    for (start, method), runs in done.items():
        interval = mean_interval([run.metrics["accuracy"] for run in runs])
        means[start, method] = interval.value
        summary = runs[0].summary
        seconds = sum(run.summary["seconds"] for run in runs) / len(runs)
        rows.append(
            [
                STARTS[start],
                NAMES[method],
                interval.value,
                _span(interval),
                summary["trained_parameters"],
                round(seconds, 1),
            ]
        )
    for (start, protocol), found in frozen.items():
        interval = mean_interval([one["value"] for one in found])
        means[start, protocol] = interval.value
        name = {"knn": "kNN, frozen features", "linear": "linear probe, frozen features"}[protocol]
        seconds = sum(one["seconds"] for one in found) / len(found)
        rows.append([STARTS[start], name, interval.value, _span(interval), 0, round(seconds, 1)])
    return rows, means


def verdict(means: dict) -> str:
    """Did pre-training help, and which adaptation to use: from mean test accuracies by (start, method)."""
    gains = {method: means["mae", method] - means["random", method] for method in METHODS}
    best = max(METHODS, key=lambda method: means["mae", method])
    most = max(gains, key=lambda method: gains[method])
    if min(gains.values()) > 0:
        helped = f"Pre-training helped every method, {NAMES[most]} most ({gains[most]:+.1%})".replace("%)", " points)")
    elif max(gains.values()) > 0:
        helped = (
            f"Pre-training helped {NAMES[most]} ({gains[most]:+.1%})".replace("%)", " points)") + ", not every method"
        )
    else:
        helped = "Pre-training did not help here"
    share = means["mae", "adaptformer"] / means["mae", "full"]
    use = f"From the pre-trained weights {NAMES[best]} is best at {means['mae', best]:.1%}"
    small = f"AdaptFormer reaches {share:.0%} of full fine-tuning's accuracy with a small share of its trained weights"
    return f"{helped}. {use}; {small}."


def _loss_curves(pretrained: Sequence[Any]) -> dict[str, list[tuple[float, float]]]:
    from vitkit.run.folder import RunFolder

    curves: dict[str, list[tuple[float, float]]] = {}
    for seed, one in enumerate(pretrained):
        records = RunFolder(one.path).records()
        curves[f"training, seed {seed}"] = [(r["epoch"], r["loss"]) for r in records if "loss" in r]
        curves[f"held-out, seed {seed}"] = [(r["epoch"], r["val_loss"]) for r in records if "val_loss" in r]
    return curves


def _accuracy_curves(done: dict) -> dict[str, list[tuple]]:
    import numpy as np

    from vitkit.run.folder import RunFolder

    curves = {}
    for (start, method), runs in done.items():
        each = [
            [(r["epoch"], r["val_accuracy"]) for r in RunFolder(run.path).records() if "val_accuracy" in r]
            for run in runs
        ]
        values = np.array([[y for _, y in one] for one in each])
        curves[f"{NAMES[method]}, {'MAE' if start == 'mae' else 'random'}"] = [
            (each[0][i][0], float(values[:, i].mean()), float(values[:, i].min()), float(values[:, i].max()))
            for i in range(values.shape[1])
        ]
    return curves


def _pictures(report: Any, run: Any) -> None:
    import numpy as np
    from PIL import Image

    from vitkit.run.folder import RunFolder

    for group in RunFolder(run.path).read_pictures():
        rows = [
            [(np.asarray(Image.open(run.path / "pictures" / name)), caption) for name, caption in row]
            for row in group["rows"]
        ]
        report.pictures(group["title"], rows, note=group["note"])


def _span(interval: Any) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}" if interval.low == interval.low else "one seed"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
