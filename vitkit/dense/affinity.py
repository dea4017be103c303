"""Neurons and other touching objects by affinities: does a voxel belong to the same object as its neighbour?

The electron-microscopy task of the DINOv3 medical benchmark (Liu et al., arXiv 2509.06467): a decoder regresses one affinity a
direction with a weighted squared error, an agglomeration makes objects of them, scored by variation of information (VOI) and
adapted Rand error. The text does not say how errors are weighted: here pairs of the same object and pairs of none weigh half
each. Its agglomeration (Waterz) stays outside; `objects` joins what affinities above a threshold connect, the simplest one.

Any decoder of `vitkit.dense.decoders` with as many "classes" as there are offsets gives affinities as `logits.sigmoid()`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import ConfigError, DataError

Offset = tuple[int, ...]
PLANE: tuple[Offset, ...] = ((1, 0), (0, 1))
VOLUME: tuple[Offset, ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


def affinities(objects: Tensor, offsets: Sequence[Offset] = VOLUME) -> tuple[Tensor, Tensor]:
    """Targets and which of them count, both (..., K, *spatial), of object numbers (..., *spatial), 0 = background.

    Target k of voxel v is 1 where v and v + offsets[k] carry the same number that is not 0. Pairs that leave the volume do not
    count.
    """
    axes = len(offsets[0])
    targets, known = [], []
    for offset in offsets:
        if len(offset) != axes or objects.ndim < axes or not any(offset):
            raise ConfigError(
                f"offset {offset} of objects of shape {tuple(objects.shape)}", fix="one number an axis, not all 0"
            )
        lead = (slice(None),) * (objects.ndim - axes)
        here, there = (lead + end for end in _ends(offset))
        same = torch.zeros(objects.shape, dtype=torch.float32, device=objects.device)
        inside = torch.zeros(objects.shape, dtype=torch.bool, device=objects.device)
        a = objects[here]
        same[here] = ((a == objects[there]) & (a != 0)).float()
        inside[here] = True
        targets.append(same)
        known.append(inside)
    return torch.stack(targets, -axes - 1), torch.stack(known, -axes - 1)


def weighted_mse(predicted: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Squared error over known pairs; joined and separate pairs weigh half each, whatever their number."""
    error, joined = (predicted - target).square(), target > 0.5
    parts = [error[known & side].mean() for side in (joined, ~joined) if bool((known & side).any())]
    if not parts:
        raise DataError("no pair of voxels counts", fix="objects larger than the offsets")
    return torch.stack(parts).mean()


def objects(
    affinity: np.ndarray, offsets: Sequence[Offset] = VOLUME, *, threshold: float = 0.5, smallest: int = 1
) -> np.ndarray:
    """Object numbers (*spatial) from affinities (K, *spatial): what pairs above `threshold` connect; 0 where a voxel has no
    such pair or its object has fewer than `smallest` voxels."""
    from scipy import sparse

    if len(affinity) != len(offsets):
        raise ConfigError(f"{len(affinity)} affinities for {len(offsets)} offsets", fix="one map an offset")
    shape = affinity.shape[1:]
    number = np.arange(int(np.prod(shape))).reshape(shape)
    first, second = [], []
    for values, offset in zip(affinity, offsets, strict=True):
        here, there = _ends(offset)
        joined = values[here] > threshold
        first.append(number[here][joined])
        second.append(number[there][joined])
    a, b = np.concatenate(first), np.concatenate(second)
    graph = sparse.coo_matrix((np.ones(len(a), bool), (a, b)), shape=(number.size, number.size))
    _, label = sparse.csgraph.connected_components(graph, directed=False)
    touched = np.zeros(number.size, bool)
    touched[a] = touched[b] = True
    size = np.bincount(label)
    kept = touched & (size[label] >= max(smallest, 2))
    out = np.zeros(number.size, np.int64)
    out[kept] = np.unique(label[kept], return_inverse=True)[1] + 1
    return out.reshape(shape)


def voi(y: np.ndarray, said: np.ndarray) -> tuple[float, float]:
    """(split, merge) in bits: H(said | truth), large where objects fall apart, and H(truth | said), large where several become
    one. Their sum is the variation of information. Voxels whose truth is 0 are left out, as CREMI does."""
    joint = _joint(y, said)
    p = joint / joint.sum()
    both = -float((p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum())
    truth, guess = (-float((q[q > 0] * np.log2(q[q > 0])).sum()) for q in (p.sum(1), p.sum(0)))
    return max(both - truth, 0.0), max(both - guess, 0.0)


def arand_error(y: np.ndarray, said: np.ndarray) -> float:
    """1 - F of the pairs of voxels that both put into one object (adapted Rand error); truth 0 is left out."""
    joint = _joint(y, said)
    together = (joint**2).sum()
    return float(1 - 2 * together / ((joint.sum(0) ** 2).sum() + (joint.sum(1) ** 2).sum()))


def _joint(y: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Voxel counts (objects, said objects) as floats."""
    y, said = np.asarray(y).reshape(-1), np.asarray(said).reshape(-1)
    if y.shape != said.shape:
        raise DataError(f"objects of {y.size} voxels and of {said.size}", fix="one shape")
    inside = y != 0
    if not inside.any():
        raise DataError("the truth holds no object", fix="numbers above 0 mark objects")
    a, b = (np.unique(v[inside], return_inverse=True)[1] for v in (y, said))
    width = int(b.max()) + 1
    return np.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).reshape(-1, width).astype(float)


def _ends(offset: Offset) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the voxels that have a partner, and of the partners."""
    here = tuple(slice(max(-d, 0), None if d <= 0 else -d) for d in offset)
    there = tuple(slice(max(d, 0), None if d >= 0 else d) for d in offset)
    return here, there
