"""UNETR: a U-shaped decoder on a ViT of volumes, from voxels and four depths of tokens to a mask.

Hatamizadeh et al., WACV 2022 (arXiv 2103.10504), in the variant of Hi-End-MAE (arXiv 2502.08347, downstream/models/UNETR),
whose patch of 12 is no power of two: the last decoder step is trilinear to the full size instead of a transposed convolution.

    tokens of blocks 4, 7, 10 (not normalised), upsampled 8, 4, 2 times -> skips of 2F, 4F, 8F channels
    normalised output -> 8F -> 4F -> 2F channels, twice the grid each, a skip joined at every step
    trilinear to the volume's size, 3x3x3 to F channels, joined with F channels of the raw volume -> classes

Generalised here: sides that differ, patches that differ by axis (an axis whose patch has been undone stays as it is), class
and register tokens (they run through the ViT and are not part of the maps), any number of channels. `load_official` takes
the authors' downstream tensors, whose ViT has MONAI's names and no class token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, MissingExtra, WeightsError

Size = Sequence[int]
_NORM = ("INSTANCE", {"affine": False})


class UNETR(nn.Module):
    """Logits (B, classes, a, b, c) of normalised volumes (B, C, a, b, c) of any multiple of the patch.

    vit: a ViT of volumes. layers: blocks, counted from 0, whose raw outputs are the skips, shallow to deep.
    feature_size: F above. Tensors have MONAI's names beside `vit`.
    """

    def __init__(self, vit: nn.Module, classes: int, *, feature_size: int = 32, layers: Sequence[int] = (3, 6, 9)):
        super().__init__()
        vit = tokens.require_vit(vit)
        if len(vit.patch_embed.patch_size) != 3:
            raise ConfigError("UNETR segments volumes and needs a ViT of volumes", fix="a volume_vit_* model")
        if (
            len(layers) != 3
            or list(layers) != sorted(set(layers))
            or not 0 <= layers[0] <= layers[-1] < len(vit.blocks)
        ):
            depth = len(vit.blocks)
            raise ConfigError(
                f"layers {tuple(layers)} of a ViT with {depth} blocks",
                fix=f"three rising block numbers below {depth}, e.g. {_thirds(depth)}",
            )
        if classes < 2 or feature_size < 1:
            raise ConfigError(
                f"{classes} classes, feature_size {feature_size}", fix="at least background and one class"
            )
        self.vit, self.layers = vit, tuple(layers)
        width, f = vit.embed_dim, feature_size
        first, second, third = stages(vit.patch_embed.patch_size)
        self.encoder1 = _Stem(vit.patch_embed.proj.in_channels, f)
        self.encoder2 = _Rise(width, 2 * f, (first, second, third))
        self.encoder3 = _Rise(width, 4 * f, (first, second))
        self.encoder4 = _Rise(width, 8 * f, (first,))
        self.decoder5 = _Join(width, 8 * f, first)
        self.decoder4 = _Join(8 * f, 4 * f, second)
        self.decoder3 = _Join(4 * f, 2 * f, third)
        self.decoder2 = _ToSize(2 * f, f)
        self.out = _Out(f, classes)

    def forward(self, volumes: Tensor) -> Tensor:
        maps = self.maps(volumes)
        shallow, middle, deep, last = maps
        x = self.decoder5(last, self.encoder4(deep))
        x = self.decoder4(x, self.encoder3(middle))
        x = self.decoder3(x, self.encoder2(shallow))
        return self.out(self.decoder2(x, self.encoder1(volumes)))

    def maps(self, volumes: Tensor) -> list[Tensor]:
        """Feature maps (B, D, ga, gb, gc): raw after each of `layers`, then of the normalised output."""
        stream, start, found = tokens.embed(self.vit, volumes), 0, []
        for layer in self.layers:
            stream, start = tokens.run(self.vit, stream, start, layer + 1), layer + 1
            found.append(tokens.finish(self.vit, stream, norm=False).map)
        last = tokens.finish(self.vit, tokens.run(self.vit, stream, start))
        return [*found, tokens.dense(self.vit, last).map]

    def head_state(self) -> dict[str, Tensor]:
        """Everything beside the ViT, for a run's extras: names start with "unetr."."""
        return {f"unetr.{name}": value for name, value in self.state_dict().items() if not name.startswith("vit.")}

    def load_head(self, extras: Mapping[str, Tensor]) -> None:
        """The inverse of `head_state`; every tensor must be there and fit."""
        named = {name.removeprefix("unetr."): value for name, value in extras.items() if name.startswith("unetr.")}
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("vit.")}
        _require_fit(own, named, "UNETR decoder")
        self.load_state_dict(named, strict=False)

    def load_official(self, tensors: Mapping[str, Tensor]) -> int:
        """Take a downstream checkpoint of Hi-End-MAE; the number of tensors, every one of which must land. Such a ViT has no
        class token and LayerNorms of eps 1e-5."""
        named = from_monai(tensors, self.vit.patch_embed.patch_size)
        own = self.state_dict()
        _require_fit(own, named, "network")
        unknown = sorted(set(named) - set(own))
        if unknown:
            raise WeightsError(
                f"{len(unknown)} of {len(named)} tensors have no place in this network, e.g. {unknown[0]}",
                fix="a ViT of the checkpoint's depth, without class token",
            )
        self.load_state_dict(named)
        return len(named)


def stages(patch_size: Size) -> tuple[tuple[int, ...], ...]:
    """How often each of the three decoder steps enlarges each axis (1 or 2), deepest first: doublings that fit the patch."""
    doublings = [min(3, int(math.log2(side))) for side in patch_size]
    return tuple(tuple(2 if step < n else 1 for n in doublings) for step in range(3))


def from_monai(tensors: Mapping[str, Tensor], patch_size: Size) -> dict[str, Tensor]:
    """MONAI's names of the ViT inside a UNETR to timm's. The flat patch projection (D, pa pb pc C), channel fastest, becomes
    a convolution (D, C, pa, pb, pc)."""
    named = {}
    for name, value in tensors.items():
        if name.endswith("patch_embedding.patch_embeddings.1.weight"):
            value = value.unflatten(1, (*patch_size, -1)).permute(0, 4, 1, 2, 3).contiguous()
        for old, new in _MONAI:
            name = re.sub(old, new, name)
        named[name] = value
    return named


_MONAI = (
    (r"patch_embedding\.patch_embeddings\.1\.", "patch_embed.proj."),
    (r"patch_embedding\.position_embeddings$", "pos_embed"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.linear([12])\.", r".mlp.fc\1."),
)


def _require_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    odd = [name for name, value in own.items() if name not in given or given[name].shape != value.shape]
    if odd:
        raise WeightsError(
            f"{len(odd)} of {len(own)} tensors of the {what} are missing or have another shape, e.g. {odd[0]}",
            fix="the same classes, feature_size, patch and channels as the checkpoint",
        )


def _thirds(depth: int) -> tuple[int, ...]:
    return tuple(max(i, round((i + 1) * depth / 4) - 1) for i in range(3))


def _monai() -> Any:
    try:
        from monai.networks.blocks import dynunet_block
    except ImportError:
        raise MissingExtra("monai", "medical") from None
    return dynunet_block


def _residual(inside: int, out: int) -> nn.Module:
    """3x3x3 convolution, instance norm, leaky ReLU, convolution, norm, plus a 1x1x1 shortcut where channels change."""
    return _monai().UnetResBlock(3, inside, out, kernel_size=3, stride=1, norm_name=_NORM)


def _larger(inside: int, out: int, factor: Size) -> nn.Module:
    """Transposed convolution with kernel = stride = factor, without bias."""
    return _monai().get_conv_layer(
        3, inside, out, kernel_size=factor, stride=factor, is_transposed=True, act=None, norm=None
    )


class _Stem(nn.Module):
    def __init__(self, inside: int, out: int):
        super().__init__()
        self.layer = _residual(inside, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Rise(nn.Module):
    """A token map to a skip: one transposed convolution, then (transposed convolution, residual block) a further stage."""

    def __init__(self, inside: int, out: int, factors: Sequence[Size]):
        super().__init__()
        self.transp_conv_init = _larger(inside, out, factors[0])
        self.blocks = nn.ModuleList(nn.Sequential(_larger(out, out, f), _residual(out, out)) for f in factors[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.transp_conv_init(x)
        for block in self.blocks:
            x = block(x)
        return x


class _Join(nn.Module):
    """Transposed convolution of what comes from below, the skip behind it, a residual block."""

    def __init__(self, inside: int, out: int, factor: Size):
        super().__init__()
        self.transp_conv = _larger(inside, out, factor)
        self.conv_block = _residual(2 * out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv_block(torch.cat([self.transp_conv(x), skip], dim=1))


class _ToSize(nn.Module):
    """Trilinear to the size of the skip, 3x3x3 convolution, the skip behind it, a residual block."""

    def __init__(self, inside: int, out: int):
        super().__init__()
        self.conv3d = nn.Conv3d(inside, out, 3, padding=1)
        self.conv_block = _residual(2 * out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if x.shape[2:] != skip.shape[2:]:
            x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return self.conv_block(torch.cat([self.conv3d(x), skip], dim=1))


class _Out(nn.Module):
    """1x1x1 convolution to the classes, under MONAI's name."""

    def __init__(self, inside: int, classes: int):
        super().__init__()
        self.conv = nn.Module()
        self.conv.conv = nn.Conv3d(inside, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv.conv(x)
