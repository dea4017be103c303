"""What a training run leaves behind: weights and passport, scores, predictions, pictures, a verdict, the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkit import weights
from vitkit.data.images import Images
from vitkit.data.transforms import eval_view
from vitkit.passport import Passport, Preprocess
from vitkit.run.batches import Data, evaluation_batches, predict_scores
from vitkit.run.config import Config, plain
from vitkit.run.folder import RunFolder
from vitkit.settings import Machine, Task


def save_model(
    folder: RunFolder, method: nn.Module, vit: nn.Module, *, name: str, config: Config, images: Images, adapted: bool
) -> None:
    """`model.safetensors`, `passport.json` and `splits.csv`: the whole ViT, or only what was trained where the base it
    stands on can be found again and that is the smaller part."""
    from vitkit.data.splits import save

    passport: Passport = vit.passport
    state, trained = vit.state_dict(), None
    if adapted and passport.base.get("kind") in ("timm", "file", "run"):
        names = {n for n, p in vit.named_parameters() if p.requires_grad} | {n for n in state if n.startswith("head.")}
        if sum(state[n].numel() for n in names) < 0.5 * sum(value.numel() for value in state.values()):
            trained = sorted(names)
    record = {
        "method": name,
        "settings": {key: value for key, value in config.values.items() if value is not None},
        "data": {"name": images.name, "fingerprint": images.fingerprint, "counts": images.counts},
        "sha256": weights.sha256_of(weights.trunk_state(vit)),
    }
    passport.lineage = [*passport.lineage, plain(record)]
    if adapted:
        passport.steps = [*passport.steps, {"method": name, "settings": plain(method.settings)}]  # as resolved
        passport.classes, passport.task = list(method.task.classes), method.task.kind
    extras = method.extras() if hasattr(method, "extras") else None
    weights.save_run(folder.path, vit, trained=trained, extras=extras)
    save(images, folder.path / "splits.csv")


def judge(
    folder: RunFolder,
    summary: dict,
    method: nn.Module,
    data: Data,
    task: Task,
    preprocess: Preprocess,
    prepare: Any,
    machine: Machine,
    main: str,
) -> None:
    """Score the test split once (the validation split where there is none), with intervals, predictions and pictures."""
    from vitkit.evaluate import metrics, statistics

    split = "test" if len(data.test) else "val"
    part = data.test if len(data.test) else data.val
    if not len(part):
        summary["metrics"] = []
        return
    view = method.test_view(preprocess) if hasattr(method, "test_view") else eval_view(preprocess)
    scores = predict_scores(method, part, view, prepare, machine)
    found = metrics.summary(task.kind, part.labels, scores, also=main)
    found = {main: found.pop(main), **found}
    interval = statistics.bootstrap(getattr(metrics, main), part.labels, scores, groups=part.group, seed=0)
    summary["metrics"] = [
        _row(key, value, part, split, interval if key == main else None) for key, value in found.items()
    ]
    write_predictions(folder.path / "predictions.csv", part, scores, task)
    if task.kind == "single":
        matrix = metrics.confusion(part.labels, scores.argmax(1), len(task.classes))
        summary["confusion"] = {"classes": list(task.classes), "matrix": np.asarray(matrix).tolist()}
        save_mistakes(folder, part, scores, task, preprocess)
    else:
        each = metrics.auc_each(part.labels, scores)
        rows = [
            [name, float(value), int(np.nansum(part.labels[:, i]))]
            for i, (name, value) in enumerate(zip(task.classes, each, strict=True))
        ]
        summary["tables"] = [
            {
                "title": "AUC of each label",
                "columns": ["label", "AUC", "positives"],
                "rows": rows,
                "note": "a label with one value only scores 0 and is left out of the mean",
            }
        ]


def _row(name: str, value: float, images: Images, split: str, interval: Any = None) -> dict[str, Any]:
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return {"name": name, "value": value, "low": low, "high": high, "n": len(images), "split": split}


def write_predictions(path: Path, images: Images, scores: np.ndarray, task: Task) -> None:
    """One row an image: name, true label(s), predicted label(s), one probability a class."""
    import pandas as pd

    from vitkit.run.files import atomic_write

    names = list(task.classes)
    frame = pd.DataFrame({"image": images.names})
    if images.labels is not None and images.task in ("single", "multi"):
        frame["label"] = [_label_text(label, names) for label in images.labels]
    if task.kind == "single":
        frame["predicted"] = [names[i] for i in scores.argmax(1)]
    else:
        frame["predicted"] = ["|".join(n for n, s in zip(names, row, strict=True) if s >= 0.5) for row in scores]
    for index, name in enumerate(names):
        frame[f"p({name})"] = scores[:, index].round(6)
    atomic_write(path, frame.to_csv(index=False))


def _label_text(label: Any, names: list[str]) -> str:
    if np.ndim(label) == 0:
        return names[int(label)] if label >= 0 else ""
    # An unknown label is written as ?name, so that nobody reads it back as absent.
    marks = [("?" if np.isnan(value) else "") + name for name, value in zip(names, label, strict=True) if value != 0]
    return "|".join(marks)


def save_mistakes(folder: RunFolder, images: Images, scores: np.ndarray, task: Task, preprocess: Preprocess) -> None:
    """Pictures of the most confident mistakes: where people look first."""
    predicted = scores.argmax(1)
    wrong = np.flatnonzero(predicted != images.labels)
    wrong = wrong[np.argsort(-scores[wrong, predicted[wrong]])][:8]
    if not len(wrong):
        return
    view = eval_view(preprocess)
    row = []
    for i in wrong:
        caption = f"{task.classes[predicted[i]]} {scores[i, predicted[i]]:.0%}, truly {task.classes[images.labels[i]]}"
        row.append((_picture(view(images.decode(int(i)))), caption))
    folder.save_pictures("Most confident mistakes on the test images", [row[:4], row[4:]] if len(row) > 4 else [row])


@torch.inference_mode()
def save_reconstructions(
    folder: RunFolder, method: nn.Module, images: Images, preprocess: Preprocess, prepare: Any, machine: Machine
) -> None:
    """Original, masked and reconstructed pictures of held-out images."""
    chosen = images.subset(np.linspace(0, len(images) - 1, num=min(6, len(images))).astype(int))
    all_of_them = replace(machine, batch_size=len(chosen))
    batch = next(iter(evaluation_batches(chosen, eval_view(preprocess), all_of_them)))
    batch["image"] = prepare(batch["image"])
    out = method.reconstruct(batch)
    ratio = float(out["mask"].float().mean())
    how = (
        "de-normalised with each target patch's own mean and deviation"
        if getattr(method.settings, "norm_pix_loss", True)
        else "raw pixels"
    )
    rows = []
    for i in range(len(chosen)):
        views = [preprocess.denormalise(out[key][i : i + 1]) for key in ("original", "masked", "reconstructed")]
        hidden = method.show_hidden(out["mask"][i], views[0])
        pictures = [_picture((v[0] * 255).round().byte().cpu()) for v in (views[0], hidden, views[2])]
        rows.append(list(zip(pictures, ("image", f"{1 - ratio:.0%} seen", "reconstructed"), strict=True)))
    folder.save_pictures("What the model sees and fills in", rows, note=f"held-out images; hidden patches: {how}")


def loss_metrics(method, used, held_out, preprocess, prepare, machine, records) -> list[dict]:
    """Held-out loss beside the two baselines that a model without understanding reaches."""
    if not len(held_out) or not records:
        return []
    rows = [_row("held-out loss", records[-1]["val_loss"], held_out, "val")]
    if hasattr(method, "baselines"):
        view = eval_view(preprocess)
        few = used.subset(np.linspace(0, len(used) - 1, num=min(len(used), 2000)).astype(int))
        train = (prepare(batch["image"]) for batch in evaluation_batches(few, view, machine))
        test = ({**b, "image": prepare(b["image"])} for b in evaluation_batches(held_out, view, machine))
        for key, value in method.baselines(train, test).items():
            rows.append(_row(key, value, held_out, "val"))
    return rows


def pretrain_verdict(summary: dict, images: int, state: Any) -> str:
    found = {m["name"]: m["value"] for m in summary["metrics"]}
    text = f"Trained on {images:,} images for {state.step:,} steps in {minutes(state.seconds)}."
    name = "per-position mean of training images"
    words = {name: "the per-position mean", "predicting zero": "predicting zero"}
    name = next((one for one in words if found.get(one)), name)
    if found.get(name) and "held-out loss" in found:
        share = found["held-out loss"] / found[name]
        text += f" Held-out hidden patches are predicted with {share:.0%} of the error of {words[name]}"
        text += "." if share < 0.9 else ": it has hardly left that plateau, train longer before judging it."
    return text


def adapt_verdict(summary: dict, state: Any, count: int) -> str:
    """One sentence: the main score with its interval, on how many images, for how many trained weights and seconds."""
    if not summary["metrics"]:
        return f"Trained on {count:,} images; there was nothing held out to score it on."
    main = summary["metrics"][0]
    words = {"mean_auc": "Mean AUC"}.get(main["name"], main["name"].replace("_", " ").capitalize())
    known = main["low"] is not None and main["low"] == main["low"]
    interval = f" (95 % interval {main['low']:.1%} to {main['high']:.1%})" if known else ""
    weights_trained = summary["trained_parameters"]
    return (
        f"{words} {main['value']:.1%}{interval} on {main['n']:,} {main['split']} images, "
        f"training {weights_trained:,} weights ({weights_trained / summary['total_parameters']:.1%}) "
        f"on {count:,} images in {minutes(state.seconds)}."
    )


def finish(folder: RunFolder, summary: dict, state: Any, say: Callable[[str], None]) -> None:
    from vitkit.run.report import run_report

    if state.bad:
        summary["tables"] = [
            *summary.get("tables", []),
            {
                "title": "Unreadable files",
                "columns": ["file"],
                "rows": [[b] for b in state.bad],
                "note": "left out of training",
            },
        ]
    folder.finish(summary)
    run_report(folder)
    say(summary["verdict"])
    say(f"report: {folder.path / 'report.html'}")


def _picture(image: Tensor) -> np.ndarray:
    """Pixels (C, H, W), uint8 or in [0, 1], to uint8 (H, W, 3) or (H, W); of a volume or video its middle slice or frame."""
    image = image[:, image.shape[1] // 2] if image.ndim == 4 else image
    array = (image.clamp(0, 1) * 255).round().byte().numpy() if image.is_floating_point() else image.numpy()
    return array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
