"""Tensors that several processes share among them (FSDP), and plain ones, in the same words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole(value: Any) -> Any:
    """A shared tensor put together, in every process; anything else as it is. Every process must call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def local(value: Tensor) -> Tensor:
    """This process's share of a shared tensor, in the same memory; a plain tensor as it is."""
    return value.to_local() if hasattr(value, "to_local") else value


def share(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of `value` (the same in every process), laid out like the shared tensor `like`; a plain `like`
    leaves it whole."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, the same plain number in every process."""
    return whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
