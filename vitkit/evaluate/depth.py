"""A linear depth probe on frozen patch features: head, losses and metrics.

`DepthHead`: a 1x1 convolution to bins; with weights (relu(logit) + 0.1) / sum the depth is their mean over centres that are
evenly spaced from `min_depth` to `max_depth`. `sig_loss` is the scale-invariant log loss with a variance share,
`gradient_loss` compares log-depth differences at several strides, `depth_metrics` are the usual nine figures.

Source: Jiawei-Yang/Denoising-ViT (commit 82704df), evaluation/depth, after DINOv2's and BTS.
Differs from what they ran: their gradient loss got [B, 1, H, W], so that it compared images with one another instead of
pixels and was 0 with 2 images a device. `gradient_loss(..., over="batch")` computes that, over="pixels" (the default)
what was meant.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import ConfigError, DataError

METRICS = ("a1", "a2", "a3", "abs_rel", "rmse", "log_10", "rmse_log", "silog", "sq_rel")
STRIDES = (1, 2, 4, 6)
FLOOR = 0.1  # added to every bin's weight
TINY = 1e-3  # added to depths before the logarithm of the losses


class DepthHead(nn.Module):
    """Features (B, D, h, w) to depth (B, 1, h, w) in the units of `min_depth` and `max_depth` (metres for NYU)."""

    def __init__(
        self, dim: int, *, bins: int = 256, min_depth: float = 1e-3, max_depth: float = 10.0, upsample: int = 1
    ):
        super().__init__()
        if bins < 2 or not 0 < min_depth < max_depth:
            raise ConfigError(
                f"{bins} bins from {min_depth} to {max_depth}", fix="bins >= 2 and 0 < min_depth < max_depth"
            )
        self.bins, self.min_depth, self.max_depth, self.upsample = bins, min_depth, max_depth, upsample
        self.conv_depth = nn.Conv2d(dim, bins, 1)

    def forward(self, features: Tensor) -> Tensor:
        if self.upsample > 1:
            features = F.interpolate(features, scale_factor=self.upsample, mode="bilinear", align_corners=False)
        weights = self.conv_depth(features).relu() + FLOOR
        weights = weights / weights.sum(1, keepdim=True)
        centres = torch.linspace(self.min_depth, self.max_depth, self.bins, device=features.device)
        return torch.einsum("bkhw,k->bhw", weights, centres).unsqueeze(1)


def with_class_token(patches: Tensor, token: Tensor) -> Tensor:
    """A patch map (B, D, h, w) with the class token (B, D) beside every patch: (B, 2 D, h, w), what the probe reads."""
    return torch.cat([patches, token[..., None, None].expand_as(patches)], 1)


def resize_to(depth: Tensor, truth: Tensor) -> Tensor:
    """`depth` (B, 1, h, w) at the size of `truth` (B, 1, H, W), bilinear."""
    return F.interpolate(depth, size=truth.shape[-2:], mode="bilinear", align_corners=False)


def sig_loss(depth: Tensor, truth: Tensor, *, max_depth: float | None = None, warm: bool = False) -> Tensor:
    """sqrt(var g + 0.15 (mean g)^2), g the difference of log depths where 0 < truth <= max_depth, variance unbiased.
    `warm`: sqrt(0.15 (mean g)^2), for the first 100 steps."""
    mask = _valid(truth, max_depth)
    error = (depth[mask] + TINY).log() - (truth[mask] + TINY).log()
    if not len(error):
        raise DataError("no pixel of this batch has a known depth", fix="leave such images out")
    shift = 0.15 * error.mean().square()
    return shift.sqrt() if warm else (error.var() + shift).sqrt()


def gradient_loss(
    depth: Tensor, truth: Tensor, *, max_depth: float | None = None, over: Literal["pixels", "batch"] = "pixels"
) -> Tensor:
    """Mean |difference of log-depth errors two pixels apart|, both of known depth, at strides 1, 2, 4 and 6, of (B, 1, H, W).

    over="pixels": along rows and columns, mean over images. over="batch": as the official probe calls it.
    """
    if over == "pixels":
        maps = zip(depth.flatten(0, 1), truth.flatten(0, 1), strict=True)
        each = [sum(_gradient(d[::k, ::k], t[::k, ::k], max_depth) for k in STRIDES) for d, t in maps]
        return torch.stack(each).mean()  # type: ignore[arg-type]
    return sum((_gradient(depth[::k, ::k], truth[::k, ::k], max_depth) for k in STRIDES), depth.new_zeros(()))


def _gradient(depth: Tensor, truth: Tensor, max_depth: float | None) -> Tensor:
    mask = _valid(truth, max_depth)
    error = ((depth + TINY).log() - (truth + TINY).log()).where(mask, depth.new_zeros(()))
    total = depth.new_zeros(())
    for axis in (0, 1):
        size = error.shape[axis] - 2
        if size > 0:
            far, near = error.narrow(axis, 2, size), error.narrow(axis, 0, size)
            both = mask.narrow(axis, 2, size) & mask.narrow(axis, 0, size)
            total = total + (far - near).abs().where(both, depth.new_zeros(())).sum()
    return total / mask.sum().clamp_min(1)


def depth_metrics(
    depth: Tensor, truth: Tensor, *, min_depth: float = 1e-3, max_depth: float = 10.0
) -> dict[str, float]:
    """The figures of `METRICS` over pixels of min_depth < truth < max_depth: shares within 1.25, 1.25^2, 1.25^3; relative,
    squared relative, root-mean-square and log10 errors; rmse of ln; silog = 100 sqrt(var e), e = ln depth - ln truth."""
    mask = (truth > min_depth) & (truth < max_depth)
    if not mask.any():
        raise DataError(
            f"no pixel has a depth between {min_depth} and {max_depth}", fix="the units of min_depth, max_depth"
        )
    p, t = depth[mask].double(), truth[mask].double()
    ratio, error, difference = torch.maximum(t / p, p / t), p.log() - t.log(), (t - p)
    values = [(ratio < 1.25**k).double().mean() for k in (1, 2, 3)]
    values += [(difference.abs() / t).mean(), difference.square().mean().sqrt(), (t.log10() - p.log10()).abs().mean()]
    values += [error.square().mean().sqrt(), 100 * (error.square().mean() - error.mean().square()).sqrt()]
    values += [(difference.square() / t).mean()]
    return {name: float(value) for name, value in zip(METRICS, values, strict=True)}


def _valid(truth: Tensor, max_depth: float | None) -> Tensor:
    return truth > 0 if max_depth is None else (truth > 0) & (truth <= max_depth)
