"""What a representation of frames looks like from inside: collapse, similarity, sparsity, attention, a map. Without labels.

Goulao & Oliveira (arXiv 2209.10901) compare self-supervised encoders of games by these pictures:

* the singular values of the covariance of features, and how many are not negligible: a collapsed encoder has few;
* effective rank: exp of the entropy of the eigenvalues of the covariance, 1 to D (`effective_rank`);
* cosine similarity of observations within a stream, across streams, and of consecutive ones: a collapsed encoder says that
  all are the same;
* sparsity of every block's output: the share of entries that are nearly zero. The authors give no threshold, so it is an
  argument, as a share of the layer's own root mean square; and Hoyer's measure, which needs none;
* attention of the class token in the last block, head by head (`vitkit.tokens.attention_maps`);
* a t-SNE map of observations, coloured by stream.

`vitkit rl look` writes them as a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError

NEGLIGIBLE = 1e-3  # a singular value below this share of the largest


def observe(images: Images, view: Callable) -> Tensor:
    """All observations of moments, uint8 (N, C, H, W)."""
    if not len(images):
        raise DataError(f"{images.name}: no observations", fix="check the split and the path")
    return torch.stack([view(images.decode(i)) for i in range(len(images))])


def outputs(vit: nn.Module, observations: Tensor, *, batch_size: int = 64) -> np.ndarray:
    """Pooled features (N, D) of observations (N, C, H, W), float32."""
    return np.concatenate([_pooled(vit, part) for part in observations.split(batch_size)])


def outputs_of(vit: nn.Module, images: Images, view: Callable, *, batch_size: int = 64) -> np.ndarray:
    """`outputs` of all moments of `images`, batch by batch: only features stay in memory."""
    parts = (range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size))
    return np.concatenate([_pooled(vit, torch.stack([view(images.decode(i)) for i in part])) for part in parts])


@torch.inference_mode()
def _pooled(vit: nn.Module, observations: Tensor) -> np.ndarray:
    device = next(vit.parameters()).device
    x = vit.passport.preprocess.normalise(observations.to(device))
    return tokens.feature(vit, x).float().cpu().numpy()


def singular_values(x: np.ndarray) -> np.ndarray:
    """Singular values (min(N, D),) of the covariance of features (N, D), largest first."""
    x = _rows(x)
    return np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / (len(x) - 1)


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the covariance's eigenvalues as shares: how many directions are in use, 1 to min(N - 1, D)."""
    values = singular_values(x)
    if not values.sum():
        return 1.0
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def in_use(x: np.ndarray, negligible: float = NEGLIGIBLE) -> int:
    """Number of singular values of at least `negligible` of the largest."""
    values = singular_values(x)
    return int((values >= negligible * values[0]).sum()) if values[0] > 0 else 0


def similarity(x: np.ndarray, stream: np.ndarray) -> dict[str, float]:
    """Mean cosine similarity of features (N, D) within a stream, across streams, and of consecutive rows of one."""
    unit = _rows(x) / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
    cosine = unit @ unit.T
    same = stream[:, None] == stream[None]
    off = ~np.eye(len(x), dtype=bool)
    following = stream[1:] == stream[:-1]
    pairs = (unit[1:] * unit[:-1]).sum(1)
    return {
        "consecutive": _mean(pairs[following]),
        "within a stream": _mean(cosine[same & off]),
        "across streams": _mean(cosine[~same]),
    }


@torch.inference_mode()
def sparsity(vit: nn.Module, observations: Tensor, *, threshold: float = 0.1) -> list[dict[str, float]]:
    """For every block's output tokens: "near zero", the share of entries below `threshold` times the layer's root mean
    square, and "hoyer", (sqrt(D) - |v|_1 / |v|_2) / (sqrt(D) - 1), mean over tokens: 0 all alike, 1 a single entry."""
    if threshold <= 0:
        raise ConfigError(f"threshold is {threshold:g}", fix="a share of the layer's root mean square, e.g. 0.1")
    normalised = vit.passport.preprocess.normalise(observations.to(next(vit.parameters()).device))
    taps = tokens.encode(vit, normalised, layers=range(len(vit.blocks)), norm=False).taps
    found = []
    for tap in taps:
        values = tap.all.float()
        near = (values.abs() < threshold * values.square().mean().sqrt()).float().mean()
        root = math.sqrt(values.shape[-1])
        hoyer = (root - values.abs().sum(-1) / values.norm(dim=-1).clamp_min(1e-12)) / (root - 1)
        found.append({"near zero": float(near), "hoyer": float(hoyer.mean())})
    return found


@torch.inference_mode()
def attention(vit: nn.Module, observations: Tensor) -> Tensor:
    """Attention (B, heads, h, w) of the class token to patches in the last block; the mean of patches' rows without one."""
    normalised = vit.passport.preprocess.normalise(observations.to(next(vit.parameters()).device))
    weights = tokens.attention_maps(vit, normalised)[0]
    prefix, grid = vit.num_prefix_tokens, tokens.grid_of(vit, observations.shape[2:])
    columns = weights[..., -math.prod(grid) :]
    rows = columns[:, :, 0] if prefix else columns.mean(2)
    return rows.unflatten(-1, grid).cpu()


def tsne(x: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Two coordinates (N, 2) of each feature by t-SNE on cosine distances."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(_rows(x))


@dataclass(frozen=True)
class Analysis:
    """All of the above of one encoder on one data set."""

    features: np.ndarray
    stream: np.ndarray  # (N,) number of the stream of each row
    singular: np.ndarray
    rank: float
    used: int
    similar: dict[str, float]
    sparse: list[dict[str, float]]
    shown: Tensor  # (S, C, H, W) observations
    looked: Tensor  # (S, heads, h, w)


def analyse(vit: nn.Module, images: Images, view: Callable, *, threshold: float = 0.1, limit: int = 1000) -> Analysis:
    """Everything about `vit` on at most `limit` consecutive-as-possible moments of `images`."""
    vit = tokens.require_vit(vit).eval()
    rows = np.arange(len(images)) if len(images) <= limit else _runs(len(images), limit)
    part = images.subset(rows)
    observations = observe(part, view)
    x = outputs(vit, observations)
    if not np.isfinite(x).all():
        raise DataError(f"{images.name}: the encoder gives NaN or infinite features", fix="use an intact checkpoint")
    stream = part.store.which[part.rows]
    some = observations[np.linspace(0, len(part) - 1, num=min(len(part), 32)).astype(int)]
    first = [int(np.flatnonzero(stream == s)[len(np.flatnonzero(stream == s)) // 2]) for s in np.unique(stream)[:6]]
    values = singular_values(x)
    return Analysis(
        x, stream, values, effective_rank(x), in_use(x), similarity(x, stream), sparsity(vit, some, threshold=threshold),
        observations[first], attention(vit, observations[first]),
    )  # fmt: skip


def _runs(count: int, limit: int, length: int = 20) -> np.ndarray:
    """`limit` of `count` rows in evenly spread runs of `length` neighbours, so that consecutive ones are among them."""
    starts = np.linspace(0, count - length, num=max(1, limit // length)).astype(int)
    return np.unique(np.concatenate([np.arange(start, start + length) for start in starts]))


def _rows(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise DataError(f"features of shape {x.shape}", fix="(N, D) with two rows or more")
    return x


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
