"""Whole-slide images and other big pictures, cut into tiles: where there is tissue, at a wished resolution.

Slides are read through openslide (SVS, NDPI, MRXS, SCN, BIF, tiled TIFF, DICOM; extra `medical`), PNG, JPEG, BMP and WebP
directly. A tile has `size` x `size` pixels at `mpp` micrometres a pixel: the coarsest level that is fine enough is read and
resampled, unless its resolution is within 2 % of what is asked. Tiles lie on a grid from the top left corner; those at
the right and bottom border are filled up with zeros. What is tissue is decided by `tissue` on a small overview.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, MissingExtra
from . import pixels
from .found import some
from .tissue import CELL, tissue_mask

SLIDES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"}
)
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_SAME = 0.02  # relative difference of resolutions that is not resampled
_LONGEST = 8192  # pixels of an overview's long side
_STRIP = 1 << 24  # pixels read at once for an overview
_COARSEST = 20.0  # micrometres a pixel; 1200 dots an inch are 21
_TILE = 4096  # pixels: a folder of smaller pictures is one slide that was cut before


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How slides are cut. `mpp=None`: the stored pixels as they are. `min_tissue`: share of a tile that must be tissue (a
    border tile's padding is none); 0 keeps every tile and looks for no tissue. `slide_mpp`: resolution of slides whose file
    does not say it."""

    size: int = 224
    mpp: float | None = 0.5
    min_tissue: float = 0.6
    slide_mpp: float | None = None

    def __post_init__(self) -> None:
        for name in ("size", "mpp", "slide_mpp"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}", fix="a number above 0")
        if not 0 <= self.min_tissue <= 1:
            raise ConfigError(f"min_tissue is {self.min_tissue}", fix="a share between 0 and 1, e.g. 0.6")


class Slide:
    """An open slide: `size` (width, height) of level 0 in pixels, `mpp` or None, `downsamples` of its levels."""

    def __init__(self, path: Path, size: tuple[int, int], mpp: float | None, downsamples: list[float], read: Callable):
        self.path, self.size, self.mpp, self.downsamples, self._read = path, size, mpp, downsamples, read
        self.power: str | None = None  # the objective's, where the file says it
        self.close: Callable[[], None] = lambda: None

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """uint8 (height, width, 3) of a level from (x, y) in level-0 pixels; zeros outside the slide, white where the
        slide holds no pixels."""
        try:
            out = self._read(x, y, level, width, height)
        except DataError:
            raise
        except Exception as error:  # openslide's own kinds, known only when it is there
            raise DataError(
                f"{self.path}: cannot be read at ({x}, {y}), level {level} ({error})",
                fix="replace the file by an intact copy or remove it",
            ) from None
        scale = self.downsamples[level]
        out[:, max(0, math.ceil((self.size[0] - x) / scale)) :] = 0
        out[max(0, math.ceil((self.size[1] - y) / scale)) :] = 0
        return out

    def level(self, scale: float) -> int:
        """The coarsest level that is at least as fine as level 0 reduced by `scale`."""
        fine = [i for i, d in enumerate(self.downsamples) if d <= scale * (1 + _SAME)]
        return max(fine, key=lambda i: self.downsamples[i]) if fine else 0

    def overview(self, scale: float) -> np.ndarray:
        """The whole slide reduced by `scale`, uint8 (h, w, 3); read in strips, so that a file without a pyramid fits too."""
        from PIL import Image

        width, height = (max(1, round(side / scale)) for side in self.size)
        level = self.level(scale)
        down = self.downsamples[level]
        wide, high = self.size[0] / down, self.size[1] / down  # the level's size, not always whole
        step = high / height
        rows = max(1, int(_STRIP / (math.ceil(wide) * step)))
        out = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            stop = min(top + rows, height)
            first = math.floor(top * step)
            last = max(first + 1, min(math.ceil(stop * step), math.floor(high) or 1))
            strip = self.read(0, round(first * down), level, max(1, math.floor(wide)), last - first)
            box = (0, top * step - first, strip.shape[1], min(stop * step - first, len(strip)))
            picture = Image.fromarray(strip).resize((width, stop - top), Image.Resampling.BOX, box)
            out[top:stop] = np.asarray(picture)
        return out

    def thumbnail(self, longest: int = 1024) -> np.ndarray:
        """The whole slide, uint8 (h, w, 3), with a long side of at most `longest` pixels."""
        return self.overview(max(1.0, max(self.size) / longest))


def open_slide(path: str | Path, mpp: float | None = None) -> Slide:
    """Open a slide (a folder of DICOM files is one). mpp: the resolution where the file does not say it."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such slide", fix="check the path")
    if path.is_dir():
        found = dicom_slide(path)
        if not found:
            raise DataError(f"{path}: a folder without DICOM files", fix="a slide file, or a folder of one DICOM slide")
        path = found[0]
    slide = _picture(path) if path.suffix.lower() in PICTURES else _openslide(path)
    slide.mpp = slide.mpp or mpp
    return slide


def dicom_slide(folder: Path) -> list[Path]:
    """The DICOM files of a folder, which make one slide; [] where it holds none."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() == ".dcm")


def _picture(path: Path) -> Slide:
    array = pixels.decode(pixels.read_bytes(path), str(path))[0]
    array = np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array

    def read(x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        out = np.zeros((height, width, 3), np.uint8)
        part = array[y : y + height, x : x + width]
        out[: part.shape[0], : part.shape[1]] = part
        return out

    return Slide(path, (array.shape[1], array.shape[0]), None, [1.0], read)


def _openslide(path: Path) -> Slide:
    try:
        import openslide
    except ImportError:
        raise MissingExtra("openslide-python", "medical") from None
    try:
        file = openslide.OpenSlide(str(path))
    except (openslide.OpenSlideError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as a slide ({str(error).replace(f'Reading {path}: ', '') or type(error).__name__})",
            fix=f"a format openslide knows ({', '.join(sorted(SLIDES))}), or convert it to PNG or tiled TIFF",
        ) from None

    def read(x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        rgba = np.asarray(file.read_region((x, y), level, (width, height)))
        alpha = rgba[..., 3:]
        if alpha.min(initial=255) == 255:
            return rgba[..., :3].copy()
        return ((rgba[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))) // 255).astype(
            np.uint8
        )

    slide = Slide(path, file.dimensions, _mpp(file), [float(d) for d in file.level_downsamples], read)
    slide.power = file.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    slide.close = file.close
    return slide


def _mpp(file: Any) -> float | None:
    """Micrometres a pixel of level 0: the mean of both axes; None where the file does not say it, or says what only a
    printer's dots per inch are."""
    try:
        both = [float(file.properties[f"openslide.mpp-{axis}"]) for axis in "xy"]
    except (KeyError, ValueError):
        return None
    return sum(both) / 2 if min(both) > 0 and max(both) <= _COARSEST else None


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of one slide: `coords` (n, 2) x, y of the top left corners and `side`, in level-0 pixels; `mpp` of the
    tiles' pixels (None unknown); `tissue` (n,) share of each tile that is tissue; `grid` how many tiles there were to choose
    from; `overview` the picture in which tissue was sought, if it was."""

    slide: Slide
    size: int
    coords: np.ndarray
    side: float
    level: int
    mpp: float | None
    tissue: np.ndarray
    grid: int = 0
    overview: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.coords)

    def thumbnail(self, longest: int) -> np.ndarray:
        """The whole slide, uint8 (h, w, 3); from the overview in which tissue was sought, where that is large enough."""
        from PIL import Image

        if self.overview is None or max(self.overview.shape) < min(longest, max(self.slide.size)):
            return self.slide.thumbnail(longest)
        picture = Image.fromarray(self.overview)
        picture.thumbnail((longest, longest), Image.Resampling.BOX)
        return np.asarray(picture)

    def read(self, i: int) -> np.ndarray:
        """uint8 (size, size, 3)."""
        x, y = self.coords[i].tolist()
        width = self.side / self.slide.downsamples[self.level]  # of the tile on its level
        if math.isclose(width, self.size, rel_tol=1e-9):
            return self.slide.read(x, y, self.level, self.size, self.size)
        from PIL import Image

        region = self.slide.read(x, y, self.level, math.ceil(width), math.ceil(width))
        box = (0, 0, width, width)
        return np.asarray(Image.fromarray(region).resize((self.size,) * 2, Image.Resampling.BICUBIC, box))


def tile(slide: Slide, tiling: Tiling | None = None) -> Tiles:
    """Where the tiles of a slide are. DataError without a resolution, or where no tile has enough tissue."""
    tiling = tiling or Tiling()
    scale, mpp = 1.0, slide.mpp or tiling.slide_mpp
    if tiling.mpp is not None:
        if mpp is None:
            raise DataError(f"{slide.path}: the file does not say how many micrometres a pixel is", fix=_mpp_fix(slide))
        scale = tiling.mpp / mpp
        if scale < 1 - _SAME:
            raise DataError(
                f"{slide.path}: has {mpp:.3g} micrometres a pixel, coarser than the {tiling.mpp:g} asked for",
                fix=f"--mpp {mpp:.3g} or more, with an encoder for that magnification; enlarging invents no detail",
            )
    level = slide.level(scale)
    down = slide.downsamples[level]
    side = tiling.size * (down if abs(down / scale - 1) <= _SAME else scale)
    columns, rows = (max(1, math.ceil((edge - 0.5) / side)) for edge in slide.size)
    y, x = np.divmod(np.arange(columns * rows), columns)
    coords = np.stack([np.round(x * side), np.round(y * side)], axis=1).astype(np.int64)
    share, grid, overview = np.ones(len(coords)), len(coords), None
    if tiling.min_tissue > 0:
        overview = slide.overview(max(1.0, side / CELL, max(slide.size) / _LONGEST))
        share = _tissue_of(slide, coords, side, overview)
        keep = share >= tiling.min_tissue
        if not keep.any():
            raise DataError(
                f"{slide.path}: none of {len(coords):,} tiles has {tiling.min_tissue:.0%} tissue (most: {share.max():.0%})",
                fix="a smaller min_tissue, or 0 to keep every tile of a picture that is not stained tissue",
            )
        coords, share = coords[keep], share[keep]
    made = None if mpp is None else mpp * side / tiling.size
    return Tiles(slide, tiling.size, coords, side, level, made, share, grid, overview)


def _tissue_of(slide: Slide, coords: np.ndarray, side: float, overview: np.ndarray) -> np.ndarray:
    """Share of tissue in each tile, from sums over the overview's mask."""
    mask = tissue_mask(overview)
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    per = np.array([mask.shape[1] / slide.size[0], mask.shape[0] / slide.size[1]])  # overview pixels a level-0 pixel
    first = np.round(coords * per).astype(int)
    last = np.minimum(np.round((coords + side) * per).astype(int), [mask.shape[1], mask.shape[0]])
    (x0, y0), (x1, y1) = first.T, last.T
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return np.minimum(inside / (side * side * per[0] * per[1]), 1.0)


def _mpp_fix(slide: Slide) -> str:
    usual = {"20": 0.5, "40": 0.25, "10": 1.0}.get((slide.power or "").split(".")[0])
    hint = f" (its objective has {slide.power}x, which is often {usual} micrometres)" if usual else ""
    return f"give it: slide_mpp (e.g. 0.5 for 20x, 0.25 for 40x){hint}; or mpp=None for tiles of the stored pixels"


@dataclass(frozen=True, eq=False)
class TileFolder:
    """A slide that was cut before: a folder of tile pictures. `coords` from two numbers at the end of the names (`x_y`),
    -1 where they have none; `side` their smallest step, nan where there is none."""

    path: Path
    files: list[Path]
    coords: np.ndarray
    side: float = float("nan")
    mpp: float | None = None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> np.ndarray:
        """uint8 (H, W, 3) or (H, W)."""
        return pixels.decode(pixels.read_bytes(self.files[i]), str(self.files[i]))[0]


def tile_folder(path: str | Path) -> TileFolder:
    """The tiles of one slide from a folder of pictures; DataError when there are none."""
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.is_file() and pixels.is_image(file.name))
    if not files:
        raise DataError(f"{path}: a slide's folder without tiles", fix="put its tile pictures there, or remove it")
    found = [re.search(r"(\d+)\D+(\d+)\D*$", file.stem) for file in files]
    coords = np.array([(int(m[1]), int(m[2])) if m else (-1, -1) for m in found], dtype=np.int64)
    if not all(found) or len(np.unique(coords, axis=0)) < len(coords):
        return TileFolder(path, files, np.full_like(coords, -1))
    steps = [np.diff(np.unique(axis)) for axis in coords.T]
    return TileFolder(path, files, coords, float(min((s.min() for s in steps if len(s)), default=math.nan)))


def find_slides(source: str | Path) -> list[Path]:
    """Slides of a folder: slide files and big pictures in it, and its subfolders: those that hold tiles or a DICOM slide
    are slides, others (one a patient, a class or a download) are searched. A path to one slide gives that one."""
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: there is no such folder", fix="a folder of slides, or of folders of tiles")
    found = _slides_in(source)
    if not found:
        raise DataError(f"{source}: holds no slides", fix=f"files {', '.join(sorted(SLIDES))}, or folders of tiles")
    names = [stem(path.name) for path in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{source}: several slides are called {some(twice)}", fix="rename them: a slide's name is its file's"
        )
    return found


def _slides_in(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file() and path.suffix.lower() in SLIDES | PICTURES:
            found.append(path)
        elif path.is_dir():
            found += [path] if _is_one_slide(path) else _slides_in(path)
    return found


def _is_one_slide(folder: Path) -> bool:
    """Whether a folder is a DICOM slide or a slide's tiles: pictures that are small, or as little as that can be seen."""
    from PIL import Image

    inside = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    if any(path.suffix.lower() == ".dcm" for path in inside):
        return True
    first = next((path for path in inside if pixels.is_image(path.name)), None)
    if first is None:
        return False
    try:
        with Image.open(first) as picture:
            return max(picture.size) <= _TILE
    except Exception:  # a slide that PIL does not read, or a damaged tile
        return first.suffix.lower() not in SLIDES


def stem(name: str) -> str:
    """A slide's name: `folder/case.1.svs` -> `case.1`; only endings of slides, pictures and feature files are removed."""
    path = Path(name)
    return path.stem if path.suffix.lower() in SLIDES | PICTURES | {".safetensors"} else path.name
