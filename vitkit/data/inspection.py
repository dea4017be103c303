"""What the doctor learns about one picture, in one reading of its file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import DataError
from . import hashes, pixels
from .images import UNKNOWN, Images, Masks

_FORMATS = {"JPEG": ".jpg .jpeg .jpe .jfif", "MPO": ".jpg .jpeg .mpo", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp .dib"}
_FORMATS |= {"TIFF": ".tif .tiff", "WEBP": ".webp", "PPM": ".ppm .pgm .pbm .pnm", "AVIF": ".avif", "JPEG2000": ".jp2"}
FLAT = 2  # levels between the darkest and brightest pixel of a picture that shows nothing (JPEG noise allowed for)


@dataclass
class Seen:
    """One picture. `trouble` is the kind of defect that kept it from being read, `message` the error in full."""

    trouble: str = ""
    message: str = ""
    facts: pixels.Facts | None = None  # None for pictures in memory
    size: tuple[int, int] = (0, 0)  # height, width
    channels: int = 0
    pixels: bytes = b""  # hash over shape and pixels
    flat: bool = False
    half: bool = False
    wrong_ending: bool = False
    sums: tuple[np.ndarray, np.ndarray] | None = None  # mean and mean square of each channel, values in [0, 1]
    hash: int = 0
    thumb: np.ndarray | None = None
    mask_trouble: dict[str, str] = field(default_factory=dict)  # kind -> text


def inspect(images: Images, i: int) -> Seen:
    """Read picture `i`, and its mask, once. Damage is recorded, never raised."""
    from PIL import Image

    row, name = int(images.rows[i]), images.path(i)
    seen = Seen()
    try:
        raw = images.store.raw(row)
        if raw is None:
            array = images.store.array(row)
        else:
            array, seen.facts = pixels.decode(raw, name, deep=getattr(images.store, "deep", "full"))
            ending = Path(name).suffix.lower()
            seen.wrong_ending = ending not in _FORMATS.get(seen.facts.format, ending).split()
    except DataError as error:
        seen.message, seen.trouble = str(error), _trouble(error.what)
        return seen
    seen.size, seen.channels = array.shape[:2], 1 if array.ndim == 2 else 3
    seen.pixels = hashlib.blake2b(repr(array.shape).encode() + array.tobytes(), digest_size=16).digest()
    histogram = np.reshape(Image.fromarray(array).histogram(), (seen.channels, 256))
    present = np.flatnonzero(histogram.any(0))
    seen.flat = present[-1] - present[0] <= FLAT
    seen.half = seen.facts is not None and seen.facts.format in ("JPEG", "MPO") and _ends_grey(array)
    share, levels = histogram / histogram[0].sum(), np.arange(256) / 255
    seen.sums = share @ levels, share @ levels**2
    seen.thumb = hashes.thumbnail(array)
    seen.hash = hashes.perceptual_hash(seen.thumb)
    if images.masks is not None:
        _mask(images.masks, row, seen, len(images.classes))
    return seen


def _trouble(what: str) -> str:
    """The kind of damage, read from our own error texts (each is tested)."""
    if "(0 bytes)" in what:
        return "empty file"
    if "truncated" in what:
        return "truncated file"
    if "cannot be read (" in what:
        return "missing or unreadable file"
    if "not an image" in what or "not a DICOM file" in what or "holds no picture" in what:
        return "not an image"
    if (
        "nothing installed here can decode" in what
        or "transfer syntax" in what
        or "is beyond what is installed" in what
    ):
        return "compressed in a way that cannot be read here"
    if "DICOM tags are missing" in what or "contradict each other" in what:
        return "DICOM tags missing or wrong"
    if "decompression bomb" in what:
        return "too large"
    return "values without a known range" if "known meaning" in what or "not finite" in what else "corrupt file"


def _ends_grey(array: np.ndarray) -> bool:
    """Whether the lowest rows are exactly the mid-grey that JPEG decoders leave where the data ran out."""
    band = array[-max(8, len(array) // 20) :]
    return len(array) >= 32 and bool((band == 128).all()) and not bool((array == 128).all())


def _mask(masks: Masks, row: int, seen: Seen, known: int) -> None:
    name = masks.store.name(row)
    try:
        mask = masks.array(row)
    except DataError as error:
        seen.mask_trouble[f"mask: {_trouble(error.what)}"] = str(error)
        return
    if mask.shape != seen.size:
        text = f"{name} is {mask.shape[0]} x {mask.shape[1]}, its image {seen.size[0]} x {seen.size[1]}"
        seen.mask_trouble["mask of another size than its image"] = text
    if known:
        values = np.unique(mask)
        strange = [int(value) for value in values if value >= known and value != UNKNOWN]
        if strange:
            seen.mask_trouble["mask values that are no class"] = f"{name} holds {', '.join(map(str, strange[:5]))}"
