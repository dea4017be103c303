"""Imitation probe: how well can a linear layer on a frozen encoder tell which action was taken? No agent is trained.

Source: Goulao, "Linear Probing for RL" (mgoulao/Linear-Probing-for-RL), which reports a correlation of 0.53 of this score with
the Rainbow score over ten games. Weighted F1 of logged actions; streams come from `vitkit rl collect` or DQN-replay.

What happens, and where: one observation's pooled feature, frozen; logistic regression over a grid of penalties, picked on
validation (`vitkit.evaluate.linear`), or with `protocol=sgd` the authors' layer: weights N(0, 0.01), momentum 0.9, lr 1e-3,
batch 512, 100 passes (`sgd`). Splits are by time, so no test frame has a training neighbour but the first.

Differs from the paper: the probe is solved instead of run for 100 passes, which removes its noise; `protocol=sgd` is theirs.
Train and test are the streams' own parts by time (authors: the first 100,000 observations, and those from 120,000 on).

Cost: the ViT once an observation; the probe takes seconds.

    vitkit rl imitate --model runs/tov --data streams/ --out probe/
    vitkit.rl("imitate", model="runs/tov", data="streams/", out="probe/")
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from vitkit.errors import ConfigError, DataError
from vitkit.settings import check_choices


@dataclass(frozen=True)
class Settings:
    """Which encoder, which streams, and how the probe is trained."""

    model: str = ""
    """encoder: run folder, weights file or timm name"""
    data: str = ""
    """streams with actions, as `vitkit rl collect` writes them"""
    out: str | None = None
    """folder for results.json; by default nothing is written"""
    pretrained: bool = True
    """load the released weights of a timm name; false starts from random ones"""
    arch_kwargs: dict[str, Any] | None = None
    """keywords of the architecture that differ from its name"""
    image_size: int | None = None
    """pixels that the encoder sees; by default the model's own"""
    patch_size: int | None = None
    """pixels of a patch; by default the model's own"""
    protocol: Literal["solved", "sgd"] = "solved"
    """logistic regression with its penalty picked on validation, or the authors' SGD on one linear layer"""
    frames: int = 3
    """frames of an observation"""
    val_fraction: float = 0.15
    """share of every stream, before the test's, for validation"""
    test_fraction: float = 0.2
    """share of every stream, its end, for the test"""
    batch_size: int = 64
    """observations at once"""
    seed: int = 0
    """of random weights, of the layer and of its batches"""
    quiet: bool = False
    """no words on the terminal"""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.frames < 1 or self.batch_size < 1:
            raise ConfigError(f"frames {self.frames}, batch_size {self.batch_size}", fix="1 or more")


def run(settings: Settings) -> dict[str, Any]:
    """{"weighted_f1", "accuracy", "constant" (weighted F1 of the commonest action), "actions", "verdict", ...} on the test."""
    import numpy as np

    from vitkit.data import read
    from vitkit.data.frames import actions
    from vitkit.evaluate import metrics
    from vitkit.rl.encoders import features_of, open_encoder
    from vitkit.run.batches import speaker

    say = speaker(settings.quiet)
    val, test = settings.val_fraction, settings.test_fraction
    images = read(settings.data, kind="frames", val_fraction=val, test_fraction=test, say=say)
    label = actions(images, settings.frames)
    classes, y = np.unique(label, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"{images.name}: all {len(label)} logged actions are {classes[0]}", fix="a policy that acts")
    if min(int((images.split == part).sum()) for part in ("train", "test")) == 0:
        raise DataError(
            f"{images.name}: no observations to train or to test on", fix="longer streams, or test_fraction above 0"
        )
    vit = open_encoder(settings, say)
    x = features_of(vit, images, settings.frames, settings.batch_size)
    learnt, picked, judged = (np.flatnonzero(images.split == part) for part in ("train", "val", "test"))
    scores = _fit(settings, x, y, learnt, picked, len(classes))(x[judged])
    constant = np.full(len(judged), np.bincount(y[learnt]).argmax())
    found: dict[str, Any] = {
        "weighted_f1": weighted_f1(y[judged], scores.argmax(1)),
        "accuracy": metrics.accuracy(y[judged], scores),
        "constant": weighted_f1(y[judged], constant),
        "actions": len(classes),
        "train": len(learnt),
        "test": len(judged),
    }
    found["verdict"] = (
        f"weighted F1 {found['weighted_f1']:.3f} on {len(judged):,} held-out observations of {len(classes)} actions; the "
        f"commonest action alone reaches {found['constant']:.3f}"
    )
    found["report"] = _write(settings.out, found)
    return found


def _fit(settings: Settings, x: Any, y: Any, train: Any, val: Any, classes: int) -> Any:
    """A function from features to scores (N, classes)."""
    from vitkit.evaluate import linear

    if settings.protocol == "sgd":
        return sgd(x[train], y[train], classes, seed=settings.seed)
    picked = (x[val], y[val]) if len(val) else (None, None)
    return linear.fit(x[train], y[train], *picked, n_classes=classes).scores


def sgd(x: Any, y: Any, classes: int, *, seed: int = 0, epochs: int = 100, batch: int = 512, lr: float = 1e-3) -> Any:
    """The authors' probe: one layer, weights N(0, 0.01), no bias at the start, SGD with momentum; features to scores."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.from_numpy(x).float(), torch.from_numpy(y)
    layer = torch.nn.Linear(inputs.shape[1], classes)
    with torch.no_grad():
        layer.weight.normal_(0, 0.01, generator=generator)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(inputs[rows]), labels[rows]).backward()
            optimizer.step()

    def scores(features: Any) -> Any:
        with torch.no_grad():
            return layer(torch.from_numpy(features).float()).softmax(1).numpy()

    return scores


def weighted_f1(y: Any, predicted: Any) -> float:
    """F1 of every class that occurs, weighted by how often it does (scikit-learn's average="weighted")."""
    from sklearn.metrics import f1_score

    return float(f1_score(y, predicted, average="weighted", zero_division=0.0))


def _write(out: str | None, found: dict[str, Any]) -> Any:
    from pathlib import Path

    from vitkit.run.files import atomic_write

    if out is None:
        return ""
    path = Path(out) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(found, indent=1) + "\n")
    return path
