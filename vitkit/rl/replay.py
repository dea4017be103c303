"""Prioritised replay of n-step transitions that stores every frame (or its feature) once.

Schaul et al., "Prioritized Experience Replay", ICLR 2016 (arXiv 1511.05952); n-step returns as in Rainbow (arXiv 1710.02298).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Sample:
    """Transitions: `now`, `later` (B, stack, ...), actions (B,), n-step rewards (B,), `discount` (B,): gamma^n, or 0 where the
    episode ended in between; `weights` (B,) correct for the priorities, `rows` (B,) name them for `update`."""

    now: np.ndarray
    later: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    discount: np.ndarray
    weights: np.ndarray
    rows: np.ndarray


class Replay:
    """A ring of `capacity` items of `shape`; observations are the last `stack` items of an episode, its first repeated.

    A row can be drawn once its next n rewards are known and as long as its stack and successor are in the ring. Drawing costs
    one running sum over the ring: below 0.3 ms for 100,000 rows, so there is no tree.
    """

    def __init__(
        self,
        capacity: int,
        shape: tuple[int, ...],
        dtype: type,
        *,
        stack: int = 1,
        steps: int = 20,
        gamma: float = 0.99,
        exponent: float = 0.5,
        seed: int = 0,
    ):
        self.capacity, self.stack, self.steps, self.gamma, self.exponent = capacity, stack, steps, gamma, exponent
        self.items: np.ndarray = np.zeros((capacity, *shape), dtype)
        self.actions, self.rewards = np.zeros(capacity, np.int64), np.zeros(capacity, np.float64)
        self.ends, self.age = np.zeros(capacity, bool), np.zeros(capacity, np.int64)  # age: steps into the episode
        self.priority = np.zeros(capacity)
        self.random = np.random.default_rng(seed)
        self.count, self.top = 0, 1.0
        self._start = True

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def add(self, item: np.ndarray, action: int, reward: float, end: bool) -> None:
        """What was seen, what was done, what that brought, and whether the episode ended with it."""
        row = self.count % self.capacity
        self.items[row], self.actions[row], self.rewards[row], self.ends[row] = item, action, reward, end
        self.age[row] = 0 if self._start else self.age[(row - 1) % self.capacity] + 1
        self._start, self.count = end, self.count + 1
        # The row before the next to be overwritten still needs `stack` items behind it.
        self.priority[(row + 1 + np.arange(self.stack)) % self.capacity] = 0.0
        self.priority[row] = 0.0
        ready = self.count - 1 - self.steps
        if ready >= 0:
            self.priority[ready % self.capacity] = self.top**self.exponent

    def sample(self, batch: int, beta: float) -> Sample:
        """`batch` transitions by priority, stratified."""
        sums = np.cumsum(self.priority)
        points = (np.arange(batch) + self.random.random(batch)) / batch * sums[-1]
        rows = np.searchsorted(sums, points, side="right").clip(0, self.capacity - 1)
        rows = np.where(self.priority[rows] > 0, rows, int(np.argmax(self.priority)))
        share = self.priority[rows] / sums[-1]
        weights = (np.count_nonzero(self.priority) * share) ** -beta
        ahead = (rows[:, None] + np.arange(self.steps)) % self.capacity  # (B, n)
        # An ended episode pays nothing more: the rewards up to and with the last step count.
        alive = np.cumprod(np.concatenate([np.ones((batch, 1), bool), ~self.ends[ahead]], 1), 1).astype(bool)
        powers = self.gamma ** np.arange(self.steps)
        rewards = (self.rewards[ahead] * powers * alive[:, :-1]).sum(1)
        discount = np.where(alive[:, -1], self.gamma**self.steps, 0.0)
        later = (rows + self.steps) % self.capacity
        return Sample(
            self.observe(rows), self.observe(later), self.actions[rows], rewards, discount, weights / weights.max(), rows
        )  # fmt: skip

    def observe(self, rows: np.ndarray) -> np.ndarray:
        """(B, stack, ...): each row's item behind those before it in its episode."""
        back = np.minimum(np.arange(self.stack)[::-1][None], self.age[rows][:, None])
        return self.items[(rows[:, None] - back) % self.capacity]

    def update(self, rows: np.ndarray, errors: np.ndarray) -> None:
        """New priorities: `errors` (B,) of the drawn rows; rows that became undrawable stay so."""
        still = self.priority[rows] > 0
        self.top = max(self.top, float(errors.max()))
        self.priority[rows[still]] = (errors[still] + 1e-6) ** self.exponent
