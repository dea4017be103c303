"""Lightning Fabric for a run: devices, processes, precision."""

from __future__ import annotations

from typing import Any

import torch

from vitkit.settings import Machine


def make_fabric(machine: Machine, shard: bool = False) -> Any:
    """Lightning Fabric for these settings; several processes start by its own launcher, or by torchrun or srun around it."""
    import logging

    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    nodes, here = launched() or (1, machine.devices)
    strategy: Any = "ddp" if launched() else "auto" if machine.devices == 1 else "ddp_spawn"
    if shard and strategy != "auto":
        from vitkit.run.sharding import Sharded

        strategy = Sharded(start_method="popen" if launched() else "spawn")
    return Fabric(
        accelerator=machine.accelerator,
        devices=here,
        num_nodes=nodes,
        strategy=strategy,
        precision=precision_of(machine),
    )


def processes(machine: Machine) -> int:
    """How many processes a run has."""
    nodes, here = launched() or (1, machine.devices)
    return nodes * here


def launched() -> tuple[int, int] | None:
    """(machines, processes on each) where torchrun or srun has started them: their numbers count, not `devices`."""
    import os

    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // here, here
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > 1:  # a batch script of one task may still ask for several devices
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return nodes, tasks // nodes
    return None


def precision_of(machine: Machine) -> str:
    """Fabric's name for the precision; "auto" asks the device what it computes natively."""
    if machine.precision != "auto":
        return {"32": "32-true", "bf16": "bf16-mixed"}[machine.precision]
    cuda = machine.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
