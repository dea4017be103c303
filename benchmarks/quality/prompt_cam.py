"""Prompt-CAM on marks planted in real photographs, and on real objects with boxes.

Trunk: DeiT-Ti/16 trained on ImageNet-1k, 112 px, frozen; it has 3 heads a block, so a ranking orders three maps.

Planted marks: photographs of `clothing`, whose own labels are ignored. Each gets one of six small marks (24 px of 112, each
a shape of its own in random colours) at a random place; the class is the mark. In training place and mark are drawn anew
each time an image is seen; test images are fixed. So where the evidence is is known, and no part of the photograph helps.
Class prompts enter at block 10 of 0..11: entering in the last block alone (the paper's main variant) this small trunk had
not learned the task in as many steps. The top head (ranked greedily, for the true class) should have its maximum inside the
mark; chance is the mark's share of the image. Insertion and deletion areas follow the probability of the predicted class;
the saliency map is the top head's. The class token's attention of the same trunk, random maps and the reversed order stand
beside.

Real objects: ten classes of `tiny_imagenet`, boxes around the object; reported, no part of the claim. The boxes are large, so
the middle of the image is a strong baseline.

Epochs and learning rate were set with seed 0 on validation images; the test split is read once a run. The epochs for marks
were then doubled, from 8 to 16, because one of three seeds was still at the level of guessing when they ended.
"""

from __future__ import annotations

import copy
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Result, arguments, data
from vitkit import tokens, weights
from vitkit.data import read
from vitkit.data.transforms import eval_view
from vitkit.evaluate.statistics import mean_interval
from vitkit.explain import attention, class_heads, faithfulness
from vitkit.explain.prompt_cam import PromptCAM, Settings
from vitkit.parts.optim import build_optimizer, set_lr
from vitkit.parts.schedules import warmup_cosine
from vitkit.run.parallel import side_by_side
from vitkit.settings import Task

SIZE, MARK, PATCH = 112, 24, 16
MARKS = ("ring", "cross", "stripes", "checks", "triangle", "dots")
BUDGET = {
    "start": 10,
    "epochs": 16,
    "object_epochs": 8,
    "lr": 2e-3,
    "batch": 32,
    "curves": 48,
    "rows": 8,
    "classes": 10,
}
QUICK = {**BUDGET, "epochs": 1, "object_epochs": 1, "curves": 4, "rows": 16, "classes": 4}


def checkpoint() -> Path:
    return data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"


def trunk() -> torch.nn.Module:
    return weights.load(str(checkpoint()), image_size=SIZE, say=None)


def settings(budget: dict) -> Settings:
    return Settings(prompt_dropout=0.0, start=budget["start"])


def pixels_of(images, vit) -> Tensor:
    """Every image as the model sees it, uint8 (N, 3, H, W)."""
    view = eval_view(vit.passport.preprocess)
    return torch.stack([view(images.decode(i)) for i in range(len(images))])


# ---------------------------------------------------------------- planted marks


def stencil(kind: int) -> Tensor:
    """Mark `kind` as a bool picture (MARK, MARK): its shape on its ground."""
    y, x = torch.meshgrid(torch.arange(MARK), torch.arange(MARK), indexing="ij")
    middle = (MARK - 1) / 2
    distance = ((y - middle) ** 2 + (x - middle) ** 2).sqrt()
    return (
        (distance - 8).abs() < 2.5,
        ((y - middle).abs() < 3) | ((x - middle).abs() < 3),
        (y // 4) % 2 == 0,
        ((y // 6) + (x // 6)) % 2 == 0,
        (y > 3) & ((x - middle).abs() < (y - 3) / 2),
        ((y % 8 - 3.5) ** 2 + (x % 8 - 3.5) ** 2) < 7,
    )[kind]


def plant(pixels: Tensor, kinds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`pixels` (N, 3, H, W) uint8 with mark `kinds` (N,) each, two random colours that differ; and its corners (N, 2)."""
    out = pixels.clone()
    corners = torch.randint(0, SIZE - MARK + 1, (len(out), 2), generator=generator)
    for i, (top, left) in enumerate(corners.tolist()):
        dark, light = (
            torch.randint(0, 90, (3,), generator=generator),
            torch.randint(165, 256, (3,), generator=generator),
        )
        shape, ground = (dark, light) if torch.rand((), generator=generator) < 0.5 else (light, dark)
        mark = torch.where(stencil(int(kinds[i])), shape.view(3, 1, 1), ground.view(3, 1, 1)).to(torch.uint8)
        out[i, :, top : top + MARK, left : left + MARK] = mark
    return out, corners


def planted(seed: int, budget: dict) -> dict[str, float]:
    """One run: train on marks, then where the heads look."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images = read(data("clothing"), say=None)
    vit = trunk()
    normalise = vit.passport.preprocess.normalise
    train, test = pixels_of(images.part("train"), vit), pixels_of(images.part(budget.get("split", "test")), vit)
    plain = copy.deepcopy(vit).eval()
    method = PromptCAM(vit, settings(budget), task=Task("single", MARKS))
    generator = torch.Generator().manual_seed(seed)

    def fresh(rows: Tensor) -> tuple[Tensor, Tensor]:
        kinds = torch.randint(len(MARKS), (len(rows),), generator=generator)
        return plant(train[rows], kinds, generator)[0], kinds

    fit(method, len(train), fresh, normalise, budget, generator)
    fixed = torch.Generator().manual_seed(1000)
    kinds = torch.arange(len(test)) % len(MARKS)
    marked, corners = plant(test, kinds, fixed)
    double, both, places = plant_two(test, fixed)
    pair = (normalise(double), both, places)
    return judge_marks(method, plain, normalise(marked), kinds, corners, pair, budget, seed)


def fit(method: PromptCAM, count: int, draw, normalise, budget: dict, generator: torch.Generator) -> None:
    """A bare loop; AdamW reaches in a few epochs what the paper's SGD needs a hundred for."""
    optimizer = build_optimizer(method.param_groups(1e-3), name="adamw", lr=budget["lr"])
    method.train()
    steps = count // budget["batch"]
    for epoch in range(budget["epochs"]):
        order = torch.randperm(count, generator=generator)
        for step in range(steps):
            rate = warmup_cosine(
                epoch + step / steps,
                lr=budget["lr"],
                min_lr=0.0,
                warmup=1.0,
                epochs=budget["epochs"],
            )
            set_lr(optimizer, rate)
            pixels, labels = draw(order[step * budget["batch"] : (step + 1) * budget["batch"]])
            method({"image": normalise(pixels), "label": labels})["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    method.eval()


@torch.no_grad()
def judge_marks(method, plain, images, kinds, corners, pair, budget, seed) -> dict[str, float]:
    """Figures of one trained model on marked test images."""
    vit = method.vit
    scores = torch.cat([method.predict(part) for part in images.split(64)])
    right = scores.argmax(1) == kinds
    ranking = class_heads.rank(vit, images, kinds)
    ordered = ranking.top_maps(ranking.heads.shape[1])  # (B, R, h, w), most important first
    token = attention.saliency(plain, images)
    found = {"accuracy": right.float().mean()}
    for place in range(ordered.shape[1]):
        found[f"head {place + 1}"] = inside(peak(ordered[:, place]), corners)[right].float().mean()
    found["mean of heads"] = inside(peak(ordered.mean(1)), corners)[right].float().mean()
    found["class token"] = inside(peak(token), corners)[right].float().mean()
    other = class_heads.class_maps(vit, images, (kinds + 1) % len(MARKS))
    own = ranking.evidence.maps
    found["cosine, top head"] = torch.cosine_similarity(
        ordered[:, 0].flatten(1),
        torch.stack([other[i, h] for i, h in enumerate(ranking.heads[:, 0])]).flatten(1),
        dim=1,
    ).mean()
    found["cosine"] = torch.cosine_similarity(own.flatten(2), other.flatten(2), dim=2).mean()
    found |= two_marks(vit, *pair)
    found |= areas(vit, images, token, budget, seed)
    return {key: float(value) for key, value in found.items()}


def two_marks(vit, images: Tensor, kinds: Tensor, corners: Tensor) -> dict[str, Tensor]:
    """Images with two marks, `kinds` (N, 2) at `corners` (N, 2, 2): asked for either class, which mark does the top head
    of that class pick?"""
    rankings = [class_heads.rank(vit, images, kinds[:, i]) for i in (0, 1)]
    maps = [ranking.top_maps(1)[:, 0] for ranking in rankings]
    own = torch.cat([inside(peak(maps[i]), corners[:, i]) for i in (0, 1)]).float().mean()
    other = torch.cat([inside(peak(maps[i]), corners[:, 1 - i]) for i in (0, 1)]).float().mean()
    every = [ranking.evidence.maps.flatten(2) for ranking in rankings]
    return {
        "two marks: own": own,
        "two marks: other": other,
        "two marks: cosine": torch.cosine_similarity(*every, dim=2).mean(),
    }


def plant_two(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`pixels` with two different marks that do not touch: images, kinds (N, 2), corners (N, 2, 2)."""
    count = len(pixels)
    first = torch.arange(count) % len(MARKS)
    second = (first + 1 + torch.randint(len(MARKS) - 1, (count,), generator=generator)) % len(MARKS)
    once, a = plant(pixels, first, generator)
    twice, b = plant(once, second, generator)
    apart = ((a - b).abs() >= MARK + PATCH).any(1)
    return twice[apart], torch.stack([first, second], 1)[apart], torch.stack([a, b], 1)[apart]


def areas(vit, images, token: Tensor, budget: dict, seed: int) -> dict[str, Tensor]:
    """Insertion and deletion areas on the first images, of several orders of the same pixels."""
    few = slice(0, budget["curves"])
    asked = tokens.logits(vit, images[few]).argmax(1)
    mine = class_heads.saliency(vit, images[few], asked, top=1)
    maps = {
        "Prompt-CAM": mine,
        "reversed": -mine,
        "class token's attention": token[few],
        "random": faithfulness.random_maps(len(mine), tuple(mine.shape[1:]), seed),
    }
    curves = faithfulness.curves(vit, images[few], maps, asked, rows=budget["rows"])
    found = {}
    for name, curve in curves.items():
        found[f"insertion, {name}"], found[f"deletion, {name}"] = (
            curve.insertion_area.mean(),
            curve.deletion_area.mean(),
        )
    return found


def peak(maps: Tensor) -> Tensor:
    """Centre (B, 2), y and x in pixels, of the patch with the largest value of (B, h, w)."""
    best = maps.flatten(1).argmax(1)
    return torch.stack([best // maps.shape[2], best % maps.shape[2]], dim=1) * PATCH + PATCH / 2


def inside(points: Tensor, corners: Tensor) -> Tensor:
    return ((points >= corners) & (points < corners + MARK)).all(1)


# ---------------------------------------------------------------- real objects


def objects(seed: int, budget: dict) -> dict[str, float]:
    """One run on photographs of ten classes: is the maximum of a map inside the object's box?"""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images = read(data("tiny_imagenet"), say=None)
    images = images.subset(np.flatnonzero(images.labels < budget["classes"]))
    vit = trunk()
    normalise = vit.passport.preprocess.normalise
    train, test = images.part("train"), images.part("test")
    pixels = enlarged(train)
    labels = torch.from_numpy(train.labels)
    plain = copy.deepcopy(vit).eval()
    method = PromptCAM(vit, settings(budget), task=Task("single", tuple(images.classes[: budget["classes"]])))
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: Tensor) -> tuple[Tensor, Tensor]:
        flipped = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        return torch.where(flipped, pixels[rows].flip(3), pixels[rows]), labels[rows]

    fit(method, len(train), draw, normalise, {**budget, "epochs": budget["object_epochs"]}, generator)
    x, y = normalise(enlarged(test)), torch.from_numpy(test.labels)
    right = torch.cat([method.predict(part) for part in x.split(64)]).argmax(1) == y
    ranking = class_heads.rank(vit, x, y)
    corners = boxes(test)
    middle = torch.full((len(test), 2), SIZE / 2)
    hit = {
        "top head": within(peak(ranking.top_maps(1)[:, 0]), corners),
        "mean of the heads": within(peak(ranking.evidence.maps.mean(1)), corners),
        "class token": within(peak(attention.saliency(plain, x)), corners),
        "middle of the image": within(middle, corners),
    }
    found = {key: float(value[right].float().mean()) for key, value in hit.items()}
    area = (corners[:, 2:] - corners[:, :2]).prod(1) / SIZE**2
    return {"accuracy": float(right.float().mean()), **found, "share of the box": float(area[right].mean())}


def enlarged(images) -> Tensor:
    """Every image at SIZE pixels, uncropped, uint8, so that boxes stay where they are."""
    pixels = torch.stack([images.decode(i).expand(3, -1, -1) for i in range(len(images))]).float()
    big = torch.nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return big.clamp(0, 255).round().to(torch.uint8)


def boxes(images) -> Tensor:
    """Object boxes (N, 4): top, left, bottom, right in pixels of SIZE."""
    with (data("tiny_imagenet") / "index.csv").open() as file:
        rows = {f"{row['shard']}/{row['key']}.jpg": row for row in csv.DictReader(file)}
    found = [[float(rows[name][key]) for key in ("y0", "x0", "y1", "x1")] for name in images.names]
    corners = torch.tensor(found)
    corners[:, 2:] += 1  # the last pixel belongs to the box
    return corners * SIZE / 64


def within(points: Tensor, corners: Tensor) -> Tensor:
    return ((points >= corners[:, :2]) & (points < corners[:, 2:])).all(1)


# ---------------------------------------------------------------- figures


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "In correctly classified photographs with a planted mark the top-ranked head of the true class has its maximum inside "
        "the mark in at least 70 % (chance below 10 %); insertion minus deletion area is at least 0.15 above random maps' and "
        "above that of the class token's attention, and the reversed order deletes worse; where an image holds the marks of "
        "two classes, their maps differ (cosine below 0.95)."
    )
    result = Result("prompt_cam", "quality", claim, options.quick)
    budget, seeds = (QUICK, range(1)) if options.quick else (BUDGET, range(3))
    tasks = [(kind, seed, budget) for seed in seeds for kind in ("objects", "planted")]
    runs: dict[str, list[dict[str, float]]] = {"planted": [], "objects": []}
    for index, found in side_by_side(one_run, tasks):
        runs[tasks[index][0]].append(found)
        print(f"  {tasks[index][0]}, seed {tasks[index][1]}: accuracy {found['accuracy']:.3f}", flush=True)
    marks = {key: mean_interval([run[key] for run in runs["planted"]]) for key in runs["planted"][0]}
    real = {key: mean_interval([run[key] for run in runs["objects"]]) for key in runs["objects"][0]}
    holds = report_marks(result, marks)
    columns = ["maximum of", "inside the box", INTERVAL]
    rows = [[key, real[key].value, span(real[key])] for key in real if key not in ("accuracy", "share of the box")]
    note = (
        f"correctly classified test images of {budget['classes']} classes (accuracy {real['accuracy'].value:.3f}); the box "
        f"covers {real['share of the box'].value:.0%} of the image on average. No part of the claim."
    )
    result.table("Real objects with boxes, tiny_imagenet", columns, rows, note)
    return result.finish(options.quick or holds)


def one_run(kind: str, seed: int, budget: dict) -> dict[str, float]:
    return {"planted": planted, "objects": objects}[kind](seed, budget)


INTERVAL = "95 % interval over seeds"


def report_marks(result: Result, marks: dict) -> bool:
    """Tables of the planted marks; whether the claim holds."""
    chance = (MARK / SIZE) ** 2
    words = {"accuracy": "accuracy, six marks", "head 1": "maximum inside the mark: top head of the true class"}
    words |= {"head 2": "second head", "head 3": "last head", "mean of heads": "mean of the heads"}
    words |= {"class token": "class token's attention of the trunk"}
    words |= {"two marks: own": "two marks, asked for either: its own", "two marks: other": "the other one"}
    rows = [[text, marks[key].value, span(marks[key])] for key, text in words.items()]
    rows.append(["chance: the mark's share of the image", chance, ""])
    note = f"{MARK} px of {SIZE}; test images, places and colours the same for all seeds; 3 heads"
    result.table("Marks planted in photographs of clothing", ["", "share", INTERVAL], rows, note)
    names = ("Prompt-CAM", "class token's attention", "random", "reversed")
    rows = []
    for name in names:
        up, down = marks[f"insertion, {name}"].value, marks[f"deletion, {name}"].value
        rows.append([name, up, down, up - down])
    note = "probability of the predicted class; the map is the top head's (Prompt-CAM), the mean of heads (class token)"
    result.table("Faithfulness", ["order of pixels", "insertion", "deletion", "difference"], rows, note)
    gap = {row[0]: row[3] for row in rows}
    cosines = {"one mark, true class and another": "cosine", "two marks, one class and the other": "two marks: cosine"}
    rows = [[text, marks[key].value, span(marks[key])] for text, key in cosines.items()]
    result.table("Cosine of the maps of two classes on one image, mean of heads", ["", "cosine", INTERVAL], rows)
    if marks["cosine"].value >= 0.95:
        result.note(
            "With one mark in the image every class looks at it, to accept or to reject it: the cosine of the true class and "
            "another is not below 0.95 there. With the marks of both, each turns to its own more often than to the other's."
        )
    return (
        marks["head 1"].value >= 0.7
        and chance < 0.1
        and gap["Prompt-CAM"] - gap["random"] >= 0.15
        and gap["Prompt-CAM"] > gap["class token's attention"]
        and marks["deletion, reversed"].value > marks["deletion, Prompt-CAM"].value
        and marks["two marks: cosine"].value < 0.95
    )


def span(interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}" if interval.low == interval.low else "one seed"


if __name__ == "__main__":
    sys.exit(main())
