"""Decoders from a frozen ViT's feature maps to masks: linear, U-Net-style, light convolutional, pyramids, and volumes.

All take `maps`, a list of feature maps (B, D, h, w) of consecutive last blocks after the final norm, oldest first, as
`vitkit.tokens.maps(vit, images, layers=n)` gives them, and `size`, the size of the masks; they return logits
(B, C, *size). `needs` says how many maps a decoder reads.

`LinearDecoder` and `UNetDecoder` are those of the radiology benchmark (arXiv 2312.02366, MohammedSB/DINOv2ForRadiology),
with its tensor names, so that its heads load. `LightDecoder` and `VolumeDecoder` follow the text of the DINOv3 medical
benchmark (arXiv 2509.06467), which publishes neither code nor widths: layers and widths are ours, and arguments.
`UPerNetDecoder` and `PyramidDecoder` have files of their own, `upernet` and `simple_pyramid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from vitkit.dense.simple_pyramid import PyramidDecoder
from vitkit.dense.upernet import UPerNetDecoder
from vitkit.errors import ConfigError

Size = tuple[int, ...]


class LinearDecoder(nn.Module):
    """1x1 convolution of the last map, then bilinear to the mask's size."""

    needs: ClassVar[int] = 1

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.decoder = nn.Conv2d(dim, classes, 1)
        nn.init.normal_(self.decoder.weight, std=0.01)
        assert self.decoder.bias is not None
        nn.init.zeros_(self.decoder.bias)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        return F.interpolate(self.decoder(maps[-1]), size=size, mode="bilinear", align_corners=False)


def _conv(inside: int, out: int, rectify: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inside, out, 3, padding=1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(out), nn.ReLU()) if rectify else nn.Sequential(*layers)


class _Up(nn.Module):
    """Twice the grid: transposed convolution of what comes from below, beside a skip from a block, joined by a convolution."""

    def __init__(self, inside: int, out: int, dim: int, rectify: bool = True):
        super().__init__()
        self.upconv = nn.ConvTranspose2d(inside, out, 2, stride=2)
        self.skip_conv = _conv(dim, out)
        self.conv = _conv(2 * out, out, rectify)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.upconv(x)
        skip = F.interpolate(self.skip_conv(skip), size=x.shape[2:], mode="bilinear", align_corners=True)
        return self.conv(torch.cat([x, skip], dim=1))


class UNetDecoder(nn.Module):
    """Four steps of twice the grid (widths D/2, D/4, D/8, classes), blocks -2 to -5 as skips; then bicubic to the mask's size.

    As published the last step ends in batch norm and ReLU, so that logits are never negative. With `rectify=False` it ends in
    its convolution.
    """

    needs: ClassVar[int] = 5

    def __init__(self, dim: int, classes: int, *, rectify: bool = True):
        super().__init__()
        if dim < 8:
            raise ConfigError(f"a width of {dim} cannot be halved three times", fix="decoder=light or linear")
        widths = (dim, dim // 2, dim // 4, dim // 8, classes)
        for i in range(4):
            setattr(self, f"up{i + 1}", _Up(widths[i], widths[i + 1], dim, rectify or i < 3))

    def forward(self, maps: Sequence[Tensor], size: Size | None = None) -> Tensor:
        """`size` None: at 16 times the grid."""
        if len(maps) != self.needs:
            raise ConfigError(
                f"{len(maps)} feature maps for a decoder of {self.needs}", fix="maps of the last 5 blocks"
            )
        x = maps[-1]
        for i in range(4):
            x = getattr(self, f"up{i + 1}")(x, maps[-2 - i])
        if size is None or tuple(x.shape[2:]) == tuple(size):
            return x
        return resize(x, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


class LightDecoder(nn.Module):
    """Shallow convolution blocks with bilinear upsampling: 1x1 to `width`, `steps` times (twice the grid, 3x3, norm, GELU),
    1x1 to the classes, bilinear to the mask's size."""

    needs: ClassVar[int] = 1

    def __init__(self, dim: int, classes: int, *, width: int = 256, steps: int = 2):
        super().__init__()
        self.reduce = nn.Conv2d(dim, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()) for _ in range(steps)
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        x = self.reduce(maps[-1])
        for block in self.blocks:
            x = block(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        return F.interpolate(self.head(x), size=size, mode="bilinear", align_corners=False)


class VolumeDecoder(nn.Module):
    """Feature maps of a volume's slices, stacked, decoded in three dimensions.

    `maps`: `levels` lists of (B, S, D, h, w), oldest first; S slices. Each level is reduced by a 1x1x1 convolution; from the
    last one on: 3x3x3 convolution, norm, GELU, twice the grid within slices, plus the next older level as a skip. Logits
    (B, C, S, H, W). Neighbouring slices are seen, so their order matters.
    """

    def __init__(self, dim: int, classes: int, *, width: int = 64, levels: int = 3):
        super().__init__()
        if levels < 1:
            raise ConfigError(f"levels is {levels}", fix="at least 1")
        self.needs = levels
        self.reduce = nn.ModuleList(nn.Conv3d(dim, width, 1) for _ in range(levels))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width), nn.GELU())
            for _ in range(levels)
        )
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        """`size` (S, H, W) or (H, W)."""
        if len(maps) != self.needs:
            raise ConfigError(f"{len(maps)} feature maps for a decoder of {self.needs}", fix=f"{self.needs} levels")
        slices = maps[0].shape[1]
        stacked = [
            reduce(m.transpose(1, 2)) for reduce, m in zip(self.reduce, maps, strict=True)
        ]  # (B, width, S, h, w)
        x = stacked[-1]
        for i, block in enumerate(self.blocks):
            if i:
                skip = stacked[-1 - i]
                x = x + F.interpolate(skip, size=x.shape[2:], mode="trilinear", align_corners=False)
            x = F.interpolate(block(x), scale_factor=(1, 2, 2), mode="trilinear", align_corners=False)
        whole = tuple(size) if len(size) == 3 else (slices, *size)
        return F.interpolate(self.head(x), size=whole, mode="trilinear", align_corners=False)


DECODERS: dict[str, type[nn.Module]] = {
    "linear": LinearDecoder,
    "unet": UNetDecoder,
    "light": LightDecoder,
    "upernet": UPerNetDecoder,
    "pyramid": PyramidDecoder,
}
WIDE = ("upernet", "pyramid")  # decoders whose channels are a setting
