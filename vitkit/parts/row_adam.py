"""Adam on a large table of which a step touches few rows: the numbers of the dense optimiser at the cost of those rows.

Without gradient a row still moves under dense Adam, by its momentum: k steps after step s it has moved by
m_s / sqrt(v_s) * sum_{j=s+1}^{s+k} lr_j r^(j-s) sqrt(1 - b2^j) / (1 - b1^j) with r = b1 / sqrt(b2). That sum is the same
for all rows last touched in step s, so it is kept for each s and a row is brought up to date when it is read again
(`take`) or at the end (`settle`). Exact where eps is negligible beside sqrt(v), as with the 1e-15 it is used with.

What differs from dense Adam: L2 decay reaches a row only in the steps that touch it.
Source of the idea: `SparseAdam` and DeepSpeed's lazy updates leave the momentum's motion out; this does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 400  # steps after which r^k has no meaning in float32: 0.9045^400 = 4e-18


class RowAdam:
    """Optimises `table` (R, F) in place. `take(rows)` gives the current values of unique rows, `step` their gradients."""

    def __init__(
        self,
        table: Tensor,
        *,
        steps: int,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
    ):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.state = torch.stack([table, torch.zeros_like(table), torch.zeros_like(table)], 1)  # (R, 3, F): w, m, v
        self.last = torch.zeros(len(table), dtype=torch.int64, device=table.device)
        self.motion = torch.zeros(steps + 1, device=table.device)  # the sum above, by s
        self.now = 0
        ratio = betas[0] / betas[1] ** 0.5
        self.fading = ratio ** torch.arange(WINDOW, 0, -1, dtype=torch.float64, device=table.device).float()

    @torch.no_grad()
    def take(self, rows: Tensor) -> Tensor:
        """Current values (U, F) of unique `rows`, to compute a loss with and give `step` the gradient of."""
        self._rows, old = rows, self.last[rows]
        w, m, v = self.state.index_select(0, rows).unbind(1)
        w = w.addcmul(m / v.sqrt().add_(self.eps), self.motion[old].unsqueeze(-1), value=-1)
        age = (self.now - old).unsqueeze(-1).float()
        self._taken = w, m * self.betas[0] ** age, v * self.betas[1] ** age
        return w

    @torch.no_grad()
    def step(self, grad: Tensor, lr: float) -> None:
        """One Adam step of rate `lr` with `grad` (U, F) for the rows that were just taken, and none for all others."""
        first, second = self.betas
        w, m, v = self._taken
        if self.weight_decay:
            grad = grad.add(w, alpha=self.weight_decay)
        m = m.lerp_(grad, 1 - first)
        v = v.mul_(second).addcmul_(grad, grad, value=1 - second)
        self.now += 1
        rate = lr * (1 - second**self.now) ** 0.5 / (1 - first**self.now)
        root = (1 - second**self.now) ** 0.5
        w = w.addcdiv(m, v.sqrt().add_(self.eps * root), value=-rate)
        self.state.index_copy_(0, self._rows, torch.stack([w, m, v], 1))
        self.last[self._rows] = self.now
        start = max(0, self.now - WINDOW)
        self.motion[start : self.now].add_(self.fading[WINDOW - (self.now - start) :], alpha=rate)

    @torch.no_grad()
    def settle(self) -> Tensor:
        """The whole table (R, F) as of now."""
        w, m, v = self.state.unbind(1)
        return w - m / v.sqrt().add_(self.eps) * self.motion[self.last].unsqueeze(-1)
