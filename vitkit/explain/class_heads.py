"""What the heads of a Prompt-CAM model look at, and which of them a class needs.

Source: Chowdhury et al., CVPR 2025 (arXiv 2501.09333), and the notebook of Imageomics/Prompt_CAM. In the last block the
attention of class c's prompt, one map a head, shows where c looks for its evidence. Blurring a head replaces the logits
of that one row by zeros, so that it looks everywhere alike. Greedy ranking blurs, one after the other, the head without
which the class keeps the highest score; the order reversed is from most to least important.

Blurring row c changes the score of c and nothing else. So one forward is enough: it leaves each head's focused output
and the mean of its values, and a trial of some blurred heads is one token through projection, MLP, norm and scorer,
all trials and images at once (`Evidence.score`). The numbers are those of a full forward for each of the R (R + 1) / 2
trials.

Shapes: B images, C classes, R heads, N patches of grid (h, w), T tokens in all (extra keys, prompts, prefix, patches).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.explain.shared import evaluating
from vitkit.parts.attention import project

Target = int | Tensor


@dataclass
class Evidence:
    """What class `target` (B,) of each image sees in the last block.

    attention: (B, R, T) of its prompt's row; focused, uniform: (B, R, d) what each head gathers by it, and when blurred.
    token: (B, D) the prompt before attention. rest: where a block's MLP half mixes tokens, all of them after attention.
    """

    vit: Any
    target: Tensor
    grid: tuple[int, ...]
    attention: Tensor
    focused: Tensor
    uniform: Tensor
    token: Tensor
    rest: Tensor | None

    @property
    def maps(self) -> Tensor:
        """Attention of the class to the patches, (B, R, *grid). A map does not sum to 1: other tokens take their share."""
        return self.attention[..., -math.prod(self.grid) :].unflatten(-1, self.grid)

    def score(self, blurred: Tensor) -> Tensor:
        """Scores (B, n) of the target class with the heads `blurred` (B, n, R) bool."""
        last, count = self.vit.blocks[-1], blurred.shape[1]
        heads = torch.where(blurred.unsqueeze(-1), self.uniform.unsqueeze(1), self.focused.unsqueeze(1))  # (B, n, R, d)
        x = self.token.unsqueeze(1).expand(-1, count, -1)
        out = project(last.attn, heads.transpose(1, 2), last.norm1(x))
        x = x + tokens.scaled(last, out, 1)
        if self.rest is None:
            z = tokens.transform(last, x)
        else:
            z = torch.stack([self._among_all(self.rest, x[:, trial]) for trial in range(count)], dim=1)
        return self.vit.score(self.vit.norm(z))

    def _among_all(self, rest: Tensor, x: Tensor) -> Tensor:
        """The target's row after an MLP half that mixes tokens, its attention output being `x` (B, D)."""
        rows, everything = torch.arange(len(x), device=x.device), rest.clone()
        everything[rows, self.target] = x
        return tokens.transform(self.vit.blocks[-1], everything)[rows, self.target]


@dataclass
class Ranking:
    """heads: (B, R) from most to least important; scores: (B, R + 1), of the class with only the first 0, 1, ... R heads
    of that order left; evidence: what it was made of."""

    heads: Tensor
    scores: Tensor
    evidence: Evidence

    def top_maps(self, count: int) -> Tensor:
        """Maps (B, min(count, R), *grid) of the most important heads, as they were before any was blurred."""
        maps = self.evidence.maps
        first = self.heads[:, :count].view(len(maps), -1, *[1] * len(self.evidence.grid))
        return maps.gather(1, first.expand(-1, -1, *self.evidence.grid))


@torch.no_grad()
def evidence(vit: nn.Module, images: Tensor, target: Target) -> Evidence:
    """What class `target` (one for all, or (B,)) sees in normalised `images` (B, C, H, W)."""
    target = checked_target(vit, images, target)
    with evaluating(vit):
        return _evidence(vit, images, target)


def _evidence(vit: Any, images: Tensor, target: Tensor) -> Evidence:
    x, rope, grid = vit.before_last(images)
    last = vit.blocks[-1]
    rest = None if getattr(last, "tokenwise", True) else tokens.attend(last, x, **rope)
    # Class prompts have no positions: moving the asked one to the front leaves it the only row to compute.
    order = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    order[:, 0] = target
    order.scatter_(1, target.unsqueeze(1), 0)
    swapped = x.gather(1, order.unsqueeze(-1).expand_as(x))
    weights, values = tokens.attention_values(last, swapped, queries=1, **rope)
    focused = (weights @ values).squeeze(2)
    keys, own = weights.squeeze(2).split([weights.shape[-1] - x.shape[1], x.shape[1]], dim=-1)
    attention = torch.cat(
        [keys, own.gather(-1, order.unsqueeze(1).expand_as(own))], dim=-1
    )  # in the order of `x` again
    return Evidence(vit, target, grid, attention, focused, values.mean(2), swapped[:, 0], rest)


@torch.no_grad()
def class_attention(vit: nn.Module, images: Tensor) -> Tensor:
    """Attention of every class prompt in the last block, (B, R, C, T): extra keys, prompts, prefix, then patches."""
    count = len(require_class_prompts(vit).class_prompts)
    with evaluating(vit):
        x, rope, _ = vit.before_last(images)
        return tokens.attention_of(vit.blocks[-1], x, queries=count, **rope)


def class_maps(vit: nn.Module, images: Tensor, classes: Target) -> Tensor:
    """Attention of a class (one for all images, or (B,)) to the patches in the last block, (B, R, h, w)."""
    return evidence(vit, images, classes).maps


@torch.no_grad()
def rank(vit: nn.Module, images: Tensor, target: Target) -> Ranking:
    """Greedy ranking of the heads for class `target`; of equal ones the lowest index is blurred first."""
    with evaluating(vit):
        return _greedy(evidence(vit, images, target))


def _greedy(found: Evidence) -> Ranking:
    batch, count = found.focused.shape[:2]
    blurred = torch.zeros(batch, 1, count, dtype=torch.bool, device=found.token.device)
    order, scores = [], [found.score(blurred)]
    for step in range(count):
        left = (~blurred[:, 0]).nonzero()[:, 1].view(batch, count - step)
        trials = blurred.repeat(1, count - step, 1).scatter_(2, left.unsqueeze(-1), True)
        each = found.score(trials)  # (B, heads left)
        highest = each.max(1, keepdim=True).values
        places = torch.arange(count - step, device=each.device).expand_as(each)
        first = places.masked_fill(each < highest, count).min(1, keepdim=True).values
        blurred.scatter_(2, left.gather(1, first).unsqueeze(1), True)
        order.append(left.gather(1, first))
        scores.append(highest)
    return Ranking(torch.cat(order[::-1], dim=1), torch.cat(scores[::-1], dim=1), found)


def rank_heads(vit: nn.Module, images: Tensor, target: Target) -> Tensor:
    """Heads (B, R) of the last block from most to least important for class `target` of normalised `images`."""
    return rank(vit, images, target).heads


def saliency(vit: nn.Module, images: Tensor, target: Target, top: int = 4) -> Tensor:
    """Where class `target` finds its evidence: the mean map (B, h, w) of its `top` heads."""
    if top < 1:
        raise ConfigError(f"top is {top}", fix="at least one head")
    return rank(vit, images, target).top_maps(top).mean(1)


@torch.no_grad()
def blurred_scores(vit: nn.Module, images: Tensor, target: Target, heads: list[int]) -> Tensor:
    """All class scores (B, C) with `heads` blurred for class `target`: only that class's score changes."""
    found = evidence(vit, images, target)
    count = found.focused.shape[1]
    for head in heads:
        if not 0 <= head < count:
            raise ConfigError(f"head {head} does not exist", fix=f"the last block has heads 0..{count - 1}")
    blurred = torch.zeros(len(images), 1, count, dtype=torch.bool, device=images.device)
    blurred[:, :, heads] = True
    with evaluating(vit):
        return vit.class_scores(images).scatter(1, found.target.unsqueeze(1), found.score(blurred))


def require_class_prompts(vit: nn.Module) -> Any:
    """`vit` itself when its head reads class prompts; otherwise an error that says how to get there."""
    if not hasattr(vit, "before_last"):
        raise ConfigError(
            "this ViT has no class prompts", fix="train them: vitkit explain prompt_cam --model M --data D --out R"
        )
    if not vit.reads_prompts:
        raise ConfigError(
            "the class prompts of this ViT are not read: it has another head", fix="use the Prompt-CAM run below it"
        )
    return vit


def checked_target(vit: nn.Module, images: Tensor, target: Target) -> Tensor:
    """`target` as (B,) int64 on the device of `images`; every class must exist."""
    count = len(require_class_prompts(vit).class_prompts)
    classes = torch.as_tensor(target, device=images.device)
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise ConfigError(f"classes of type {classes.dtype}", fix="whole class indices, int or int64")
    classes = classes.long()
    if classes.ndim > 1 or (classes.ndim == 1 and len(classes) != len(images)):
        raise ConfigError(
            f"{tuple(classes.shape)} classes for {len(images)} images", fix="one for all, or one an image"
        )
    wrong = classes[(classes < 0) | (classes >= count)]
    if wrong.numel():
        raise ConfigError(
            f"class {int(wrong.flatten()[0])} does not exist", fix=f"the model has classes 0..{count - 1}"
        )
    return classes.expand(len(images))
