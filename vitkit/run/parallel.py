"""Independent jobs side by side, one core each: small models gain nothing from more threads, but much from more jobs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(
    function: Callable[..., Any], tasks: Sequence[tuple], *, jobs: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (index of the task, `function(*task)`) as results come. `function` must be importable by name.

    Each process computes with one thread, so results do not depend on how many run. An error in one stops the rest.
    """
    jobs = min(jobs or cores(), len(tasks))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        waiting: dict[Future, int] = {pool.submit(function, *task): index for index, task in enumerate(tasks)}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
