"""JPEG compression with a gradient: what an image looks like after it was saved as JPEG and opened again.

Colour to full-range YCbCr, chroma averaged over 2 x 2 pixels, 8 x 8 blocks, orthonormal DCT-II, division by the
quantisation table, rounding, and all of it back. Rounding is r(x) = round(x) + (x - round(x))^3, whose derivative is
not zero (Shin and Song, "JPEG-resistant adversarial images", 2017). The tables are those of ITU-T T.81, annex K, in the
orientation of OpenTAI/taiadv (DiffJPEG): the coefficient of vertical frequency u and horizontal frequency v is divided
by the printed entry [v][u], which only matters for luminance, the one table that is not symmetric.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.errors import ConfigError

# Annex K, table K.1, as printed: rows of increasing vertical frequency.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
# Table K.2: what is not printed here is 99.
_CHROMINANCE = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """`pixels` (B, 3, H, W) in [0, 1] after JPEG of `quality` 1 to 100, differentiable; H and W multiples of 16."""
    if not 1 <= quality <= 100:
        raise ConfigError(f"JPEG quality is {quality}", fix="1 to 100, e.g. 75")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % 16 or pixels.shape[3] % 16:
        raise ConfigError(
            f"JPEG of images of shape {tuple(pixels.shape)}",
            fix="(batch, 3, height, width) with height and width multiples of 16",
        )
    scale = (200 - 2 * quality) / 100 if quality >= 50 else 50 / quality
    # Quality 100 asks for steps of 0, which the standard's encoders raise to the smallest step there is.
    light, colour = ((table * scale if scale else torch.ones_like(table)).to(pixels.device) for table in _tables())
    to, back = (pixels.new_tensor(matrix) for matrix in (_TO_YCBCR, _TO_RGB))
    offset = pixels.new_tensor((0.0, 128.0, 128.0))
    ycc = (torch.tensordot((pixels * 255).permute(0, 2, 3, 1), to.T, dims=1) + offset).permute(0, 3, 1, 2)
    y, chroma = ycc[:, :1], F.avg_pool2d(ycc[:, 1:], 2)
    y, chroma = _quantised(y - 128, light) + 128, _quantised(chroma - 128, colour) + 128
    chroma = F.interpolate(chroma, scale_factor=2, mode="nearest")
    rgb = torch.tensordot(torch.cat([y, chroma], dim=1).permute(0, 2, 3, 1) - offset, back.T, dims=1)
    return rgb.permute(0, 3, 1, 2).clamp(0, 255) / 255


def soft_round(x: Tensor) -> Tensor:
    """round(x) + (x - round(x))^3: nearly rounded, with the derivative 3 (x - round(x))^2."""
    whole = x.round()
    return whole + (x - whole) ** 3


def _quantised(plane: Tensor, table: Tensor) -> Tensor:
    """`plane` (B, C, H, W) centred on 0, with every 8 x 8 block's DCT coefficients rounded to multiples of `table`.

    The derivative of the rounding magnifies the last bits of a coefficient, so the sums are taken in the order of the
    common implementations: all 64 products of a block, then the factors of frequency zero.
    """
    batch, chans, height, width = plane.shape
    basis, factors = (part.to(plane.device, plane.dtype) for part in _dct())
    blocks = plane.reshape(batch, chans, height // 8, 8, width // 8, 8).transpose(3, 4).flatten(4)  # (B, C, h, w, 64)
    coefficients = (0.25 * factors) * torch.tensordot(blocks, basis, dims=1)
    coefficients = soft_round(coefficients / table.to(plane.dtype)) * table.to(plane.dtype)
    blocks = 0.25 * torch.tensordot(coefficients * factors, basis.T.contiguous(), dims=1)
    return blocks.unflatten(4, (8, 8)).transpose(3, 4).reshape(batch, chans, height, width)


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    """Luminance and chrominance tables (64,), frequency u of rows slowest."""
    with torch.inference_mode(False):
        colour = torch.full((8, 8), 99.0)
        colour[:4, :4] = torch.tensor(_CHROMINANCE, dtype=torch.float32)
        return torch.tensor(_LUMINANCE, dtype=torch.float32).T.flatten(), colour.flatten()


@lru_cache(maxsize=1)
def _dct() -> tuple[Tensor, Tensor]:
    """Products of cosines (64 pixels, 64 frequencies), and the factors a(u) a(v) with a(0) = 1 / sqrt 2 (64,)."""
    with torch.inference_mode(False):
        n = torch.arange(8, dtype=torch.float64)
        cosine = torch.cos((2 * n[:, None] + 1) * n[None] * math.pi / 16)  # (pixel, frequency)
        factor = torch.ones_like(n)
        factor[0] = math.sqrt(0.5)
        return torch.kron(cosine, cosine).float(), torch.outer(factor, factor).float().flatten()
