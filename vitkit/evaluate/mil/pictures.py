"""Where a slide head looked: its tile weights painted over the slide's overview."""

from __future__ import annotations

from typing import Literal

import numpy as np

from vitkit.errors import DataError


def heatmap(
    thumbnail: np.ndarray,
    coords: np.ndarray,
    side: float,
    attention: np.ndarray,
    size: tuple[int, int],
    *,
    scale: Literal["rank", "max"] = "rank",
    alpha: float = 0.55,
    colours: str = "inferno",
) -> np.ndarray:
    """uint8 (h, w, 3): `thumbnail` of a slide of `size` (width, height) level-0 pixels, its tiles coloured by `attention`.

    coords (n, 2) and `side` in level-0 pixels, as feature files hold them. scale: colours by rank among the slide's tiles
    (attention is often a few peaks over almost nothing), or as shares of the largest. colours: a matplotlib colour map.
    """
    from matplotlib import colormaps

    attention = np.asarray(attention, dtype=float).reshape(-1)
    if len(attention) != len(coords):
        raise DataError(
            f"{len(attention)} weights for {len(coords)} tiles", fix="one weight a tile, in the file's order"
        )
    if not side > 0 or np.min(coords, initial=0) < 0:
        raise DataError("these tiles have no places on the slide", fix="heatmaps need tiles cut by vitkit from a slide")
    if scale == "rank":
        _, place = np.unique(attention, return_inverse=True)
        values = place.reshape(-1) / max(place.max(initial=0), 1)
    else:
        values = attention / max(attention.max(initial=0), 1e-12)
    painted = (255 * colormaps[colours](values)[:, :3]).astype(np.float32)
    out = thumbnail.astype(np.float32)
    height, width = out.shape[:2]
    per = np.array([width / size[0], height / size[1]])
    first = np.round(np.asarray(coords) * per).astype(int)
    last = np.maximum(np.round((np.asarray(coords) + side) * per).astype(int), first + 1)
    for (x0, y0), (x1, y1), colour in zip(first, last, painted, strict=True):
        out[y0:y1, x0:x1] = (1 - alpha) * out[y0:y1, x0:x1] + alpha * colour
    return np.clip(np.round(out), 0, 255).astype(np.uint8)
