"""Adding to a timm block without wrapping it: extend its class by a mixin.

Wrapping renames every key of the trunk, and replacing the MLP is wrong under layer scale; changing the block's class to
`type(name, (Mixin, type(block)), {})` keeps all keys, composes through `super()` in any order, and survives deepcopy,
`torch.compile`, export and FSDP2. A mixin derives from `Steps` and overrides one of its methods:

    attend(x, **kw)   x + attention branch          transform(x)   x + MLP branch
    mlp_branch(x)     the MLP branch alone          entering(x)    the tokens that this block's attention sees
    forward(x, **kw)  transform(attend(x))
"""

from __future__ import annotations

from functools import cache
from typing import Any

from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitkit.errors import ConfigError, WeightsError


class Steps:
    """A block's forward in named steps, for mixins to extend. Sits between the mixins and timm's own class."""

    def entering(self, x: Tensor) -> Tensor:
        return x

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        from vitkit.tokens import attend_plain

        return attend_plain(self, x, **kwargs)  # type: ignore[arg-type]

    def mlp_branch(self, x: Tensor) -> Tensor:
        from vitkit.tokens import mlp_branch

        return mlp_branch(self, x)  # type: ignore[arg-type]

    def transform(self, x: Tensor) -> Tensor:
        return x + self.mlp_branch(x)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.transform(self.attend(x, **kwargs))


def extend(block: nn.Module, mixin: type[Steps]) -> None:
    """Put `mixin` on top of `block`'s class. Adding the same mixin twice is an error: its child would be replaced."""
    if not isinstance(block, Block | EvaBlock):
        raise WeightsError(
            f"blocks of type {type(block).__name__} cannot be extended",
            fix="use a ViT made of timm's Block or EvaBlock",
        )
    if isinstance(block, mixin):
        raise ConfigError(f"this ViT already carries {mixin.__name__}", fix="start from a ViT without it")
    block.__class__ = _extended(mixin, type(block))


@cache  # one class for one combination, so that isinstance and compile caches work
def _extended(mixin: type[Steps], base: type) -> type:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": mixin.__module__})


def add_prefix_tokens(vit: nn.Module, block: nn.Module | None, count: int) -> None:
    """Tell rotary attention that `count` more tokens stand in front: of one block (prompts) or of all (registers)."""
    for one in vit.blocks if block is None else [block]:
        if hasattr(one.attn, "num_prefix_tokens"):  # EvaAttention and AttentionRope each keep their own count
            one.attn.num_prefix_tokens += count
    if block is None:
        vit.num_prefix_tokens += count


def ensure_qkv_layer(vit: nn.Module) -> None:
    """Let `EvaAttention` with separate biases call its qkv layer, so that LoRA on it is not silently ignored.

    timm evaluates `F.linear(x, qkv.weight, cat(q_bias, k_bias, v_bias))` there and never calls the layer. Giving the
    layer that bias and dropping the three computes the same numbers through the layer.
    """
    import torch

    if not isinstance(vit, Eva):
        return
    for block in vit.blocks:
        attn = block.attn
        if getattr(attn, "qkv", None) is not None and getattr(attn, "q_bias", None) is not None:
            attn.qkv.bias = nn.Parameter(torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)).detach().clone())
            attn.q_bias = attn.v_bias = None
            attn.k_bias = None


def restore_qkv_biases(vit: nn.Module) -> None:
    """Undo `ensure_qkv_layer`, so that keys are timm's again: the layer's bias goes back to q_bias and v_bias.

    A key bias that training moved away from zero has no place in timm's model; such a block is left as it is.
    """
    import torch

    if not isinstance(vit, Eva):
        return
    for block in vit.blocks:
        attn = block.attn
        layer = getattr(attn, "qkv", None)
        if layer is None or getattr(layer, "bias", None) is None or getattr(attn, "q_bias", None) is not None:
            continue
        q, k, v = (part.detach().clone() for part in layer.bias.chunk(3))
        if k.any():
            continue
        attn.q_bias, attn.v_bias, attn.k_bias = nn.Parameter(q), nn.Parameter(v), torch.zeros_like(k)
        layer.bias = None
