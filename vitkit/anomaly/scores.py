"""How two pictures differ: squared error, SSIM, gradient magnitudes at several scales. Losses in training, maps at test.

Sources: Xue et al., "Gradient Magnitude Similarity Deviation", 2014 (arXiv 1308.3052); Zavrtanik et al., "Reconstruction by
inpainting for visual anomaly detection", Pattern Recognition 2021 (RIAD); constants and paddings of YeongHyeon/RIAD-PyTorch.

Pictures are (B, C, H, W) in [0, 1]. Maps are larger where pictures differ.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

GMS_C = 0.0026  # keeps flat regions from counting as different
C1, C2 = 0.01**2, 0.03**2  # SSIM
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian
TINY = 1e-12


def msgms_map(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """(B, C, H, W): 1 - gradient magnitude similarity, averaged over `scales` halvings of the pictures."""
    size, total = x.shape[2:], torch.zeros((), device=x.device)
    for scale in range(scales):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        similar = _gms(x, y)
        total = total + (
            similar if not scale else F.interpolate(similar, size=size, mode="bilinear", align_corners=False)
        )
    return 1 - total / scales


def msgms_loss(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """Mean of `msgms_map`."""
    return msgms_map(x, y, scales).mean()


def anomaly_map(x: Tensor, y: Tensor, scales: int = 3, smooth: float = 0.0) -> Tensor:
    """(B, 1, H, W): channel mean of `msgms_map`, then a Gaussian of `smooth` pixels (0 = none)."""
    found = msgms_map(x, y, scales).mean(1, keepdim=True)
    return gaussian_blur(found, smooth) if smooth else found


def image_score(found: Tensor) -> Tensor:
    """(B,) maximum of each map (B, 1, H, W)."""
    return found.flatten(1).amax(1)


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """(B, C, H, W): (1 - SSIM) / 2 within [0, 1/2]. Window 11, deviation 1.5, zeros beyond the border."""
    chans = x.shape[1]
    kernel = _gaussian(WINDOW, SIGMA, x.device, x.dtype)
    stacked = _separable(torch.cat([x, y, x * x, y * y, x * y], dim=1), kernel)
    mx, my, xx, yy, xy = stacked.split(chans, dim=1)
    cross = mx * my
    sx, sy, sxy = xx - mx * mx, yy - my * my, xy - cross
    similar = ((2 * cross + C1) * (2 * sxy + C2)) / ((mx * mx + my * my + C1) * (sx + sy + C2))
    return (1 - similar).clamp(0, 1) / 2


def edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the gradient magnitudes."""
    return (_squared_gradient(x).sqrt() - _squared_gradient(y).sqrt()).abs().mean()


def per_image(difference: Tensor) -> Tensor:
    """(B,) means over all other axes."""
    return difference.flatten(1).mean(1)


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Each channel blurred by a Gaussian of `sigma` pixels, the border repeated."""
    radius = min(max(1, round(4 * sigma)), min(x.shape[2:]) - 1)
    if radius < 1:
        return x
    kernel = _gaussian(2 * radius + 1, sigma, x.device, x.dtype)
    padded = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    return _separable(padded, kernel, padding=0)


def _gms(x: Tensor, y: Tensor) -> Tensor:
    # The squares are known before the root is taken: only the product needs it.
    a, b = _squared_gradient(x), _squared_gradient(y)
    return (2 * a.sqrt() * b.sqrt() + GMS_C) / (a + b + GMS_C + TINY)


def _squared_gradient(x: Tensor) -> Tensor:
    """Squared gradient magnitude (B, C, H, W): Prewitt kernels over 3, zeros beyond the border; both directions in one
    convolution."""
    chans = x.shape[1]
    both = F.conv2d(x, _prewitt(chans, x.device, x.dtype), padding=1, groups=chans)  # (B, 2C, H, W): gx, gy by turns
    return both.square().unflatten(1, (chans, 2)).sum(2) + TINY


def _separable(x: Tensor, kernel: Tensor, padding: int | None = None) -> Tensor:
    chans, size = x.shape[1], len(kernel)
    pad = size // 2 if padding is None else padding
    x = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(chans, 1, -1, 1), padding=(pad, 0), groups=chans)
    return F.conv2d(x, kernel.view(1, 1, 1, -1).expand(chans, 1, 1, -1), padding=(0, pad), groups=chans)


@lru_cache(maxsize=32)
def _prewitt(chans: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        row = torch.tensor([[1.0, 0.0, -1.0]] * 3, device=device, dtype=dtype) / 3
        return torch.stack([row, row.T]).unsqueeze(1).repeat(chans, 1, 1, 1)  # (2C, 1, 3, 3)


@lru_cache(maxsize=32)
def _gaussian(size: int, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        at = torch.arange(size, device=device, dtype=dtype) - size // 2
        kernel = (-at.square() / (2 * sigma**2)).exp()
        return kernel / kernel.sum()
