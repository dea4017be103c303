"""timm's self-attention taken apart: keys that ask nothing, queries of some rows only, and the weights themselves.

Learned prompts whose outputs are thrown away (VPT-deep, the early layers of Prompt-CAM) are only keys and values: they
need no query, no projection and no MLP, and before attention they are the same for every image of the batch. Computing
just that gives the numbers of the full sequence at a fraction of its cost.

Shapes: B images, T tokens, E extra keys, h heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from vitkit.errors import ConfigError, WeightsError

KINDS = (Attention, AttentionRope, EvaAttention)


def attention(
    attn: nn.Module,
    x: Tensor,
    *,
    queries: int | None = None,
    extra: Tensor | None = None,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`attn` on normalised tokens `x` (B, T, D): (B, T, D), or (B, n, D) of the first `queries` = n rows.

    extra: (E, D) normalised tokens that everything may look at; they stand outside rotary positions. attn_mask: as for
    the tokens alone, broadcastable to (B, h, T, T). `is_causal` (timm's Eva passes it on) is refused: learned tokens have
    no place in a causal order.
    """
    if is_causal:
        raise ConfigError("causal attention over learned tokens is not defined", fix="is_causal=False")
    if extra is not None and attn_mask is not None:
        attn_mask = F.pad(attn_mask, (len(extra), 0), value=1 if attn_mask.dtype == torch.bool else 0)
    if not isinstance(attn, KINDS):
        return _whole(attn, x, queries, extra, rope, attn_mask)
    if attn_mask is not None and queries is not None and attn_mask.shape[-2] > 1:
        attn_mask = attn_mask[..., :queries, :]
    q, k, v = _with_extra(attn, x, queries, extra, rope)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
    return project(attn, out, x[:, :queries])


def project(attn: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    """What `attn` does after attention: heads (B, h, n, d) joined, normed, gated by `x` (B, n, D), projected."""
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def weights(
    attn: nn.Module,
    x: Tensor,
    *,
    queries: int | None = None,
    extra: Tensor | None = None,
    rope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention weights (B, h, T or n, E + T) of normalised tokens `x` and the values (B, h, E + T, d) they weigh."""
    if not isinstance(attn, KINDS):
        raise WeightsError(
            f"attention of type {type(attn).__name__} has no single map of weights",
            fix=f"a ViT made of {', '.join(kind.__name__ for kind in KINDS)}",
        )
    q, k, v = _with_extra(attn, x, queries, extra, rope)
    return (q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1), v


def _with_extra(
    attn: nn.Module, x: Tensor, queries: int | None, extra: Tensor | None, rope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, h, T or n, d), keys and values (B, h, E + T, d), normed and rotated."""
    q, k, v = _heads(attn, x, queries)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = _rotated(attn, q, rope, v), _rotated(attn, k, rope, v)
    if extra is not None:
        _, key, value = _heads(attn, extra.unsqueeze(0), 0)
        key = attn.k_norm(key)
        k = torch.cat([key.expand(len(x), -1, -1, -1).type_as(k), k], dim=2)
        v = torch.cat([value.expand(len(x), -1, -1, -1).type_as(v), v], dim=2)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # grouped queries: several heads share keys
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def _heads(attn: nn.Module, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Raw queries (B, h, n, d) of the first `queries` = n rows (None: all), keys and values (B, h, T, d) of `x` (B, T, D)."""
    if getattr(attn, "qkv", None) is None:  # separate projections
        q, k, v = attn.q_proj(x[:, :queries]), attn.k_proj(x), attn.v_proj(x)
        return _split(q, attn.head_dim), _split(k, attn.head_dim), _split(v, attn.head_dim)
    width = attn.qkv.weight.shape[0] // 3 // attn.num_heads
    bias = None
    if getattr(attn, "q_bias", None) is not None:  # EvaAttention keeps its biases beside the layer
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if queries is not None and type(attn.qkv) is nn.Linear:  # a wrapped layer (LoRA) is asked as a whole
        start, weight = width * attn.num_heads, attn.qkv.weight
        bias = attn.qkv.bias if bias is None else bias
        first, rest = (None, None) if bias is None else (bias[:start], bias[start:])
        k, v = F.linear(x, weight[start:], rest).chunk(2, dim=-1)
        return _split(F.linear(x[:, :queries], weight[:start], first), width), _split(k, width), _split(v, width)
    if bias is not None:
        qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
    else:
        qkv = attn.qkv(x)
    q, k, v = qkv.chunk(3, dim=-1)
    return _split(q[:, :queries], width), _split(k, width), _split(v, width)


def _split(x: Tensor, width: int) -> Tensor:
    """(B, T, h d) -> (B, h, T, d)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _rotated(attn: nn.Module, x: Tensor, rope: Tensor, like: Tensor) -> Tensor:
    """Rotary positions on all but the prefix; on the first rows only where `x` (B, h, n, d) holds no more."""
    skip, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
    rows = x.shape[2] - skip
    if rows <= 0:
        return x
    turned = apply_rot_embed_cat(x[:, :, skip:], rope[..., :rows, :], half=half)
    return torch.cat([x[:, :, :skip], turned], dim=2).type_as(like)


def _whole(
    attn: nn.Module,
    x: Tensor,
    queries: int | None,
    extra: Tensor | None,
    rope: Tensor | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """The same through the module's own forward, with extra keys as full tokens: for attention that this file does not
    know (timm's differential attention)."""
    if rope is not None:
        raise WeightsError(
            f"rotary attention of type {type(attn).__name__} cannot take learned tokens",
            fix=f"a ViT made of {', '.join(kind.__name__ for kind in KINDS)}",
        )
    count = 0 if extra is None else len(extra)
    if extra is not None:
        x = torch.cat([extra.expand(len(x), -1, -1), x], dim=1)
        if attn_mask is not None and attn_mask.shape[-2] > 1:
            attn_mask = F.pad(attn_mask, (0, 0, count, 0), value=1 if attn_mask.dtype == torch.bool else 0)
    out = attn(x, **({} if attn_mask is None else {"attn_mask": attn_mask}))[:, count:]
    return out[:, :queries]
