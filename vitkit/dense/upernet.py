"""UPerNet on a frozen ViT: four blocks' maps at four strides, pyramid pooling on the coarsest, fused from the top down.

Paper: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018 (arXiv 1807.10221); four strides out of a
plain ViT as BEiT (arXiv 2106.08254) makes them. RAD-DINO (arXiv 2401.10815) evaluates frozen patch tokens with it.

What happens, and where: the last four blocks' maps become grids of 4, 2, 1 and 1/2 times the patch grid (`fpn1` to `fpn4`:
two transposed convolutions, one, none, max pooling). In `UPerHead` the coarsest one is averaged over 1, 2, 3 and 6 bins a
side, each convolved, enlarged and joined again (`psp`); 1x1 convolutions bring the others to `width` channels, sums run
from coarse to fine, a 3x3 convolution cleans each level, and all four, at the finest size, give the logits. Tensor names
are those of transformers' UperNet head, so that it loads; its numbers and BEiT's are the test.

Differs from the paper: no auxiliary head, whose only use is a second loss on a trunk that trains; in the protocols the maps
are those of the last four blocks, as DINOv2 probes read them (BEiT takes blocks 3, 5, 7, 11 of 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import ConfigError

Size = tuple[int, ...]


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU; the grid stays."""

    def __init__(self, inside: int, out: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(inside, out, kernel, padding=kernel // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.batch_norm(self.conv(x)))


class UPerHead(nn.Module):
    """Maps (B, C_i, h_i, w_i), finest first, to logits (B, classes, h_0, w_0)."""

    def __init__(self, channels: Sequence[int], classes: int, *, width: int = 512, bins: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvModule(channels[-1], width, 1)) for side in bins
        )
        self.bottleneck = ConvModule(channels[-1] + len(bins) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, width, 1) for c in channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3) for _ in channels[:-1])
        self.fpn_bottleneck = ConvModule(len(channels) * width, width, 3)
        self.classifier = nn.Conv2d(width, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def psp(self, x: Tensor) -> Tensor:
        """The coarsest map with what is around each of its cells, (B, width, h, w)."""
        pooled = [_enlarged(pool(x), x.shape[2:]) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.psp(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + _enlarged(levels[i], levels[i - 1].shape[2:])
        clean = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        same = [_enlarged(x, clean[0].shape[2:]) for x in clean]
        return self.classifier(self.fpn_bottleneck(torch.cat(same, dim=1)))


class UPerNetDecoder(nn.Module):
    """Four maps (B, D, h, w) of a plain ViT, oldest first, to logits (B, C, *size). `width`: channels (published 512)."""

    needs: ClassVar[int] = 4

    def __init__(self, dim: int, classes: int, *, width: int = 512):
        super().__init__()
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, stride=2))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(2, stride=2)
        self.decode_head = UPerHead([dim] * 4, classes, width=width)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        if len(maps) != self.needs:
            raise ConfigError(
                f"{len(maps)} feature maps for UPerNet, which reads {self.needs}", fix="maps of the last 4 blocks"
            )
        require_grid(maps[-1], "UPerNet")
        if self.training and len(maps[0]) < 2:  # pooling to 1 x 1 leaves one value a channel to normalise
            raise ConfigError("UPerNet normalises over a batch, and got one image", fix="batches of 2 images or more")
        steps = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        logits = self.decode_head([step(x) for step, x in zip(steps, maps, strict=True)])
        return _enlarged(logits, size)


def require_grid(x: Tensor, what: str) -> None:
    """Raise ConfigError where a map (B, D, h, w) cannot be halved."""
    if min(x.shape[2:]) < 2:
        raise ConfigError(
            f"{what} halves the patch grid, which is {x.shape[2]} x {x.shape[3]}",
            fix="a larger image_size or a smaller patch_size: at least 2 patches a side",
        )


def _enlarged(x: Tensor, size: Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
