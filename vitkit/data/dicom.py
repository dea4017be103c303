"""One DICOM file in, one uint8 picture out: grey through the whole display pipeline, colour as RGB.

========================  ===================================================================================
MONOCHROME2, MONOCHROME1  modality (LUT or rescale), window or VOI LUT (`windowing`), 8 bits; MONOCHROME1 is turned
                          over last, so that bright always means bright; padding becomes black
RGB, YBR_FULL, YBR_RCT..  RGB, 8 bits (more are scaled by what BitsStored can hold); planes by pixel or by colour
PALETTE COLOR             RGB through its palette, also a segmented one; 16-bit palettes give their upper 8 bits
several frames            `frame` chooses one, counted from 0
signed, 12 of 16 bits     BitsStored and HighBit decide; bits beside them (old overlays) are cut off
missing tags              the rules of `dicom_tags.layout`; Rows, Columns, BitsAllocated cannot be done without
compressed                whatever pydicom can decode with what is installed; else an error naming the syntax
========================  ===================================================================================
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from . import windowing
from .dicom_tags import _REPLACE, Layout, _words, get, layout, number, numbers, open_file, pydicom, text
from .found import count
from .pixels import Facts
from .windowing import Window

_GREY = ("MONOCHROME2", "MONOCHROME1")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
# What decodes a syntax that pydicom's own parts and Pillow cannot; only packages whose licence lets anybody use them.
_DECODERS = {
    "1.2.840.10008.1.2.4.51": "python-gdcm",
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.201": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.90": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg pylibjpeg-openjpeg",
}


def decode(
    source: bytes | str | Path, name: str = "", *, frame: int = 0, window: Window | None = None
) -> tuple[np.ndarray, Facts]:
    """A file (its bytes or its path) -> (uint8 (H, W) or (H, W, 3), facts).

    `window` is (centre, width) in the file's units (HU), and replaces what the file says; colour is not windowed.
    Raises DataError naming the file: not DICOM, cut off, no picture in it, no decoder, colours of an unknown kind.
    """
    name, window = name or str(source), windowing.require_window(window)
    ds = open_file(source, name) if isinstance(source, bytes) else _opened(source, name)
    shape = layout(ds, name)
    facts = Facts("DICOM", shape.photometric, shape.frames, 1, False, float("nan"), float("nan"))
    if shape.samples == 1 and shape.photometric in _GREY:
        return grey(ds, shape, name, frame, window), facts
    if shape.photometric == "PALETTE COLOR":
        return _palette(ds, shape, stored_pixels(ds, shape, name, frame), name), facts
    if shape.samples != 3 or shape.photometric not in _COLOUR:
        many = count(shape.samples, "value")
        raise DataError(
            f"{name}: PhotometricInterpretation {shape.photometric} with {many} a pixel is not read",
            fix="convert the file to RGB or MONOCHROME2",
        )
    stored = stored_pixels(ds, shape, name, frame)
    if shape.bits_stored != 8:
        stored = np.rint(stored * (255.0 / ((1 << shape.bits_stored) - 1))).clip(0, 255)
    return np.ascontiguousarray(stored, dtype=np.uint8), facts


def grey(ds: Any, shape: Layout, name: str, frame: int, window: Window | None) -> np.ndarray:
    """The display pipeline for one frame of grey values: uint8 (H, W)."""
    stored = stored_pixels(ds, shape, name, frame)
    padding = _padding(ds, shape, stored)
    try:
        values = windowing.modality(stored, ds, frame)
        _require_finite(values, name)
        keep = None if padding is None else ~padding
        levels = np.rint(windowing.brightness(values, ds, shape, frame, window, keep) * 255).astype(np.uint8)
    except DataError as error:
        raise error if name in error.what else DataError(f"{name}: {error.what}", fix=error.fix) from None
    if shape.photometric == "MONOCHROME1":
        levels = 255 - levels
    if padding is not None:
        levels[padding] = 0
    return levels


def values(source: bytes | str | Path, name: str = "", *, frame: int = 0) -> np.ndarray:
    """(H, W) float32 in the file's own units (HU, ...): after the modality step, before any window."""
    name = name or str(source)
    ds = open_file(source, name) if isinstance(source, bytes) else _opened(source, name)
    shape = layout(ds, name)
    if shape.samples != 1 or shape.photometric not in _GREY:
        raise DataError(f"{name}: {shape.photometric} holds colours, not measured values", fix="read it as a picture")
    found = windowing.modality(stored_pixels(ds, shape, name, frame), ds, frame)
    _require_finite(found, name)
    return found.astype(np.float32)


def _require_finite(found: np.ndarray, name: str) -> None:
    if not np.isfinite(found).all():
        raise DataError(f"{name}: holds values that are not finite", fix="replace NaN and infinity before saving")


def _opened(path: str | Path, name: str) -> Any:
    """A Dataset with its pixels; of files with several frames the last two are kept open."""
    try:
        stamp = os.stat(path)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})", fix="restore the file") from None
    return _cached(str(path), name, stamp.st_size, stamp.st_mtime_ns)


@lru_cache(maxsize=2)
def _cached(path: str, name: str, size: int, time: int) -> Any:
    return open_file(path, name)


def stored_pixels(ds: Any, shape: Layout, name: str, frame: int = 0) -> np.ndarray:
    """The numbers in the file: int64 (H, W), RGB (H, W, 3), or float32/64 (H, W) of a parametric map."""
    if not 0 <= frame < shape.frames:
        raise DataError(f"{name}: there is no frame {frame}", fix=f"frames run from 0 to {shape.frames - 1}")
    keyword = next((k for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if get(ds, k) is not None), None)
    if keyword is None:
        kind = text(ds, "SOPClassUID")
        kind = f" ({pydicom().uid.UID(kind).name})" if kind else ""
        fix = "leave it out, or replace it by an intact copy if it was a picture"
        raise DataError(f"{name}: a DICOM file that holds no picture{kind}", fix=fix)
    syntax = ds.file_meta.TransferSyntaxUID
    decoder = _decoder(syntax, name)
    colour = shape.samples == 3
    # Bits beside the stored ones are ours to cut where the numbers are in the file as they are (HighBit may differ).
    plain = not syntax.is_encapsulated or syntax == pydicom().uid.RLELossless
    try:
        array, _ = decoder.as_array(
            ds[keyword].value,
            index=frame,
            raw=not colour,
            correct_unused_bits=not plain,
            **_options(ds, shape, keyword),
        )
    except Exception as error:
        raise _broken(error, name, syntax) from None
    if array.dtype.kind == "f":
        return array
    array = array.astype(np.int64)
    return _cut_bits(array, shape) if plain and (not colour or shape.photometric == "RGB") else array


def _decoder(syntax: Any, name: str) -> Any:
    from pydicom.pixels import get_decoder

    if syntax.is_private or not syntax.is_transfer_syntax:
        raise DataError(
            f"{name}: pixels in a transfer syntax that is not DICOM's own ({syntax})",
            fix="export the picture again, uncompressed (Explicit VR Little Endian)",
        )
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_available:
        package = _DECODERS.get(str(syntax))
        fix = f"pip install {package}, or save the files" if package else "save the files"
        raise DataError(
            f"{name}: pixels are compressed as {syntax.name} ({syntax}), which nothing installed here can decode",
            fix=f"{fix} uncompressed (Explicit VR Little Endian)",
        )
    return decoder


def _options(ds: Any, shape: Layout, keyword: str) -> dict[str, Any]:
    """What the decoder must know, from our reading of the tags: nothing is written into the data set."""
    found: dict[str, Any] = {
        "rows": shape.rows,
        "columns": shape.columns,
        "samples_per_pixel": shape.samples,
        "number_of_frames": shape.frames,
        "photometric_interpretation": shape.photometric,
        "bits_allocated": shape.bits_allocated,
        "bits_stored": shape.bits_stored,
        "pixel_representation": int(shape.signed),
        "planar_configuration": shape.planar,
        "pixel_keyword": keyword,
        "pixel_vr": ds[keyword].VR,
    }
    offsets = [get(ds, tag) for tag in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    if None not in offsets:
        found["extended_offsets"] = tuple(offsets)
    return found


def _broken(error: Exception, name: str, syntax: Any) -> DataError:
    words = " ".join((str(error) or type(error).__name__).split())
    words = words.partition("available plugins: ")[2] or words
    lower = words.lower()
    if isinstance(error, MemoryError):
        return DataError(f"{name}: too large for the memory there is", fix="store a smaller copy or tiles of it")
    package = _DECODERS.get(str(syntax))
    if package and "does not support" in lower:
        fix = f"pip install {package}, or save the files uncompressed (Explicit VR Little Endian)"
        return DataError(f"{name}: {syntax.name} ({syntax}) is beyond what is installed here ({words})", fix=fix)
    cut = any(w in lower for w in ("less than expected", "truncated", "unexpected end", "not enough", "no frame"))
    fix = f"{_REPLACE}; where other programs open it, pip install {package}" if package else _REPLACE
    return DataError(f"{name}: {'truncated' if cut else 'corrupt'} DICOM pixels ({words[:240]})", fix=fix)


def _cut_bits(array: np.ndarray, shape: Layout) -> np.ndarray:
    """Keep BitsStored bits below HighBit and give them their sign: what lies beside them is no part of the number."""
    array = array >> (shape.high_bit + 1 - shape.bits_stored)
    array &= (1 << shape.bits_stored) - 1
    if shape.signed:
        array = array - ((array >> (shape.bits_stored - 1)) << shape.bits_stored)
    return array


def _padding(ds: Any, shape: Layout, stored: np.ndarray) -> np.ndarray | None:
    """(H, W) bool: pixels outside the picture (PixelPaddingValue, or the range up to its limit); None without any."""
    value = number(ds, "PixelPaddingValue")
    if value is None or not numbers(ds, "PixelPaddingValue"):
        return None
    limit = number(ds, "PixelPaddingRangeLimit")
    ends = [_as_signed(int(v), shape) for v in (value, value if limit is None else limit)]
    found = (stored >= min(ends)) & (stored <= max(ends))
    return found if found.any() and not found.all() else None


def _as_signed(value: int, shape: Layout) -> int:
    """A padding value written as unsigned where the pixels are signed."""
    return value - 65536 if shape.signed and value > 32767 and shape.bits_allocated == 16 else value


def _palette(ds: Any, shape: Layout, stored: np.ndarray, name: str) -> np.ndarray:
    """Indices -> RGB. Padding of the table (first mapped value, indices beyond its end) as PS3.3 C.7.6.3.1.5 says."""
    from pydicom.pixels import apply_color_lut

    colours = ("Red", "Green", "Blue")
    descriptors = [get(ds, f"{colour}PaletteColorLookupTableDescriptor") for colour in colours]
    entries = [get(ds, f"{colour}PaletteColorLookupTableData") for colour in colours]
    if None in descriptors or (None in entries and get(ds, "SegmentedRedPaletteColorLookupTableData") is None):
        raise DataError(f"{name}: PALETTE COLOR without its colour tables", fix="export the picture again")
    try:
        if None in entries:
            if stored.max() > 255 and int(descriptors[0][2]) == 8:
                raise ValueError("a segmented palette of 8 bits with more than 256 colours")
            rgb = apply_color_lut(stored, ds)[..., :3]
            return (rgb >> 8 if rgb.dtype == np.uint16 else rgb).astype(np.uint8)
        little = ds.file_meta.TransferSyntaxUID.is_little_endian
        tables = [
            windowing.table(list(d), data, little=little, signed=shape.signed, what=f"{colour}Palette")
            for d, data, colour in zip(descriptors, entries, colours, strict=True)
        ]
    except (ValueError, TypeError, AttributeError, DataError) as error:
        raise DataError(f"{name}: the colour palette cannot be read ({_words(error)})", fix="export it again") from None
    wide = max(int(one.entries.max()) for one in tables) > 255  # 8-bit colours in 16-bit words stay as they are
    looked = np.stack([one.look_up(stored) for one in tables], axis=-1)
    return (looked >> 8 if wide else looked).astype(np.uint8)
