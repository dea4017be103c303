"""`vitkit embed --window_stride 4`: a feature for every window of every video, as temporal action detectors take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitkit.errors import ConfigError, DataError
from vitkit.run.batches import open_data, open_model, speaker
from vitkit.run.config import Config
from vitkit.run.files import atomic, atomic_write

CHUNK = 64  # windows whose frames are in memory together, at the size of the file


@dataclass(frozen=True)
class Windows:
    """What was written to `out`: features/NAME.npy float32 (W, D) a video, and videos.csv with frames, rate and windows."""

    out: Path
    videos: int
    windows: int
    dim: int
    bad: list[str]


def window_job(config: Config) -> Windows:
    """Features of the windows of every video of `config`, one .npy each; unreadable files are named and left out."""
    from vitkit.run.measure import _home, device_of

    own, machine = config.own, config.machine
    if own.window_stride < 1:
        raise ConfigError(f"window_stride is {own.window_stride}", fix="frames, e.g. 4")
    device, say = device_of(machine, "embed"), speaker(machine.quiet)
    with torch.random.fork_rng(devices=[]), _home(config, "embed") as folder:
        if folder is None:
            raise ConfigError("out is empty, and vitkit embed writes its features", fix="--out embeddings")
        images = open_data(config.inputs, say)
        if images.kind != "video":
            raise ConfigError(
                f"window_stride is for models of videos, and {config.inputs.model} takes {images.kind}s",
                fix="leave it out",
            )
        vit: Any = open_model(config.inputs, seed=machine.seed, say=say).eval().to(device)
        rows, bad = [], []
        for i, name in enumerate(images.names):
            try:
                video = images.decode(i)
                x = video_features(vit, video, own.window_stride, own.window_normalise, machine.batch_size)
            except DataError as error:
                bad.append(str(error))
                say(f"left out: {error}")
                continue
            target = folder.path / "features" / f"{Path(name).with_suffix('')}.npy"
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic(target) as file:
                np.save(file, x, allow_pickle=False)
            rows.append((name, len(video), getattr(video, "rate", float("nan")), *x.shape))
        if not rows:
            raise DataError(f"{images.name}: not one video could be read; the first: {bad[0]}", fix="vitkit check")
        write_list(folder.path / "videos.csv", rows)
        vit.passport.save(folder.path)
        found = Windows(folder.path, len(rows), sum(row[3] for row in rows), rows[0][4], bad)
        folder.finish({"verb": "embed", "metrics": [], "videos": found.videos, "windows": found.windows, "bad": bad})
    return found


def video_features(vit: Any, video: Any, stride: int, normalise: bool, batch_size: int) -> np.ndarray:
    """(W, D) float32 of one video of any length: decoded once but for a window's length at the edges of pieces."""
    from vitkit.evaluate.video import window_features, window_starts

    length = vit.patch_embed.img_size[0]
    starts = window_starts(len(video), length, stride)
    pieces = []
    for first in range(0, len(starts), CHUNK):
        some = starts[first : first + CHUNK]
        stop = min(some[-1] + length, len(video))
        frames = video.read(np.arange(some[0], stop)).permute(0, 2, 3, 1)
        moved = [start - some[0] for start in some]
        pieces.append(window_features(vit, frames, moved, normalise=normalise, batch_size=batch_size))
    return np.concatenate(pieces)


def write_list(path: Path, rows: list[tuple]) -> None:
    import pandas as pd

    names = ["video", "frames", "frames_per_second", "windows", "values"]
    atomic_write(path, pd.DataFrame(rows, columns=names).to_csv(index=False))
