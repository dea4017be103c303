"""Exponential moving average of trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitkit.parts.sharded import local, share, whole


class EMA:
    """Averages w <- decay w + (1 - decay) p of every trainable floating parameter of `module`, after each real step."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.live = [p for _, p in named]  # lists built once: one fused call a step
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        mean, live = self._tensors()
        torch._foreach_lerp_(mean, live, 1 - self.decay)

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(averages, trained weights): of sharded ones what this process holds."""
        return [local(m) for m in self.mean], [local(p.detach()) for p in self.live]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights stand in for the trained ones inside this block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        mean, live = self._tensors()
        kept = [p.clone() for p in live]
        torch._foreach_copy_(live, mean)
        torch._foreach_copy_(mean, kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: whole(mean) for name, mean in zip(self.names, self.mean, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, mean in zip(self.names, self.mean, strict=True):
            mean.copy_(share(state[name], mean))
