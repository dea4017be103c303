"""Stochastic depth as DINOv2 trains with it: the same rate in every block, and above 0.1 by leaving samples out.

Ordinary drop path computes a branch for all samples and zeroes some. Above a rate of 0.1 DINOv2 computes the branch for a
random subset only and adds it scaled by batch / kept, which saves the rate's share of the work. Attention and MLP, and
every crop size, draw their own subset. Source: DINOv2, layers/block.py (`drop_add_residual_stochastic_depth`).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitkit.parts.blocks import Steps, extend

SUBSET_ABOVE = 0.1


class SubsetDepth(Steps):
    """Mixin: in training each half of the block runs on max(int(B (1 - rate)), 1) random samples."""

    subset_rate = 0.0

    def attend(self, x: Tensor, queries: int | None = None, **kwargs: Any) -> Tensor:
        if not self._subset(x) or queries is not None:
            return super().attend(x, queries, **kwargs)
        rows = self._rows(x)
        kwargs = {key: _of(value, rows, len(x)) for key, value in kwargs.items()}
        some = x[rows]
        return self._add(x, rows, super().attend(some, **kwargs) - some)

    def transform(self, x: Tensor) -> Tensor:
        if not self._subset(x):
            return super().transform(x)
        rows = self._rows(x)
        return self._add(x, rows, self.mlp_branch(x[rows]))

    def _subset(self, x: Tensor) -> bool:
        return bool(self.training and self.subset_rate and len(x) > 1)  # type: ignore[attr-defined]

    def _rows(self, x: Tensor) -> Tensor:
        kept = max(int(len(x) * (1 - self.subset_rate)), 1)
        return torch.randperm(len(x), device=x.device)[:kept]

    @staticmethod
    def _add(x: Tensor, rows: Tensor, branch: Tensor) -> Tensor:
        return torch.index_add(x, 0, rows, branch.to(x.dtype), alpha=len(x) / len(rows))


def _of(value: Any, rows: Tensor, batch: int) -> Any:
    """A keyword of a block for some samples: per-sample tables (of kept patches) are cut, others pass."""
    if isinstance(value, Tensor) and value.ndim > 2 and len(value) == batch:
        return value[rows]
    return value


def uniform_depth(vit: nn.Module, most: float = 1.0) -> float:
    """Give every block of `vit`, built with any drop-path rates, their largest, at most `most`; as subsets where that is
    above 0.1. Returns the rate."""
    halves = [half for block in vit.blocks for half in (block.drop_path1, block.drop_path2)]
    rate = min(max((float(getattr(half, "drop_prob", 0.0) or 0.0) for half in halves), default=0.0), most)
    if not rate:
        return 0.0
    for block in vit.blocks:
        ordinary = rate <= SUBSET_ABOVE + 1e-6  # timm's rates went through float32
        block.drop_path1 = DropPath(rate) if ordinary else nn.Identity()
        block.drop_path2 = DropPath(rate) if ordinary else nn.Identity()
        if not ordinary:
            extend(block, SubsetDepth)
            block.subset_rate = rate
    return rate
