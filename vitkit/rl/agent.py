"""The network of Rainbow on top of a ViT: dueling, distributional, noisy heads on the pooled feature of stacked frames.

Dueling: Wang et al. (arXiv 1511.06581). Distributional: Bellemare et al. (arXiv 1707.06887). Noisy: Fortunato et al.
(arXiv 1706.10295). Together: Hessel et al., "Rainbow" (arXiv 1710.02298).
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.data.frame_views import Observe


class NoisyLinear(nn.Module):
    """A linear layer with factorised Gaussian noise on its weights, drawn in every training forward; none in eval mode."""

    def __init__(self, inputs: int, outputs: int, sigma: float):
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), sigma * bound))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), sigma * outputs**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight, self.bias)
        rows, columns = _noise(self.weight.shape[1], x), _noise(self.weight.shape[0], x)
        # (W + S * (c r^T)) x = W x + c * (S (r * x)): no noisy matrix is made.
        return F.linear(x, self.weight, self.bias + self.bias_sigma * columns) + columns * F.linear(
            x * rows, self.weight_sigma
        )


class Heads(nn.Module):
    """Features (B, D) to log-probabilities (B, actions, atoms) of returns on a fixed support."""

    def __init__(self, dim: int, actions: int, *, hidden: int, atoms: int, low: float, high: float, sigma: float):
        super().__init__()
        self.actions, self.atoms = actions, atoms
        self.register_buffer("support", torch.linspace(low, high, atoms))
        self.value = nn.Sequential(NoisyLinear(dim, hidden, sigma), nn.ReLU(), NoisyLinear(hidden, atoms, sigma))
        self.advantage = nn.Sequential(
            NoisyLinear(dim, hidden, sigma), nn.ReLU(), NoisyLinear(hidden, actions * atoms, sigma)
        )

    def forward(self, x: Tensor) -> Tensor:
        advantage = self.advantage(x).unflatten(1, (self.actions, self.atoms))
        return (self.value(x).unsqueeze(1) + advantage - advantage.mean(1, keepdim=True)).log_softmax(-1)

    def returns(self, x: Tensor) -> Tensor:
        """Expected return (B, actions)."""
        return (self(x).exp() * self.support).sum(-1)


class Encoder(nn.Module):
    """Stacks of frames uint8 (B, frames, H, W) to features (B, D) of a ViT, prepared as its passport says."""

    def __init__(self, vit: nn.Module, frames: int = 3):
        super().__init__()
        self.vit = tokens.require_vit(vit)
        self.frames, self.dim = frames, vit.num_features
        self.fit = Observe(tuple(vit.passport.preprocess.image_size), tuple(vit.patch_embed.patch_size), frames).fit

    def forward(self, stacks: Tensor) -> Tensor:
        return tokens.feature(self.vit, self.vit.passport.preprocess.normalise(self.fit(stacks)))


class SmallCNN(nn.Module):
    """The encoder of data-efficient Rainbow (van Hasselt et al. 2019, arXiv 1906.05243): two convolutions of stride 5."""

    def __init__(self, frames: int, size: int):
        super().__init__()
        self.frames = frames
        self.layers = nn.Sequential(
            nn.Conv2d(frames, 32, 5, stride=5), nn.ReLU(), nn.Conv2d(32, 64, 5, stride=5), nn.ReLU(), nn.Flatten()
        )
        side = (size - 5) // 5 + 1
        self.dim = 64 * ((side - 5) // 5 + 1) ** 2

    def forward(self, stacks: Tensor) -> Tensor:
        return self.layers(stacks.float() / 255)


class Agent:
    """Encoder and heads as a player: `see` a frame, then `act`. It remembers the frames of the running episode."""

    def __init__(self, encoder: nn.Module, heads: Heads):
        self.encoder, self.heads = encoder, heads
        self._recent: deque[np.ndarray] = deque(maxlen=encoder.frames)
        self._feature: Tensor | None = None

    def begin(self) -> None:
        """Forget the frames of the last episode."""
        self._recent.clear()

    def see(self, frame: np.ndarray) -> None:
        if not self._recent:
            self._recent.extend([frame] * (self.encoder.frames - 1))
        self._recent.append(frame)
        self._feature = None

    @torch.no_grad()
    def feature(self) -> Tensor:
        """Of the last frames seen, (1, D), computed once a frame."""
        if self._feature is None:
            stack = torch.from_numpy(np.stack(self._recent)).unsqueeze(0)
            self._feature = self.encoder(stack.to(self.heads.support.device))
        return self._feature

    @torch.no_grad()
    def act(self) -> int:
        """The action with the largest expected return; noise explores in train mode."""
        return int(self.heads.returns(self.feature()).argmax(1))


def project(rewards: Tensor, discount: Tensor, probabilities: Tensor, support: Tensor) -> Tensor:
    """The distribution (B, atoms) of reward + discount * return, put back on the support (arXiv 1707.06887, algorithm 1)."""
    step = support[1] - support[0]
    places = (rewards.unsqueeze(1) + discount.unsqueeze(1) * support).clamp(float(support[0]), float(support[-1]))
    b = ((places - support[0]) / step).clamp(0, len(support) - 1)  # (B, atoms), fractional index
    # Each atom's probability goes to its two neighbours by distance: a triangle of width one around every atom.
    share = (1 - (b.unsqueeze(1) - torch.arange(len(support), device=b.device).view(1, -1, 1)).abs()).clamp(min=0)
    return (share * probabilities.unsqueeze(1)).sum(-1)


def _noise(count: int, like: Tensor) -> Tensor:
    x = torch.randn(count, device=like.device, dtype=like.dtype)
    return x.sign() * x.abs().sqrt()
