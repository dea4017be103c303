"""From stored numbers to brightness in [0, 1], in the order of DICOM part 3: modality, then VOI, then 8 bits.

Modality: the modality LUT, else `slope * stored + intercept`. VOI, the first of these that there is:

1. a window (centre, width) that the caller chose, in modality units such as HU: centre - width/2 is black;
2. the file's VOI LUT (its first);
3. the file's window (its first), LINEAR, LINEAR_EXACT or SIGMOID as `VOILUTFunction` says;
4. for 8 bits and fewer: every value that can be stored, so equal values stay equal;
5. for CT: -160 to 240 HU (centre 40, width 400), so that equal tissue stays equal across slices;
6. the frame's own 0.5 to 99.5 percentile, padding left out.

pydicom's own functions are not used for this: their window turns the picture over where the slope is negative (C.11.2
asks only for an output range, and theirs runs backwards then), and their 8-bit tables wrap where indices pass 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .dicom_tags import Layout, get, number, numbers, text

CT_WINDOW = (40.0, 400.0)
PERCENTILES = (0.5, 99.5)
Window = tuple[float, float]


def require_window(window: object) -> Window | None:
    """(centre, width) or None; raises ConfigError for anything else."""
    if window is None:
        return None
    try:
        centre, width = (float(value) for value in window)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ConfigError(
            f"window={window!r}", fix="(centre, width) in HU or the file's units, e.g. (40, 400)"
        ) from None
    if not (np.isfinite(centre) and np.isfinite(width) and width > 0):
        raise ConfigError(f"window={window!r}", fix="a finite centre and a width above 0, e.g. (40, 400)")
    return centre, width


def window_linear(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3: float64 in [0, 1]."""
    x = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (x - centre) / width, -700, 700)))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
        if width == 0:
            return (x > centre).astype(np.float64)
    return np.clip((x - centre) / width + 0.5, 0, 1)


def modality(stored: np.ndarray, ds: Any, frame: int = 0) -> np.ndarray:
    """Stored integers -> float64 in the file's own units (HU, optical density, ...)."""
    table = _table(ds, "ModalityLUTSequence", signed=bool(number(ds, "PixelRepresentation")))
    if table is not None:
        return table.look_up(stored).astype(np.float64)
    slope, intercept = rescale(ds, frame)
    return stored.astype(np.float64) * slope + intercept


def rescale(ds: Any, frame: int = 0) -> tuple[float, float]:
    """(slope, intercept); a missing one is 1 or 0, and so is a slope of 0, which would wipe the picture out."""
    slope, intercept = number(ds, "RescaleSlope", frame), number(ds, "RescaleIntercept", frame)
    return slope or 1.0, intercept or 0.0


def brightness(
    values: np.ndarray,
    ds: Any,
    shape: Layout,
    frame: int = 0,
    window: Window | None = None,
    keep: np.ndarray | None = None,
) -> np.ndarray:
    """Modality values -> float64 in [0, 1]. `keep` (bool) marks the pixels that percentiles look at (no padding)."""
    if window is not None:
        return window_linear(values, *window, "LINEAR_EXACT")
    table = None
    if get(ds, "VOILUTSequence"):  # its first value is signed where the modality step can give negative ones
        table = _table(ds, "VOILUTSequence", signed=bool(modality(np.array(_range(shape)), ds, frame).min() < 0))
    if table is not None:
        return table.look_up(np.rint(values)).astype(np.float64) / table.top
    found = file_window(ds, frame)
    if found is not None:
        return window_linear(values, *found)
    if shape.bits_stored <= 8 and not is_ct(ds, frame):
        ends = modality(np.array(_range(shape)), ds, frame)
        modal = _table(ds, "ModalityLUTSequence")
        low, high = (0.0, float(modal.top)) if modal is not None else (float(ends.min()), float(ends.max()))
    elif is_ct(ds, frame):
        return window_linear(values, *CT_WINDOW, "LINEAR_EXACT")
    else:
        chosen = values[keep] if keep is not None and keep.any() else values
        low, high = (float(value) for value in np.percentile(chosen, PERCENTILES))
        if high <= low:
            low, high = float(chosen.min()), float(chosen.max())
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def file_window(ds: Any, frame: int = 0) -> tuple[float, float, str] | None:
    """The file's first window, or None when it is missing or impossible."""
    centre, width = number(ds, "WindowCenter", frame), number(ds, "WindowWidth", frame)
    if centre is None or width is None:
        return None
    function = text(ds, "VOILUTFunction", frame).upper() or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        function = "LINEAR"
    least = width >= 1 if function == "LINEAR" else width > 0
    return (centre, width, function) if least else None


def is_ct(ds: Any, frame: int = 0) -> bool:
    """Whether values are Hounsfield units: CT with a rescale, or a rescale that says so."""
    has = number(ds, "RescaleIntercept", frame) is not None
    return text(ds, "RescaleType", frame).upper() == "HU" or (text(ds, "Modality").upper() == "CT" and has)


def rule(ds: Any, shape: Layout) -> list[str]:
    """Which of the rules a file needs that leaves something out, in words for `vitkit check`."""
    said = []
    slope, intercept = number(ds, "RescaleSlope"), number(ds, "RescaleIntercept")
    if slope == 0:
        said.append("RescaleSlope 0: taken as 1")
    elif (slope is None) != (intercept is None):
        said.append("only one of RescaleSlope and RescaleIntercept: the other taken as 1 or 0")
    if shape.photometric not in ("MONOCHROME1", "MONOCHROME2") or get(ds, "VOILUTSequence"):
        return said
    centres, widths = numbers(ds, "WindowCenter"), numbers(ds, "WindowWidth")
    if file_window(ds) is None:
        why = "window that cannot be used" if centres or widths else "no window"
        if is_ct(ds):
            said.append(f"{why}: centre 40, width 400 HU")
        elif shape.bits_stored <= 8:
            said.append(f"{why}: all values of {shape.bits_stored} bits")
        else:
            said.append(f"{why}: brightness from the 0.5 to 99.5 percentile")
    elif len(centres) > 1:
        said.append("several windows: the first is used")
    return said


def _range(shape: Layout) -> tuple[int, int]:
    """Smallest and largest number that BitsStored can hold."""
    if shape.signed:
        return -(1 << shape.bits_stored - 1), (1 << shape.bits_stored - 1) - 1
    return 0, (1 << shape.bits_stored) - 1


@dataclass(frozen=True)
class Table:
    """A look-up table: `first` is the value mapped to entry 0; values outside get the first or last entry."""

    entries: np.ndarray
    first: int
    top: int  # the largest value that an entry may have

    def look_up(self, values: np.ndarray) -> np.ndarray:
        index = np.clip(values.astype(np.int64) - self.first, 0, len(self.entries) - 1)
        return self.entries[index]


def _table(ds: Any, sequence: str, *, signed: bool = False) -> Table | None:
    items = get(ds, sequence)
    if not items:
        return None
    descriptor, data = get(items[0], "LUTDescriptor"), get(items[0], "LUTData")
    if descriptor is None or data is None or len(descriptor) != 3:
        return None
    little = str(ds.file_meta.TransferSyntaxUID) != "1.2.840.10008.1.2.2"
    return table(list(descriptor), data, little=little, signed=signed, what=sequence)


def table(descriptor: list[int], data: Any, *, little: bool, signed: bool, what: str) -> Table:
    """A LUT from its descriptor (entries, first value, bits) and its data: bytes, or a list of numbers.

    0 entries mean 65,536. 8-bit entries come one a byte, or one a 16-bit word; both are told apart by the length.
    """
    count, first, bits = int(descriptor[0]) & 0xFFFF or 65536, int(descriptor[1]), int(descriptor[2])
    if signed and first > 32767:
        first -= 65536  # written as unsigned, meant as signed
    if isinstance(data, bytes):
        entries = np.frombuffer(data, np.uint8 if len(data) <= count + count % 2 else ("<u2" if little else ">u2"))
    else:
        entries = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    if len(entries) < count:
        raise DataError(
            f"{what}: {len(entries)} entries of {count} are there", fix="export the picture again from its source"
        )
    entries = entries[:count].astype(np.int64)
    top = max((1 << bits) - 1 if 1 <= bits <= 16 else 0, int(entries.max()))
    return Table(entries, first, top)
