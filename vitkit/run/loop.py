"""The one training loop, for every method that is a module with a loss. On Lightning Fabric; readable as a page.

A bare loop over the same method gives the same losses (tests/run/test_loop.py): everything random is a function of
(seed, step, rank) for the model and (seed, epoch, sample) for the data, so nothing needs to be restored but weights,
optimiser and position, and a run killed at any step resumes bit for bit for any number of workers.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import TrainingError
from vitkit.parts.ema import EMA
from vitkit.parts.optim import build_optimizer, set_lr
from vitkit.parts.schedules import scaled_lr, warmup_cosine
from vitkit.parts.sharded import total_norm
from vitkit.run import sharding
from vitkit.run.batches import prepare_all
from vitkit.run.trained import load_trained, same_processes, trained_state
from vitkit.settings import Machine, Train


@dataclass
class State:
    """Where training stands. `position` is the next batch of `epoch`; saved only where an optimiser step was just made."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    best: float | None = None
    best_step: int = 0
    seconds: float = 0.0
    bad: list[str] = field(default_factory=list)
    ended: str = ""  # why validation ended training early


@dataclass(frozen=True)
class Now:
    """Where a step stands, for what a method schedules itself (`before_step`): `epoch` is fractional, `lr` the rate that
    the parameter groups have just got (times their own `lr_scale`)."""

    step: int
    epoch: float
    epochs: int
    steps_per_epoch: int
    lr: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the run was saved at a step boundary before this was raised."""


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of the model's randomness (dropout, drop path, mixup) in one forward pass."""
    return (seed * 1_000_003 + step * 8_191 + rank) % (2**63 - 1)


def fit(
    method: nn.Module,
    batches: Callable[[int, int], Any],
    *,
    train: Train,
    machine: Machine,
    fabric: Any,
    steps_per_epoch: int,
    prepare: Callable[[Tensor], Tensor],
    folder: Any | None = None,
    validate: Callable[[nn.Module], tuple] | None = None,
    keep_best: bool = True,
    progress: Any | None = None,
) -> State:
    """Train `method` in place.

    batches(epoch, start): the epoch's batches from number `start` on. prepare: uint8 images to normalised floats on the
    method's device. validate(method) -> (score, metrics) or (score, metrics, reason): called every `eval_every` epochs; a
    reason that is not empty ends training there; with `keep_best` the weights of the best score are put back at the end.
    folder: run folder for metrics, checkpoints and exact resume.

    A method may define before_step(now, groups): called before the first batch of every optimiser step, after the rates
    were set, to schedule what is its own; after_step(step); clip_parts() -> lists of parameters whose gradient norms are
    clipped apart; persistent() -> what a checkpoint holds; watch(record) ->
    sentences about the figures that were just logged. Scalars that `forward` returns beside the loss are logged.
    Raises TrainingError on non-finite losses or gradients (before the step) and when memory runs out.
    """
    return _Fit(
        method, batches, train, machine, fabric, steps_per_epoch, prepare, folder, validate, keep_best, progress
    ).run()


@dataclass
class _Fit:
    method: nn.Module
    batches: Callable[[int, int], Any]
    train: Train
    machine: Machine
    fabric: Any
    steps_per_epoch: int  # batches an epoch, before accumulation
    prepare: Callable[[Tensor], Tensor]
    folder: Any
    validate: Any
    keep_best: bool
    progress: Any

    def run(self) -> State:
        train, fabric = self.train, self.fabric
        if train.compile:
            for block in self.method.vit.blocks:
                block.compile()
        effective = self.machine.batch_size * train.accumulate * fabric.world_size
        self.lr = scaled_lr(train.blr, effective, train.lr_rule) if train.lr == "auto" else float(train.lr)
        self.warmup = min(train.warmup_epochs, train.epochs / 5)
        saved = self.folder.load_checkpoint() if self.folder is not None else None
        if saved is not None:
            same_processes(len(saved["loss"][1]), fabric.world_size)
            load_trained(self.method, saved["method"])
        self.whole = self.method  # the caller's; under `shard` a copy trains of which each process holds a part
        if train.shard:
            self.method = sharding.shard(self.method, fabric.device)
        self.method.to(fabric.device)
        kwargs = {"layer_decay": train.layer_decay} if train.layer_decay != 1.0 else {}
        groups = self.method.param_groups(train.weight_decay, **kwargs)
        optimizer = build_optimizer(
            groups, name=train.optimizer, lr=self.lr, betas=train.betas, momentum=train.momentum
        )
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.module, self.optimizer = fabric.setup(self.method, optimizer, move_to_device=False)
        self.ema = EMA(self.method, train.ema) if train.ema else None
        self.state, self.best_weights = State(), None
        self.sums, self.loss_count = {"loss": torch.zeros((), device=fabric.device)}, 0
        parts = self.method.clip_parts() if hasattr(self.method, "clip_parts") else [self.params]
        self.parts = [[p for p in part if p.requires_grad] for part in parts]
        if saved is not None:
            self._resume(saved)
        started = time.perf_counter() - self.state.seconds
        with _signals() as self.stop:
            while self.state.epoch < train.epochs and not self._done() and not self.state.ended:
                self._epoch(started)
        if self.best_weights is None and self.ema is not None:
            self.ema._swap()
        self._put_together()
        if self.best_weights is not None:
            load_trained(self.whole, self.best_weights)
        return self.state

    def _put_together(self) -> None:
        """Under `shard`: what was trained into the caller's method, in every process."""
        if self.whole is self.method:
            return
        load_trained(self.whole, trained_state(self.method))
        sharding.carry_over(self.method, self.whole)
        self.whole.to(self.fabric.device)

    def _epoch(self, started: float) -> None:
        state, train = self.state, self.train
        self.module.train()
        clock = time.perf_counter()
        for batch in self.batches(state.epoch, state.position):
            waited = time.perf_counter() - clock
            last = state.position + 1 == self.steps_per_epoch
            step_now = (state.position + 1) % train.accumulate == 0 or last
            count = len(batch["image"])
            self._note_bad(batch.pop("bad", []))
            with _memory(self.machine.batch_size):
                self._forward_backward(batch, step_now)
            state.position += 1
            if step_now:
                self._optimize(batch)
                state.seconds = time.perf_counter() - started
                self._after_step()
            if self.progress is not None:
                self.progress.step(lr=self.now_lr, waited=waited, images=count * self.fabric.world_size)
            if last:
                break
            if step_now and self._done():
                return
            clock = time.perf_counter()
        state.epoch, state.position = state.epoch + 1, 0
        self._validate()
        self._save()

    def _forward_backward(self, batch: dict[str, Any], step_now: bool) -> None:
        state, train, fabric = self.state, self.train, self.fabric
        # As in MAE's engine the rate belongs to the optimiser step: it is set at the first batch of an accumulation window.
        start = state.position - state.position % train.accumulate
        window = min(train.accumulate, self.steps_per_epoch - start)  # the last one of an epoch may be short
        self.now_lr = warmup_cosine(
            state.epoch + start / self.steps_per_epoch,
            lr=self.lr,
            min_lr=min(train.min_lr, self.lr),
            warmup=self.warmup,
            epochs=train.epochs,
        )
        set_lr(self.optimizer.optimizer, self.now_lr)
        if state.position == start and hasattr(self.method, "before_step"):
            epoch = state.epoch + start / self.steps_per_epoch
            now = Now(state.step, epoch, train.epochs, self.steps_per_epoch, self.now_lr)
            self.method.before_step(now, self.optimizer.optimizer.param_groups)
        batch = {key: fabric.to_device(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
        prepare_all(batch, self.prepare)
        index = state.epoch * self.steps_per_epoch + state.position
        torch.manual_seed(step_seed(self.machine.seed, index, fabric.global_rank))
        with fabric.no_backward_sync(self.module, enabled=not step_now) if fabric.world_size > 1 else nullcontext():
            out = self.module(batch)
            fabric.backward(out["loss"] / window if window > 1 else out["loss"])
        for name, value in out.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.loss_count += 1

    def _optimize(self, batch: dict[str, Any]) -> None:
        """Check, clip, step. The check reads one number from the device: the price of never stepping on a NaN."""
        with_grad = [[p for p in part if p.grad is not None] for part in self.parts]
        norms = [total_norm([p.grad for p in part]) for part in with_grad]
        if not torch.isfinite(sum(norms) + self.sums["loss"]):
            self._stop_on_nan(batch)
        if self.train.clip_grad is not None:
            for part, norm in zip(with_grad, norms, strict=True):
                nn.utils.clip_grads_with_norm_(part, self.train.clip_grad, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        if hasattr(self.method, "after_step"):
            self.method.after_step(self.state.step)
        if self.ema is not None:
            self.ema.update()

    def _after_step(self) -> None:
        state, train = self.state, self.train
        every = max(1, self.steps_per_epoch // train.accumulate // 10)
        if state.step % every == 0 or self._done():
            means = torch.stack([value / self.loss_count for value in self.sums.values()])
            means = self.fabric.all_reduce(means, reduce_op="mean").tolist()
            found = dict(zip(self.sums, means, strict=True))
            self.sums = {"loss": torch.zeros_like(self.sums["loss"])}
            self.loss_count = 0
            fraction = state.epoch + state.position / self.steps_per_epoch
            seconds = round(state.seconds, 2)
            record = {"step": state.step, "epoch": round(fraction, 4), **found, "lr": self.now_lr, "seconds": seconds}
            self._log(**record)
            if hasattr(self.method, "watch"):
                self._say(self.method.watch(record))
            if self.progress is not None:
                self.progress.step(loss=found["loss"])
        if self.stop["now"] or (train.save_every and state.step % train.save_every == 0):
            self._save()
        if self.stop["now"]:
            raise Interrupted(f"stopped at step {state.step}; the same command resumes from there")
        if self._done() and state.position < self.steps_per_epoch:
            self._validate()
            self._save()

    def _done(self) -> bool:
        return self.train.max_steps is not None and self.state.step >= self.train.max_steps

    def _validate(self) -> None:
        """Score on the validation data; keep the trained weights of the best score so far."""
        due = self.state.epoch % self.train.eval_every == 0 or self.state.epoch == self.train.epochs or self._done()
        if self.validate is None or not due:
            return
        self.module.eval()
        with self.ema.applied() if self.ema is not None else nullcontext():
            self._put_together()
            self.whole.eval()
            result = self.validate(self.whole) if self.fabric.is_global_zero else None
            score, metrics, *reason = self.fabric.broadcast(result)
            self.state.ended = reason[0] if reason else ""
            if self.state.best is None or score > self.state.best:
                self.state.best, self.state.best_step = score, self.state.step
                self.best_weights = trained_state(self.method) if self.keep_best else None
        fraction = self.state.epoch + self.state.position / self.steps_per_epoch  # position is 0 after a whole epoch
        self._log(step=self.state.step, epoch=round(fraction, 4), **metrics)
        self.module.train()

    def _log(self, **record: Any) -> None:
        if self.folder is not None and self.fabric.is_global_zero:
            self.folder.log(record)

    def _say(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            if self.progress is not None:
                self.progress.say(sentence)

    def _save(self) -> None:
        if self.folder is None:
            return
        first = self.fabric.is_global_zero
        sums = (
            self.fabric.all_gather(torch.stack(list(self.sums.values()))).reshape(self.fabric.world_size, -1).tolist()
        )
        if first or self.train.shard:  # putting shares together takes every process
            optimizer = self.optimizer.optimizer.state_dict()
            held = {
                "state": dict(vars(self.state), bad=list(self.state.bad)),
                "method": trained_state(self.method),
                "optimizer": sharding.gathered(optimizer, keep=first) if self.train.shard else optimizer,
                "ema": self.ema.state_dict() if self.ema is not None else None,
                "best": self.best_weights,
                "loss": (list(self.sums), sums, self.loss_count),
            }
            if first:
                self.folder.save_checkpoint(held)
        self.fabric.barrier()

    def _resume(self, saved: dict[str, Any]) -> None:
        """All but the weights, which the method already has."""
        self.state = State(**saved["state"])
        self.optimizer.optimizer.load_state_dict(saved["optimizer"])
        if self.train.shard:
            sharding.shared_out(self.optimizer.optimizer)
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        self.best_weights = saved["best"]
        names, sums, self.loss_count = saved["loss"]
        own = sums[self.fabric.global_rank]
        self.sums = {name: torch.full_like(self.sums["loss"], value) for name, value in zip(names, own, strict=True)}
        if self.fabric.is_global_zero:
            self.folder.truncate(self.state.step)
        if self.progress is not None:
            self.progress.resume(self.state.epoch * self.steps_per_epoch + self.state.position)
            self.progress.say(f"resumed at step {self.state.step} (epoch {self.state.epoch})")

    def _note_bad(self, bad: list[str]) -> None:
        """Remember unreadable files for the report; the loader stops the run when there are too many."""
        self.state.bad.extend(name for name in dict.fromkeys(bad) if name not in self.state.bad)

    def _stop_on_nan(self, batch: dict[str, Any]) -> None:
        where = ""
        if self.folder is not None:
            path = self.folder.path / f"bad_batch_step{self.state.step}_rank{self.fabric.global_rank}.pt"
            torch.save({key: value for key, value in batch.items() if isinstance(value, Tensor)}, path)
            where = f"; the batch is in {path}"
        kind = "loss" if not torch.isfinite(self.sums["loss"]) else "gradient"
        raise TrainingError(
            f"non-finite {kind} at step {self.state.step}, before the optimiser step{where}",
            fix="a lower lr, clip_grad=1, or precision=32; the weights and the last checkpoint are unharmed",
        )


@contextmanager
def _memory(batch_size: int) -> Iterator[None]:
    """Turn an allocator's failure into an error that names the batch size."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
        if not memory:
            raise
        half = max(1, batch_size // 2)
        raise TrainingError(
            f"no memory for a batch of {batch_size} images",
            fix=f"--batch_size {half} --accumulate 2 computes the same step in half the memory",
        ) from error


@contextmanager
def _signals() -> Iterator[dict[str, bool]]:
    """Ctrl-C and SIGTERM ask for a save at the next step boundary; a second Ctrl-C stops at once."""
    stop = {"now": False}
    previous: dict[int, Any] = {}

    def ask(number: int, frame: Any) -> None:
        if stop["now"] and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop["now"] = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: leave signals to whoever owns it
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
