"""One image file in, one uint8 array out: every pixel format that cameras, scanners and scripts leave behind.

What a file becomes (PIL decodes it; no global switch of PIL is touched, so a truncated file is always an error):

========================  ===================================================================================
8-bit grey, RGB           as it is: grey stays one channel, RGB stays three even when its channels are equal
1-bit                     0 and 255
palette                   RGB through its palette
transparency (any mode)   composited on white, then grey or RGB
CMYK, YCbCr               RGB by PIL's formula, (1 - C)(1 - K) for CMYK; embedded colour profiles are not applied
16-bit grey               `deep="full"`: 0..65535 -> 0..255, so equal values stay equal across files;
                          `deep="minmax"`: each file's own minimum..maximum -> 0..255 (12-bit data in 16-bit files)
float grey                accepted when all values lie in [0, 1] or else in [0, 255]; refused otherwise
EXIF orientation          applied
several frames or pages   the first
DICOM                     `dicom.decode`, whatever the file is called (`sources.read` gives all frames and volumes)
========================  ===================================================================================
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".jp2",
    ]
)
DEEP = ("full", "minmax")
UNCLEAR = 2.0  # floats up to here, but above 1, may be [0, 1] overshot or 0..255 nearly black: refused
_DICOM = (".dcm", ".dicom", ".dic", ".ima")
_SIXTEEN = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_REPLACE = "replace the file by an intact copy or remove it from the data (`vitkit check` lists all such files)"


@dataclass
class Facts:
    """What the file said about itself before it became uint8; the data doctor reports from it."""

    format: str  # PIL's name: "JPEG", "PNG", ...
    mode: str  # PIL's mode: "RGB", "I;16", "CMYK", ...
    frames: int
    orientation: int  # EXIF, 1 = upright
    alpha: bool
    low: float  # smallest and largest stored value, for 16-bit and float files only (else nan)
    high: float


def is_image(name: str) -> bool:
    """Whether a file name ends like an image that `decode` can read (hidden files are never images)."""
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def read_bytes(path: str | Path) -> bytes:
    """The file's bytes; DataError when it is gone, unreadable or empty."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error})", fix="restore the file or remove it from the data"
        ) from None
    if not raw:
        raise DataError(f"{path}: the file is empty (0 bytes)", fix=_REPLACE)
    return raw


def decode(raw: bytes, name: str, *, deep: str = "full") -> tuple[np.ndarray, Facts]:
    """Image bytes -> (uint8 array (H, W) or (H, W, 3), facts). `name` is what errors call the file.

    Raises DataError when the bytes are no image, are truncated, hold a decompression bomb or values without a
    known range.
    """
    if deep not in DEEP:
        raise ConfigError(f"deep={deep!r} is not a way to read 16-bit images", fix=f"one of {', '.join(DEEP)}")
    if raw[128:132] == b"DICM" or name.lower().endswith(_DICOM):
        from . import dicom

        return dicom.decode(raw, name)
    image, facts = _open(raw, name)
    try:
        array = _to_uint8(image, facts, name, deep)
    except DataError:
        raise
    except Exception as error:
        raise _broken(error, name, facts.format) from None
    finally:
        image.close()
    return np.array(array, order="C"), facts  # an own copy: PIL's buffer is read-only


def decode_mask(raw: bytes, name: str) -> np.ndarray:
    """Mask bytes -> (H, W) integers as stored: palette indices, grey values, 16-bit numbers; 1-bit masks give 0 and 1."""
    image, facts = _open(raw, name)
    try:
        image = _upright(image, facts.orientation)
        array = np.asarray(image)
    except Exception as error:
        raise _broken(error, name, facts.format) from None
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if image.mode in ("LA", "PA"):
        array = array[..., 0]
    if array.ndim == 3 and (array[..., :1] == array[..., :3]).all():
        array = array[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "ui":
        raise DataError(
            f"{name}: a mask must hold one class number per pixel, this file is {image.mode} with colours",
            fix="save masks as 8-bit grey or palette PNG, pixel value = class number",
        )
    return array


def _open(raw: bytes, name: str) -> tuple[Any, Facts]:
    """(PIL image with its pixels loaded, facts)."""
    from PIL import Image, UnidentifiedImageError

    kind = "image"
    try:
        image = Image.open(io.BytesIO(raw))
        kind = image.format or kind
        facts = Facts(kind, image.mode, getattr(image, "n_frames", 1), 1, False, float("nan"), float("nan"))
        image.load()
    except UnidentifiedImageError:
        start = raw[:8].hex(" ")
        raise DataError(f"{name}: not an image that can be read (it starts with bytes {start})", fix=_REPLACE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        text = str(error).split(",")[0]
        raise DataError(
            f"{name}: refused as a possible decompression bomb: {text}", fix="store a smaller copy or tiles of it"
        ) from None
    except Exception as error:
        raise _broken(error, name, kind) from None
    facts.orientation = _orientation(image)
    facts.alpha = image.has_transparency_data
    return image, facts


def _broken(error: Exception, name: str, kind: str) -> DataError:
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return DataError(f"{name}: too large for the memory there is", fix="store a smaller copy or tiles of it")
    cut = any(
        word in text.lower() for word in ("truncated", "unexpected end", "end of file", "premature", "not enough")
    )
    what = "truncated" if cut or isinstance(error, EOFError) else "corrupt"
    return DataError(f"{name}: {what} {kind} file ({text})", fix=_REPLACE)


def _orientation(image: Any) -> int:
    """EXIF orientation 1..8; damaged EXIF data counts as upright, because the pixels themselves are intact."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _upright(image: Any, orientation: int) -> Any:
    from PIL import Image

    turn = Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE}
    turns |= {6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_uint8(image: Any, facts: Facts, name: str, deep: str) -> np.ndarray:
    mode = image.mode
    if mode in _SIXTEEN or mode in ("I", "F"):
        values = np.asarray(_upright(image, facts.orientation))
        facts.low, facts.high = float(values.min()), float(values.max())
        return _scaled(values, facts, name, deep)
    if facts.alpha:
        image = _on_white(image)
    elif mode not in ("L", "RGB"):
        image = image.convert("L" if mode == "1" else "RGB")
    return np.asarray(_upright(image, facts.orientation))


def _on_white(image: Any) -> Any:
    from PIL import Image

    grey = image.mode in ("L", "LA", "La", "1")
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("L" if grey else "RGB")


def _scaled(values: np.ndarray, facts: Facts, name: str, deep: str) -> np.ndarray:
    """16-bit integers and floats -> uint8, by a rule that is stated or an error, never by a guess per file."""
    low, high = facts.low, facts.high
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{name}: holds values that are not finite", fix="replace NaN and infinity before saving")
    if deep == "minmax":
        return np.rint((values.astype(np.float64) - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
    tops: tuple[float, ...]
    if facts.mode == "F":
        tops = (1.0, 255.0)
    elif facts.mode == "I":
        tops = (65535.0,) if facts.format == "PPM" else (255.0, 65535.0)  # PIL stretches 16-bit PGM to 65535 itself
    else:
        tops = (65535.0,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top == 255.0 and facts.mode == "F" and high < UNCLEAR:
        top = None
    if top is None:
        raise DataError(
            f"{name}: values from {low:g} to {high:g} have no known meaning as brightness ({facts.mode} {facts.format})",
            fix='save it as 8- or 16-bit, scale it to [0, 1], or read with deep="minmax" (each file by its own range)',
        )
    return np.rint(values.astype(np.float64) * (255.0 / top)).astype(np.uint8)
