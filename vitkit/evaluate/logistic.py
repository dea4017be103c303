"""Logistic regression for many penalties (and classes) at once: a batched L-BFGS. `vitkit.evaluate.linear` is its user.

Every problem minimises  mean loss + penalty / 2 * |w|^2  over the same images, bias free. Two matrix products a step
serve a whole batch of problems; each has its own curvature pairs, step length and end, and leaves the batch when it
ends. The initial Hessian is diag(c * variance of the coordinate + penalty), c the current mean of p * (1 - p), which
is close to the truth when the coordinates are principal axes. Logits are linear in the step length, so a line search
costs no product.

Float32 carries a problem as far as its rounding allows; float64 takes over from there, curvature pairs included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

COARSE = 1e-3  # relative gain left to float64; validation scores have settled by then

_BATCH = {"cpu": 1 << 16}  # logits of one batch: what a core's cache holds ...
_BATCH_ELSEWHERE = 1 << 24  # ... and what keeps a GPU busy


@dataclass
class Solution:
    """For R penalties: `weight` (R, C, d), `bias` (R, C), whether the tolerance was met (R,), steps taken (R,)."""

    weight: Tensor
    bias: Tensor
    converged: Tensor
    steps: Tensor


def solve(
    z: Tensor,
    y: Tensor,
    penalties: list[float],
    *,
    tolerance: float = 1e-6,
    max_iter: int = 1000,
    memory: int = 5,
    start: tuple[Tensor, Tensor] | None = None,
) -> Solution:
    """Minimise for every penalty over `z` (N, d) float64, best given in principal axes.

    The strongest penalties go first; a batch holds what the cache does, and starts from the weakest one before it.

    y: (N,) int64 classes, each of 0 ... C - 1 occurring: softmax cross-entropy. (N, C) of 0, 1, NaN = unknown, each
    column with both values: for every column the sigmoid cross-entropy over its known images. tolerance: a problem
    ends when its loss can fall by about this fraction of itself. start: weights (R, C, d) and biases (R, C) of a
    solution nearby, for instance with a larger tolerance; float64 goes on from there.
    """
    make = _Softmax if y.ndim == 1 else _Sigmoid
    coarse, fine = make(z.float(), y), make(z, y)
    last = fine.start()  # (K = C or C problems of K = 1) of one penalty
    given = None if start is None else torch.cat([start[0], start[1][..., None]], 2)
    strongest_first = sorted(range(len(penalties)), key=lambda i: -penalties[i])
    at_once = max(1, _BATCH.get(z.device.type, _BATCH_ELSEWHERE) // last[..., 0].numel() // len(z))
    weight = z.new_zeros(len(penalties), last[..., 0].numel(), z.shape[1] + 1)
    met, steps = (torch.zeros(len(penalties), dtype=t, device=z.device) for t in (torch.bool, torch.int64))
    for first in range(0, len(penalties), at_once):
        part = strongest_first[first : first + at_once]
        some = z.new_tensor([penalties[i] for i in part])
        origin = last.repeat(len(part), 1, 1) if given is None else given[part].view(-1, *last.shape[1:])
        state = _State.fresh(origin, memory)
        if given is None:
            coarse.take(some.float())
            state = _minimise(coarse, state.to(torch.float32), max(COARSE, tolerance), max_iter).to(torch.float64)
        left = torch.nonzero(~(state.converged & (tolerance >= COARSE)))[:, 0]  # a coarse answer may be settled already
        if len(left):
            fine.take(some, left)
            state.put(left, _minimise(fine, state.rows(left), tolerance, max_iter))
        last = state.w[-len(last) :]
        weight[part] = state.w.view(len(part), *weight.shape[1:])
        met[part] = state.converged.view(len(part), -1).all(1)
        steps[part] = state.steps.view(len(part), -1).amax(1)
    return Solution(weight[..., :-1], weight[..., -1], met, steps)


# ---------------------------------------------------------------- the two losses


class _Problem(ABC):
    """P problems over the same images; subclasses hold the loss. Weights are (P, K, d + 1), the bias last.

    A step is `aim`, any number of `change` with t (P,), `accept`, `gradient`.
    """

    rows: tuple[str, ...]  # names of the tensors with one row a problem
    penalty: Tensor  # (P,)
    value: Tensor  # (P,) the objective

    @abstractmethod
    def start(self) -> Tensor:
        """Weights of the best constant prediction, for one penalty."""

    @abstractmethod
    def take(self, penalties: Tensor, keep: Tensor | None = None) -> None:
        """The problems of these penalties (r,), or those of them that are kept."""

    @abstractmethod
    def begin(self, w: Tensor) -> None:
        """Set `value` and all that the steps need at `w`."""

    @abstractmethod
    def aim(self, direction: Tensor) -> None:
        """Fix the direction (P, K, d + 1) of the next step: the only product before it."""

    @abstractmethod
    def change(self, t: Tensor) -> Tensor:
        """How much the loss, without the penalty, changes after a step `t`: (P,)."""

    @abstractmethod
    def accept(self, t: Tensor) -> None:
        """Take the step that `change` was last asked about."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """Of the loss, without the penalty: (P, K, d + 1)."""

    @abstractmethod
    def spread(self) -> Tensor:
        """Mean of p (1 - p): (P, K)."""

    def __init__(self, z: Tensor):
        self.x = torch.cat([z, torch.ones_like(z[:, :1])], 1)  # (N, d + 1)
        # a contiguous transpose makes the forward product up to twice as fast while everything fits the cache
        self.xt = self.x.T.contiguous() if self.x.numel() < 1 << 23 else self.x.T
        self.variance = z.square().mean(0)  # (d,)

    def narrow(self, keep: Tensor) -> None:
        """Keep only these problems."""
        for name in self.rows:
            setattr(self, name, getattr(self, name)[keep])

    def product(self, w: Tensor) -> Tensor:
        return (w.reshape(-1, w.shape[-1]) @ self.xt).view(*w.shape[:2], -1)  # (P, K, N)

    def backward(self, residual: Tensor) -> Tensor:
        return (residual.reshape(-1, residual.shape[-1]) @ self.x).view(*residual.shape[:2], -1)  # (P, K, d + 1)


class _Softmax(_Problem):
    """One problem for each penalty, K = C. Keeps log-probabilities: a change of the loss then has no cancellation."""

    rows = ("penalty", "value", "log_p", "p")

    def __init__(self, z: Tensor, y: Tensor):
        super().__init__(z)
        member = F.one_hot(y).T.to(z.dtype)  # (K, N)
        self.share = member.mean(1)
        self.sums = member @ self.x / len(z)  # (K, d + 1) the part of the gradient that never changes

    def start(self) -> Tensor:
        w = self.x.new_zeros(1, len(self.share), self.x.shape[1])
        w[..., -1] = self.share.log()
        return w

    def take(self, penalties: Tensor, keep: Tensor | None = None) -> None:
        self.penalty = penalties if keep is None else penalties[keep]

    def begin(self, w: Tensor) -> None:
        logits = self.product(w)
        total = logits.logsumexp(1, keepdim=True)  # (P, 1, N)
        self.log_p = logits.sub_(total)  # (P, K, N)
        self.p = self.log_p.exp()
        self.value = total.mean((1, 2)) - (w * self.sums).sum((1, 2)) + _ridge(self.penalty, w)

    def aim(self, direction: Tensor) -> None:
        self.move = self.product(direction)
        self.gain = (direction * self.sums).sum((1, 2))

    def change(self, t: Tensor) -> Tensor:
        self.new = torch.addcmul(self.log_p, self.move, t[:, None, None]).exp_()
        self.total = self.new.sum(1, keepdim=True)  # (P, 1, N)
        return self.total.log().mean((1, 2)) - t * self.gain

    def accept(self, t: Tensor) -> None:
        self.log_p.addcmul_(self.move, t[:, None, None]).sub_(self.total.log())
        self.p = self.new.div_(self.total)

    def gradient(self) -> Tensor:
        return self.backward(self.p) / len(self.x) - self.sums

    def spread(self) -> Tensor:
        return self.p.mean(2) - torch.linalg.vecdot(self.p, self.p) / len(self.x)


class _Sigmoid(_Problem):
    """One problem for each pair of penalty and class, K = 1; images whose label is unknown take no part.

    With sign -1 for a positive and 1 for a negative image the loss is softplus(u), u = sign * logit.
    """

    rows = ("penalty", "known", "sign", "value", "base", "u", "p")

    def __init__(self, z: Tensor, y: Tensor):
        super().__init__(z)
        self.signs = torch.nan_to_num(1 - 2 * y.T).to(z.dtype)  # (C, N), 0 = unknown

    def start(self) -> Tensor:
        w = self.x.new_zeros(len(self.signs), 1, self.x.shape[1])
        w[:, 0, -1] = torch.log((self.signs < 0).sum(1) / (self.signs > 0).sum(1))
        return w

    def take(self, penalties: Tensor, keep: Tensor | None = None) -> None:
        pairs = torch.arange(len(penalties) * len(self.signs), device=penalties.device) if keep is None else keep
        self.penalty = penalties[pairs // len(self.signs)]
        self.sign = self.signs[pairs % len(self.signs)]  # (P, N)
        self.known = self.sign.abs().sum(1)

    def begin(self, w: Tensor) -> None:
        self.u = self.product(w)[:, 0].mul_(self.sign)  # (P, N)
        self.p = self.u.sigmoid()
        self.total = self.base = self._loss(self.u)
        self.value = self.base + _ridge(self.penalty, w)

    def _loss(self, u: Tensor) -> Tensor:
        return torch.linalg.vecdot(F.softplus(u), self.sign.abs()) / self.known

    def aim(self, direction: Tensor) -> None:
        self.move = self.product(direction)[:, 0].mul_(self.sign)

    def change(self, t: Tensor) -> Tensor:
        self.new = torch.addcmul(self.u, self.move, t[:, None])
        self.total = self._loss(self.new)
        return self.total - self.base

    def accept(self, t: Tensor) -> None:
        self.u, self.base = self.new, self.total
        self.p = self.u.sigmoid()

    def gradient(self) -> Tensor:
        return self.backward((self.p * self.sign)[:, None]) / self.known[:, None, None]

    def spread(self) -> Tensor:
        return (torch.linalg.vecdot(self.p - self.p.square(), self.sign.abs()) / self.known)[:, None]


def _ridge(penalty: Tensor, w: Tensor) -> Tensor:
    return penalty * _dot(w[..., :-1], w[..., :-1]) / 2


# ---------------------------------------------------------------- batched L-BFGS


@dataclass
class _State:
    """P problems: weights, whether each met the tolerance, steps taken, and the last m steps and gradient changes."""

    w: Tensor  # (P, K, d + 1)
    converged: Tensor  # (P,)
    steps: Tensor  # (P,)
    s: Tensor  # (P, m, K (d + 1)), the newest last
    y: Tensor

    @classmethod
    def fresh(cls, w: Tensor, memory: int) -> _State:
        count = torch.zeros(len(w), dtype=torch.int64, device=w.device)
        pairs = w.new_zeros(len(w), memory, w[0].numel())
        return cls(w, count.bool(), count, pairs, pairs)

    def rows(self, keep: Tensor) -> _State:
        return _State(*(getattr(self, f.name)[keep] for f in fields(self)))

    def put(self, at: Tensor, other: _State) -> None:
        for f in fields(self):
            getattr(self, f.name)[at] = getattr(other, f.name)

    def to(self, dtype: torch.dtype) -> _State:
        return _State(self.w.to(dtype), self.converged, self.steps, self.s.to(dtype), self.y.to(dtype))


def _minimise(problem: _Problem, now: _State, tolerance: float, max_iter: int) -> _State:
    """Run every problem until its own quadratic model predicts less to gain than `tolerance` times its value."""
    active = torch.arange(len(now.w), device=now.w.device)
    result = now.rows(active)
    near = idle = torch.zeros(len(active), device=active.device)
    problem.begin(now.w)
    g = _gradient(problem, now.w)
    for _ in range(max_iter):
        inverse = _inverse(problem)
        direction, slope = _direction(g, now.s, now.y, inverse)
        gain = -slope / 2
        settled = gain <= tolerance * problem.value
        near = torch.where(settled | (gain <= _noise(problem, inverse)), near + 1, 0.0)
        met = near >= 2  # twice in a row: one small prediction may come from a poor model
        t, change = _step_length(problem, now.w, direction, slope)
        idle = torch.where(change > -_rounding(problem), idle + 1, 0.0)
        ended = met | (t == 0) | (idle >= 5)
        move = direction * t[:, None, None]
        problem.accept(t)
        problem.value = problem.value + change
        now.w, now.steps = now.w + move, now.steps + 1
        new = _gradient(problem, now.w)
        now.s, now.y = _remember(now.s, now.y, move.flatten(1), (new - g).flatten(1))
        now.converged, g = met & (settled | (g.dtype == torch.float64)), new
        if ended.any():
            result.put(active[ended], now.rows(ended))
            going = ~ended
            if not going.any():
                return result
            active, near, idle, g, now = active[going], near[going], idle[going], g[going], now.rows(going)
            problem.narrow(going)
    result.put(active, now)
    return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each problem: (P, ...), (P, ...) -> (P,)."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def _gradient(problem: _Problem, w: Tensor) -> Tensor:
    g = problem.gradient()
    g[..., :-1] += problem.penalty[:, None, None] * w[..., :-1]
    return g


def _inverse(problem: _Problem) -> Tensor:
    """Diagonal of the inverse Hessian (P, K, d + 1) if p (1 - p) did not depend on the image."""
    c = problem.spread()[..., None].clamp(min=1e-10)
    return torch.cat([1 / (c * problem.variance + problem.penalty[:, None, None]), 1 / c], 2)


def _noise(problem: _Problem, inverse: Tensor) -> Tensor:
    """Gain (P,) that rounding of the gradient alone would predict: eps * deviation / sqrt(N) a coordinate, times 8."""
    eps = torch.finfo(inverse.dtype).eps
    return 64 * eps**2 / len(problem.x) * (inverse[..., :-1] * problem.variance).sum((1, 2))


def _rounding(problem: _Problem) -> Tensor:
    """Changes of the value smaller than this are none. (P,)"""
    return 8 * torch.finfo(problem.value.dtype).eps * problem.value


def _remember(s: Tensor, y: Tensor, step: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the oldest pair, append the newest; zeros (no effect) where rounding left no curvature."""
    size = torch.linalg.vector_norm(step, dim=1) * torch.linalg.vector_norm(change, dim=1)
    sound = _dot(step, change) > 10 * torch.finfo(s.dtype).eps * size
    step, change = (torch.where(sound[:, None], v, 0.0)[:, None] for v in (step, change))
    return torch.cat([s[:, 1:], step], 1), torch.cat([y[:, 1:], change], 1)


def _direction(g: Tensor, s: Tensor, y: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the L-BFGS inverse Hessian times the gradient (P, K, d + 1), and the slope along it (P,).

    Compact form of the inverse (Byrd, Nocedal & Schnabel 1994, theorem 2.2): a few products with all pairs at once.
    """
    flat, h = g.flatten(1), inverse.flatten(1)
    hy = y * h[:, None]
    products = s @ y.mT  # (P, m, m)
    curvature = products.diagonal(dim1=1, dim2=2)
    upper = products.triu() + torch.diag_embed((curvature == 0).to(s))
    middle = torch.diag_embed(curvature) + hy @ y.mT
    u = torch.linalg.solve_triangular(upper, s @ flat[..., None], upper=True)
    v = torch.linalg.solve_triangular(upper.mT, middle @ u - hy @ flat[..., None], upper=False)
    direction = -(h * flat + (s.mT @ v - hy.mT @ u)[..., 0])
    slope = _dot(flat, direction)
    uphill = ~(slope < 0)
    if uphill.any():
        direction = torch.where(uphill[:, None], -h * flat, direction)
        slope = _dot(flat, direction)
    return direction.view_as(g), slope


def _step_length(problem: _Problem, w: Tensor, direction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Step (P,) with sufficient decrease (Armijo) and the change of the objective (P,); each problem backtracks on
    its own.

    The objective is convex, so every step has positive curvature without a second Wolfe condition. A step of 0 means
    that none was found: rounding hides what is left to gain.
    """
    problem.aim(direction)
    inner, square = _dot(w[..., :-1], direction[..., :-1]), _dot(direction[..., :-1], direction[..., :-1])
    rounding = _rounding(problem)
    t = torch.ones_like(slope)
    for _ in range(20):
        change = problem.change(t) + problem.penalty * (t * inner + t.square() * square / 2)
        fine = change.isfinite() & (change <= 1e-4 * t * slope + rounding)  # too long a step under- or overflows
        if fine.all():
            return t, change
        parabola = (-slope * t / (2 * (change - slope * t))).nan_to_num(0.1).clamp(0.1, 0.5)
        t = torch.where(fine, t, t * parabola)
    t = torch.where(fine, t, 0.0)
    problem.change(t)
    return t, torch.where(fine, change, 0.0)
