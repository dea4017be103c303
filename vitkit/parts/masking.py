"""Which patches are hidden: random masks as in MAE, reproducible per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkit.errors import ConfigError


@dataclass(frozen=True)
class RandomMask:
    """`keep` (B, K) and `masked` (B, N - K) patch indices in shuffled order; together a permutation of all patches."""

    keep: Tensor
    masked: Tensor

    @property
    def restore(self) -> Tensor:
        """(B, N): position of each patch, in original order, in cat(keep, masked)."""
        return torch.cat([self.keep, self.masked], dim=1).argsort(dim=1)

    @property
    def binary(self) -> Tensor:
        """(B, N) float: 1 where hidden, 0 where kept."""
        mask = torch.ones(self.keep.shape[0], self.keep.shape[1] + self.masked.shape[1], device=self.keep.device)
        return mask.scatter_(1, self.keep, 0.0)


def kept_count(patches: int, ratio: float) -> int:
    """int(N * (1 - ratio)), in Python doubles as the reference code: 100 patches at 0.9 keep 9, not 10."""
    kept = int(patches * (1 - ratio))
    if not 0 < kept < patches:
        raise ConfigError(
            f"mask_ratio {ratio} keeps {kept} of {patches} patches",
            fix="choose a ratio that keeps at least one patch and hides at least one, or larger images",
        )
    return kept


def random_mask(noise: Tensor, ratio: float) -> RandomMask:
    """Keep the patches with the smallest `noise` (B, N) in [0, 1). MAE, `random_masking` (models_mae.py)."""
    kept = kept_count(noise.shape[1], ratio)
    order = noise.argsort(dim=1)
    return RandomMask(order[:, :kept], order[:, kept:])


def sample_noise(seeds: Tensor | None, count: int, batch: int, device: torch.device) -> Tensor:
    """Uniform noise (B, `count`): a function of each sample's seed (B,) where given, so that it does not depend on
    batch size or number of processes; from the global generator otherwise."""
    if seeds is None:
        return torch.rand(batch, count, device=device)
    generator = torch.Generator()
    rows = [torch.rand(count, generator=generator.manual_seed(int(seed))) for seed in seeds.tolist()]
    return torch.stack(rows).to(device)
