"""From image to tokens, for every timm `VisionTransformer` and `Eva`: the one place that touches timm's internals.

`encode` gives the numbers of timm's own `forward_features` for every family built on these two classes (class token or
none, distillation token, registers, `norm_pre`, absolute or rotary positions, any size that the model accepts) and adds
what timm does not offer: a kept subset of patches, mask tokens, taps after any layer. `embed`, `run` and `finish` are
its three steps, for methods that work between blocks; `attend` and `transform` are a block's two halves;
`attention_maps` recomputes the exact attention that fused kernels do not return; `maps` serves any trunk.

Shapes: B images, P prefix tokens (class, distillation, registers), N patches of grid (h, w) or (d, h, w), K kept, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.layers.pos_embed_sincos import apply_keep_indices_nlc
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkit.backbones.embed3d import PatchEmbed3d
from vitkit.errors import ConfigError, WeightsError
from vitkit.parts.attention import attention, weights
from vitkit.parts.patches import patch_pixels

ViT = VisionTransformer | Eva
RULE_OF = {
    "image": "timm",
    "volume": "trilinear",
    "video": "video",
}  # of resampling positions, where nothing else is said


@dataclass
class Tokens:
    """Tokens of a batch: `prefix` (B, P, D) and `patches` (B, N or K, D), on `grid`; `keep` (B, K) where a subset ran;
    `prompts` (B, n, D) where an adaptation has put learned tokens in front that run along."""

    prefix: Tensor
    patches: Tensor
    grid: tuple[int, ...]
    keep: Tensor | None = None
    taps: list[Tokens] = field(default_factory=list)
    prompts: Tensor | None = None

    @property
    def all(self) -> Tensor:
        """Prompts (if any), prefix and patches, in the order in which the blocks see them, (B, n + P + N, D)."""
        front = [] if self.prompts is None else [self.prompts]
        return torch.cat([*front, self.prefix, self.patches], dim=1)

    @property
    def map(self) -> Tensor:
        """Patches as a feature map (B, D, *grid). Needs every patch."""
        if self.keep is not None:
            raise ConfigError("a kept subset of patches has no feature map", fix="encode without keep=")
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


@dataclass
class Stream:
    """What flows through the blocks: `x` (B, n + P + K, D), its first n = `prompts` tokens learned ones, and the rotary
    tables that belong to exactly these patches; `done` blocks have run."""

    x: Tensor
    rope: Any
    grid: tuple[int, ...]
    keep: Tensor | None = None
    prompts: int = 0
    done: int = 0


def require_vit(vit: nn.Module) -> ViT:
    """`vit` itself when this module can run it; otherwise an error that says what can."""
    if not isinstance(vit, VisionTransformer | Eva):
        raise WeightsError(
            f"{type(vit).__name__} is not a timm VisionTransformer or Eva, so its tokens cannot be taken apart",
            fix="use a ViT, or vitkit.tokens.maps for feature maps of any timm trunk",
        )
    drop = getattr(vit, "patch_drop", None)
    rate = getattr(drop, "prob", 0.0)
    if rate:
        raise ConfigError(
            f"the ViT drops {rate:.0%} of its patches at random (patch_drop_rate), so kept indices would be wrong",
            fix="build it with patch_drop_rate=0 (vitkit.weights.load does)",
        )
    return vit


def kind_of(vit: nn.Module) -> str:
    """What a ViT takes: "image", "volume" or "video"."""
    return getattr(vit.patch_embed, "kind", "image")


def grid_of(vit: ViT, size: Sequence[int]) -> tuple[int, ...]:
    """The patch grid of an input of `size` ((H, W) or (D, H, W) pixels); refuses sizes that would lose pixels."""
    embed = vit.patch_embed
    patch = getattr(embed, "patch_size", None)
    if patch is not None and not getattr(embed, "dynamic_img_pad", False) and len(patch) == len(size):
        for pixels, step in zip(size, patch, strict=True):
            if pixels % step or pixels < step:
                near = max(step, round(pixels / step) * step)
                raise ConfigError(
                    f"image size {tuple(size)} is not a multiple of the patch size {tuple(patch)}",
                    fix=f"use a multiple, e.g. {near} instead of {pixels}",
                )
    return tuple(embed.dynamic_feat_size(tuple(size)))  # type: ignore[arg-type]  # volumes have three axes


def encode(
    vit: nn.Module,
    images: Tensor,
    *,
    keep: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    layers: Sequence[int] | None = None,
    norm: bool = True,
) -> Tokens:
    """Tokens of `images` (B, C, *size) after the last block and, with `norm`, the final norm.

    keep: (B, K) patch indices; only these run, equal to full attention restricted to them and the prefix.
    mask: (B, N) bool; masked patch embeddings are replaced by `mask_token` (D,) before positions are added.
    layers: block indices (negative counts from the end) whose outputs are returned in `taps`, in the order asked,
        normalised when `norm`.
    """
    vit = require_vit(vit)
    stream = embed(vit, images, keep=keep, mask=mask, mask_token=mask_token)
    wanted = [_layer(vit, i) for i in layers or ()]
    seen: dict[int, Tokens] = {}
    start = 0
    for stop in sorted({*wanted}):
        stream = run(vit, stream, start, stop + 1)
        seen[stop] = finish(vit, stream, norm=norm)
        start = stop + 1
    stream = run(vit, stream, start)
    tokens = finish(vit, stream, norm=norm)
    tokens.taps = [seen[i] for i in wanted]
    return tokens


def embed(
    vit: nn.Module,
    images: Tensor,
    *,
    keep: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    patches: Tensor | None = None,
) -> Stream:
    """Everything before the first block: patches, prefix, positions, kept subset, `norm_pre`. Arguments as `encode`.

    patches: embeddings (B', N, D) of every patch, where they are known already; of `images` only the size is read then.
    """
    vit = require_vit(vit)
    grid = grid_of(vit, images.shape[2:])
    count = math.prod(grid)
    if keep is not None and (keep.ndim != 2 or keep.shape[0] != images.shape[0]):
        raise ConfigError(f"keep must be (batch, kept) indices, got {tuple(keep.shape)} for {images.shape[0]} images")
    # Embedding only the kept patches saves the rest; a mask is applied to embeddings, so it needs all of them.
    some = keep if mask is None else None
    patches = _patches(vit, images, grid, some) if patches is None else patches  # (B, N or K, D)
    if mask is not None:
        if mask_token is None or mask.shape != (images.shape[0], count):
            raise ConfigError(f"mask needs mask_token and shape {(images.shape[0], count)}, got {tuple(mask.shape)}")
        patches = torch.where(mask.unsqueeze(-1), mask_token.to(patches.dtype).view(1, 1, -1), patches)
        patches = patches if keep is None else _take(patches, keep)
    prefix, positions, rope = _stem(vit, grid, patches)
    if positions is not None:
        patches = patches + (positions if keep is None else _take(positions.expand(images.shape[0], -1, -1), keep))
    x = vit.pos_drop(torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1))
    prompts = 0
    if hasattr(vit, "front_prompts"):  # learned tokens that run along from the start, e.g. DVPT's
        front = vit.front_prompts()
        prompts, x = front.shape[1], torch.cat([front.expand(x.shape[0], -1, -1), x], dim=1)
    x = vit.norm_pre(x)
    if keep is not None and rope is not None:
        rope = apply_keep_indices_nlc(x, rope, keep)  # (B, ...): one table a sample from here on
        rope = rope.transpose(0, 1) if getattr(vit, "rope_mixed", False) else rope.unsqueeze(1)
    return Stream(x, rope, grid, keep, prompts)


def run(vit: nn.Module, stream: Stream, start: int = 0, stop: int | None = None) -> Stream:
    """`stream` after blocks start..stop-1 (all the rest when `stop` is None).

    A block that returns more tokens than it was given has put new prompts in front (vitkit.parts.blocks).
    """
    x, prompts = stream.x, stream.prompts
    blocks = list(vit.blocks)
    again = getattr(vit, "grad_checkpointing", False) and torch.is_grad_enabled()
    stop = len(blocks) if stop is None else stop
    for index in range(start, stop):
        kwargs = rope_for(vit, stream.rope, index)
        block, count = blocks[index], x.shape[1]
        x = checkpoint(block, x, use_reentrant=False, **kwargs) if again else block(x, **kwargs)
        prompts += x.shape[1] - count
    return Stream(x, stream.rope, stream.grid, stream.keep, prompts, stop)


def rope_for(vit: nn.Module, rope: Any, index: int) -> dict[str, Any]:
    """Keyword arguments with which block `index` wants its rotary table (none for absolute positions)."""
    if not isinstance(vit, Eva):
        return {}
    return {"rope": rope[index] if rope is not None and getattr(vit, "rope_mixed", False) else rope}


def finish(vit: nn.Module, stream: Stream, *, norm: bool = True) -> Tokens:
    """Split a stream into `Tokens`, after the final norm when `norm`; a ViT may `refine` those of its last block then."""
    x = vit.norm(stream.x) if norm else stream.x
    start, stop = stream.prompts, stream.prompts + vit.num_prefix_tokens
    prompts = x[:, :start] if start else None
    found = Tokens(x[:, start:stop], x[:, stop:], stream.grid, stream.keep, prompts=prompts)
    if norm and stream.done == len(vit.blocks) and hasattr(vit, "refine"):  # e.g. DVT's denoiser
        return vit.refine(found)
    return found


def feature(vit: nn.Module, images: Tensor) -> Tensor:
    """The pooled feature (B, D) that a head sees: timm's `forward_head(..., pre_logits=True)` on `encode`'s tokens."""
    return vit.forward_head(encode(vit, images).all, pre_logits=True)


def dense(vit: nn.Module, tokens: Tokens) -> Tokens:
    """Tokens fit for dense use: models with a norm only after pooling (`fc_norm`) get it applied to each token."""
    if isinstance(vit.norm, nn.Identity) and not isinstance(vit.fc_norm, nn.Identity):
        prompts = None if tokens.prompts is None else vit.fc_norm(tokens.prompts)
        prefix, patches = vit.fc_norm(tokens.prefix), vit.fc_norm(tokens.patches)
        return Tokens(prefix, patches, tokens.grid, tokens.keep, prompts=prompts)
    return tokens


def logits(vit: nn.Module, images: Tensor) -> Tensor:
    """Class scores (B, C): the head on `encode`'s tokens. Equals `vit(images)` under timm's position rule.

    A ViT whose head reads only some tokens may offer `class_scores(images)`, the same numbers without the rest.
    """
    scores = getattr(vit, "class_scores", None)
    return vit.forward_head(encode(vit, images).all) if scores is None else scores(images)


def maps(model: nn.Module, images: Tensor, *, layers: int | Sequence[int] = 1, norm: bool = True) -> list[Tensor]:
    """Feature maps (B, D, h, w) of any timm trunk: `encode`'s taps for a ViT, else timm's `forward_intermediates`.

    layers: block or stage indices, or how many of the last ones.
    """
    if not isinstance(model, VisionTransformer | Eva):
        return model.forward_intermediates(images, indices=layers, intermediates_only=True)
    wanted = range(-layers, 0) if isinstance(layers, int) else layers
    return [tap.map for tap in encode(model, images, layers=list(wanted), norm=norm).taps]


def attend(block: nn.Module, x: Tensor, queries: int | None = None, **kwargs: Any) -> Tensor:
    """First half of a block: x + attention branch. `kwargs` are those of the block's forward (rope, attn_mask).

    queries: compute only the first so many rows, (B, queries, D); keys and values still come from all of `x`.
    """
    halves = getattr(block, "attend", None)
    if halves is not None:  # a block extended by vitkit.parts.blocks
        return halves(x, queries=queries, **kwargs)
    return attend_plain(block, x, queries, **kwargs)


def transform(block: nn.Module, x: Tensor) -> Tensor:
    """Second half of a block: x + MLP branch."""
    halves = getattr(block, "transform", None)
    return halves(x) if halves is not None else x + mlp_branch(block, x)


def attend_plain(
    block: nn.Module, x: Tensor, queries: int | None = None, extra: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """The attention half of timm's own two block classes; `extra` (E, D) are tokens that are only looked at."""
    if queries is None and extra is None:
        out = block.attn(block.norm1(x), **kwargs)
    else:
        seen = None if extra is None else block.norm1(extra)
        out = attention(block.attn, block.norm1(x), queries=queries, extra=seen, **kwargs)
    return x[:, :queries] + block.drop_path1(scaled(block, out, 1))


def mlp_branch(block: nn.Module, x: Tensor) -> Tensor:
    """What timm's MLP half adds to the residual stream, layer scale and drop-path included."""
    return block.drop_path2(scaled(block, block.mlp(block.norm2(x)), 2))


def scaled(block: nn.Module, out: Tensor, half: int) -> Tensor:
    """Layer scale: modules ls1/ls2 in `Block`, parameters gamma_1/gamma_2 (or None) in `EvaBlock`."""
    if isinstance(block, Block):
        return (block.ls1 if half == 1 else block.ls2)(out)
    if isinstance(block, EvaBlock):
        gamma = block.gamma_1 if half == 1 else block.gamma_2
        return out if gamma is None else gamma * out
    raise WeightsError(
        f"blocks of type {type(block).__name__} cannot be taken apart",
        fix="use a ViT made of timm's Block or EvaBlock",
    )


def attention_maps(
    vit: nn.Module, images: Tensor, *, layers: Sequence[int] = (-1,), keep: Tensor | None = None
) -> list[Tensor]:
    """Softmax attention (B, heads, T, E + T) inside each asked block, recomputed exactly.

    T = n + P + N tokens (flowing prompts, prefix, patches), which ask and are looked at; E learned keys of the block that
    are only looked at (VPT's prompts) take the first columns. Fused attention returns no weights; this evaluates
    softmax(scale q k^T) from the block's own parameters.
    """
    vit = require_vit(vit)
    stream = embed(vit, images, keep=keep)
    wanted = [_layer(vit, i) for i in layers]
    found: dict[int, Tensor] = {}
    for index in range(max(wanted) + 1):
        if index in wanted:
            block = vit.blocks[index]
            prompted = block.entering(stream.x) if hasattr(block, "entering") else stream.x
            found[index] = attention_of(block, prompted, **rope_for(vit, stream.rope, index))
        stream = run(vit, stream, index, index + 1)
    return [found[i] for i in wanted]


def attention_of(block: nn.Module, x: Tensor, rope: Tensor | None = None, queries: int | None = None) -> Tensor:
    """The attention weights (B, heads, T, E + T) of `block` on what enters its attention, `x` (B, T, D); of the first
    `queries` rows alone where asked."""
    return attention_values(block, x, rope, queries)[0]


def attention_values(
    block: nn.Module, x: Tensor, rope: Tensor | None = None, queries: int | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_of`, and the values (B, heads, E + T, d) that these weights are applied to."""
    extra = block.extra_keys() if hasattr(block, "extra_keys") else None
    seen = None if extra is None else block.norm1(extra)
    return weights(block.attn, block.norm1(x), queries=queries, extra=seen, rope=rope)


def _layer(vit: ViT, index: int) -> int:
    depth = len(vit.blocks)
    if not -depth <= index < depth:
        raise ConfigError(f"layer {index} does not exist", fix=f"the ViT has blocks 0..{depth - 1} (or -{depth}..-1)")
    return index % depth


def _take(x: Tensor, keep: Tensor) -> Tensor:
    """Rows `keep` (B, K) of `x` (B, N, D)."""
    return x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _patches(vit: ViT, images: Tensor, grid: tuple[int, ...], keep: Tensor | None) -> Tensor:
    """Patch embeddings (B, N, D), or only those of `keep` (B, K, D) where the stem is a plain patch projection."""
    layer = vit.patch_embed
    if keep is None:
        return _flat(layer(images), vit)
    if type(layer) not in (PatchEmbed, PatchEmbed3d) or getattr(layer, "dynamic_img_pad", False):  # hybrid stems
        return _take(_flat(layer(images), vit), keep)
    pixels = patch_pixels(images, layer.patch_size, keep)  # (B, K, C ph pw)
    return layer.norm(F.linear(pixels, layer.proj.weight.flatten(1), layer.proj.bias))


def _flat(x: Tensor, vit: ViT) -> Tensor:
    """Patch embeddings as (B, N, D): dynamic models emit (B, h, w, D)."""
    return x.flatten(1, -2) if x.ndim > 3 else x


def _stem(vit: ViT, grid: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
    """Prefix tokens with their positions (1, P, D), patch positions (1, N, D) or None, rotary tables or None.

    timm's private `_pos_embed` is the only code that knows prefix order and resampling for every family; run on zeros
    it returns exactly these. Dropout on positions is applied later, on real tokens, so it is kept out here.
    """
    own = tuple(vit.patch_embed.grid_size)
    fixed = len(grid) == 3 and own != grid  # timm resamples no grids of three axes: only the prefix is taken from it
    flat = (math.prod(own if fixed else grid),)
    zeros = like.new_zeros((1, *(grid if vit.dynamic_img_size else flat), vit.embed_dim))
    drop, training = vit.pos_drop, vit.pos_drop.training
    drop.training = False
    try:
        out = getattr(vit, "plain_pos_embed", vit._pos_embed)(zeros)
    finally:
        drop.training = training
    table, rope = out if isinstance(out, tuple) else (out, None)
    count = vit.num_prefix_tokens
    prefix, positions = table[:, :count], table[:, count:]
    rule = _position_rule(vit)
    if vit.pos_embed is None:
        return prefix, None, rope
    if fixed or (rule != "timm" and vit.dynamic_img_size and own != grid):
        from vitkit.parts.positions import resample_positions

        rows = 0 if vit.no_embed_class else count
        positions = resample_positions(vit.pos_embed, grid, prefix=rows, rule=rule, old_grid=own)[:, rows:]
    return prefix, positions, rope


def _position_rule(vit: ViT) -> str:
    """How positions are resampled to another grid: travels in the passport; without one timm's rule, or that of its kind."""
    passport = getattr(vit, "passport", None)
    return passport.feature.positions if passport is not None else RULE_OF[kind_of(vit)]
