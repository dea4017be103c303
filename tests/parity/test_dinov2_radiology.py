"""The radiology benchmark's parts against MohammedSB/DINOv2ForRadiology, MONAI and torchmetrics: every recorded tensor."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from vitkit.dense.decoders import LinearDecoder, UNetDecoder
from vitkit.dense.losses import dice_ce_loss, dice_loss
from vitkit.evaluate import few_shot, masks, mlknn, pooling, rescale

from .conftest import Compared, files, read

PATHS = files("dinov2_radiology")
FLAG = {"0": False, "1": True}


def numbered(keys, pattern: str) -> list[tuple[str, ...]]:
    """Groups of every key that matches: settings are taken from names, none is assumed."""
    return [found.groups() for key in keys if (found := re.fullmatch(pattern, key))]


def blocks(fixture) -> list[tuple[torch.Tensor, torch.Tensor]]:
    count = len(numbered(fixture.tensors, r"in\.block(\d+)\.cls"))
    return [(fixture[f"in.block{i}.patch"], fixture[f"in.block{i}.cls"]) for i in range(count)]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_every_recorded_tensor(path):
    fixture = read(path)
    seen = Compared(fixture)
    compare_linear(fixture, seen)
    compare_decoders(fixture, seen)
    compare_masks(fixture, seen)
    compare_neighbours(fixture, seen)
    compare_inputs(fixture, seen)
    seen.done()


def compare_linear(fixture, seen) -> None:
    taps = blocks(fixture)
    for count, avgpool in numbered(fixture.tensors, r"out\.linear_input\.blocks(\d+)\.avgpool([01])"):
        ours = pooling.linear_input(taps, int(count), FLAG[avgpool])
        seen.same(f"out.linear_input.blocks{count}.avgpool{avgpool}", ours)
    weight, bias = fixture["weights.linear.linear.weight"], fixture["weights.linear.linear.bias"]
    dim = fixture.config["embed_dim"]
    count = weight.shape[1] // dim - 1
    whole = pooling.linear_input(taps, 4)
    x = whole[:, pooling.columns(dim, 4, count, True)]
    seen.same("out.linear_logits_2d", x @ weight.T + bias)
    slices = [[(p[:1] * (1 + 0.1 * k), c[:1] - 0.2 * k) for p, c in taps] for k in range(3)]
    rows = torch.cat([pooling.linear_input(s, count) for s in slices])
    seen.same(
        "out.linear_logits_3slices", pooling.mean_over(rows, torch.zeros(3, dtype=torch.int64), 1)[0] @ weight.T + bias
    )


def compare_decoders(fixture, seen) -> None:
    c = fixture.config
    grid = c["grid"] if isinstance(c["grid"], list) else [c["grid"]] * 2
    size = c["image_size"] if isinstance(c["image_size"], list) else [c["image_size"]] * 2
    maps = [patch.transpose(1, 2).unflatten(2, grid) for patch, _ in blocks(fixture)]
    linear, unet = LinearDecoder(c["embed_dim"], c["num_classes"]), UNetDecoder(c["embed_dim"], c["num_classes"])
    linear.load_state_dict(fixture.group("weights.lineardec."))
    unet.load_state_dict(fixture.group("weights.unetdec."))
    with torch.no_grad():
        seen.same("out.lineardec", linear(maps, tuple(size)))
        seen.same("out.unetdec", unet.eval()(maps, tuple(size)))
        seen.same("out.unetdec_noresize", unet(maps))


def compare_masks(fixture, seen) -> None:
    logits, target = fixture["in.dice_logits"].clone().requires_grad_(), fixture["in.dice_target"]
    loss = dice_loss(logits, target)
    loss.backward()
    seen.same("out.dice_loss", loss)
    seen.same("grad.dice_logits", logits.grad)
    seen.same("out.dicece_loss", dice_ce_loss(logits, target))
    said, classes = logits.argmax(1).numpy(), logits.shape[1]
    seen.same("out.jaccard", torch.tensor(masks.legacy_jaccard(target.numpy(), said, classes)))
    seen.same("out.dice_metric", torch.tensor(masks.mean_dice(target.numpy(), said, classes)))


def compare_neighbours(fixture, seen) -> None:
    train, test = fixture["in.knn_train"].numpy(), fixture["in.knn_test"].numpy()
    labels, single = fixture["in.knn_multilabel"].numpy(), fixture["in.knn_class"].numpy()
    for (k,) in numbered(fixture.tensors, r"out\.mlknn\.k(\d+)"):
        ours = mlknn.fit(train, labels, settings=mlknn.Settings(k=int(k))).scores(test)
        seen.same(f"out.mlknn.k{k}", torch.from_numpy(ours))
    ks = {int(k) for (k,) in numbered(fixture.tensors, r"out\.wknn\.k(\d+)")}
    votes = mlknn.votes(
        train, single, test, ks=tuple(sorted({*ks, 10})), normalise=False
    )  # weights over the largest, 10
    for k in ks:
        seen.same(f"out.wknn.k{k}", torch.from_numpy(votes[k]))
    for count, seed in numbered(fixture.tensors, r"out\.fewshot_idx_(\d+)perclass_seed(\d+)"):
        ours = few_shot.per_class(single, int(count), int(seed))
        seen.same(f"out.fewshot_idx_{count}perclass_seed{seed}", torch.from_numpy(ours))


def compare_inputs(fixture, seen) -> None:
    seen.same("out.rescaled", rescale.min_max(fixture["in.raw_image"]))
    size = fixture["out.eval_transform"].shape[1:]
    seen.same("out.eval_transform", rescale.eval_view(fixture["in.raw_image"], tuple(size)))
    for n, shots in numbered(fixture.tensors, r"out\.systematic_(\d+)_(\d+)"):
        seen.same(f"out.systematic_{n}_{shots}", torch.from_numpy(few_shot.systematic(int(n), int(shots))))
    volumes = [fixture[f"in.vol{i}"] for i in range(len(numbered(fixture.tensors, r"in\.vol(\d+)")))]
    seen.same("out.padded_vols", pooling.pad_volumes(volumes))


def test_the_index_rule_never_gives_one_too_many():
    """The official float steps emit n itself for n = 15, 13 shots, and crash."""
    for n in range(1, 120):
        for shots in range(1, n + 1):
            rows = few_shot.systematic(n, shots)
            assert len(rows) == shots and rows.max() < n and len(np.unique(rows)) == shots, (n, shots)
