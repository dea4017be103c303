"""What `vitkit check` finds in a folder of videos: files that cannot be read, lengths, rates, copies."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from . import folders
from .images import Images
from .video import scan
from .video_files import SUFFIXES


@dataclass(frozen=True)
class Look:
    """One video: its length, rate and size, what is wrong with it, and a mark that equal videos share."""

    frames: int = 0
    rate: float = 0.0
    size: tuple[int, int] = (0, 0)
    variable: bool = False
    mark: bytes = b""
    trouble: str = ""


def are_videos(spec: Any) -> bool:
    """Whether `spec` is a video file, or a folder with videos and without a single picture."""
    if not isinstance(spec, str | Path):
        return False
    path = Path(spec).expanduser()
    if path.is_dir():
        return any(Path(name).suffix.lower() in SUFFIXES for name in scan(path).files) and not folders.scan(path).files
    return path.is_file() and path.suffix.lower() in SUFFIXES


def look(images: Images, i: int) -> Look:
    """The first, middle and last frame are decoded, the others counted."""
    try:
        video = images.decode(i)
        n = len(video)
        frames = video.read([0, n // 2, n - 1])
    except DataError as error:
        return Look(trouble=error.what.removeprefix(f"{images.path(i)}: "))
    stamps = getattr(video, "stamps", None)
    rate, variable = (stamps.rate, stamps.variable) if stamps is not None else (0.0, False)
    return Look(n, rate, (int(frames.shape[-2]), int(frames.shape[-1])), variable, frames.numpy().tobytes())


def problems(images: Images, facts: list[str], workers: int) -> list[tuple[str, str, list[str], str]]:
    """(severity, kind, files, advice) of a set of videos; sentences about the whole set are added to `facts`."""
    with ThreadPoolExecutor(workers) as pool:
        seen = list(pool.map(lambda i: look(images, i), range(len(images))))
    good = [one for one in seen if not one.trouble]
    found: list[tuple[str, str, list[str], str]] = []
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, one in zip(images.names, seen, strict=True):
        if one.trouble:
            kinds[one.trouble].append(name)
    found += [("error", kind, names, "make them again, or remove them") for kind, names in kinds.items()]
    if good:
        frames = np.array([one.frames for one in good])
        middle = int(np.median(frames))
        facts.append(
            f"frames: {frames.min()} to {frames.max()}, half have {middle} or more; a shorter clip repeats its last"
        )
        rates = sorted({round(one.rate, 2) for one in good if one.rate})
        facts.append(
            f"sizes: {len({one.size for one in good})}; frames a second: {', '.join(map(str, rates[:6])) or 'unknown'}"
        )
    uneven = [name for name, one in zip(images.names, seen, strict=True) if one.variable]
    found.append(("note", "variable frame rate", uneven, "frames are taken evenly in time"))
    return found + copies(images, seen)


def copies(images: Images, seen: list[Look]) -> list[tuple[str, str, list[str], str]]:
    """Videos with the same length and the same first, middle and last frame, within a split and across."""
    same: dict[tuple, list[int]] = defaultdict(list)
    for i, one in enumerate(seen):
        if one.mark:
            same[(one.frames, one.size, one.mark)].append(i)
    groups = [rows for rows in same.values() if len(rows) > 1]
    across = [rows for rows in groups if len({images.split[i] for i in rows}) > 1]
    text = lambda rows: " = ".join(images.names[i] for i in rows)  # noqa: E731
    advice = "the test would be of videos that were trained on: keep one copy"
    return [
        ("error", "the same video in several splits", [text(rows) for rows in across], advice),
        ("warning", "the same video twice", [text(rows) for rows in groups if rows not in across], "keep one copy"),
    ]
