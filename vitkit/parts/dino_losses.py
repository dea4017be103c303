"""Losses of DINO, iBOT and DINOv2: teacher targets by centring or Sinkhorn-Knopp, their cross-entropy, and KoLeo.

Memory is what matters here: with 65,536 prototypes a batch's logits are larger than the model. The teacher's values are
kept once (`Targets`: Sinkhorn's result is that matrix and two vectors), and `cross_entropy` computes the student's logits
in chunks of rows, takes loss and gradient of each at once and keeps neither logits nor probabilities.

Sums over a batch are sums over all processes where torch.distributed runs. Source: DINOv2, loss/*.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK = {"cpu": 2**22}  # elements of logits that exist at once: what a cache holds
CHUNK_ELSEWHERE = 2**26


@dataclass(frozen=True)
class Targets:
    """Teacher probabilities (n, K) = `values` * `rows` (n, 1) * `columns` (1, K); missing factors are 1."""

    values: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Tensor) -> Tensor:
        """The sum (m, K) of the rows that `index` (m, j) names."""
        total = None
        for column in index.unbind(1):
            part = self.values[column]
            part = part if self.rows is None else part * self.rows[column]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total if self.columns is None else total.mul_(self.columns)

    def all(self) -> Tensor:
        """(n, K), for tests and small sizes."""
        return self.take(torch.arange(len(self), device=self.values.device).unsqueeze(1))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(mean entropy of a row, entropy of the mean row), both in shares of ln K: how sharp single targets are, and how
        evenly all prototypes are used. Of this process's rows."""
        count, prototypes = self.values.shape
        entropy, mean = self.values.new_zeros(()), self.values.new_zeros(prototypes)
        for rows in _chunks(count, prototypes, self.values.device):
            p = self.take(torch.arange(rows.start, rows.stop, device=self.values.device).unsqueeze(1))
            entropy -= torch.special.xlogy(p, p).sum()
            mean += p.sum(0)
        mean = mean / max(count, 1)
        scale = torch.log(torch.tensor(float(prototypes)))
        return entropy / max(count, 1) / scale, -torch.special.xlogy(mean, mean).sum() / scale


# ---------------------------------------------------------------- the teacher's side


@torch.no_grad()
def centred(logits: Tensor, center: Tensor, temperature: float, *, consume: bool = False) -> Targets:
    """softmax((t - center) / temperature) of teacher logits (n, K). consume: their memory may be overwritten."""
    x = logits if consume and logits.dtype == torch.float32 else logits.to(torch.float32, copy=True)
    x.sub_(center.view(1, -1)).div_(temperature)
    if len(x):
        x.sub_(x.amax(1, keepdim=True))
    x.exp_()
    return Targets(x.div_(x.sum(1, keepdim=True)))


@torch.no_grad()
def sinkhorn(
    logits: Tensor, temperature: float, *, iterations: int = 3, consume: bool = False, shared: bool = True
) -> Targets:
    """Sinkhorn-Knopp: exp(t / temperature) scaled in turn so that every prototype and every sample get equal mass; the
    last scaling makes each sample's probabilities sum to 1. fp32, over the samples of all processes (`shared`; without,
    of this one alone, as where only one process looks at held-out images).

    The common shift by the middle of all logits cancels and keeps exp within range whatever the prototypes' norms.
    """
    x = logits if consume and logits.dtype == torch.float32 else logits.to(torch.float32, copy=True)
    x.div_(temperature)
    if x.numel():
        ends = torch.stack([x.amax(), -x.amin()])
    else:  # a process without masked patches takes part in the sums all the same
        ends = x.new_full((2,), -torch.inf)
    total = _reduced if shared else _alone
    ends = total(ends, "max")
    x.sub_((ends[0] - ends[1]) / 2).exp_()
    count = total(x.new_tensor(float(len(x))))
    prototypes = x.shape[1]
    v = x.new_ones(len(x))
    u = x.new_ones(prototypes)
    smallest = torch.finfo(torch.float32).tiny
    for _ in range(iterations):
        u = 1 / (prototypes * total(x.T @ v)).clamp_min_(smallest)
        v = 1 / (count * (x @ u)).clamp_min_(smallest)
    return Targets(x, (v * count).unsqueeze(1), u.unsqueeze(0))


@torch.no_grad()
def update_center(center: Tensor, logits: Tensor, momentum: float = 0.9) -> None:
    """center <- momentum center + (1 - momentum) mean of the teacher's logits (n, K), in place, over all processes."""
    total = _reduced(logits.float().sum(0))
    count = _reduced(total.new_tensor(float(len(logits))))
    mean = torch.where(count > 0, total / count.clamp_min(1), center.flatten())
    center.lerp_(mean.view_as(center), 1 - momentum)


def _reduced(value: Tensor, how: str = "sum") -> Tensor:
    """Summed (or the largest) over all processes, in place."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    return value


def _alone(value: Tensor, how: str = "sum") -> Tensor:
    return value


# ---------------------------------------------------------------- the student's side


@dataclass(frozen=True)
class Part:
    """Rows of a cross-entropy that share their `targets`: index (n, j) names the rows of them whose sum is each row's
    target (cross-entropies to two teacher views are one to their sum), row_weight (n,) what each counts."""

    targets: Targets
    index: Tensor
    row_weight: Tensor


def cross_entropy(
    x: Tensor, directions: Tensor, scale: Tensor, parts: Sequence[Part], temperature: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows i of row_weight[i] * sum_j -P[index[i, j]] . log softmax(scale * x[i] directions^T / temperature).

    x (n, d): bottleneck features of all `parts`, one after the other. directions (K, d) and scale (K,): the prototypes are
    scale[k] * directions[k], never put together. Returns the loss, and without gradient each part's share of it and the
    share of its rows whose most probable prototype is that of their target.
    """
    return _CrossEntropy.apply(x, directions, scale, tuple(parts), temperature)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass: the loss is a scalar, so its gradient only scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, directions: Tensor, scale: Tensor, parts: tuple[Part, ...], temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad[:3])
        values, agree = torch.zeros(len(parts), device=x.device), torch.zeros(len(parts), device=x.device)
        grads = [torch.empty_like(x), torch.empty_like(directions), torch.zeros_like(scale)] if wanted else []
        begin = 0
        for number, part in enumerate(parts):
            for rows in _chunks(len(part.index), len(directions), x.device):
                here = slice(begin + rows.start, begin + rows.stop)
                raw = F.linear(x[here], directions).float()  # (c, K)
                logits = raw * (scale / temperature)
                target = part.targets.take(part.index[rows])
                agree[number] += (logits.argmax(1) == target.argmax(1)).sum() / len(part.index)
                mass, weight = target.sum(1, keepdim=True), part.row_weight[rows].unsqueeze(1)
                norm = torch.logsumexp(logits, 1, keepdim=True)
                dot = torch.linalg.vecdot(logits, target).unsqueeze(1)
                values[number] += ((mass * norm - dot) * weight).sum()
                if wanted:
                    # d/dlogits = (mass softmax - target) * weight of the row, in the memory of the logits
                    grad = logits.sub_(norm).exp_().mul_(mass).sub_(target).mul_(weight / temperature)
                    _add_gradients(grads, grad, raw, x, directions, scale, here)
            begin += len(part.index)
        if wanted and not begin:
            grads[1].zero_()
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(values, agree)
        return values.sum(), values, agree

    @staticmethod
    def backward(ctx: Any, *outs: Any) -> tuple:  # type: ignore[override]
        return (*(grad.mul_(outs[0].to(grad.dtype)) for grad in ctx.saved_tensors), None, None)


def _add_gradients(
    grads: list[Tensor], grad: Tensor, raw: Tensor, x: Tensor, directions: Tensor, scale: Tensor, rows: slice
) -> None:
    """Add a chunk's d/dlogits to the gradients of x, directions and scale; the first chunk of all starts the second one."""
    grads[2] += raw.mul_(grad).sum(0).to(scale.dtype)
    grad.mul_(scale)
    grads[0][rows] = (grad @ directions.float()).to(x.dtype)
    some = x[rows].float()
    if grads[1].dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):  # no copy is made
        torch.addmm(grads[1], grad.T, some, beta=0.0 if rows.start == 0 else 1.0, out=grads[1])
    elif rows.start == 0:
        grads[1].copy_(grad.T @ some)
    else:
        grads[1] += (grad.T @ some).to(directions.dtype)


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean of -log distance to the nearest neighbour among unit features (n, D) of this process: keeps them apart.

    Neighbours are found by the largest inner product. Identical rows cost -log(eps sqrt(D)), with no gradient to part them.
    """
    if len(x) < 2:
        return x.sum() * 0.0
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=eps)
        return -torch.log(nearest_distance(x, eps) + eps).mean()


def nearest_distance(x: Tensor, eps: float = 1e-8) -> Tensor:
    """(n,): |x_i - x_nearest(i) + eps| of unit rows."""
    if len(x) < 2:
        return x.new_full((len(x),), torch.inf)
    with torch.no_grad():
        near = (x @ x.T).fill_diagonal_(-1).argmax(1)
    return F.pairwise_distance(x, x[near], p=2, eps=eps)


def drift(seen: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], hidden: Tensor) -> Tensor:
    """1 - cosine of features (image (B, D), patches (B, N, D)) to those of another model, of the image and of the patches
    that are not `hidden` (B, N): what holds a continued model near the one that it started from."""
    image = 1 - F.cosine_similarity(seen[0].float(), before[0].float(), dim=-1)
    patches = 1 - F.cosine_similarity(seen[1].float(), before[1].float(), dim=-1)
    shown = (~hidden).to(patches.dtype)
    return image.mean() + (patches * shown).sum() / shown.sum().clamp_min(1)


def _chunks(rows: int, width: int, device: torch.device) -> list[slice]:
    step = max(1, CHUNK.get(device.type, CHUNK_ELSEWHERE) // max(width, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
