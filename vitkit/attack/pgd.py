"""Projected descent on pixels in [0, 1]: what the attack, its layer search and its baselines share.

A `Cost` maps pixels (B, C, H, W) to one number an image (B,), to be made small. Images never meet: the gradient is that of
the sum, and every image's random start comes from a seed of its own, so a result does not depend on the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit.errors import ConfigError, DataError

Cost = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Crafted:
    """`pixels` (B, C, H, W) in [0, 1]; `costs` (K, B): what was made small, before each of the K steps."""

    pixels: Tensor
    costs: Tensor


def check_pixels(pixels: Tensor) -> Tensor:
    """`pixels` (B, C, H, W) as float32 in [0, 1]; uint8 is divided by 255. Raises DataError for anything else."""
    if pixels.ndim != 4:
        raise DataError(f"images of shape {tuple(pixels.shape)}", fix="(batch, channels, height, width)")
    if pixels.dtype == torch.uint8:
        return pixels.float().div(255)
    if not pixels.is_floating_point():
        raise DataError(f"images of type {pixels.dtype}", fix="uint8, or floats in [0, 1]")
    pixels = pixels.detach().float()
    low, high = (float(value) for value in pixels.aminmax()) if pixels.numel() else (0.0, 0.0)
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise DataError(
            f"images reach from {low:.3g} to {high:.3g}, and an attack works on pixels in [0, 1]",
            fix="pass uint8, divide by 255, or undo the normalisation (vit.passport.preprocess.denormalise)",
        )
    return pixels.clamp(0, 1)


def eight_bit(adversarial: Tensor, clean: Tensor, eps: float) -> Tensor:
    """`adversarial` rounded to uint8 with the budget kept: no value further than eps from the `clean` 8-bit image."""
    base = (clean * 255).round()
    reach = int(eps * 255 + 1e-4)  # whole grey levels within eps
    change = ((adversarial * 255).round() - base).clamp(-reach, reach)
    return (base + change).clamp(0, 255).byte()


def uniform(pixels: Tensor, seeds: Tensor | None) -> Tensor:
    """Numbers in [-1, 1) of the shape of `pixels`, image i drawn from `seeds[i]` (by default its place in the batch).

    Drawn on the CPU, so that every device starts alike.
    """
    seeds = torch.arange(len(pixels)) if seeds is None else torch.as_tensor(seeds).reshape(-1)
    if len(seeds) != len(pixels):
        raise ConfigError(f"{len(seeds)} seeds for {len(pixels)} images", fix="one whole number an image")
    drawn = torch.empty(pixels.shape, dtype=torch.float32)
    for row, seed in zip(drawn, seeds.tolist(), strict=True):
        row.uniform_(-1, 1, generator=torch.Generator().manual_seed(int(seed)))
    return drawn.to(pixels.device)


def sign_noise(pixels: Tensor, eps: float, seeds: Tensor | None = None) -> Tensor:
    """Every value moved by +eps or -eps at random: the control that any attack must beat."""
    return (pixels + eps * torch.where(uniform(pixels, seeds) < 0, -1.0, 1.0)).clamp(0, 1)


def sign_descent(
    cost: Cost,
    pixels: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
) -> Crafted:
    """PGD (arXiv 1706.06083): from a uniform start, `steps` times against the gradient's sign, back into the ball and
    [0, 1]. noise: the start as a share of eps, by default uniform in [-1, 1) from `seeds`.

    The random start is needed: where the clean image is itself the optimum, its gradient is zero.
    """
    adversarial = (pixels + eps * (uniform(pixels, seeds) if noise is None else noise)).clamp(0, 1)
    low, high = (pixels - eps).clamp_min(0), (pixels + eps).clamp_max(1)
    costs = []
    for _ in range(steps):
        gradient, found = gradient_of(cost, adversarial)
        costs.append(found)
        adversarial = torch.clamp(adversarial - step_size * gradient.sign(), low, high)
    return Crafted(adversarial, torch.stack(costs))


def tanh_descent(
    cost: Cost,
    pixels: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
) -> Crafted:
    """Adam on n in x + eps tanh(n), the authors' toolbox: x' cannot leave the ball, and [0, 1] is a clamp.

    The loss is the mean over the batch as there, so Adam's small constant makes the result depend faintly on the batch.
    noise: the start of n, by default uniform in [-1, 1) from `seeds`; it is left at its final value.
    """
    noise = uniform(pixels, seeds) if noise is None else noise
    state = torch.optim.Adam([noise.requires_grad_()], lr=step_size)
    costs = []
    for _ in range(steps):
        with torch.enable_grad():
            found = cost(torch.clamp(pixels + eps * torch.tanh(noise), 0, 1))
            noise.grad = torch.autograd.grad(found.mean(), noise)[0]
        costs.append(found.detach())
        state.step()
    noise.requires_grad_(False)
    return Crafted(torch.clamp(pixels + eps * torch.tanh(noise), 0, 1), torch.stack(costs))


def gradient_of(cost: Cost, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's gradient (B, C, H, W) of its own cost, and the costs (B,)."""
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        costs = cost(pixels)
        (gradient,) = torch.autograd.grad(costs.sum(), pixels)
    return gradient, costs.detach()


@contextmanager
def frozen(models: Sequence[nn.Module]) -> Iterator[None]:
    """`models` in eval mode and without parameter gradients, and afterwards as they were. Gradients of pixels can be taken
    inside, under `torch.inference_mode`, too."""
    training = [(module, module.training) for model in models for module in model.modules()]
    learning = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    for module, _ in training:
        module.training = False
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for module, was in training:
            module.training = was
        for parameter in learning:
            parameter.requires_grad_(True)
