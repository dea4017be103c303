"""The radiology protocols on real X-rays from one real checkpoint: decoders, linear grid, ML-kNN, few-shot, LoRA and BitFit.

Trunk: DeiT-Ti/16 trained on ImageNet-1k. Lungs: `cxr_covid` images with a lung mask (138 training, 28 validation, 26 test,
split by patient) at 128 px; a linear and a U-Net-style decoder on the same cached maps, the linear one with five times the
passes, rates picked by validation IoU, refit on train + validation; seeds change first weights and order. Findings:
`nih_cxr64` (14 labels) at 96 px, every head on one extraction. Adaptation: three classes of `clothing`, 30 images each, at
96 px. Test labels are read once.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from benchmarks.common import Result, arguments, data
from vitkit import tokens, weights
from vitkit.adapt import bitfit, full, linear, lora
from vitkit.data import read
from vitkit.data.transforms import to_channels
from vitkit.evaluate import few_shot, linear_grid, metrics, mlknn, pooling, rescale, segment
from vitkit.evaluate import linear as probe
from vitkit.evaluate.statistics import bootstrap, mean_interval
from vitkit.run.parallel import side_by_side
from vitkit.settings import Classify, Task

SPLITS = ("train", "val", "test")
LUNGS, XRAY, SMALL = 128, 96, 96  # pixels
RATES = (1e-2, 5e-2, 1e-1)
EPOCHS = {"linear": 60, "unet": 12}  # the linear decoder costs a tenth and gets five times the passes
METHODS = {  # with learning rates set by habit, not searched
    "linear head": (linear.Linear, linear.Settings(), 1e-3),
    "BitFit": (bitfit.BitFit, bitfit.Settings(), 1e-3),
    "LoRA, r = 48": (lora.LoRA, lora.Settings(rank=48, alpha=16, targets=("qkv", "fc1", "fc2")), 1e-3),
    "full fine-tuning": (full.Full, full.Settings(), 1e-4),
}
STEPS = 60


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "On lung masks the U-Net decoder beats the linear decoder by more than 3 points of foreground IoU; "
        "hyper-parameters do not depend on test labels; features of volumes do not depend on slice order and padding; "
        "LoRA and BitFit change their own parameters and no others, with a training loss below the linear head's."
    )
    result = Result("dinov2_radiology", "quality", claim, options.quick)
    seeds = [0] if options.quick else [0, 1, 2]
    lungs = [("unet", seed, options.quick) for seed in seeds] + [("linear", seed, options.quick) for seed in seeds]
    scores: dict[str, list[dict]] = {"unet": [], "linear": []}
    for index, found in side_by_side(decode, lungs):
        print(f"  {lungs[index][0]} decoder, seed {lungs[index][1]}: {found}", flush=True)
        scores[lungs[index][0]].append(found)
    holds = report_lungs(result, scores)
    holds &= findings(result, seeds)
    holds &= volumes(result)
    tasks = [(name, seed, options.quick) for seed in seeds for name in METHODS]
    trained: dict[str, list[dict]] = {name: [] for name in METHODS}
    for index, found in side_by_side(adapt, tasks):
        print(f"  {tasks[index][0]}, seed {tasks[index][1]}: {found}", flush=True)
        trained[tasks[index][0]].append(found)
    holds &= report_adaptation(result, trained)
    return result.finish(options.quick or holds)


def trunk(size: int):
    path = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    return weights.load(str(path), image_size=size, say=None).eval()


# ---------------------------------------------------------------- lungs


def decode(decoder: str, seed: int, quick: bool) -> dict[str, float]:
    """Scores of one decoder from one seed."""
    images = read(data("cxr_covid") / "labels.csv", mask_column="lung_mask", say=None)
    settings = segment.Settings(
        rates=RATES[-1:] if quick else RATES,
        epochs=2 if quick else EPOCHS[decoder],
        batch_size=16,
        seed=seed,
        refit=True,
    )
    found = segment.fit(trunk(LUNGS), images, decoder=decoder, rescale=True, settings=settings)
    return {key: round(value, 4) for key, value in found.scores.items()} | {"rate": found.rate}


def report_lungs(result: Result, scores: dict[str, list[dict]]) -> bool:
    rows, ious = [], {}
    for name in ("linear", "unet"):
        each = scores[name]
        ious[name] = mean_interval([found["test_iou"] for found in each])
        means = [float(np.mean([found[key] for found in each])) for key in ("test_dice", "test_legacy_jaccard")]
        rates = ", ".join(f"{found['rate']:g}" for found in each)
        rows.append([f"{name} decoder", ious[name].value, span(ious[name]), *means, rates])
    columns = ["decoder", "IoU", "95 % interval over seeds", "Dice", "legacy Jaccard", "rates picked"]
    gap = ious["unet"].value - ious["linear"].value
    result.table(
        "Lungs on 26 test X-rays, frozen DeiT-Ti/16 at 128 px",
        columns,
        rows,
        "legacy Jaccard: the official metric, which forgives false positives on background",
    )
    result.note(f"U-Net minus linear decoder: {100 * gap:+.1f} points of IoU")
    return gap > 0.03


# ---------------------------------------------------------------- findings


def findings(result: Result, seeds: list[int]) -> bool:
    """ML-kNN, weighted votes, the grid, the exact probe and few-shot on one extraction; permuted test labels."""
    images = read(data("nih_cxr64") / "labels.csv", say=None)
    vit = trunk(XRAY)
    pixels = torch.stack([images.decode(i) for i in range(len(images))])
    views = (rescale.eval_view(part, XRAY, preprocess=vit.passport.preprocess) for part in pixels.split(64))
    x = pooling.extract(vit, views)
    dim = vit.embed_dim
    y, split = images.labels, images.split
    parts = {name: (x[split == name], y[split == name]) for name in SPLITS}
    found, scores = protocols(parts, dim, seeds)
    shuffled = dict(parts)
    order = np.random.default_rng(0).permutation(len(parts["test"][1]))
    shuffled["test"] = (parts["test"][0], parts["test"][1][order])
    same = protocols(shuffled, dim, seeds[:1])[0] == {**found, "grid": found["grid"][:1]}
    truth, groups = parts["test"][1], images.group[split == "test"]
    rows = []
    for name, score in scores.items():
        interval = bootstrap(metrics.mean_auc, truth, score, groups=groups, n=1000)
        rows.append([name, interval.value, f"{interval.low:.3f} to {interval.high:.3f}"])
    result.table(
        "Mean AUC of 14 findings on 283 test X-rays of nih_cxr64 (64 px images), frozen DeiT-Ti/16 at 96 px",
        ["head", "mean AUC", "95 % interval over patients"],
        rows,
        f"picked on validation: {found['mlknn']} neighbours; heads {'; '.join(found['grid'])}",
    )
    curve = []
    token = parts["train"][0][:, pooling.columns(dim, 4, 1, True)]
    test = parts["test"][0][:, pooling.columns(dim, 4, 1, True)]
    shots, draws = ((1, 5), 3) if len(seeds) == 1 else ((1, 2, 5, 10, 20), 20)
    each = {head: few_shot.fit(token, parts["train"][1], test, truth, settings=few_shot.Settings(shots, draws), head=head)
            for head in ("linear", "knn")}  # fmt: skip
    for a, b in zip(each["linear"], each["knn"], strict=True):
        curve.append([a.shots, a.interval.value, span(a.interval), b.interval.value, span(b.interval)])
    result.table(
        "Few-shot: mean AUC from k images a finding",
        ["k", "linear", "95 % interval over draws", "kNN", "95 % interval over draws"],
        curve,
        f"{draws} draws of the labelled images; the same test images",
    )
    result.note(f"Permuted test labels {'change nothing that was selected' if same else 'CHANGE WHAT IS SELECTED'}")
    return same


def protocols(parts: dict, dim: int, seeds: list[int]) -> tuple[dict, dict[str, np.ndarray]]:
    """What was selected, and test scores of every head."""
    (x, y), (vx, vy), (tx, _) = (parts[name] for name in SPLITS)
    both = np.concatenate([x, vx]), np.concatenate([y, vy])
    unit = pooling.columns(dim, 4, 1, False)
    best = mlknn.fit(x[:, unit], y, vx[:, unit], vy).k
    nearest = mlknn.fit(both[0][:, unit], both[1], settings=mlknn.Settings(k=best))
    scores = {"ML-kNN, class token": nearest.scores(tx[:, unit])}
    heads = []
    for seed in seeds:
        grid = linear_grid.Settings(epochs=50, seed=seed, sum_over_batch=True)
        chosen = linear_grid.fit(x, y, vx, vy, dim=dim, grid=grid)
        heads.append(str(chosen.head))
        scores.setdefault("linear, SGD grid (16 heads), refit", chosen.scores(tx))
    exact = probe.fit(x, y, vx, vy, settings=probe.Settings(refit=True))
    scores["linear, exact (L-BFGS), 4 blocks + avgpool"] = exact.scores(tx)
    return {"mlknn": best, "grid": heads, "penalty": exact.chosen}, scores


# ---------------------------------------------------------------- volumes


def volumes(result: Result) -> bool:
    """Real MRI volumes: slices shuffled, volumes padded and batched together."""
    import nibabel

    vit = trunk(64)
    files = sorted((data("hippocampus3d") / "images").glob("*.nii.gz"))[:3]
    stacks = []
    for file in files:
        cube = torch.from_numpy(np.asarray(nibabel.load(file).dataobj, np.float32)).permute(2, 0, 1)
        stacks.append(rescale.eval_view(cube.unsqueeze(1), 64, preprocess=vit.passport.preprocess))
    with torch.inference_mode():
        alone = torch.cat([pooling.volume_inputs(vit, [stack]) for stack in stacks])
        together = pooling.volume_inputs(vit, stacks)
        order = torch.Generator().manual_seed(0)
        mixed = [stack[torch.randperm(len(stack), generator=order)] for stack in stacks]
        shuffled = pooling.volume_inputs(vit, mixed)
    scale = alone.abs().max()
    rows = [[name, float((other - alone).abs().max() / scale)] for name, other in
            (("padded, with other volumes", together), ("slices shuffled", shuffled))]  # fmt: skip
    depths = ", ".join(str(len(stack)) for stack in stacks)
    result.table(
        f"Features of 3 MRI volumes ({depths} slices)", ["against each volume alone", "largest difference"], rows
    )
    return all(row[1] < 1e-5 for row in rows)


# ---------------------------------------------------------------- adaptation


def adapt(name: str, seed: int, quick: bool) -> dict[str, float]:
    """Sixty steps of one method on 90 photographs of three classes, in a bare loop."""
    images = read(data("clothing"), say=None)
    kept = np.flatnonzero(images.labels < 3)
    images = images.subset(kept)
    few = images.part("train").few(30, seed)
    vit = trunk(SMALL)
    before = {key: value.clone() for key, value in vit.state_dict().items() if not key.startswith("head")}
    kind, settings, rate = METHODS[name]
    task, classify = Task("single", tuple(images.classes[:3])), Classify(head="linear")
    torch.manual_seed(seed)
    method = kind(vit, settings, task=task, classify=classify).train()
    x, y = pictures(few, vit), torch.from_numpy(few.labels)
    trained = [p for n, p in method.named_parameters() if p.requires_grad and "head." not in n]
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    for _ in range(5 if quick else STEPS):
        rows = torch.randperm(len(x), generator=order)[:30]
        loss = method({"image": x[rows], "label": y[rows]})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method.eval()
    with torch.inference_mode():
        final = float(torch.nn.functional.cross_entropy(tokens.logits(method.vit, x), y))
        test = images.part("test")
        right = float((method.predict(pictures(test, vit)).argmax(1) == torch.from_numpy(test.labels)).float().mean())
    return {"loss": round(final, 4), "accuracy": right, "share": sum(p.numel() for p in trained) / count(before), **changed(
        method, before, name)}  # fmt: skip


def pictures(images, vit) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as F

    small = [F.resize(to_channels(images.decode(i), 3), [SMALL, SMALL], antialias=True) for i in range(len(images))]
    return vit.passport.preprocess.normalise(torch.stack(small))


def changed(method, before: dict, name: str) -> dict[str, float]:
    """Tensors of the pre-trained trunk that should have moved and did not, and those that should not have and did."""
    after = method.vit.state_dict()
    stuck = moved = 0
    for key, old in before.items():
        inner = key if key in after else f"{key.rpartition('.')[0]}.base_layer.{key.rpartition('.')[2]}"
        differs = not torch.equal(after[inner], old)
        should = name == "full fine-tuning" or (name == "BitFit" and key.endswith("bias"))
        stuck += should and not differs
        moved += differs and not should
    return {"stuck": stuck, "moved": moved}


def count(state: dict) -> int:
    return sum(value.numel() for value in state.values())


def report_adaptation(result: Result, trained: dict[str, list[dict]]) -> bool:
    rows = []
    for name, each in trained.items():
        loss, accuracy = (mean_interval([found[key] for found in each]) for key in ("loss", "accuracy"))
        stuck, moved = (max(found[key] for found in each) for key in ("stuck", "moved"))
        share = f"{each[0]['share']:.2%}"
        rows.append([name, loss.value, span(loss), accuracy.value, span(accuracy), share, stuck, moved])
    columns = ["method", "training loss", "interval", "test accuracy", "interval", "of the trunk", "stuck", "moved"]
    result.table(
        "Three classes of clothing, 30 images each, 60 steps",
        columns,
        rows,
        "stuck: tensors that should have changed and did not; moved: tensors that should not have changed and did; "
        "share: trained numbers beside the head",
    )
    head = rows[0][1]
    fine = all(row[6] == 0 and row[7] == 0 for row in rows)
    return fine and all(row[1] < head for row in rows[1:3])


def span(interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}" if interval.low == interval.low else "one seed"


if __name__ == "__main__":
    sys.exit(main())
