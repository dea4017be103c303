"""Grid of linear heads by SGD: learning rates x blocks x avgpool at once on cached features, validation picks the head.

Paper: Baharoon et al., "Towards General Purpose Vision Foundation Models for Medical Image Analysis: An Experimental
Study of DINOv2 on Radiology Benchmarks", arXiv 2312.02366, after DINOv2's linear evaluation. Official code:
MohammedSB/DINOv2ForRadiology.

What happens, and where: every head has its own learning rate and input: class tokens of the last 1 or 4 blocks, with or
without the mean patch token (`pooling.linear_input`). SGD with momentum 0.9, no weight decay, cosine to 0 by step,
weights ~ N(0, 0.01), biases 0 (`train`). The head with the best mean AUC on validation wins, of equal ones the first in
the order blocks, avgpool, rate; with `refit` it is trained afresh on train + validation (`fit`). Only that head sees
test images.

Differs from the paper: features are taken once, without augmentation; the official code runs the backbone again in
every epoch, and for the search and the refit. Scores of one label an image are softmax probabilities, where the
official AUC is on sigmoids. The official loss for several labels is summed over the batch (`sum_over_batch`); here it
is averaged unless asked.

Cost: a pass over the features and epoch. Heads with the same input are one matrix product and the gradient is written
down instead of taped; the results are those of separate torch.optim.SGD runs. For a plain answer to "how good is a
linear head" the exact probe (`evaluate linear`) is cheaper and has no learning rate; this grid is for comparison with
published tables.

    vitkit evaluate --model vit_small_patch14_dinov2.lvd142m --data scans/ --protocols linear_grid --refit true
    vitkit.evaluate(model="vit_small_patch14_dinov2.lvd142m", data="scans/", protocols="linear_grid", refit=True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import ConfigError, DataError
from vitkit.evaluate import metrics
from vitkit.evaluate.pooling import columns


@dataclass(frozen=True)
class Settings:
    """The heads that are tried, and how they are trained."""

    rates: tuple[float, ...] = (1e-3, 5e-3, 1e-2, 5e-2)
    """learning rates"""
    blocks: tuple[int, ...] = (1, 4)
    """class tokens of so many last blocks"""
    avgpool: tuple[bool, ...] = (True, False)
    """with the mean patch token of the last block"""
    epochs: int = 10
    """passes over the training features, for the search and for the final head"""
    batch_size: int = 128
    """images a step"""
    momentum: float = 0.9
    """of SGD"""
    sum_over_batch: bool = False
    """several labels: the official loss, summed over the batch instead of averaged, so that steps grow with it"""
    metric: str = ""
    """what picks the head on validation; "" = mean AUC, as the benchmark does"""
    seed: int = 0
    """of the initial weights and the order of images"""

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates {self.rates} must be positive", fix="for example (1e-3, 1e-2)")
        if not self.blocks or not self.avgpool or self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"this grid has no head or no step: {self}", fix="at least one of each")
        if self.metric and not hasattr(metrics, self.metric):
            raise ConfigError(f"metric is {self.metric!r}", fix="a name of vitkit.evaluate.metrics, e.g. accuracy")

    def heads(self) -> list[Head]:
        """Every head, in the order in which ties are broken."""
        return [Head(b, a, lr) for b in self.blocks for a in self.avgpool for lr in self.rates]


@dataclass(frozen=True)
class Head:
    """What one head reads and how fast it learns."""

    blocks: int
    avgpool: bool
    rate: float

    def __str__(self) -> str:
        return f"{self.blocks} block{'s' * (self.blocks > 1)}{' + avgpool' * self.avgpool}, lr {self.rate:g}"


@dataclass
class Chosen:
    """The head that validation picked, trained on train + validation: `weight` (C, F), `bias` (C,) on its own columns.

    table: (head, value of the metric on validation) for every head of the grid.
    """

    head: Head
    weight: Tensor
    bias: Tensor
    where: slice
    task: str
    table: list[tuple[Head, float]] = field(default_factory=list)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """(M, D * (stored blocks + 1)) -> (M, C)."""
        return (torch.as_tensor(x[:, self.where]) @ self.weight.T + self.bias).numpy()

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (M, C)."""
        return _probabilities(torch.from_numpy(self.logits(x)), self.task)


def fit(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    *,
    dim: int,
    stored: int = 4,
    n_classes: int | None = None,
    grid: Settings = Settings(),
    refit: bool = True,
) -> Chosen:
    """Train the whole grid on `train`, pick by validation, train that head afresh on train + validation.

    Features are linear inputs (N, dim * (stored + 1)) as `pooling.encode_inputs` gives them. Labels are (N,) integers, or
    (N, C) of 0, 1, NaN (one column is the official binary case).
    """
    task = "single" if np.ndim(train_y) == 1 else "multi"
    classes = np.shape(train_y)[1] if task == "multi" else n_classes or int(max(np.max(train_y), np.max(val_y))) + 1
    for name, x, y in (("training", train_x, train_y), ("validation", val_x, val_y)):
        if np.ndim(x) != 2 or x.shape[1] != dim * (stored + 1) or len(x) != len(y):
            raise DataError(
                f"{name} features {np.shape(x)} and labels {np.shape(y)} do not fit together",
                fix=f"linear inputs (N, {dim * (stored + 1)}): {stored} class tokens and the mean patch, {dim} wide each",
            )
    if max(grid.blocks) > stored:
        raise ConfigError(f"the grid asks for {max(grid.blocks)} blocks, features hold {stored}", fix="extract more")
    heads = grid.heads()
    found = train(train_x, train_y, heads, grid, dim=dim, stored=stored, classes=classes)
    measure = getattr(metrics, grid.metric or "mean_auc")
    x = torch.as_tensor(np.asarray(val_x, np.float32))
    table = []
    for head, (weight, bias) in zip(heads, found, strict=True):
        scores = _probabilities(x[:, columns(dim, stored, head.blocks, head.avgpool)] @ weight.T + bias, task)
        table.append((head, float(measure(np.asarray(val_y), scores))))
    best = max(range(len(heads)), key=lambda i: (-math.inf if math.isnan(table[i][1]) else table[i][1], -i))
    weight, bias = found[best]
    if refit:
        x, y = np.concatenate([train_x, val_x]), np.concatenate([train_y, val_y])
        ((weight, bias),) = train(x, y, [heads[best]], grid, dim=dim, stored=stored, classes=classes)
    where = columns(dim, stored, heads[best].blocks, heads[best].avgpool)
    return Chosen(heads[best], weight, bias, where, task, table)


def train(
    x: np.ndarray,
    y: np.ndarray,
    heads: Sequence[Head],
    grid: Settings,
    *,
    dim: int,
    stored: int = 4,
    classes: int,
) -> list[tuple[Tensor, Tensor]]:
    """`weight` (C, F), `bias` (C,) of every head after SGD on features (N, dim * (stored + 1))."""
    features, labels = torch.as_tensor(np.asarray(x, np.float32)), _targets(np.asarray(y), classes)
    kinds = list(dict.fromkeys((h.blocks, h.avgpool) for h in heads))
    stacks = [_Stack.new([h for h in heads if (h.blocks, h.avgpool) == kind], kind, dim, stored, classes, grid.seed)
              for kind in kinds]  # fmt: skip
    order = torch.Generator().manual_seed(grid.seed)
    per_epoch = -(-len(features) // grid.batch_size)
    total, step = per_epoch * grid.epochs, 0
    for _ in range(grid.epochs):
        shuffled = torch.randperm(len(features), generator=order)
        for rows in shuffled.split(grid.batch_size):
            fraction = 0.5 * (1 + math.cos(math.pi * step / total))
            batch, target = features[rows], labels[rows]
            for stack in stacks:
                stack.step(batch, target, np.ndim(y) == 1, fraction, grid)
            step += 1
    rows = {head: pair for stack in stacks for head, pair in stack.results()}
    return [rows[head] for head in heads]


@dataclass
class _Stack:
    """Heads that read the same columns: their weights below each other, so that logits are one product."""

    heads: list[Head]
    where: slice
    weight: Tensor  # (H * C, F)
    bias: Tensor  # (H * C,)
    rates: Tensor  # (H * C,)
    classes: int
    momentum: tuple[Tensor, Tensor]

    @classmethod
    def new(cls, heads: list[Head], kind: tuple[int, bool], dim: int, stored: int, classes: int, seed: int) -> _Stack:
        where = columns(dim, stored, *kind)
        width = where.stop - where.start
        draw = torch.Generator().manual_seed(seed)  # every head of one kind starts alike, however many there are
        first = 0.01 * torch.randn(classes, width, generator=draw)
        weight, bias = first.repeat(len(heads), 1), torch.zeros(len(heads) * classes)
        rates = torch.tensor([h.rate for h in heads]).repeat_interleave(classes)
        return cls(heads, where, weight, bias, rates, classes, (torch.zeros_like(weight), torch.zeros_like(bias)))

    def step(self, batch: Tensor, target: Tensor, single: bool, fraction: float, grid: Settings) -> None:
        x = batch[:, self.where]
        logits = torch.addmm(self.bias, x, self.weight.T).view(len(x), len(self.heads), self.classes)
        residual = loss_gradient(logits, target, single, grid.sum_over_batch).view(len(x), -1)
        gradients = residual.T @ x, residual.sum(0)
        rates = fraction * self.rates
        for value, velocity, gradient in zip((self.weight, self.bias), self.momentum, gradients, strict=True):
            velocity.mul_(grid.momentum).add_(gradient)
            value.sub_((rates if value.ndim == 1 else rates.unsqueeze(1)) * velocity)

    def results(self) -> list[tuple[Head, tuple[Tensor, Tensor]]]:
        weights, biases = self.weight.split(self.classes), self.bias.split(self.classes)
        return [(h, (w.clone(), b.clone())) for h, w, b in zip(self.heads, weights, biases, strict=True)]


def loss(logits: Tensor, target: Tensor, *, sum_over_batch: bool = False) -> Tensor:
    """Of logits (B, C): cross-entropy for int64 targets (B,), else binary cross-entropy over known labels (B, C).

    sum_over_batch: the official loss for several labels, the mean over an image's labels, summed over the batch.
    """
    if not target.is_floating_point():
        return torch.nn.functional.cross_entropy(logits, target)
    known = ~target.isnan()
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.nan_to_num(), reduction="none") * known
    return (each.sum(1) / known.sum(1).clamp_min(1)).sum() if sum_over_batch else each.sum() / known.sum().clamp_min(1)


def loss_gradient(logits: Tensor, target: Tensor, single: bool, sum_over_batch: bool) -> Tensor:
    """d `loss` / d logits for logits (B, H, C) of H heads at once, targets (B, C): one-hot, or 0, 1, NaN."""
    if single:
        return (logits.softmax(-1) - target.unsqueeze(1)) / len(logits)
    known = ~target.isnan()
    residual = (logits.sigmoid() - target.nan_to_num().unsqueeze(1)) * known.unsqueeze(1)
    if sum_over_batch:
        return residual / known.sum(1).clamp_min(1)[:, None, None]
    return residual / known.sum().clamp_min(1)


def _targets(y: np.ndarray, classes: int) -> Tensor:
    if y.ndim == 2:
        return torch.as_tensor(y.astype(np.float32))
    if y.min() < 0 or y.max() >= classes:
        raise DataError(f"labels run from {y.min()} to {y.max()}", fix=f"0 to {classes - 1}; leave unlabelled out")
    return torch.nn.functional.one_hot(torch.as_tensor(y.astype(np.int64)), classes).float()


def _probabilities(logits: Tensor, task: str) -> np.ndarray:
    return (logits.double().softmax(1) if task == "single" else logits.double().sigmoid()).numpy()
