"""What a linear head sees: class tokens of the last blocks and the mean patch token, of images and of volumes.

The input of the radiology benchmark (arXiv 2312.02366, after DINOv2's own linear evaluation): class tokens of the last
`blocks` blocks after the final norm, oldest first, then, with `avgpool`, the mean of the last block's patch tokens. One
extraction with `blocks=4` holds every variant of the grid as a slice (`columns`), so a frozen trunk runs once.

A volume is a stack of slices; its feature is the mean of its slices' features, so the order of slices does not matter.
Volumes of different depth are padded by slices that are -100 everywhere, which are left out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, DataError
from vitkit.tokens import Tokens

PADDING = -100.0


def linear_input(taps: Sequence[Tokens | tuple[Tensor, Tensor]], blocks: int = 1, avgpool: bool = True) -> Tensor:
    """(B, D * blocks (+ D)) from the taps of consecutive last blocks, oldest first: `Tokens`, or (patches, class)."""
    if not 1 <= blocks <= len(taps):
        raise ConfigError(f"{blocks} blocks of {len(taps)} taps", fix="ask encode for at least that many layers")
    pairs = [(t.patches, _class_token(t)) if isinstance(t, Tokens) else t for t in taps[-blocks:]]
    parts = [cls for _, cls in pairs]
    return torch.cat([*parts, pairs[-1][0].mean(1)] if avgpool else parts, dim=-1)


def columns(dim: int, stored: int, blocks: int, avgpool: bool) -> slice:
    """Where the variant (blocks, avgpool) lies in an input that was stored with `stored` blocks and avgpool."""
    if not 1 <= blocks <= stored:
        raise ConfigError(f"{blocks} blocks are asked of features with {stored}", fix="extract more blocks")
    return slice((stored - blocks) * dim, (stored + int(avgpool)) * dim)


def encode_inputs(vit: nn.Module, images: Tensor, blocks: int = 4) -> Tensor:
    """The linear input (B, D * (blocks + 1)) of normalised images (B, C, H, W), avgpool included, in float32."""
    taps = tokens.encode(vit, images, layers=_last(vit, blocks)).taps
    return linear_input(taps, blocks, True).float()


def feature_and_inputs(vit: nn.Module, images: Tensor, blocks: int = 4) -> Tensor:
    """(B, F + D * (blocks + 1)): the model's own pooled feature, then the linear input, from one pass."""
    found = tokens.encode(vit, images, layers=_last(vit, blocks))
    pooled = vit.forward_head(found.all, pre_logits=True)
    return torch.cat([pooled, linear_input(found.taps, blocks, True)], dim=-1).float()


def _last(vit: nn.Module, blocks: int) -> list[int]:
    depth = len(tokens.require_vit(vit).blocks)
    if blocks > depth:
        raise ConfigError(f"{blocks} blocks of a ViT with {depth}", fix=f"at most {depth}")
    return list(range(-blocks, 0))


@torch.inference_mode()
def extract(
    vit: nn.Module,
    batches: Iterable[Tensor],
    *,
    blocks: int = 4,
    read: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray:
    """Linear inputs (N, D * (blocks + 1)) of batches of normalised images, once, in eval mode; float32.

    read: what is taken of a batch instead, e.g. `lambda x: tokens.feature(vit, x)`.
    """
    training = [m for m in vit.modules() if m.training]
    device = next(vit.parameters()).device
    read = read or (lambda x: encode_inputs(vit, x, blocks))
    try:
        vit.eval()
        found = [read(batch.to(device)).float().cpu().numpy() for batch in batches]
    finally:
        for module in training:
            module.training = True
    if not found:
        raise DataError("no images to extract features of", fix="check the split and the path")
    return np.concatenate(found)


def pad_volumes(volumes: Sequence[Tensor]) -> Tensor:
    """Volumes (S_i, C, H, W) of one slice size as a batch (B, S, C, H, W), short ones filled up with -100."""
    shapes = {tuple(v.shape[1:]) for v in volumes}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise DataError(
            f"volumes have slices of shapes {sorted(shapes)}", fix="slices (C, H, W) of one size; resize them first"
        )
    out = torch.full((len(volumes), max(len(v) for v in volumes), *next(iter(shapes))), PADDING)
    for row, volume in zip(out, volumes, strict=True):
        row[: len(volume)] = volume
    return out


def is_padding(volumes: Tensor) -> Tensor:
    """(B, S): which slices of (B, S, C, H, W) are padding."""
    return (volumes == PADDING).flatten(2).all(-1)


def volume_inputs(
    vit: nn.Module, volumes: Tensor | Sequence[Tensor], *, blocks: int = 4, batch_size: int = 64
) -> Tensor:
    """Linear inputs (B, D * (blocks + 1)) of volumes of normalised slices: the mean over each volume's own slices.

    Slices of all volumes go through the model in batches, however few a volume has. `volumes`: (B, S, C, H, W) with
    padding, or a list of (S_i, C, H, W).
    """
    padded = volumes if isinstance(volumes, Tensor) else pad_volumes(volumes)
    real = ~is_padding(padded)
    if not real.any(1).all():
        raise DataError("a volume has no slice that is not padding", fix="leave empty volumes out")
    slices, owner = padded[real], real.nonzero()[:, 0]
    inputs = torch.cat([encode_inputs(vit, part, blocks) for part in slices.split(batch_size)])
    return mean_over(inputs, owner, len(padded))


def mean_over(inputs: Tensor, owner: Tensor, count: int) -> Tensor:
    """Rows (N, F) averaged by their volume `owner` (N,): (count, F)."""
    total = inputs.new_zeros(count, inputs.shape[1]).index_add_(0, owner, inputs)
    return total / torch.bincount(owner, minlength=count).unsqueeze(1)


def _class_token(tap: Tokens) -> Tensor:
    if tap.prefix.shape[1] == 0:
        raise ConfigError(
            "this ViT has no class token, which the linear grid reads",
            fix="leave linear_grid out; the protocol linear reads the model's own pooled feature",
        )
    return tap.prefix[:, 0]
