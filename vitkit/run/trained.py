"""What training changes of a method: taken out for checkpoints, put back to go on."""

from __future__ import annotations

from torch import Tensor, nn

from vitkit.errors import ConfigError, TrainingError
from vitkit.parts.sharded import whole


def trained_state(method: nn.Module) -> dict[str, Tensor]:
    """CPU copies of everything training changes: trainable parameters, buffers, and what the method names itself."""
    if hasattr(method, "persistent"):
        named = method.persistent()
    else:
        named = {n: p for n, p in method.named_parameters() if p.requires_grad}
        keys = set(method.state_dict())
        named.update({n: b for n, b in method.named_buffers() if n in keys})
    return {name: whole(value.detach()).to("cpu", copy=True).contiguous() for name, value in named.items()}


def load_trained(method: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a `trained_state` back."""
    unexpected = method.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise TrainingError(f"the checkpoint holds tensors that this method has not, e.g. {unexpected[0]}")


def same_processes(before: int, now: int) -> None:
    """Refuse to go on with another number of processes: batches, rates and random numbers would be other ones."""
    if before != now:
        raise ConfigError(
            f"this run was begun by {before} process{'es' * (before > 1)}, and now there {'are' if now > 1 else 'is'} {now}: "
            "its steps would not be the ones that were begun",
            fix=f"{before} as before (devices, or torchrun's --nproc_per_node), or a new out folder",
        )
