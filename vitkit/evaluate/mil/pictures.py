"""Pictures of slides: a head's tile weights painted over the overview, kept tiles, a slide put together from its tiles."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal

import numpy as np

from vitkit.errors import DataError

if TYPE_CHECKING:
    from vitkit.data.slide import TileFolder


def heatmap(
    thumbnail: np.ndarray,
    coords: np.ndarray,
    side: float,
    attention: np.ndarray,
    size: tuple[int, int],
    *,
    scale: Literal["rank", "max"] = "rank",
    alpha: float = 0.55,
    colours: str = "plasma",
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


def kept_tiles(thumbnail: np.ndarray, coords: np.ndarray, side: float, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3): `thumbnail` with what lies in no tile faded, and the tiles' edges where they are large enough to
    see. coords, `side` and `size` as in `heatmap`."""
    height, width = thumbnail.shape[:2]
    per = np.array([width / size[0], height / size[1]])
    first = np.round(coords * per).astype(int)
    last = np.maximum(np.round((coords + side) * per).astype(int), first + 1)
    inside = np.zeros((height, width), bool)
    edges = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(first, last, strict=True):
        inside[y0:y1, x0:x1] = True
        if side * per[0] >= 8:
            edges[y0:y1, [x0, min(x1, width - 1)]] = True
            edges[[y0, min(y1, height - 1)], x0:x1] = True
    out = np.where(inside[..., None], thumbnail, 255 - (255 - thumbnail.astype(np.uint16)) // 3).astype(np.uint8)
    out[edges] = (out[edges] // 2 + np.array([0, 70, 60])).astype(np.uint8)
    return out


def stitched(tiles: TileFolder, longest: int) -> tuple[np.ndarray, tuple[int, int] | None]:
    """A small picture of a slide that is a folder of tiles: each where its name says, or some of them in rows; and the
    size of what they cover."""
    from PIL import Image

    placed = bool((tiles.coords >= 0).all()) and tiles.side > 0
    coords, side = tiles.coords.astype(float), tiles.side
    shown = range(len(tiles))
    if not placed:
        shown = range(min(len(tiles), 48))
        coords, side = np.array([(i % 8, i // 8) for i in shown], dtype=float), 1.0
    size = coords.max(0) + side
    scale = longest / size.max()
    out = np.full((*np.maximum(np.ceil(size * scale), 1).astype(int)[::-1], 3), 255, np.uint8)
    for i in shown:
        (x0, y0), (x1, y1) = (np.round(at * scale).astype(int) for at in (coords[i], coords[i] + side))
        if x1 > x0 and y1 > y0:
            tile = Image.fromarray(tiles.read(i)).convert("RGB").resize((x1 - x0, y1 - y0), Image.Resampling.BOX)
            part = out[y0:y1, x0:x1]
            part[:] = np.asarray(tile)[: part.shape[0], : part.shape[1]]
    return out, (int(size[0]), int(size[1])) if placed else None


def jpeg(picture: np.ndarray) -> bytes:
    """A picture as the bytes of a JPEG file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=82)
    return out.getvalue()
