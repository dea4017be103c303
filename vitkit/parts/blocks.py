"""Adding to a timm block without wrapping it: extend its class by a mixin.

Wrapping renames every key of the trunk, and replacing the MLP is wrong under layer scale; changing the block's class to
`type(name, (Mixin, type(block)), {})` keeps all keys, composes through `super()` in any order, and survives deepcopy,
`torch.compile`, export and FSDP2. A mixin derives from `Steps` and overrides one of its methods:

    attend(x, **kw)   x + attention branch          transform(x)   x + MLP branch
    mlp_branch(x)     the MLP branch alone          forward(x)     transform(attend(entering(x)))
    entering(x)       the tokens that attention gets: learned ones put in front here run along to the end
    extra_keys()      learned tokens that attention only looks at: nothing of them is handed on
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitkit.errors import ConfigError, WeightsError


class Steps:
    """A block's forward in named steps, for mixins to extend. Sits between the mixins and timm's own class."""

    tokenwise = True  # `transform` treats every token by itself, so that some rows of it can be computed alone
    learned_before = 0  # prompts entering at this block or an earlier one, which stand before the ViT's `front_prompts`

    def entering(self, x: Tensor) -> Tensor:
        return x

    def extra_keys(self) -> Tensor | None:
        """(E, D) or None. A mixin appends its own to `super().extra_keys()` by `join_keys`."""
        return None

    def attend(self, x: Tensor, queries: int | None = None, **kwargs: Any) -> Tensor:
        from vitkit.tokens import attend_plain

        return attend_plain(self, x, queries, self.extra_keys(), **kwargs)  # type: ignore[arg-type]

    def mlp_branch(self, x: Tensor) -> Tensor:
        from vitkit.tokens import mlp_branch

        return mlp_branch(self, x)  # type: ignore[arg-type]

    def transform(self, x: Tensor) -> Tensor:
        return x + self.mlp_branch(x)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.transform(self.attend(self.entering(x), **kwargs))


def join_keys(first: Tensor | None, second: Tensor) -> Tensor:
    """Extra keys of two mixins as one (E, D)."""
    return second if first is None else torch.cat([first, second])


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


def mix_into(vit: nn.Module, mixin: type) -> None:
    """Put `mixin` on top of a ViT's own class, once: what `extend` is to blocks."""
    if not isinstance(vit, mixin):
        vit.__class__ = _extended(mixin, type(vit))


def unmix(vit: nn.Module, mixin: type) -> None:
    """Take `mixin` away again, wherever it stands among the others."""
    kind, others = type(vit), []
    while "_mixed" in vars(kind):
        others += [vars(kind)["_mixed"]]
        kind = kind.__bases__[1]
    for other in reversed([one for one in others if one is not mixin]):
        kind = _extended(other, kind)
    vit.__class__ = kind


@cache  # one class for one combination, so that isinstance and compile caches work
def _extended(mixin: type, base: type) -> type:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": mixin.__module__, "_mixed": mixin})


def add_prefix_tokens(vit: nn.Module, block: nn.Module | None, count: int) -> None:
    """Tell rotary attention that `count` more tokens stand in front: of one block, which is where prompts enter or run
    along, or of the whole ViT (registers)."""
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
