"""Batches in an order that depends on (seed, epoch) alone, so that a run resumes exactly with any number of workers.

The order of an epoch is one permutation of all images. Global batch `t` is its slice of `world * batch_size`, and rank
`r` takes the r-th piece of it: two processes see together what one process with the double batch sees. Everything
random about a picture is seeded from (seed, epoch, index), whoever computes it and whenever.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import ConfigError, DataError
from .found import count, some
from .images import Images
from .transforms import View

Batch = dict[str, Any]


def loader(
    images: Images,
    view: View,
    *,
    batch_size: int,
    seed: int,
    epoch: int = 0,
    start: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    max_bad: float = 0.01,
    pin_memory: bool = False,
) -> Batches:
    """One epoch of batches from batch number `start` on.

    A batch: "image" uint8 (B, C, H, W) or what else `view` makes (the entries of a dict come under their own names),
    "label" int64 (B,) or float32 (B, K) when there are labels, "index" int64 (B,) into `images`, "seed" int64 (B,) for
    the model's own randomness about each picture, "bad" the files that failed. The last, incomplete global batch is
    dropped (`drop_last`) or divided between the ranks as evenly as can be; then up to `world - 1` images that cannot be
    divided are left out, so that all ranks see as many batches.

    A damaged file is replaced by the next good image in index order (the augmentation's seed stays that of its
    place). When more than the fraction `max_bad` of `images` failed in this epoch, DataError names them; with
    `max_bad=0` the first one ends the epoch, as evaluation needs it. No images give no batches.
    """
    return Batches(
        images,
        view,
        Order(len(images), batch_size, seed, epoch, shuffle, drop_last, rank, world),
        start,
        workers,
        max_bad,
        pin_memory,
    )


@dataclass(frozen=True)
class Order:
    """Which images rank `rank` sees in batch 0, 1, 2, ... of an epoch."""

    n: int
    batch_size: int
    seed: int
    epoch: int = 0
    shuffle: bool = True
    drop_last: bool = False
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.world < 1 or not 0 <= self.rank < self.world:
            what = f"batch_size={self.batch_size}, rank={self.rank}, world={self.world}"
            raise ConfigError(f"no batches can be made with {what}", fix="batch_size >= 1 and 0 <= rank < world")

    @property
    def batches(self) -> int:
        """Batches in the whole epoch, the same for every rank."""
        whole, rest = divmod(self.n, self.batch_size * self.world)
        return whole + (rest >= self.world and not self.drop_last)

    def permutation(self) -> np.ndarray:
        """(N,) order of the epoch."""
        if not self.shuffle:
            return np.arange(self.n)
        # RandomState: the one stream of numpy that is promised to stay the same in all versions.
        words = [self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF, self.epoch & 0xFFFFFFFF]
        return np.random.RandomState(words).permutation(self.n)

    def __iter__(self) -> Iterator[np.ndarray]:
        order, step = self.permutation(), self.batch_size * self.world
        for t in range(self.batches):
            piece = order[t * step : (t + 1) * step]
            if len(piece) < step:
                each, more = divmod(len(piece), self.world)
                first = self.rank * each + min(self.rank, more)
                yield piece[first : first + each + (self.rank < more)]
            else:
                yield piece[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]


class Batches:
    """What `loader` returns: iterate it for batches; `len` counts those still to come, `total` those of the epoch."""

    def __init__(self, images: Images, view: View, order: Order, start: int, workers: int, max_bad: float, pin: bool):
        if not 0 <= start <= order.batches:
            raise ConfigError(f"start={start} of an epoch of {order.batches} batches", fix="0 <= start <= batches")
        if workers < 0 or not 0 <= max_bad <= 1:
            raise ConfigError(f"workers={workers}, max_bad={max_bad}", fix="workers >= 0 and 0 <= max_bad <= 1")
        self.images, self.order, self.start = images, order, start
        self.workers, self.max_bad, self.pin = workers, max_bad, pin
        tries = 1 + int(max_bad * len(images))  # one more than may fail: then the epoch ends anyway
        self.samples = Samples(images, view, tries)

    @property
    def total(self) -> int:
        return self.order.batches

    def __len__(self) -> int:
        return self.order.batches - self.start

    def __iter__(self) -> Iterator[Batch]:
        if not len(self):
            return
        generator = torch.Generator().manual_seed(0)  # else every epoch would draw a number from the global generator
        source = DataLoader(
            self.samples,
            batch_sampler=_Keys(self.order, self.start),
            num_workers=min(self.workers, len(self)),
            collate_fn=collate,
            worker_init_fn=_one_thread,
            generator=generator,
            pin_memory=self.pin,
        )
        bad: dict[str, None] = {}
        for batch in source:
            if batch["bad"]:
                bad.update(dict.fromkeys(batch["bad"]))
                self._limit(bad, batch)
            del batch["errors"]
            yield batch

    def _limit(self, bad: dict[str, None], batch: Batch) -> None:
        n = len(self.images)
        if len(bad) <= self.max_bad * n and batch["image"] is not None:
            return
        if self.max_bad == 0:
            raise DataError(batch["errors"][0])
        raise DataError(
            f"{self.images.name}: {count(len(bad), 'file')} of {n:,} cannot be read, more than max_bad={self.max_bad:g} "
            f"allows: {some(bad)}\n  the first: {batch['errors'][0]}",
            fix="mend or remove them (`vitkit check` lists all), or allow more with max_bad",
        )


@dataclass(frozen=True)
class _Keys:
    """The sampler: every picture of every batch as (seed, epoch, index)."""

    order: Order
    start: int

    def __len__(self) -> int:
        return self.order.batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for indices in islice(self.order, self.start, None):
            yield [(self.order.seed, self.order.epoch, index) for index in indices.tolist()]


class Samples(Dataset):
    """(seed, epoch, index) -> one picture's entries of a batch, the same in every process."""

    def __init__(self, images: Images, view: View, tries: int):
        self.images, self.view, self.tries = images, view, min(tries, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> list[Batch]:
        with kept_generators():
            return [self._sample(*key) for key in keys]

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        return self.__getitems__([key])[0]

    def _sample(self, seed: int, epoch: int, wanted: int) -> Batch:
        bad, errors, seen, index = [], [], None, wanted
        number = sample_seed(seed, epoch, wanted)
        for shift in range(self.tries):
            index = (wanted + shift) % len(self.images)
            try:
                image = self.images.decode(index)
                seed_generators(number)
                seen = self.view(image)  # of a video it is the view that decodes
                break
            except DataError as error:
                bad.append(self.images.path(index))
                errors.append(str(error))
        sample = {"index": index, "seed": number, "bad": bad, "errors": errors}
        sample |= seen if isinstance(seen, dict) else {"image": seen}
        if self.images.labels is not None:
            sample["label"] = self.images.labels[index]
        return sample


def seed_generators(seed: int) -> None:
    """Start the global CPU generators of torch, Python and numpy from `seed`.

    Only the CPU's: `torch.manual_seed` would also restart the generators of every GPU, which belong to the model.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextmanager
def kept_generators() -> Iterator[None]:
    """The three generators are afterwards as they were before: without workers they are the caller's own."""
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit number that is well mixed: neighbours in any of the three get unrelated streams."""
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def collate(samples: list[Batch]) -> Batch:
    """Samples -> a batch; labels become one tensor, names of damaged files one list."""
    batch: Batch = {name: [entry for s in samples for entry in s[name]] for name in ("bad", "errors")}
    for name in ("index", "seed"):
        batch[name] = torch.tensor([s[name] for s in samples], dtype=torch.int64)
    if any(s["image"] is None for s in samples):
        return {**batch, "image": None}
    for name in samples[0].keys() - batch.keys() - {"label"}:
        batch[name] = default_collate([s[name] for s in samples])  # in a worker: straight into shared memory
    if "label" in samples[0]:
        batch["label"] = torch.from_numpy(np.stack([s["label"] for s in samples]))
    return batch


def steps_per_epoch(n: int, batch_size: int, *, world: int = 1, drop_last: bool = False) -> int:
    """Batches of an epoch of `n` images, as `loader` counts them."""
    return Order(n, batch_size, 0, drop_last=drop_last, world=world).batches


def _one_thread(_: int) -> None:
    """Workers share the cores with each other and with the model."""
    torch.set_num_threads(1)
