"""DTA: attack a downstream model through nothing but its public pre-trained trunk, and learn how much it leaks.

Paper: Zheng et al., "Downstream Transfer Attack: Adversarial Attacks on Downstream Models with Pre-trained Vision
Transformers", 2024 (arXiv 2408.01705). No code of the paper is public; the authors' later toolbox is OpenTAI/taiadv.

What happens, and where: with f_l(x) the tokens after block l, every image is moved within |d|_inf <= eps in pixel space
so that the average token cosine similarity, the mean over tokens of cos(f_l(x)_t, f_l(x + d)_t) (`similarity`), becomes
small: PGD from a uniform start, clean features computed once, only blocks up to l run (`DTA`). The layer is searched on
unlabelled images (`DTA.search`): a short attack at each block, scored by its footprint, the mean similarity over all
blocks; the lowest is chosen. The downstream model is never called. `objective=flat, param=tanh, layer=output` is the
feature attack of the toolbox. Several encoders are attacked together, their similarities averaged.

Differs from the paper: its text was not available beyond the abstract, so the search score, eps, steps and step size are
this project's reading; similarity at the last block alone is not used as a score, since it always elects that block.

Cost: steps x (l + 1) / L forward and backward passes without weight gradients; the search about steps / 2 x (L + 1) / 2
of them on the calibration images.

    vitkit attack runs/a --data photos/ --eps 8/255 --out runs/a-attacked
    vitkit.attack("runs/a", data="photos/", eps=8 / 255, out="runs/a-attacked")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.attack.encoder import normaliser
from vitkit.attack.pgd import Cost, Crafted, check_pixels, frozen, sign_descent, sign_noise, tanh_descent
from vitkit.errors import ConfigError
from vitkit.parts.jpeg import jpeg
from vitkit.settings import check_choices


@dataclass(frozen=True)
class Settings:
    """The Downstream Transfer Attack."""

    eps: float = 10 / 255
    """largest change of a pixel value in [0, 1], before any normalisation (10/255 in the authors' toolbox)"""
    steps: int = 10
    """gradient steps an image (10 in the toolbox)"""
    step_size: float | Literal["auto"] = "auto"
    """change a step; auto = eps / 4 for sign steps, Adam's learning rate 1 for tanh (toolbox)"""
    layer: int | tuple[int, ...] | Literal["auto", "output"] = "auto"
    """block attacked (0 is the first, -1 the last), several together, output = after the final norm; auto = searched"""
    exploit: int = 1
    """how many of the most vulnerable blocks a search chooses to attack together"""
    search: Literal["full", "coarse"] = "full"
    """blocks tried: all, or every third one and then the neighbours of the best"""
    calibration: int = 32
    """unlabelled images that the search looks at"""
    objective: Literal["token", "flat"] = "token"
    """cosine of each token, averaged (the paper's), or one cosine of all tokens as one vector (toolbox)"""
    tokens: Literal["all", "patches", "prefix"] = "all"
    """tokens that are compared; prefix is the class token and registers"""
    param: Literal["sign", "tanh"] = "sign"
    """sign steps on pixels, or Adam on n in x + eps tanh(n) (toolbox)"""
    jpeg: int = 0
    """quality of a differentiable JPEG between attack and encoder, so that examples survive saving; 0 = none"""

    def __post_init__(self) -> None:
        if isinstance(self.layer, str) and self.layer not in ("auto", "output"):
            raise ConfigError(f"layer is {self.layer!r}", fix="a block such as 8, several such as 7,8, auto or output")
        check_choices(self)
        if not 0 <= self.eps <= 1:
            hint = f"{self.eps:g}/255" if 1 < self.eps <= 255 and self.eps == int(self.eps) else "8/255"
            raise ConfigError(f"eps is {self.eps:g}, and pixels are in [0, 1]", fix=f"a share of it, e.g. {hint}")
        for name in ("steps", "exploit", "calibration"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="1 or more")
        if self.step_size != "auto" and self.step_size <= 0:
            raise ConfigError(f"step_size is {self.step_size:g}", fix="a positive number, or auto")
        if not 0 <= self.jpeg <= 100:
            raise ConfigError(f"jpeg is {self.jpeg}", fix="a quality of 1 to 100, e.g. 75, or 0 for none")

    @property
    def step(self) -> float:
        """The step size in numbers."""
        if self.step_size != "auto":
            return float(self.step_size)
        return self.eps / 4 if self.param == "sign" else 1.0


@dataclass(frozen=True)
class Profile:
    """What a search found in one encoder; every similarity is a mean over the calibration images.

    similarity[i][j]: at block j, between clean images and those attacked at block candidates[i]. footprint[i]: its mean
    over all blocks, lower = more vulnerable. noise: the footprint of random noise of the same size.
    """

    candidates: tuple[int, ...]
    similarity: tuple[tuple[float, ...], ...]
    footprint: tuple[float, ...]
    noise: float
    chosen: tuple[int, ...]
    depth: int
    images: int

    def row(self, block: int) -> tuple[float, ...]:
        """Similarity at every block when `block` is attacked."""
        return self.similarity[self.candidates.index(block)]


class DTA:
    """The attack through one encoder or several (timm ViTs with a passport). `search` first where layer is auto.

        attack = DTA(vit, Settings(eps=8 / 255))
        attack.search(unlabelled)          # (B, C, H, W) in [0, 1] or uint8; chooses the block, returns the profile
        adversarial = attack(pixels)       # (B, C, H, W) in [0, 1]

    Encoders are put in eval mode without weight gradients while they work, and then back as they were.
    """

    def __init__(self, encoders: nn.Module | Sequence[nn.Module], settings: Settings = Settings()):
        self.encoders = [encoders] if isinstance(encoders, nn.Module) else list(encoders)
        if not self.encoders:
            raise ConfigError("no encoder was given", fix="a ViT, or a list of ViTs")
        self.settings = settings
        self.prepare = [normaliser(tokens.require_vit(vit)) for vit in self.encoders]
        # One entry an encoder: block numbers, or "output"; None until a search has chosen.
        self.layers: list[tuple[int, ...] | Literal["output"]] | None = None
        if settings.layer != "auto":
            self.layers = [_blocks(vit, settings.layer) for vit in self.encoders]

    def search(self, pixels: Tensor, seeds: Tensor | None = None) -> list[Profile]:
        """Choose the blocks of each encoder on unlabelled `pixels` (the first `calibration` of them); their profiles."""
        pixels = check_pixels(pixels)[: self.settings.calibration]
        if not len(pixels):
            raise ConfigError("the layer search got no images", fix="some unlabelled images, e.g. 32")
        seeds = None if seeds is None else seeds[: len(pixels)]
        with frozen(self.encoders):
            pairs = zip(self.encoders, self.prepare, strict=True)
            profiles = [_search(vit, prepare, pixels, seeds, self.settings) for vit, prepare in pairs]
        self.layers = [profile.chosen for profile in profiles]
        return profiles

    def __call__(self, pixels: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Adversarial pixels in [0, 1], no further than eps from `pixels` (B, C, H, W). seeds: (B,) whole numbers, one
        an image, of its random start; by default its place in the batch."""
        return self.crafted(pixels, seeds).pixels

    def crafted(self, pixels: Tensor, seeds: Tensor | None = None, noise: Tensor | None = None) -> Crafted:
        """As a call, with the similarity before every step. noise: the start (B, C, H, W) in [-1, 1] instead of a seeded
        one; with param=tanh it is n, and holds its final value afterwards."""
        pixels, settings = self._on_device(pixels), self.settings
        with frozen(self.encoders):
            cost = self.cost(pixels)
            descend = tanh_descent if settings.param == "tanh" else sign_descent
            own: dict[str, Any] = {"eps": settings.eps, "steps": settings.steps, "step_size": settings.step}
            return descend(cost, pixels, **own, seeds=seeds, noise=noise)

    def cost(self, pixels: Tensor) -> Cost:
        """Similarity (B,) to the clean `pixels`, averaged over encoders and blocks; clean features are computed here, once."""
        if self.layers is None:
            raise ConfigError("layer is auto and was not searched", fix="attack.search(unlabelled images), or layer=8")
        settings = self.settings
        parts = []
        for vit, prepare, layers in zip(self.encoders, self.prepare, self.layers, strict=True):
            with torch.no_grad():
                clean = features(vit, prepare(pixels), layers, settings.tokens)
            parts.append((vit, prepare, layers, clean))

        def average(changed: Tensor) -> Tensor:
            seen = jpeg(changed, settings.jpeg) if settings.jpeg else changed
            total, count = torch.zeros(len(changed), device=changed.device), 0
            for vit, prepare, layers, clean in parts:
                for a, b in zip(clean, features(vit, prepare(seen), layers, settings.tokens), strict=True):
                    total, count = total + similarity(b, a, settings.objective), count + 1
            return total / count

        return average

    def _on_device(self, pixels: Tensor) -> Tensor:
        return check_pixels(pixels).to(next(self.encoders[0].parameters()).device)


def craft(
    encoders: nn.Module | Sequence[nn.Module],
    pixels: Tensor,
    settings: Settings = Settings(),
    *,
    seeds: Tensor | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Adversarial pixels for `pixels` (B, C, H, W), `batch_size` at a time. With layer=auto the block is searched on the
    first `calibration` of them (no labels are needed); to attack several sets alike, keep a `DTA`."""
    attack = DTA(encoders, settings)
    pixels = check_pixels(pixels)
    if attack.layers is None:
        attack.search(pixels)
    seeds = torch.arange(len(pixels)) if seeds is None else torch.as_tensor(seeds)
    pairs = zip(pixels.split(batch_size), seeds.split(batch_size), strict=True)
    return torch.cat([attack(part, own) for part, own in pairs])


def similarity(a: Tensor, b: Tensor, objective: Literal["token", "flat"] = "token") -> Tensor:
    """(B,) from tokens (B, T, D): the average token cosine similarity, or one cosine of all tokens flattened.

    A token of large norm outweighs the rest in the flat cosine; in the average every token counts the same.
    """
    if objective == "flat":
        return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)
    return F.cosine_similarity(a, b, dim=-1).mean(dim=1)


def features(
    vit: nn.Module, images: Tensor, layers: Sequence[int] | Literal["output"], which: str = "all"
) -> list[Tensor]:
    """Tokens (B, T, D) of normalised `images` after each of `layers` (ascending block numbers), before the final norm;
    no block beyond the last of them runs. "output": after all blocks and the final norm. Half precision comes as float32:
    costs are made of them."""
    stream, start, found = tokens.embed(vit, images), 0, []
    for block in (len(vit.blocks) - 1,) if layers == "output" else layers:
        stream, start = tokens.run(vit, stream, start, block + 1), block + 1
        if which == "all":  # as the stream has them: taking them apart and together again would copy every token
            found.append(vit.norm(stream.x) if layers == "output" else stream.x)
            continue
        parts = tokens.finish(vit, stream, norm=layers == "output")
        chosen = parts.patches if which == "patches" else parts.prefix
        if not chosen.shape[1]:
            raise ConfigError("tokens is prefix, and this ViT has no class token or registers", fix="tokens=all")
        found.append(chosen)
    return [one.float() if one.dtype in (torch.float16, torch.bfloat16) else one for one in found]


def _search(
    vit: nn.Module, prepare: Callable[[Tensor], Tensor], pixels: Tensor, seeds: Tensor | None, settings: Settings
) -> Profile:
    """The profile of one encoder: a short attack at each candidate block, its footprint over all blocks."""
    pixels = pixels.to(next(vit.parameters()).device)
    depth = len(vit.blocks)
    with torch.no_grad():
        clean = features(vit, prepare(pixels), range(depth), settings.tokens)

    @torch.no_grad()
    def over_blocks(changed: Tensor) -> tuple[float, ...]:
        other = features(vit, prepare(changed), range(depth), settings.tokens)
        return tuple(float(similarity(b, a).mean()) for a, b in zip(clean, other, strict=True))

    def attacked(block: int) -> tuple[float, ...]:
        def cost(changed: Tensor) -> Tensor:
            seen = jpeg(changed, settings.jpeg) if settings.jpeg else changed
            (now,) = features(vit, prepare(seen), (block,), settings.tokens)
            return similarity(now, clean[block], settings.objective)

        descend = tanh_descent if settings.param == "tanh" else sign_descent
        few = max(1, settings.steps // 2)
        found = descend(cost, pixels, eps=settings.eps, steps=few, step_size=settings.step, seeds=seeds)
        return over_blocks(found.pixels)

    first = range(depth) if settings.search == "full" else [*range(2, depth, 3)] or [depth - 1]
    found = {block: attacked(block) for block in first}
    if settings.search == "coarse":
        best = min(found, key=lambda block: sum(found[block]))
        near = (best - 2, best - 1, best + 1, best + 2)
        found |= {block: attacked(block) for block in near if 0 <= block < depth and block not in found}
    order = sorted(found)
    prints = {block: sum(found[block]) / depth for block in order}
    if settings.exploit > len(order):
        few = len(order)
        raise ConfigError(f"exploit is {settings.exploit}, and {few} blocks were tried", fix=f"at most {few}")
    chosen = sorted(sorted(order, key=prints.__getitem__)[: settings.exploit])
    noise = over_blocks(sign_noise(pixels, settings.eps, seeds))
    rows = tuple(found[block] for block in order)
    footprint = tuple(prints[block] for block in order)
    return Profile(tuple(order), rows, footprint, sum(noise) / depth, tuple(chosen), depth, len(pixels))


def _blocks(vit: nn.Module, layer: int | tuple[int, ...] | str) -> tuple[int, ...] | Literal["output"]:
    """Ascending block numbers of `vit` for a `layer` setting other than auto."""
    if isinstance(layer, str):
        return "output"
    depth = len(tokens.require_vit(vit).blocks)
    asked = (layer,) if isinstance(layer, int) else tuple(layer)
    odd = [one for one in asked if not -depth <= one < depth]
    if odd or not asked:
        named = f"layer {odd[0]} does not exist" if odd else "layer names no block"
        raise ConfigError(named, fix=f"the encoder has blocks 0..{depth - 1} (or -{depth}..-1)")
    return tuple(sorted({one % depth for one in asked}))
