"""Guarded continuation: heads first, what trains, the anchor, the tripwire with its rollback, and the verdict."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import vitkit
from tests.pretrain.test_dinov2 import RUN, SMALL, batch, make, make_vit, now, quiet
from vitkit import weights
from vitkit.data import read
from vitkit.pretrain.dinov2 import DINOv2, Settings
from vitkit.run.guard import FEWEST, Guard, watched
from vitkit.run.loop import State
from vitkit.settings import Machine


@pytest.fixture
def released(tmp_path):
    """A weight file without heads, as backbones are released."""
    vit = make_vit()
    weights.save_run(tmp_path / "released", vit)
    (tmp_path / "released" / "passport.json").unlink()
    weights.save_state(tmp_path / "model.safetensors", vit.state_dict())
    return str(tmp_path / "model.safetensors")


def guarded(tmp_path, released, **settings):
    kept = {key: RUN[key] for key in ("data", "workers", "batch_size")}
    more = {**kept, "arch_kwargs": {"num_heads": 2}, "max_steps": 20, "epochs": 4, "eval_every": 1, **SMALL, **settings}
    return vitkit.pretrain("dinov2", model=released, out=tmp_path / "run", **more)


def verdict(run) -> str:
    return run.summary["verdict"]


def test_released_weights_without_heads_are_guarded_by_default(released):
    vit = weights.load(released, arch_kwargs={"num_heads": 2}, say=None)
    assert DINOv2(vit, Settings(**SMALL)).guarded
    assert not DINOv2(
        weights.load(released, arch_kwargs={"num_heads": 2}, say=None), Settings(**SMALL, guard=False)
    ).guarded
    assert not make().guarded  # random weights have nothing to lose


def test_heads_train_first_and_the_backbone_stays(released):
    method = make(guard=True, head_epochs=2)
    groups = method.param_groups(0.04, layer_decay=0.9)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    for epoch in (0.0, 1.9, 2.0):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        method.before_step(now(epoch), optimizer.param_groups)
        assert method.heads_only == (epoch < 2)
        method(batch())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(1)
        moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
        trunk = {name for name in moved if name.startswith(("vit.", "mask_token", "teacher."))}
        assert bool(trunk) == (epoch >= 2) and any(name.startswith("dino_head.last_layer") for name in moved)


def test_heads_see_features_without_noise_and_the_backbone_little_of_it():
    vit = make_vit(drop_path_rate=0.3)
    method = DINOv2(vit, Settings(**SMALL, guard=True, head_epochs=1)).train()
    groups = [{**group, "lr": 1e-3} for group in method.param_groups(0.04)]
    method.before_step(now(0.0), groups)
    assert not method.vit.training and method.dino_head.training
    method.before_step(now(1.0), groups)
    assert method.vit.training and method.vit.blocks[0].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize("unfreeze", ["all", 1, "lora"])
def test_only_what_was_unfrozen_trains_and_a_plain_vit_comes_out(unfreeze):
    method = make(guard=True, unfreeze=unfreeze, lora_rank=2)
    trains = {n for n, p in method.named_parameters() if p.requires_grad and n.startswith("vit.")}
    if unfreeze == 1:
        assert all(n.startswith(("vit.blocks.2.", "vit.norm.")) for n in trains)
    elif unfreeze == "lora":
        assert trains and all("lora_" in n for n in trains)
    method.heads_only = False
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        method(batch())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.momentum = 0.0
        method.after_step(1)
    from vitkit import tokens

    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        want = tokens.encode(method.teacher.eval(), x).all
        vit = method.finish()
        assert torch.allclose(tokens.encode(vit, x).all, want, atol=1e-5)
        assert not torch.allclose(tokens.encode(method.origin, x).all, want, atol=1e-4)
    assert set(vit.state_dict()) == set(make_vit().state_dict())


def test_the_anchor_pulls_back_to_the_original():
    method = make(guard=True, dino_weight=0.0, ibot_weight=0.0, koleo_weight=0.0)
    method.heads_only = False
    hidden = torch.zeros(12, 16, dtype=torch.bool)
    views = {**batch(local=0), "masks": hidden}
    assert float(method(views)["anchor"]) == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        method.vit.blocks[0].mlp.fc2.weight.mul_(5)
    optimizer = torch.optim.SGD(method.vit.parameters(), lr=0.05)
    found = []
    for _ in range(10):
        out = method(views)
        found.append(float(out["anchor"]))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[0] > 1e-3 and found[-1] < 0.9 * found[0]
    assert not any(name.startswith("origin.") for name in method.persistent())


def test_the_tripwire_ends_a_run_that_wrecks_the_features(tmp_path, released, capsys):
    """A rate far too high: the watch ends training and puts the best state back."""
    run = guarded(
        tmp_path, released, backbone_lr=30.0, lr=0.02, anchor=0.0, head_epochs=0, warmup_epochs=0.0, tripwire=0.02,
        batch_size=64, max_steps=200,
    )  # fmt: skip
    assert "training ends and the best state is put back" in capsys.readouterr().err
    assert "Ended early: " in verdict(run)
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    scores = [record["val_guard"] for record in records if "val_guard" in record]
    kept = weights.load(run.path, say=None).eval()
    guard = Guard(kept, watched(read("digits", say=None), 0), 0.02, Machine(workers=0), torch.device("cpu"), quiet)
    original = weights.load(released, arch_kwargs={"num_heads": 2}, say=None)
    back = all(torch.equal(value, original.state_dict()[name]) for name, value in kept.state_dict().items())
    assert back or guard.first == pytest.approx(max(scores[:-1]), abs=1e-6)  # never the state that tripped
    assert "Guard" in (run.path / "report.html").read_text()


def test_where_no_state_was_better_the_original_comes_back(released):
    method = make(guard=True)
    images = watched(read("digits", say=None), 0).subset(range(60))
    said = []
    guard = Guard(method.teacher, images, 0.02, Machine(workers=0), torch.device("cpu"), said.append)
    guard.original = copy.deepcopy(method.teacher)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.normal_()
    assert guard.settle(method, State(best=guard.first - 0.1))
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    assert "no state was better than the original" in said[-1]
    words, _ = guard.verdict(method.finish(), images, None, True, State(ended="a reason"))
    assert words.startswith("Ended early: a reason. It did not help")
    assert not guard.settle(method, State(best=guard.first + 0.1))


def test_a_guarded_run_says_whether_it_helped(tmp_path, released, capsys):
    run = guarded(tmp_path, released, epochs=2, max_steps=12, tripwire=0.5)
    said = capsys.readouterr().err
    assert "guard: kNN of each image by the others" in said
    assert "on your images" in verdict(run) or "It did not help" in verdict(run)
    records = [line for line in (run.path / "metrics.jsonl").read_text().splitlines() if "val_guard" in line]
    assert records and all("neighbours_kept" in line and "guard_rank" in line for line in records)


def test_without_labels_views_are_watched(tmp_path, released, capsys):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"{i:02}.png")
    run = guarded(tmp_path, released, data=str(folder), epochs=2, max_steps=4, tripwire=1.0)
    assert "guard: images found again in another view" in capsys.readouterr().err
    assert "without labels" in verdict(run).lower() or "It did not help" in verdict(run)


def test_too_few_images_to_watch_is_said(tmp_path, released, capsys):
    from tests.pretrain.test_dinov2 import one_folder

    guarded(tmp_path, released, data=str(one_folder(tmp_path / "few", 12)), batch_size=4, epochs=1, max_steps=1)
    assert "images cannot be watched (20 or more can)" in capsys.readouterr().err


def test_test_images_are_never_watched():
    images = read("digits", say=None)
    some = watched(images, 0)
    assert not set(some.names) & set(images.part("test").names) and len(some) >= FEWEST
