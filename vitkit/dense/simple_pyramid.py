"""ViTDet's simple feature pyramid on a frozen ViT, with the semantic branch of Panoptic FPN: four strides from one map.

Paper: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022 (arXiv 2203.16527), and
Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019 (arXiv 1901.02446). RAD-DINO (arXiv 2401.10815) evaluates
frozen patch tokens with such a pyramid; what it puts on top is not public, hence the usual branch for semantic masks.

What happens, and where: the last map alone becomes grids of 4, 2, 1 and 1/2 times the patch grid by transposed convolutions
or max pooling, each followed by a 1x1 and a 3x3 convolution with LayerNorm (`SimpleFeaturePyramid`, named `simfp_2` to
`simfp_5` by their stride as in detectron2, so that ViTDet's tensors load). `SemanticBranch` brings every level to the
finest grid, a 3x3 convolution, GroupNorm, ReLU and twice the grid at a time, adds them up and classifies each cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitkit.dense.upernet import require_grid
from vitkit.errors import ConfigError

Size = tuple[int, ...]
STAGES = (2, 3, 4, 5)  # log2 of the stride for patches of 16 pixels: grids of 4, 2, 1 and 1/2 times the patch grid


class NormedConv(nn.Conv2d):
    """Convolution without bias, then LayerNorm over channels; the grid stays."""

    def __init__(self, inside: int, out: int, kernel: int):
        super().__init__(inside, out, kernel, padding=kernel // 2, bias=False)
        self.norm = LayerNorm2d(out, eps=1e-6)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


class SimpleFeaturePyramid(nn.Module):
    """One map (B, D, h, w) to four (B, width, 4h..h//2, 4w..w//2), finest first."""

    def __init__(self, dim: int, *, width: int = 256):
        super().__init__()
        half = max(1, dim // 2)
        scale: dict[int, list[nn.Module]] = {
            2: [
                nn.ConvTranspose2d(dim, half, 2, stride=2),
                LayerNorm2d(half, eps=1e-6),
                nn.GELU(),
                nn.ConvTranspose2d(half, max(1, dim // 4), 2, stride=2),
            ],
            3: [nn.ConvTranspose2d(dim, half, 2, stride=2)],
            4: [],
            5: [nn.MaxPool2d(2, stride=2)],
        }
        inside = {2: max(1, dim // 4), 3: half, 4: dim, 5: dim}
        for stage in STAGES:
            convs = [NormedConv(inside[stage], width, 1), NormedConv(width, width, 3)]
            setattr(self, f"simfp_{stage}", nn.Sequential(*scale[stage], *convs))

    def forward(self, x: Tensor) -> list[Tensor]:
        require_grid(x, "the simple feature pyramid")
        return [getattr(self, f"simfp_{stage}")(x) for stage in STAGES]


class SemanticBranch(nn.Module):
    """Levels (B, C, h_i, w_i), finest first and each about half the one before, to logits (B, classes, h_1, w_1)."""

    def __init__(self, inside: int, classes: int, *, width: int = 128, levels: int = 4):
        super().__init__()
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if width % n == 0)
        self.towers = nn.ModuleList()
        for level in range(levels):
            count = max(1, level)
            self.towers.append(
                nn.ModuleList(
                    nn.Sequential(
                        nn.Conv2d(inside if i == 0 else width, width, 3, padding=1, bias=False),
                        nn.GroupNorm(groups, width),
                        nn.ReLU(),
                    )
                    for i in range(count)
                )
            )
        self.predictor = nn.Conv2d(width, classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        grids = [tuple(x.shape[2:]) for x in levels]
        total: Tensor | None = None
        for level, (tower, x) in enumerate(zip(self.towers, levels, strict=True)):
            for step, conv in enumerate(tower):
                x = conv(x)
                if level:  # to the grid of the level that is one finer: odd grids are not exactly doubled
                    x = F.interpolate(x, size=grids[level - 1 - step], mode="bilinear", align_corners=False)
            total = x if total is None else total + x
        assert total is not None
        return self.predictor(total)


class PyramidDecoder(nn.Module):
    """The last map (B, D, h, w) to logits (B, C, *size). `width`: channels of the pyramid (published 256; half of it in
    the branch, 128)."""

    needs: ClassVar[int] = 1

    def __init__(self, dim: int, classes: int, *, width: int = 256):
        super().__init__()
        if width < 2:
            raise ConfigError(f"width is {width}", fix="at least 2, e.g. 256")
        self.pyramid = SimpleFeaturePyramid(dim, width=width)
        self.branch = SemanticBranch(width, classes, width=width // 2)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        logits = self.branch(self.pyramid(maps[-1]))
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
