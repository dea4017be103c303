"""What a method may do in the loop beyond its loss: schedules of its own, clipping apart, scalars, an early end."""

from __future__ import annotations

import math

import torch
from torch import nn

from vitkit.run.fabric import make_fabric
from vitkit.run.folder import RunFolder
from vitkit.run.loop import fit
from vitkit.settings import Machine, Train


class Two(nn.Module):
    """Two numbers pulled with very different forces."""

    def __init__(self):
        super().__init__()
        self.strong, self.weak = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.seen, self.norms = [], []

    def forward(self, batch):
        pull = batch["image"].mean() + batch["image_more"].mean()
        strong = (100 * self.strong * pull).sum()
        return {"loss": strong + (0.01 * self.weak * pull).sum(), "strong": strong, "pulls": batch["image"]}

    def param_groups(self, weight_decay):
        return [{"params": [self.strong, self.weak], "weight_decay": weight_decay}]

    def before_step(self, now, groups):
        self.seen.append((now.step, now.epoch, now.lr))
        groups[0]["weight_decay"] = 0.1 * now.step

    def clip_parts(self):
        return [[self.strong], [self.weak]]

    def after_step(self, step):
        self.norms.append((self.strong.item(), self.weak.item()))


def run(tmp_path, validate=None, **train):
    method = Two()

    def batches(epoch, start):
        image = torch.ones(2, 1, 2, 2)
        return ({"image": image, "image_more": image, "bad": []} for _ in range(start, 4))

    machine = Machine(quiet=True, accelerator="cpu")
    asked = {"epochs": 3, "lr": 0.1, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_grad": 1.0}
    state = fit(
        method,
        batches,
        train=Train(out=str(tmp_path), **{**asked, **train}),
        machine=machine,
        fabric=make_fabric(machine),
        steps_per_epoch=4,
        prepare=lambda x: x / 2,
        folder=RunFolder(tmp_path),
        validate=validate,
    )
    return method, state


def test_own_schedules_separate_clipping_and_logged_scalars(tmp_path):
    method, state = run(tmp_path, accumulate=2)
    assert state.step == 6
    assert [(step, epoch) for step, epoch, _ in method.seen] == [(i, i / 2) for i in range(6)]  # once a window
    first = 0.1 * 0.5 * (1 + math.cos(0))
    assert method.seen[0][2] == first
    # "image" and "image_more" are both prepared: a pull of 1. Clipped apart, each part is judged by its own norm:
    # 100 comes down to 1, 0.01 stays what it is.
    torch.testing.assert_close(torch.tensor(method.norms[0]), torch.tensor([-0.1, -0.001]), rtol=1e-4, atol=0)
    records = [r for r in RunFolder(tmp_path).records() if "loss" in r]
    assert all("strong" in r and "pulls" not in r for r in records)


def test_validation_may_end_training_and_the_best_weights_come_back(tmp_path):
    scores = iter([(1.0, {"val": 1.0}, ""), (0.5, {"val": 0.5}, "features collapsed")])
    kept = {}

    def validate(method):
        kept[len(kept)] = method.strong.item()
        return next(scores)

    method, state = run(tmp_path, validate)
    assert state.ended == "features collapsed" and state.epoch == 2 and state.best_step == 4
    assert method.strong.item() == kept[0] != kept[1]
