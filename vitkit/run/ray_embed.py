"""`vitkit embed --engine ray`: shards computed by a pool of Ray Data actors, on this machine or on a cluster.

One actor holds one copy of the model and computes whole shards (`sharded.compute`), which it writes itself: only a line
about each travels back. A shard lost with its machine is computed again by another actor.

Without `RAY_ADDRESS` a Ray of our own is started for the job and stopped after it; it listens on the loopback interface
only. With it the job joins that cluster, whose nodes need vitkit, the images and the output folder under the same paths.
Ray's usage statistics are switched off here; on a cluster of yours its head node decides.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from vitkit.errors import ConfigError, MissingExtra, VitkitError, WeightsError
from vitkit.run.parquet import Shard
from vitkit.run.sharded import Work, compute
from vitkit.settings import Machine

# Read by Ray when it is imported or started.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no report to its makers
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # what Ray does on a laptop: 127.0.0.1 instead of every interface


def remote(
    work: Work, shards: list[int], actors: int | Literal["auto"], machine: Machine, say: Callable[[str], None]
) -> Iterator[Shard]:
    """Compute `shards` in any order."""
    with _ray() as ray:
        size, cpus, gpus = _pool(ray, actors, machine, len(shards))
        where = "GPU" if gpus else "CPU"
        each = f"{cpus} {'core' if cpus == 1 else 'cores'}" + (" and a GPU" if gpus else "")
        say(f"ray: {size} {'actor' if size == 1 else 'actors'} with {each} each, {len(shards)} shards")
        work.workers = cpus - 1
        held = ray.put(work)
        rows = (
            ray.data.from_items([{"shard": n} for n in shards], override_num_blocks=len(shards))
            .map_batches(
                _Actor,
                fn_constructor_args=(held, os.getcwd(), where),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=size),
                num_cpus=cpus,
                num_gpus=gpus,
            )
            .iter_rows()
        )
        try:
            for row in rows:
                found = row["found"]
                if isinstance(found, VitkitError):
                    raise found
                yield found
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise WeightsError(
                f"a Ray actor failed: {type(cause).__name__}: {cause}",
                fix="the shards that were finished are kept; --engine local shows the error where it happens",
            ) from error


class _Actor:
    """One process with one copy of the model."""

    def __init__(self, held: Any, folder: str, where: str):
        import ray
        import torch

        os.chdir(folder)  # images may have relative paths
        self.work = ray.get(held)
        self.device = torch.device("cuda" if where == "GPU" else "cpu")
        self.work.vit.to(self.device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        found: list[Any] = []
        for number in batch["shard"].tolist():
            try:
                found.append(compute(self.work, number, self.device))
            except VitkitError as error:
                found.append(error)  # handed over, so that Ray does not try it again
        return {"found": found}


@contextmanager
def _ray() -> Iterator[Any]:
    """Ray, connected; one of our own is stopped at the end."""
    address = os.environ.get("RAY_ADDRESS")
    before = set(os.environ)
    for name, value in {**QUIET, **({} if address else LOOPBACK)}.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingExtra("ray[data]", "ray") from None
    ours = not ray.is_initialized()
    try:
        if ours:
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            local: dict[str, Any] = {} if address else {"include_dashboard": False}
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
    except ConnectionError as error:
        raise ConfigError(f"no Ray answers at RAY_ADDRESS={address}: {error}", fix="ray status, or unset it") from None
    finally:
        if ours and ray.is_initialized():
            ray.shutdown()
        for name in (*QUIET, *LOOPBACK):
            if name not in before:
                os.environ.pop(name, None)


def _pool(ray: Any, actors: int | Literal["auto"], machine: Machine, shards: int) -> tuple[int, int, int]:
    """(actors, cores each, GPUs each): by default one actor a GPU, or where there is none, one a core."""
    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
    on_gpu = gpus > 0 and machine.accelerator in ("auto", "cuda")
    if machine.accelerator == "cuda" and not gpus:
        raise ConfigError("accelerator is cuda, and Ray finds no GPU", fix="leave accelerator out, or ray status")
    decoders = machine.workers if machine.workers != "auto" else (max(1, cores // gpus - 1) if on_gpu else 0)
    each = 1 + decoders
    most = min(cores // each, gpus) if on_gpu else cores // each
    size = most if actors == "auto" else actors
    if size < 1 or size > most:
        raise ConfigError(
            f"actors is {actors}, each with {each} cores{' and a GPU' if on_gpu else ''}, and Ray has {cores} cores and "
            f"{gpus} GPUs",
            fix=f"--actors {most} or less" if most else f"--workers {max(0, cores - 1)} or less",
        )
    return min(size, shards), each, int(on_gpu)
