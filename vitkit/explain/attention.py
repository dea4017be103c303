"""Attention: where a ViT's class token looks, in one block by head, or rolled out through all blocks. No training.

Paper: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020 (arXiv 2005.00928).

What happens, and where: fused kernels return no weights, so softmax(q k^T / sqrt(d)) is evaluated again from each block's
own parameters, block by block in the same pass (`vitkit.tokens.attention_of`). `saliency` takes the class token's row of
one block, `by_head` the same for every head. `rollout`: with A the heads of a block fused (mean, max or min), tokens mix
by (A + I) / row sum; the product over all blocks says how much of each patch reaches the class token. Only patch columns
are followed, one block at a time, and of the last block one row: no map of another block is kept. Learned tokens that
attention only looks at (VPT's prompts) take columns of A: they are dropped and its rows made to sum to 1 again.

Which row: the class token's; the mean of all patches' rows where there is no class token or a head reads the mean of the
patches (`query`). Attention is the same for every class: it says where information is taken from, not what for.

Differs from the paper: it has no fusion other than the mean; `discard` (the lowest share of a block's weights to patches
set to 0 first) and max/min fusion are from public implementations. Prefix columns are never discarded.

Cost: about one forward pass. A block's weights, T^2 a head, are evaluated for a few images at once and used for its output,
too; between blocks only T N floats an image are held.

    vitkit explain vit_small_patch14_dinov2.lvd142m photos/ --maps attention,rollout
    vitkit.explain.attention.rollout(vit, images)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.explain.shared import evaluating, has_head
from vitkit.parts.attention import project
from vitkit.parts.blocks import Steps
from vitkit.settings import check_choices

CHUNK = 1 << 22  # attention weights evaluated at once (16 MiB): they stay in the processor's cache


@dataclass(frozen=True)
class Settings:
    """Attention and rollout."""

    layer: int = -1
    """block whose attention `saliency` reads; negative counts from the last"""
    head: int | None = None
    """head of that block; by default the mean of all"""
    query: Literal["auto", "class", "patches"] = "auto"
    """row that is read; auto = the class token's, or the mean of all patches' where the head averages patches"""
    fusion: Literal["mean", "max", "min"] = "mean"
    """how rollout fuses the heads of a block (paper: mean)"""
    discard: float = 0.0
    """lowest share of each block's weights to patches that rollout sets to 0 (paper: none)"""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.discard < 1:
            raise ConfigError(f"discard is {self.discard:g}", fix="a share from 0 to below 1, e.g. 0.9")


def saliency(vit: nn.Module, images: Tensor, target: Tensor | None = None, settings: Settings = Settings()) -> Tensor:
    """Attention (B, *grid) of block `settings.layer` to each patch, of one head or averaged; `target` changes nothing."""
    found = by_head(vit, images, settings)
    if settings.head is None:
        return found.mean(1)
    heads = found.shape[1]
    if not -heads <= settings.head < heads:
        raise ConfigError(f"head {settings.head} does not exist", fix=f"the block has heads 0..{heads - 1}")
    return found[:, settings.head]


@torch.no_grad()
def by_head(vit: nn.Module, images: Tensor, settings: Settings = Settings()) -> Tensor:
    """Attention (B, heads, *grid) of block `settings.layer` to each patch."""
    with evaluating(vit) as vit:
        layer = block_index(vit, settings.layer)
        stream = tokens.run(vit, tokens.embed(vit, images), 0, layer)
        block, x, prompts = _entering(vit, stream, layer)
        first, rows = _rows(vit, prompts, settings)
        kwargs = tokens.rope_for(vit, stream.rope, layer)
        found = [
            tokens.attention_of(block, part, queries=rows, **kwargs)[:, :, first:, -math.prod(stream.grid) :].mean(2)
            for part in x.split(_chunk(block, x))
        ]
        return torch.cat(found).unflatten(-1, stream.grid)


@torch.no_grad()
def rollout(vit: nn.Module, images: Tensor, target: Tensor | None = None, settings: Settings = Settings()) -> Tensor:
    """How much of each patch reaches the read row through all blocks, (B, *grid); `target` changes nothing."""
    with evaluating(vit) as vit:
        stream = tokens.embed(vit, images)
        count, last = math.prod(stream.grid), len(vit.blocks) - 1
        held = torch.eye(count, dtype=stream.x.dtype, device=stream.x.device)
        held = F.pad(held, (0, 0, stream.x.shape[1] - count, 0)).expand(len(images), -1, -1)  # (B, T, N): token, patch
        for index in range(last + 1):
            block, x, prompts = _entering(vit, stream, index)
            held = F.pad(held, (0, 0, x.shape[1] - held.shape[1], 0))  # prompts that enter here hold no patch
            first, rows = _rows(vit, prompts, settings) if index == last else (0, None)
            kwargs = tokens.rope_for(vit, stream.rope, index)
            size = _chunk(block, x)
            here = _in_steps(block) and index < last  # the same weights carry the tokens on
            mixed, moved = [], []
            for part, before in zip(x.split(size), held.split(size), strict=True):
                asked = None if settings.discard else rows  # the share to discard is one of the whole matrix
                weights, values = tokens.attention_values(block, part, queries=asked, **kwargs)
                mixed.append(_mix(weights, before, rows, settings))
                if here:
                    moved.append(_moved(block, part, weights @ values))
            held = torch.cat(mixed)
            if here:
                stream = tokens.Stream(torch.cat(moved), stream.rope, stream.grid, prompts=prompts)
            elif index < last:
                stream = tokens.run(vit, stream, index, index + 1)
        return held[:, first:].mean(1).unflatten(-1, stream.grid)


def reads(vit: nn.Module, settings: Settings = Settings()) -> str:
    """What the maps are of, in words: "class token" or "mean of all patches"."""
    return "class token" if _from_class(vit, settings) else "mean of all patches"


def block_index(vit: Any, layer: int) -> int:
    """`layer` counted from 0; ConfigError where there is no such block."""
    depth = len(vit.blocks)
    if not -depth <= layer < depth:
        raise ConfigError(f"layer {layer} does not exist", fix=f"the ViT has blocks 0..{depth - 1} (or -{depth}..-1)")
    return layer % depth


def _mix(weights: Tensor, held: Tensor, rows: int | None, settings: Settings) -> Tensor:
    """What each token (the first `rows`) holds of each patch after a block with attention `weights` (b, heads, T, E + T),
    from what it held before: (b, T, N)."""
    count = held.shape[1]
    if weights.shape[-1] > count:
        weights = weights[..., -count:]
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    fused = weights.mean(1) if settings.fusion == "mean" else getattr(weights, f"a{settings.fusion}")(1)
    if settings.discard:
        fused = _without_lowest(fused, held.shape[-1], settings.discard)[:, :rows]
    return (fused @ held + held[:, :rows]) / (fused.sum(-1, keepdim=True) + 1)


def _in_steps(block: nn.Module) -> bool:
    """Whether the block is timm's own, or extended only where attention and the order of its halves stay timm's."""
    own = Block, EvaBlock
    return type(block) in own or (
        getattr(type(block), "attend", None) is Steps.attend and type(block).forward is Steps.forward
    )


def _moved(block: Any, x: Tensor, out: Tensor) -> Tensor:
    """The block's output for tokens `x` (b, T, D) that entered, from its weighted values `out` (b, heads, T, d)."""
    branch = project(block.attn, out, block.norm1(x) if block.attn.gate is not None else x)
    return tokens.transform(block, x + tokens.scaled(block, branch, 1))


def _without_lowest(fused: Tensor, patches: int, share: float) -> Tensor:
    """`fused` (b, T, T) with the lowest `share` of each image's weights to patches set to 0."""
    columns = fused[:, :, -patches:]
    drop = int(share * columns[0].numel())
    if not drop:
        return fused
    limit = columns.flatten(1).kthvalue(drop, dim=1).values[:, None, None]
    return torch.cat([fused[:, :, :-patches], columns.masked_fill(columns <= limit, 0)], dim=2)


def _entering(vit: Any, stream: tokens.Stream, index: int) -> tuple[nn.Module, Tensor, int]:
    """Block `index`, the tokens that its attention gets, and how many of them are learned prompts in front."""
    block = vit.blocks[index]
    x = block.entering(stream.x) if hasattr(block, "entering") else stream.x
    return block, x, stream.prompts + x.shape[1] - stream.x.shape[1]


def _rows(vit: Any, prompts: int, settings: Settings) -> tuple[int, int | None]:
    """First and last row (exclusive, None = all) that are read: the class token stands first in timm's prefix."""
    if _from_class(vit, settings):
        return prompts, prompts + 1
    return prompts + vit.num_prefix_tokens, None


def _from_class(vit: Any, settings: Settings) -> bool:
    there = getattr(vit, "cls_token", None) is not None
    if settings.query == "class" and not there:
        raise ConfigError("this ViT has no class token", fix="query=patches reads the mean of all patches")
    pools = has_head(vit) and getattr(vit, "global_pool", "") in ("avg", "avgmax", "max")
    return there and not pools if settings.query == "auto" else settings.query == "class"


def _chunk(block: Any, x: Tensor) -> int:
    """Images whose attention weights are evaluated at once."""
    return max(1, CHUNK // (block.attn.num_heads * x.shape[1] ** 2))
