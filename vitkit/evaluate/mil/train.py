"""Training slide heads: all models of a cross-validation (folds x seeds x settings) together, as one stacked model.

A head is small (164k parameters) and so is a batch of bags: one at a time, most of the time goes into starting operations.
Models that take equally many steps an epoch are stacked (`torch.func.stack_module_state`) and every operation runs once for
all of them. Each keeps its own slides, order, initial weights and optimiser state, so that the result is the same as
training them one by one, up to rounding (`together=False` does that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from vitkit.errors import ConfigError, TrainingError, nearest

from .bags import Bags
from .heads import ABMIL, DSMIL, Chowder, Head, MaxPool, MeanPool
from .inference import score
from .survival import cox_loss
from .transformers import HIPT, TransMIL

HEADS: dict[str, type[Head]] = {
    "abmil": ABMIL,
    "chowder": Chowder,
    "dsmil": DSMIL,
    "hipt": HIPT,
    "max": MaxPool,
    "mean": MeanPool,
    "transmil": TransMIL,
}
_BYTES = (4 << 20, 512 << 20)  # of tile features in one stacked batch: on a CPU, on anything else
State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one head is trained. The defaults are Phikon-v2's: Adam at 1e-3, batches of 16 slides, 100 epochs."""

    head: str = "abmil"
    options: dict = field(default_factory=dict)
    """Keyword arguments of the head, e.g. {"dim": 64}."""
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 16
    epochs: int = 100
    n_tiles: int | None = 5000
    """At most so many random tiles of a slide at each visit (evaluation always sees all)."""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            close = nearest(self.head, HEADS) or list(HEADS)
            raise ConfigError(f"there is no slide head '{self.head}'", fix=f"did you mean {' or '.join(close)}?")
        for name in ("lr", "batch_size", "epochs", *(["n_tiles"] if self.n_tiles is not None else [])):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="a number above 0")

    def build(self, bags: Bags, seed: int) -> Head:
        """A fresh head for these bags; the seed alone decides its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return HEADS[self.head](bags.dim, bags.outputs, **self.options)


@dataclass
class Job:
    """One model to train: rows of the bags to train on, rows to watch (may be empty), its seed and recipe."""

    train: np.ndarray
    seed: int
    recipe: Recipe
    val: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    epochs: int | None = None  # instead of the recipe's

    @property
    def batch(self) -> int:
        return min(self.recipe.batch_size, len(self.train))

    @property
    def steps(self) -> int:
        """Whole batches an epoch: the short last one is dropped."""
        return len(self.train) // self.batch

    @property
    def length(self) -> int:
        return self.epochs or self.recipe.epochs

    def order(self, epoch: int) -> tuple[np.ndarray, np.random.Generator]:
        """Slides of every step (steps, batch) in this epoch, and the generator that draws their tiles."""
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(self.train)[: self.steps * self.batch].reshape(self.steps, self.batch), rng


@dataclass
class Trained:
    """A trained head: `state` after `epochs` epochs; `curve` the watched AUC or C-index after each epoch."""

    recipe: Recipe
    state: State
    epochs: int
    curve: np.ndarray


def fit(
    bags: Bags,
    jobs: Sequence[Job],
    *,
    keep: str = "last",
    together: bool = True,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Trained]:
    """Train every job; results in the jobs' order.

    keep: "last" epoch, or the "best" on each job's `val` rows (the first of equals). together: False trains one by one.
    progress: called with (epochs of models done, in all).
    """
    if keep not in ("last", "best"):
        raise ConfigError(f"keep is {keep!r}", fix="'last' or 'best'")
    if keep == "best" and any(len(job.val) == 0 for job in jobs):
        raise ConfigError("the best epoch needs slides to watch", fix="give every job val rows, or keep='last'")
    out: list[Trained | None] = [None] * len(jobs)
    done, total = 0, sum(job.length for job in jobs)
    device, pooled = torch.device(device), {}
    for group in _groups(bags, jobs, together, device):
        seen, how = bags, _pooling(bags, jobs[group[0]].recipe)
        if how is not None:
            seen = pooled[how] = pooled.get(how) or bags.pooled(how)
        models = _Models([jobs[i] for i in group], seen, device)
        for _ in models.train(keep):
            done += len(group)
            if progress is not None:
                progress(done, total)
        for i, trained in zip(group, models.found, strict=True):
            out[i] = trained
    return out  # type: ignore[return-value]


def _pooling(bags: Bags, recipe: Recipe) -> str | None:
    """ "mean" or "max" where the head sees nothing of a slide but that, at every visit the same: it is computed once."""
    drawn = recipe.n_tiles is not None and recipe.n_tiles < int(bags.lengths.max())
    return None if drawn or recipe.options.get("metadata_cols") else HEADS[recipe.head].pooled


def _groups(bags: Bags, jobs: Sequence[Job], together: bool, device: torch.device) -> Iterator[list[int]]:
    """Jobs that can be stacked, in parts whose batches fit into memory (a GPU's) or cache (a CPU's)."""
    alike: dict[tuple, list[int]] = {}
    for i, job in enumerate(jobs):
        if not len(job.train):
            raise ConfigError("a model without training slides", fix="fewer folds, or more slides")
        stack = together and job.recipe.build(bags, 0).stackable
        kind = (repr(job.recipe), job.steps, job.batch, job.length, len(job.val) > 0) if stack else (i,)
        alike.setdefault(kind, []).append(i)
    for group in alike.values():
        job = jobs[group[0]]
        longest = 1 if _pooling(bags, job.recipe) else int(bags.lengths.max())
        tiles = job.batch * (min(job.recipe.n_tiles, longest) if job.recipe.n_tiles else longest)
        part = max(1, _BYTES[device.type != "cpu"] // (4 * tiles * bags.dim))
        yield from (group[at : at + part] for at in range(0, len(group), part))


class Flat(nn.Module):
    """A head whose forward is `flat`, as `functional_call` needs it."""

    def __init__(self, head: Head):
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.head.flat(x, places)


class _Models:
    """Jobs that run in step. One job is a plain module; several are one module under `vmap` over stacked parameters."""

    def __init__(self, jobs: list[Job], bags: Bags, device: torch.device):
        self.jobs, self.bags, self.device = jobs, bags, device
        built = [job.recipe.build(bags, job.seed).to(device) for job in jobs]
        self.base = built[0]
        self.single = len(jobs) == 1
        self.found: list[Trained] = []
        if self.single:
            self.parameters = dict(self.base.named_parameters())
        else:
            self.parameters, _ = stack_module_state([Flat(head) for head in built])
            self.flat = Flat(self.base)
        recipe = jobs[0].recipe
        self.optimizer = torch.optim.Adam(
            self.parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, foreach=True
        )

    def logits(self, places: Tensor) -> Tensor:
        """Logits (K, B, C) of the tiles at `places` (K, B, T) of the features."""
        x, at = self.bags.flat(places, self.device)
        if self.single:
            return self.base.flat(x[0], at[0]).unsqueeze(0)
        return vmap(lambda p, tiles, where: functional_call(self.flat, p, (tiles, where)))(self.parameters, x, at)

    def train(self, keep: str) -> Iterator[None]:
        """Train all epochs, one between two yields; then `found` holds the results."""
        epochs, watched = self.jobs[0].length, len(self.jobs[0].val) > 0
        # A fixed number of epochs needs no random state outside the jobs' own; dropout's is seeded by the first job.
        curves = np.full((len(self.jobs), epochs), np.nan)
        best: list[State | None] = [None] * len(self.jobs)
        state = torch.random.get_rng_state()
        torch.manual_seed(self.jobs[0].seed)
        try:
            for epoch in range(epochs):
                self.epoch(epoch)
                if watched:
                    curves[:, epoch] = self.watch()
                for k in range(len(self.jobs)) if keep == "best" else ():
                    earlier = curves[k, :epoch]
                    if best[k] is None or curves[k, epoch] > np.nanmax(earlier, initial=-np.inf):
                        best[k] = self.state(k)
                yield
        finally:
            torch.random.set_rng_state(state)
        for k, job in enumerate(self.jobs):
            picked = int(np.nanargmax(curves[k])) + 1 if keep == "best" and np.isfinite(curves[k]).any() else epochs
            self.found.append(Trained(job.recipe, best[k] or self.state(k), picked, curves[k]))

    def epoch(self, epoch: int) -> None:
        """One pass of every model over its own slides."""
        self.base.train()
        orders = [job.order(epoch) for job in self.jobs]
        n_tiles = self.jobs[0].recipe.n_tiles
        total = torch.zeros((), device=self.device)
        for step in range(self.jobs[0].steps):
            rows = np.stack([order[step] for order, _ in orders])  # (K, B)
            parts = [self.bags.places(r, n_tiles=n_tiles, rng=rng) for r, (_, rng) in zip(rows, orders, strict=True)]
            self.optimizer.zero_grad(set_to_none=True)
            losses = slide_loss(self.logits(_stack(parts)), torch.from_numpy(self.bags.labels[rows]).to(self.device))
            losses.sum().backward()  # each model's loss reaches its own parameters only
            self.optimizer.step()
            total = total + losses.detach().sum()
        if not torch.isfinite(total):  # looked at once an epoch: a step waits for nothing
            recipe = self.jobs[0].recipe
            raise TrainingError(
                f"the loss of {recipe.head} is not finite in epoch {epoch + 1}", fix=f"a smaller lr than {recipe.lr:g}"
            )

    @torch.no_grad()
    def watch(self) -> list[float]:
        """AUC or C-index of every model on its own `val` slides, all tiles."""
        self.base.eval()
        most = max(len(job.val) for job in self.jobs)
        rows = np.stack([np.resize(job.val, most) for job in self.jobs])  # shorter folds see some slides again
        longest = int(self.bags.lengths[rows].max())
        width = max(1, (64 << 20) // (4 * len(rows) * longest * self.bags.dim))
        found = []
        for at in range(0, most, width):
            parts = [self.bags.places(r[at : at + width]) for r in rows]
            found.append(self.logits(_stack(parts)).cpu())
        logits = torch.cat(found, dim=1).numpy()
        return [score(self.bags.labels[job.val], logits[k, : len(job.val)]) for k, job in enumerate(self.jobs)]

    def state(self, k: int) -> State:
        """Parameters of model k, copied."""
        if self.single:
            return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        return {name.removeprefix("head."): p[k].detach().cpu().clone() for name, p in self.parameters.items()}


def _stack(parts: list[Tensor]) -> Tensor:
    """Places (B, T_k) of every model -> (K, B, T), padded with -1."""
    longest = max(part.shape[1] for part in parts)
    return torch.stack([F.pad(part, (0, longest - part.shape[1]), value=-1) for part in parts])


def slide_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean loss of each model (K,): logits (K, B, C) against labels (K, B): binary or softmax cross-entropy for integers,
    Cox for signed times."""
    if y.is_floating_point():
        return cox_loss(logits.squeeze(-1), y)
    if logits.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(logits.squeeze(-1), y.float(), reduction="none").mean(-1)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(-1)


def module(bags_or_dim: Bags | int, outputs: int, trained: Trained) -> nn.Module:
    """The trained head as a module in eval mode, for features of so many dimensions."""
    dim = bags_or_dim if isinstance(bags_or_dim, int) else bags_or_dim.dim
    head = HEADS[trained.recipe.head](dim, outputs, **trained.recipe.options)
    head.load_state_dict(trained.state)
    return head.eval()
