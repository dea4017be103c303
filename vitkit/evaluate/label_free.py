"""What can be said about features without any label: their rank and spread, whether a picture is recognised in another
view, and how far two models agree.

None of these is quality itself. The rank says how many directions are in use (a collapsed model uses few), and view
consistency that what does not matter to a person (crop, mirroring, light) does not matter to the model; what matters to
*your* task only labels can tell.

* `effective_rank`: RankMe, the exponential of the entropy of the singular values (Garrido et al. 2023, arXiv 2210.02885);
* `alignment` and `uniformity`: Wang & Isola 2020, arXiv 2005.10242;
* `found_again`: of the features of all images in a second view, is the nearest one the image's own?
* `views`: the same `Images` seen through random changes, the same for every model, which `features` reads and caches;
* `cka`: unbiased linear CKA of two models (Kornblith et al. 2019, arXiv 1905.00414; the HSIC estimate of Song et al. 2012,
  as the biased one is near 1 for few images in many dimensions); `neighbour_overlap`: shared k nearest neighbours.

Features are (N, D) arrays, one row an image.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from vitkit.data.images import Images, Store
from vitkit.errors import ConfigError, DataError

_BLOCK = 2048  # rows compared at once


# ---------------------------------------------------------------- one model


def effective_rank(x: np.ndarray) -> float:
    """RankMe: between 1 (all features on one line) and min(N, D). Not centred, as published; depends on N, so compare
    models on the same images only."""
    singular = np.linalg.svd(_rows(x), compute_uv=False)
    if not singular.any():
        return 1.0
    share = singular / singular.sum() + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def alignment(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared distance of the unit features of two views of the same images: 0 = the same, 2 = unrelated."""
    return float((2 - 2 * (_unit(a) * _unit(b)).sum(1)).mean())


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
    """log of the mean of exp(-t distance^2) over pairs of unit features: 0 = all in one point, near -2t = evenly spread."""
    x = _unit(x)
    total = 0.0
    for start in range(0, len(x), _BLOCK):
        total += np.exp(-t * np.clip(2 - 2 * x[start : start + _BLOCK] @ x.T, 0, None)).sum()
    return math.log((total - len(x)) / (len(x) * (len(x) - 1)))


def found_again(query: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Is row i of `gallery` nearest to row i of `query`? (hit (N,) bool, margin (N,), the nearest *other* row (N,)).

    By cosine similarity; a tie is no hit. margin: own similarity minus that of the nearest other, in standard
    deviations of the similarities to all others, so that models of any scale can be compared.
    """
    query, gallery = _unit(query), _unit(gallery)
    if query.shape != gallery.shape:
        raise DataError(
            f"views of shapes {query.shape} and {gallery.shape}", fix="give both views of the same images, same model"
        )
    hit, margin, other = np.zeros(len(query), bool), np.zeros(len(query)), np.zeros(len(query), np.int64)
    for start in range(0, len(query), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(query)))
        near = query[rows] @ gallery.T
        own = near[np.arange(len(rows)), rows].copy()
        near[np.arange(len(rows)), rows] = np.nan
        other[rows] = np.nanargmax(near, 1)
        best, spread = np.nanmax(near, 1), np.nanstd(near, 1)
        hit[rows] = own > best + 1e-9
        margin[rows] = (own - best) / np.maximum(spread, 1e-9)
    return hit, margin, other


# ---------------------------------------------------------------- two models


def cka(a: np.ndarray, b: np.ndarray) -> float:
    """How alike two models arrange the same images, whatever their dimensions: 1 = alike up to rotation and scale, 0 = not
    at all (unbiased, so that it may fall slightly below). NaN where a model gives all images the same feature."""
    a, b = _same_images(a, b)
    if len(a) < 4:
        raise DataError(f"CKA of {len(a)} images", fix="at least 4")
    grams = [_zero_diagonal(x @ x.T) for x in (a - a.mean(0), b - b.mean(0))]
    norms = [_hsic(gram, gram) for gram in grams]
    if min(norms) <= 0:
        return math.nan
    return float(_hsic(*grams) / math.sqrt(norms[0] * norms[1]))


def neighbour_overlap(a: np.ndarray, b: np.ndarray, k: int = 10) -> np.ndarray:
    """Share of its `k` nearest images that an image has in both models (N,); chance is k / (N - 1)."""
    a, b = _same_images(a, b)
    if not 1 <= k < len(a):
        raise DataError(f"k is {k} for {len(a)} images", fix="at least 1, and fewer than there are images")
    near = [_neighbours(_unit(x), k) for x in (a, b)]
    return np.array([len(np.intersect1d(one, two)) / k for one, two in zip(*near, strict=True)])


# ---------------------------------------------------------------- views of the same images


@dataclass(frozen=True)
class Changes:
    """How a view differs from its picture. Ranges are drawn uniformly."""

    area: tuple[float, float]
    """share of the area that the crop keeps"""
    light: float
    """brightness, contrast and (of colour pictures) saturation are multiplied by 1 - light to 1 + light"""
    hflip: bool
    """mirrored half of the time"""
    shrink: tuple[float, float] = (1.0, 1.0)
    """sides are divided by this and the picture is stored smaller"""
    quality: tuple[int, int] | None = None
    """compressed as JPEG of this quality"""


CHANGES = {
    "view": Changes(area=(0.5, 0.95), light=0.3, hflip=True),
    "duplicate": Changes(area=(0.85, 0.98), light=0.1, hflip=False, shrink=(1.0, 2.0), quality=(30, 70)),
}


def views(images: Images, kind: Literal["view", "duplicate"], *, seed: int = 0, hflip: bool = True) -> Images:
    """`images` seen through random changes: "view" (crop of 50-95 % of the area, mirroring, light) or "duplicate" (what a
    re-saved copy has gone through: a slight crop, fewer pixels, JPEG). The same `seed` changes every picture the same
    way, whichever model looks; another seed is another view. hflip=False never mirrors.
    """
    if kind not in CHANGES:
        raise ConfigError(f"there are no views called {kind!r}", fix=f"one of {', '.join(CHANGES)}")
    changes = CHANGES[kind] if hflip else replace(CHANGES[kind], hflip=False)
    return replace(images, store=_Changed(images.store, changes, seed), masks=None)


@dataclass(frozen=True)
class _Changed:
    """A `Store` whose pictures are changed, each in its own way that depends on nothing but seed and name."""

    store: Store
    changes: Changes
    seed: int

    def name(self, row: int) -> str:
        return self.store.name(row)

    def stamp(self, row: int) -> str:
        return f"{self.store.stamp(row)} {self.changes} {self.seed}"

    def raw(self, row: int) -> None:
        return None

    def array(self, row: int) -> np.ndarray:
        number = hashlib.blake2b(f"{self.seed} {row}".encode(), digest_size=8).digest()
        return change(self.store.array(row), self.changes, np.random.default_rng(int.from_bytes(number, "little")))


def change(array: np.ndarray, how: Changes, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) -> a changed one, smaller, of the same channels."""
    height, width = array.shape[:2]
    area, ratio = rng.uniform(*how.area), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    h = min(height, max(1, round(height * math.sqrt(area / ratio))))
    w = min(width, max(1, round(width * math.sqrt(area * ratio))))
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    flip, factors, smaller = rng.random() < 0.5, rng.uniform(1 - how.light, 1 + how.light, 3), rng.uniform(*how.shrink)
    image = torch.from_numpy(np.ascontiguousarray(array[top : top + h, left : left + w]))
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    if how.hflip and flip:
        image = image.flip(-1)
    image = F.adjust_contrast(F.adjust_brightness(image, factors[0]), factors[1])
    if len(image) == 3:
        image = F.adjust_saturation(image, factors[2])
    if smaller > 1:
        image = F.resize(image, [max(8, round(h / smaller)), max(8, round(w / smaller))], antialias=True)
    found = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    found = np.ascontiguousarray(found)
    return found if how.quality is None else _jpeg(found, int(rng.integers(how.quality[0], how.quality[1] + 1)))


def _jpeg(array: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


# ---------------------------------------------------------------- rows


def _rows(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise DataError(f"features of shape {x.shape}", fix="give one row an image, at least two images")
    if not np.isfinite(x).all():
        raise DataError("features are not finite", fix="leave out images that could not be read")
    return x


def _unit(x: np.ndarray) -> np.ndarray:
    x = _rows(x)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _same_images(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _rows(a), _rows(b)
    if len(a) != len(b):
        raise DataError(f"features of {len(a)} and {len(b)} images", fix="give both models the same images")
    return a, b


def _zero_diagonal(gram: np.ndarray) -> np.ndarray:
    np.fill_diagonal(gram, 0.0)
    return gram


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Unbiased HSIC of two Gram matrices with zero diagonals (Song et al. 2012, equation 5), times n (n - 3)."""
    n = len(k)
    rows_k, rows_m = k.sum(0), m.sum(0)
    return float((k * m).sum() + rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2)) - 2 * (rows_k @ rows_m) / (n - 2))


def _neighbours(x: np.ndarray, k: int) -> np.ndarray:
    found = []
    for start in range(0, len(x), _BLOCK):
        near = x[start : start + _BLOCK] @ x.T
        near[np.arange(len(near)), np.arange(start, start + len(near))] = -np.inf
        found.append(np.argpartition(-near, k - 1, axis=1)[:, :k])
    return np.concatenate(found)
