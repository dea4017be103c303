"""Training on volumes with masks, and what it leaves behind: a network that segments whole volumes, scored class by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from vitkit.data.images import Images
from vitkit.errors import DataError
from vitkit.run import discover
from vitkit.run.batches import Data, open_data, open_model, prepare_for, speaker
from vitkit.run.config import Config
from vitkit.run.folder import RunFolder
from vitkit.run.results import finish, minutes, save_model
from vitkit.run.volume_predict import segment_case

SHOWN = 4  # test volumes with a picture


def segment_job(fabric: Any, verb: str, name: str, config: Config) -> None:
    """Train on the masks of train, choose the epoch by the Dice of val, score the volumes of test once."""
    from vitkit.run.jobs import _fit, _summary, count_parameters, require_kind

    inputs, train, machine = config.inputs, config.train, config.machine
    first = fabric.is_global_zero
    say = speaker(machine.quiet or not first)
    kind = discover.method_class(discover.load(verb, name))
    images = open_data(inputs, say, kind.kinds[0])
    data = masked_parts(images, config.method.volumes, machine.seed, say)
    torch.manual_seed(machine.seed)
    vit = open_model(inputs, seed=machine.seed, say=say, num_classes=0, drop_path_rate=train.drop_path)
    require_kind(kind, vit, f"{verb} {name}")
    method = kind(vit, config.method, classes=images.classes)
    trainable, total = count_parameters(method)
    say(f"{trainable:,} of {total:,} weights train; {len(images.classes)} classes: {', '.join(images.classes[:6])}")
    preprocess, device = vit.passport.preprocess, fabric.device
    for sentence in smaller_than_crop(data.all, preprocess):
        say(sentence)
    view, _ = method.views(preprocess, train)
    folder, prepare = RunFolder(train.out), prepare_for(preprocess, device)

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        from vitkit.evaluate.volumes import mean_dice

        cases = dice_of(model, data.val, preprocess, device)
        return mean_dice(cases)[0], {"val_dice": mean_dice(cases)[0]}

    checks = validate if len(data.val) else None
    state = _fit(fabric, method, data.train, view, prepare, config, folder, validate=checks, keep_best=True)
    if first:
        method.eval()
        vit.passport.classes = list(method.classes)
        save_model(folder, method, vit, name=f"{verb}.{name}", config=config, images=images, adapted=False)
        summary = _summary(verb, name, method, state)
        judge(folder, summary, method, data, preprocess, device)
        summary["verdict"] = verdict(summary, state, len(data.train))
        finish(folder, summary, state, say)
    fabric.barrier()


def masked_parts(images: Images, few: int | None, seed: int, say: Callable[[str], None]) -> Data:
    """Train, validation and test volumes that have masks; refuses data that cannot be learnt from."""
    if images.task != "mask" or images.masks is None:
        raise DataError(
            f"{images.name}: no masks were found, and segmentation learns from them",
            fix="images/ and labels/ with equal file names, nnU-Net's imagesTr/ and labelsTr/, or a table with a mask column",
        )
    train, val, test = (images.part(split) for split in ("train", "val", "test"))
    if not len(train):
        raise DataError(f"{images.name}: no training volumes with masks", fix="name some of the split train")
    if few is not None:
        if few > len(train):
            raise DataError(
                f"volumes={few}, but only {len(train)} training volumes have masks", fix=f"at most {len(train)}"
            )
        train = train.subset(np.random.RandomState(seed).permutation(len(train))[:few])
        say(f"training on {few} labelled volumes")
    return Data(images, train, val, test)


def smaller_than_crop(images: Images, preprocess: Any) -> list[str]:
    """A sentence where volumes are smaller than the model's crop along some axis; read from headers, spacing included."""
    crop, spacing = preprocess.image_size, preprocess.spacing
    small = []
    for row in images.rows.tolist():
        grid = images.store.grid(row)  # type: ignore[attr-defined]
        if grid is None:
            continue
        sides = (
            grid.shape
            if spacing is None
            else [n * a / b for n, a, b in zip(grid.shape, grid.spacing, spacing, strict=True)]
        )
        if any(round(have) < want for have, want in zip(sides, crop, strict=True)):
            small.append(images.store.name(row))
    if not small:
        return []
    size = " x ".join(map(str, crop))
    return [
        f"{len(small)} of {len(images)} volumes are smaller than the crop of {size}: they are padded, e.g. {small[0]}"
    ]


def dice_of(method: nn.Module, images: Images, preprocess: Any, device: Any) -> np.ndarray:
    """Dice (N, C) of whole volumes at the file's own spacing; NaN where a class is not there."""
    from vitkit.evaluate.volumes import dice_cases

    return dice_cases(np.stack([counts_of(method, images, i, preprocess, device)[0] for i in range(len(images))]))


def counts_of(method: Any, images: Images, i: int, preprocess: Any, device: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """(voxel counts (C, C), the predicted mask, the case) of one volume."""
    from vitkit.evaluate.masks import confusion

    case = images.decode(i)
    predicted = segment_case(method, case, preprocess, device)
    truth = case.mask
    highest = int(truth[truth != 255].max(initial=0))
    if highest >= len(method.classes):
        raise DataError(
            f"{images.path(i)}: the mask holds class {highest}, and there are {len(method.classes)}",
            fix="list all classes in dataset.json or classes.json",
        )
    return confusion(truth, predicted, len(method.classes)), predicted, case


def judge(folder: RunFolder, summary: dict, method: Any, data: Data, preprocess: Any, device: Any) -> None:
    """Score the test volumes once (the validation volumes where there are none): Dice with intervals, a table of classes, a
    row a volume in predictions.csv, pictures."""
    from vitkit.evaluate.statistics import bootstrap
    from vitkit.evaluate.volumes import dice_cases, volume_means

    split, part = ("test", data.test) if len(data.test) else ("val", data.val)
    if not len(part):
        return
    counts, pictures = [], []
    for i in range(len(part)):
        table, predicted, case = counts_of(method, part, i, preprocess, device)
        counts.append(table)
        if i < SHOWN:
            pictures.append(slices(case, predicted, preprocess, part.names[i]))
    cases = dice_cases(np.stack(counts))
    for key, values in (("dice", volume_means(cases)), ("dice_with_background", volume_means(cases, background=True))):
        found = bootstrap(_mean, values, groups=part.group, seed=0)
        row = {"name": key, "value": found.value, "low": found.low, "high": found.high, "n": len(part), "split": split}
        summary["metrics"].append(row)
    rows = []
    for k, label in enumerate(method.classes):
        found = bootstrap(_mean, cases[:, k], groups=part.group, seed=0)
        rows.append([label, found, int((~np.isnan(cases[:, k])).sum())])
    summary["tables"] = [
        {
            "title": "Dice of each class",
            "columns": ["class", "Dice", "95 % interval", "volumes with it"],
            "rows": [[label, one.value, _words(one), n] for label, one, n in rows],
            "note": "mean over volumes; a volume that lacks a class does not count for it",
        }
    ]
    write_scores(folder, part, method.classes, cases)
    folder.save_pictures(f"What it finds in {split} volumes", pictures, columns=("volume", "truth", "found"))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _words(interval: Any) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}" if interval.low == interval.low else interval.note


def write_scores(folder: RunFolder, images: Images, classes: Sequence[str], cases: np.ndarray) -> None:
    """predictions.csv: one row a volume, its Dice of every class and their mean without background."""
    import pandas as pd

    from vitkit.evaluate.volumes import volume_means
    from vitkit.run.files import atomic_write

    frame = pd.DataFrame({"volume": images.names, "dice": volume_means(cases).round(6)})
    for k, label in enumerate(classes):
        frame[f"dice({label})"] = cases[:, k].round(6)
    atomic_write(folder.path / "predictions.csv", frame.to_csv(index=False))


def slices(case: Any, predicted: np.ndarray, preprocess: Any, name: str) -> list[tuple[np.ndarray, str]]:
    """The axial slice with most of the truth: as it is, with the true and with the predicted mask in colour; seen from the
    feet, the front of the body up."""
    from vitkit.data.volume_views import cut

    known = np.where(case.mask == 255, 0, case.mask)
    at = int((known > 0).sum((0, 1)).argmax())
    whole = cut(replace(case, data=case.data[:1], _even={}), [0, 0, 0], case.size, preprocess.window)
    grey = (whole[0, :, :, at].numpy() * 255).round().astype(np.uint8)
    found = [(np.repeat(_up(grey)[..., None], 3, 2), name)]
    for mask, caption in ((known, ""), (predicted, "")):
        found.append((_coloured(_up(grey), _up(mask[:, :, at])), caption))
    return found


_COLOURS = np.array(
    [[230, 80, 60], [60, 140, 230], [90, 190, 90], [230, 180, 50], [170, 90, 200], [60, 190, 190]], float
)


def _coloured(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    shown = np.repeat(grey[..., None], 3, 2).astype(float)
    inside = mask > 0
    shown[inside] = 0.45 * shown[inside] + 0.55 * _COLOURS[(mask[inside].astype(int) - 1) % len(_COLOURS)]
    return shown.round().astype(np.uint8)


def _up(plane: np.ndarray) -> np.ndarray:
    """(right, anterior) to rows from front to back, columns from the patient's right to left."""
    return np.ascontiguousarray(plane.T[::-1, ::-1])


def verdict(summary: dict, state: Any, count: int) -> str:
    """One sentence: mean Dice with its interval, on how many volumes, from how many labelled ones."""
    if not summary["metrics"]:
        return f"Trained on {count:,} volumes; there was nothing held out to score it on."
    main = summary["metrics"][0]
    known = main["low"] is not None and main["low"] == main["low"]
    interval = f" (95 % interval {main['low']:.1%} to {main['high']:.1%})" if known else ""
    return (
        f"Dice {main['value']:.1%}{interval} without background on {main['n']:,} {main['split']} volumes, "
        f"training {summary['trained_parameters']:,} weights on {count:,} volumes in {minutes(state.seconds)}."
    )
