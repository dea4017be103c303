"""What an attack is compared with: noise, older attacks on the same public encoder, and white-box PGD as the ceiling.

The encoder attacks are universal perturbations in their papers; here each image gets its own, by the loop, budget, steps
and starts of `DTA`, so that only the cost differs. `COSTS` maps pixels to one number an image, to be made small:

    l4a   -mean(f_0^2): lift the activations of the first block (PAP: Ban and Dong, NeurIPS 2022, arXiv 2210.03372)
    ssp   -mean((f_L^2 - clean f_L^2)^2): distort the squared features of the last block (Naseer et al., CVPR 2020)
    std   std(f_3): disperse the features of block 3 less (dispersion reduction: Lu et al., CVPR 2020)
    fff   -sum over blocks of log(|f_l|^2 / 2): fire all blocks at once (Mopuri et al., BMVC 2017)

f_l are tokens (T, D) after block l, counted from 0. The white-box attacks see the downstream model and its labels:
torchattacks' PGD and MIFGSM, through an adapter that normalises inside the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.attack.dta import Settings, features
from vitkit.attack.encoder import normaliser
from vitkit.attack.pgd import Cost, check_pixels, frozen, sign_descent, sign_noise
from vitkit.errors import ConfigError, MissingExtra

ENCODER_ATTACKS = ("l4a", "ssp", "std", "fff")
WHITE_BOX = ("pgd", "mifgsm")
NAMES = (*ENCODER_ATTACKS, *WHITE_BOX)
DISPERSION_BLOCK = 3  # PAP's choice for ViT-B; the last block of shallower encoders


def noise(pixels: Tensor, settings: Settings = Settings(), seeds: Tensor | None = None) -> Tensor:
    """Random signs of size eps: the control."""
    return sign_noise(check_pixels(pixels), settings.eps, seeds)


def encoder_attack(
    name: str, vit: nn.Module, pixels: Tensor, settings: Settings = Settings(), seeds: Tensor | None = None
) -> Tensor:
    """Adversarial pixels by one of `ENCODER_ATTACKS` on the encoder `vit`, with DTA's eps, steps and starts."""
    if name not in ENCODER_ATTACKS:
        raise ConfigError(f"there is no attack '{name}' on an encoder", fix=f"one of: {', '.join(ENCODER_ATTACKS)}")
    pixels = check_pixels(pixels).to(next(vit.parameters()).device)
    with frozen([vit]):
        cost = COSTS[name](vit, normaliser(vit), pixels)
        # Always sign steps: eps / 4 each, unless a size was given for them.
        step = settings.step if settings.param == "sign" else settings.eps / 4
        return sign_descent(cost, pixels, eps=settings.eps, steps=settings.steps, step_size=step, seeds=seeds).pixels


def white_box(name: str, vit: nn.Module, pixels: Tensor, labels: Tensor, settings: Settings, seed: int = 0) -> Tensor:
    """Adversarial pixels against the downstream model itself and the true `labels`: what nobody without it can reach.

    Raises MissingExtra without torchattacks. Starts are drawn from `seed`; torch's own generators stay as they were.
    """
    if name not in WHITE_BOX:
        raise ConfigError(f"there is no white-box attack '{name}'", fix=f"one of: {', '.join(WHITE_BOX)}")
    try:
        import torchattacks
    except ImportError:
        raise MissingExtra("torchattacks", "attack") from None
    device = next(vit.parameters()).device
    pixels = check_pixels(pixels).to(device)
    kind = {"pgd": torchattacks.PGD, "mifgsm": torchattacks.MIFGSM}[name]
    step = settings.step if settings.param == "sign" else settings.eps / 4
    with frozen([vit]), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        attack = kind(InPixels(vit), eps=settings.eps, alpha=step, steps=settings.steps)
        return attack(pixels, labels.to(device, copy=True)).detach()


class InPixels(nn.Module):
    """A model that takes pixels in [0, 1] and normalises them itself, as attack libraries want it."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, self.normalise = vit, normaliser(vit)

    def forward(self, pixels: Tensor) -> Tensor:
        return tokens.logits(self.vit, self.normalise(pixels))


def _l4a(vit: nn.Module, prepare: Callable, pixels: Tensor) -> Cost:
    return lambda x: -_only(vit, prepare(x), 0).square().mean(dim=(1, 2))


def _ssp(vit: nn.Module, prepare: Callable, pixels: Tensor) -> Cost:
    last = len(vit.blocks) - 1
    with torch.no_grad():
        clean = _only(vit, prepare(pixels), last).square()
    return lambda x: -(_only(vit, prepare(x), last).square() - clean).square().mean(dim=(1, 2))


def _std(vit: nn.Module, prepare: Callable, pixels: Tensor) -> Cost:
    block = min(DISPERSION_BLOCK, len(vit.blocks) - 1)
    return lambda x: _only(vit, prepare(x), block).flatten(1).std(dim=1)


def _fff(vit: nn.Module, prepare: Callable, pixels: Tensor) -> Cost:
    every = range(len(vit.blocks))

    def cost(x: Tensor) -> Tensor:
        energies = [f.square().sum(dim=(1, 2)) / 2 for f in features(vit, prepare(x), every)]
        return -torch.stack(energies).log().sum(dim=0)

    return cost


def _only(vit: nn.Module, images: Tensor, block: int) -> Tensor:
    return features(vit, images, (block,))[0]


COSTS: dict[str, Callable[[nn.Module, Callable, Tensor], Cost]] = {"l4a": _l4a, "ssp": _ssp, "std": _std, "fff": _fff}
