"""Finding the same picture twice: exactly, saved again (other size, quality, brightness), or merely looking alike.

A 63-bit hash (signs of the lowest 8 x 8 cosine coefficients of a 32 x 32 grey thumbnail against their median; Zauner
2010, "pHash") finds candidates by Hamming distance. Candidates are then compared by two correlations: of the
thumbnails, and of their finer structure (cosine coefficients above the lowest 4 x 4), which tells two chest X-rays of
one patient, alike in every coarse respect, from one X-ray stored twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SIDE = 32
ALL_PAIRS = 50_000  # up to here every pair is compared; beyond, only those that share a band of the hash
MOST = 100_000  # pairs reported at most: frames of a film would otherwise fill the memory


@dataclass(frozen=True)
class Closeness:
    """When two pictures count as one: at most `bits` of the hash differ, both correlations reach their bounds."""

    bits: int
    coarse: float
    fine: float


# Bounds between what re-saving does and what different pictures reach. Re-saving (JPEG quality 30, half size,
# brightness +20 %, contrast -20 %) of photographs and X-rays: at most 6 bits, both correlations above 0.98. Different
# X-rays of one patient reach 0.976 in the finer structure, different photographs of clothes 0.945.
SAME = Closeness(bits=6, coarse=0.98, fine=0.98)
ALIKE = Closeness(bits=10, coarse=0.95, fine=0.93)


def _cosines(n: int) -> np.ndarray:
    """(n, n) orthonormal DCT-II matrix."""
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.cos(np.pi * (2 * x + 1) * k / (2 * n)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


_DCT = _cosines(SIDE)


def thumbnail(array: np.ndarray) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) -> uint8 (32, 32) grey."""
    from PIL import Image

    return np.asarray(Image.fromarray(array).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def perceptual_hash(thumb: np.ndarray) -> int:
    """uint8 (32, 32) -> 63 bits."""
    low = (_DCT @ thumb.astype(np.float32) @ _DCT.T)[:8, :8].reshape(-1)[1:]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def near_pairs(hashes: np.ndarray, thumbs: np.ndarray, close: Closeness) -> tuple[np.ndarray, bool]:
    """((P, 2) row pairs i < j that are `close`, whether the list was cut at MOST). hashes uint64 (N,), thumbs (N, 32, 32)."""
    found, total = [], 0
    for pairs in _candidates(hashes, close.bits):
        for start in range(0, len(pairs), 4096):
            piece = pairs[start : start + 4096]
            piece = piece[_compare(thumbs[piece[:, 0]], thumbs[piece[:, 1]], close)]
            found.append(piece)
            total += len(piece)
        if total > MOST:
            break
    pairs = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    return pairs[:MOST], total > MOST


def are(hashes: np.ndarray, thumbs: np.ndarray, pairs: np.ndarray, close: Closeness) -> np.ndarray:
    """(P,) whether each of the given pairs is `close`."""
    a, b = pairs[:, 0], pairs[:, 1]
    parts = [slice(start, start + 4096) for start in range(0, len(pairs), 4096)]
    same = [_compare(thumbs[a[part]], thumbs[b[part]], close) for part in parts]
    return np.concatenate([*same, np.zeros(0, bool)]) & (popcount(hashes[a] ^ hashes[b]) <= close.bits)


def _compare(a: np.ndarray, b: np.ndarray, close: Closeness) -> np.ndarray:
    """(P,) bool for thumbnails (P, 32, 32) each."""
    a, b = (_DCT @ x.astype(np.float32) @ _DCT.T for x in (a, b))  # orthonormal: correlations are those of the pixels
    a[:, 0, 0] = b[:, 0, 0] = 0
    same = _correlation(a, b) >= close.coarse
    a[:, :4, :4] = b[:, :4, :4] = 0
    return same & (_correlation(a[:, :24, :24], b[:, :24, :24]) >= close.fine)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norm = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    return (a * b).sum((1, 2)) / np.maximum(norm, 1e-6)


def _candidates(hashes: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """Blocks of (P, 2) pairs within `bits` of each other; every such pair comes at least once.

    Beyond ALL_PAIRS the 63 bits are cut into `bits + 1` bands: two hashes that differ in `bits` places agree in one band.
    """
    n = len(hashes)
    if n <= ALL_PAIRS:
        yield from _within(hashes, np.arange(n), bits)
        return
    edges = np.linspace(0, 63, bits + 2).astype(int)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            if len(bucket) > 1:
                yield from _within(hashes, bucket, bits)


def _within(hashes: np.ndarray, rows: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """Tiles of 64 x 4096 comparisons: what is in flight stays in the cache, 3.5 times faster than whole rows."""
    mine = hashes[rows]
    for top in range(0, len(rows), 64):
        for left in range(top, len(rows), 4096):
            near = popcount(mine[top : top + 64, None] ^ mine[None, left : left + 4096]) <= bits
            if not near.any():
                continue
            a, b = np.nonzero(near)
            a, b = a + top, b + left
            later = b > a  # each pair once, no picture with itself
            if later.any():
                yield np.stack([rows[a[later]], rows[b[later]]], axis=1)


def popcount(words: np.ndarray) -> np.ndarray:
    """Bits set in every uint64."""
    return np.bitwise_count(words) if hasattr(np, "bitwise_count") else popcount_by_table(words)


def popcount_by_table(words: np.ndarray) -> np.ndarray:
    """The same for numpy 1, which has no instruction for it."""
    table = np.array([bin(i).count("1") for i in range(256)], np.uint8)
    return table[np.ascontiguousarray(words).view(np.uint8)].reshape(*words.shape, 8).sum(-1, dtype=np.uint8)
