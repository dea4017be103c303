"""Small video files for tests, written by PyAV: frame k is grey of value 5 k, so that a frame says which one it is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch


def write_video(
    path: Path,
    frames: int = 40,
    *,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    times: list[int] | None = None,
) -> Path:
    """`times`: when each frame is shown, in 25ths of a second; by default 0, 1, 2, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 25)
        for k in range(frames):
            array = np.full((*size, 3), 5 * k % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = (k if times is None else times[k]), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(frames: torch.Tensor) -> list[int]:
    """Which frames (n, C, H, W) are, by their grey."""
    return [round(value / 5) for value in frames.float().mean((1, 2, 3)).tolist()]
