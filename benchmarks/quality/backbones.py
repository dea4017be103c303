"""Which backbone, with which head, on which data? Four backbones x every protocol x six medical data sets.

Backbones, all ViT-Ti/16 at 96 px: random weights; masked autoencoding (MAE) from random weights on the training images of
each data set, without labels; DeiT-Ti, trained on ImageNet-1k; the same continued by MAE on those training images.

Data, as they lie in the folder of VITKIT_DATA: `nih_cxr64` (14 findings), `cxr_covid` (6 findings, and lung masks), `bccd`
(crops of blood cells: red, white, platelet; whole images on one side of a split), `nuclei` (kind of microscopy),
`hippocampus3d` (MRI volumes, slices averaged: is the anterior part the larger one?). Every protocol of `vitkit evaluate` that
suits the data; trained ones on two sets and two backbones. Every choice is made on validation images, and each test split
is scored once. Intervals: 95 %, bootstrap over test images (patients whole), for few-shot over draws. One seed: what differs
between trainings is not in the intervals.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vitkit
from benchmarks.common import Result, arguments, data
from vitkit.run.parallel import side_by_side

SIZE, CROP, CELLS = 96, 64, 220  # px of the input, px around a cell, most cells of a kind and split
ARCH = "vit_tiny_patch16_224"
BACKBONES = ("random", "MAE", "DeiT-Ti", "DeiT-Ti + MAE")
FROZEN = ("knn", "linear", "few_shot")
SETS: dict[str, tuple[str, ...]] = {
    "nih_cxr64": (*FROZEN, "mlknn", "linear_grid"),
    "cxr_covid": (*FROZEN, "mlknn", "linear_grid"),
    "bccd cells": (*FROZEN, "linear_grid"),
    "nuclei modality": FROZEN,
    "hippocampus3d": FROZEN,
    "lung masks": ("segment_linear", "segment_unet"),
}
TRAINED = ("bitfit", "lora", "adaptformer", "full")
ADAPTED = ("nih_cxr64", "bccd cells"), ("random", "DeiT-Ti")
TITLES = {"knn": "kNN", "linear": "linear probe", "mlknn": "ML-kNN", "linear_grid": "linear, SGD grid as published"}
TITLES |= {"few_shot": "few-shot, most shots", "bitfit": "BitFit", "lora": "LoRA", "adaptformer": "AdaptFormer"}
TITLES |= {"full": "full fine-tuning", "segment_linear": "linear decoder", "segment_unet": "U-Net decoder"}
MAE = {"mask_ratio": 0.75, "decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4, "lr": 1e-3, "batch_size": 48,
       "crop_scale": (0.5, 1.0), "eval_every": 1000}  # fmt: skip
STEPS = 320
QUIET = {"workers": 0, "quiet": True, "image_size": SIZE}
TUNE = {"randaug": None, "drop_path": 0.0, "crop_scale": (0.6, 1.0), "full": {"layer_decay": 0.75}}


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "On every data set that is classified the linear probe of DeiT-Ti is ahead of that of random weights, and on masks "
        "its U-Net decoder is."
    )
    result = Result("backbones", "quality", claim, options.quick)
    folder = Path(tempfile.mkdtemp())
    try:
        where = prepare(folder)
        names = [*list(SETS)[:1], "lung masks"] if options.quick else list(SETS)
        kinds = BACKBONES[::2] if options.quick else BACKBONES
        tasks = [(name, str(where[name]), kind, str(folder), options.quick) for name in names for kind in kinds]
        found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
        for index, outcome in side_by_side(one, tasks):
            name, _, kind, *_ = tasks[index]
            found[name][kind] = outcome
            lead = next(iter(outcome.values()))
            print(f"  {name}, {kind}: {lead['name']} {lead['value']:.3f} ...", flush=True)
    finally:
        shutil.rmtree(folder)
    ahead = [report(result, name, found[name], kinds) for name in names]
    return result.finish(options.quick or all(ahead))


def one(name: str, where: str, kind: str, folder: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Every protocol of one backbone on one data set."""
    import torch

    torch.set_num_threads(1)
    home = Path(folder) / f"{name} {kind}".replace(" ", "_")
    model = backbone(kind, where, home, quick)
    protocols = SETS[name]
    if name in ADAPTED[0] and kind in ADAPTED[1] and not quick:
        protocols = (*protocols, *TRAINED)
    training = TUNE if set(protocols) & set(TRAINED) else None
    few = {"draws": 3, "mask_epochs": 2} if quick else {"mask_epochs": 15}
    found = vitkit.evaluate(
        data=where, out=home / "scores", protocols=protocols, training=training, epochs=6, **model, **few, **QUIET
    )
    keep = ("name", "value", "low", "high", "n", "chosen", "seconds", "trained")
    return {key: {word: value[word] for word in keep if word in value} for key, value in found.items()}


def backbone(kind: str, where: str, home: Path, quick: bool) -> dict[str, Any]:
    """Keywords that name the model; pre-trains it first where it is one of ours."""
    released = str(data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors")
    start: dict[str, Any] = {"model": released} if kind.startswith("DeiT") else {"model": ARCH, "pretrained": False}
    if "MAE" not in kind:
        return start
    steps = {"max_steps": 10 if quick else STEPS, "epochs": 10_000, "warmup_epochs": 0.0}
    vitkit.pretrain("mae", data=where, out=home / "mae", **start, **MAE, **steps, **QUIET)
    return {"model": str(home / "mae")}


# ---------------------------------------------------------------- data


def prepare(folder: Path) -> dict[str, Path]:
    """Tables and crops that `vitkit.data.read` takes."""
    xrays = data("cxr_covid")
    rows = read_rows(xrays / "labels.csv")
    lungs = [[xrays / r["file"], xrays / r["lung_mask"], r["split"], r["patient_id"]] for r in rows if r["lung_mask"]]
    lungs = [row for row in lungs if row[2] != "unlabelled"]
    write_rows(folder / "lungs.csv", ["path", "mask", "split", "patient"], lungs)
    nuclei = [[data("nuclei") / r["image"], r["modality"], r["split"]] for r in read_rows(data("nuclei") / "index.csv")]
    write_rows(folder / "modality.csv", ["path", "label", "split"], nuclei)
    brains = data("hippocampus3d")
    parts = [
        [brains / r["image"], larger(r["anterior_voxels"], r["posterior_voxels"]), r["split"]]
        for r in read_rows(brains / "index.csv")
    ]
    write_rows(folder / "hippocampus.csv", ["path", "label", "split"], parts)
    return {
        "nih_cxr64": data("nih_cxr64"),
        "cxr_covid": xrays / "labels.csv",
        "bccd cells": cells(folder / "cells"),
        "nuclei modality": folder / "modality.csv",
        "hippocampus3d": folder / "hippocampus.csv",
        "lung masks": folder / "lungs.csv",
    }


def larger(anterior: str, posterior: str) -> str:
    return "anterior" if int(anterior) > int(posterior) else "posterior"


def cells(folder: Path) -> Path:
    """Crops around annotated cells: SPLIT/KIND/*.png, at most CELLS of a kind and split, drawn evenly over the images."""
    source = data("bccd")
    for split in ("train", "val", "test"):
        coco = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        kinds = {one["id"]: one["name"] for one in coco["categories"]}
        files = {one["id"]: one["file_name"] for one in coco["images"]}
        by_kind: dict[str, list[dict]] = {}
        for cell in coco["annotations"]:
            by_kind.setdefault(kinds[cell["category_id"]], []).append(cell)
        for kind, found in by_kind.items():
            place = folder / split / kind
            place.mkdir(parents=True)
            rows = np.random.default_rng(0).permutation(len(found))[:CELLS]
            for row in rows.tolist():
                x, y, w, h = found[row]["bbox"]
                left, top = x + w / 2 - CROP / 2, y + h / 2 - CROP / 2
                with Image.open(source / "images" / files[found[row]["image_id"]]) as image:
                    image.convert("RGB").crop((left, top, left + CROP, top + CROP)).save(place / f"{row}.png")
    return folder


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, head: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


# ---------------------------------------------------------------- figures


def report(result: Result, name: str, found: dict[str, dict[str, dict[str, Any]]], kinds: tuple[str, ...]) -> bool:
    """A table of one data set; whether released weights are ahead of random ones."""
    protocols = list(max(found.values(), key=len))
    first = found[kinds[0]][protocols[0]]
    rows = []
    for protocol in protocols:
        row: list[Any] = [TITLES[protocol]]
        for kind in kinds:
            cell = found[kind].get(protocol)
            row += ["", ""] if cell is None else [cell["value"], f"{cell['low']:.3f} to {cell['high']:.3f}"]
        rows.append(row)
    columns = ["protocol", *(word for kind in kinds for word in (kind, "interval"))]
    result.table(name, columns, rows, f"{first['name'].replace('_', ' ')}, {first['n']} test cases")
    judge = "segment_unet" if name == "lung masks" else "linear"
    return found["DeiT-Ti"][judge]["value"] > found["random"][judge]["value"]


if __name__ == "__main__":
    sys.exit(main())
