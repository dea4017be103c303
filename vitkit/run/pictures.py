"""Pictures for people: uint8 arrays to PNG, no larger than a report needs."""

from __future__ import annotations

import base64
import io
import struct
from typing import Any

import numpy as np

from vitkit.errors import DataError

LARGEST = (
    640  # pixels of the longer side in a report; a grid never shows more, and 50 photographs must stay one small file
)


def png(picture: Any) -> bytes:
    """PNG bytes of a uint8 picture, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); shrunk to `LARGEST`. Raises DataError."""
    from PIL import Image

    array = np.asarray(picture)
    if array.dtype != np.uint8:
        raise DataError(
            f"a report picture must be uint8, got {array.dtype} of shape {array.shape}",
            fix="(x.clip(0, 1) * 255).round().astype('uint8') for values in [0, 1]",
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise DataError(
            f"a report picture must be (H, W), (H, W, 3) or (H, W, 4), got {array.shape}",
            fix="move channels last: x.transpose(1, 2, 0)",
        )
    image = Image.fromarray(np.ascontiguousarray(array))
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=max(image.size) <= 256)
    return out.getvalue()


def data_uri(content: bytes) -> str:
    """PNG bytes as something an `img` shows without a file beside it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def size_of(content: bytes) -> tuple[int, int]:
    """(width, height) from the header of PNG bytes. Raises DataError when they are not a PNG."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise DataError("a report picture is not a PNG file", fix="save it as PNG")
    return struct.unpack(">II", content[16:24])
