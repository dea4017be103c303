"""Fully sharded data parallelism (`--shard`): each process keeps its share of weights, gradients and optimiser state.

PyTorch's `fully_shard` (FSDP2): the weights of a block are put together just before it runs and given up after; what is
not in a block stays together from the forward pass to the end of the backward. The numbers are those of data-parallel
training. What trains is a copy of the method; the method itself stays whole, in the main memory, for validation on the first
process, saving and what comes after training. Methods that reach into their blocks cannot be sharded; those that can say
`shards = True`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from lightning_fabric.strategies import DDPStrategy
from lightning_fabric.strategies.strategy import _BackwardSyncControl
from torch import nn

from vitkit.errors import ConfigError
from vitkit.parts.sharded import share, whole


class Sharded(DDPStrategy):
    """Fabric's processes of data-parallel training, for modules that are sharded already."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._backward_sync_control = _Sync()  # type: ignore[assignment]

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        return module


class _Sync(_BackwardSyncControl):
    """Gradients stay with their process until the last batch of an optimiser step."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager:
        return _unsynced(module) if enabled else nullcontext()


@contextmanager
def _unsynced(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def require(method: type, name: str, world: int, compiled: bool) -> None:
    """Raise where `shard` cannot be kept."""
    if world < 2:
        raise ConfigError(
            "shard shares a model among processes, and there is one", fix="devices=2 or more, or torchrun"
        )
    if compiled:
        raise ConfigError("shard and compile together are not supported", fix="one of the two")
    if not getattr(method, "shards", False):
        raise ConfigError(
            f"{name} cannot be sharded: only methods can that leave the blocks of their ViT whole and say so",
            fix="leave shard out: devices alone works",
        )


def shard(method: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `method` on `device` of which this process holds its share."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    copy = deepcopy(method).to(device)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for module in list(copy.modules()):
        if hasattr(module, "patch_embed"):  # a ViT; decoders are small, and some reach into their blocks
            for block in module.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
    fully_shard(copy, mesh=mesh, reshard_after_forward=False)
    return copy


def carry_over(trained: nn.Module, method: nn.Module) -> None:
    """What a method keeps of its schedule in plain numbers and words, from the copy that trained."""
    for name, value in vars(trained).items():
        if name != "training" and isinstance(value, bool | int | float | str):
            setattr(method, name, value)


def gathered(state: dict, keep: bool) -> dict:
    """An optimiser's state put together, on the CPU of the processes that `keep` it. Every process must call this."""
    found: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            value = whole(value)
            if keep:
                found.setdefault(index, {})[name] = value.cpu() if isinstance(value, torch.Tensor) else value
    return {**state, "state": found}


def shared_out(optimizer: torch.optim.Optimizer) -> None:
    """A state that was loaded whole, to the shares that this process's parameters have."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = share(value, parameter)
