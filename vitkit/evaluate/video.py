"""Videos as they are measured: many views of each averaged, a feature for every window of a long one.

Multi-clip evaluation: softmax of every view, mean over the views of a video, argmax (VideoMAE V2,
engine_for_finetuning.py). Window features for temporal action detection: the pooled feature of `length` consecutive frames
starting at every `stride`-th one (extract_tad_feature.py). The authors fed these frames without mean and deviation, which
their model was trained with; `normalise=False` gives their numbers, and the default is what the model expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, DataError


@dataclass(frozen=True)
class Merged:
    """`probabilities` (V, C) of `videos` (V,), in the order in which the videos first appear."""

    videos: np.ndarray
    probabilities: np.ndarray

    def top(self, k: int, truth: np.ndarray) -> float:
        """Share of videos whose class `truth` (V,) is among the k most probable."""
        best = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return float((best == np.asarray(truth)[:, None]).any(1).mean())


def merge_views(probabilities: np.ndarray, video: Sequence[int] | np.ndarray) -> Merged:
    """Mean over the views of each video: `probabilities` (views, C), `video` (views,) the number of each view's video."""
    video = np.asarray(video)
    if len(video) != len(probabilities):
        raise DataError(f"{len(probabilities)} views, but {len(video)} numbers of videos", fix="one number a view")
    names, first, inverse = np.unique(video, return_index=True, return_inverse=True)
    sums = np.zeros((len(names), probabilities.shape[1]))
    np.add.at(sums, inverse, np.asarray(probabilities, np.float64))
    order = np.argsort(first)
    mean = sums / np.bincount(inverse)[:, None]
    return Merged(names[order], mean[order].astype(np.float32))


def window_starts(frames: int, length: int, stride: int) -> list[int]:
    """First frames of the windows that fit into a video of so many `frames`; one window, at 0, where none fits."""
    if length < 1 or stride < 1:
        raise ConfigError(f"windows of {length} frames every {stride}", fix="1 or more of both")
    return list(range(0, frames - length + 1, stride)) or [0]


@torch.no_grad()
def window_features(
    vit: nn.Module,
    frames: Tensor,
    starts: Sequence[int],
    *,
    normalise: bool = True,
    batch_size: int = 8,
) -> np.ndarray:
    """Pooled features (W, D) float32 of windows of `frames`, uint8 (n, H, W, C), that begin at `starts`.

    Frames are resized to the model's size without keeping their aspect, once each (bilinear, corners not aligned, no
    antialiasing). Tubes that windows share are embedded once where every start falls on a tube. A video shorter than a
    window is filled up with its last frame.
    """
    vit = tokens.require_vit(vit)
    if tokens.kind_of(vit) != "video":
        raise ConfigError("window features need a ViT of videos", fix="e.g. a video_vit_* model or its run folder")
    if frames.ndim != 4 or not len(frames):
        raise DataError(f"frames of shape {tuple(frames.shape)}", fix="uint8 (frames, height, width, channels)")
    device = next(vit.parameters()).device
    length, *size = vit.patch_embed.img_size
    missing = max(starts) + length - len(frames)
    if missing > 0:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    was, out = vit.training, []
    vit.eval()
    try:
        prepared = _prepared(vit, frames, size, normalise, device)
        shared = _shared_tubes(vit, prepared, starts, batch_size)
        for first in range(0, len(starts), batch_size):
            some = starts[first : first + batch_size]
            if shared is None:
                clips = torch.stack([prepared[:, start : start + length] for start in some])
                out.append(tokens.feature(vit, clips))
            else:
                out.append(_from_tubes(vit, shared, some))
    finally:
        vit.train(was)
    return torch.cat(out).float().cpu().numpy()


def _prepared(vit: nn.Module, frames: Tensor, size: Sequence[int], normalise: bool, device: torch.device) -> Tensor:
    """(C, n, h, w) float32, in pieces so that a long video is never held in full size as floats."""
    pieces = []
    for piece in frames.split(64):
        x = piece.to(device).permute(0, 3, 1, 2).float() / 255
        pieces.append(F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False))
    video = torch.cat(pieces).transpose(0, 1)
    return vit.passport.preprocess.normalise(video) if normalise else video


def _shared_tubes(vit: nn.Module, video: Tensor, starts: Sequence[int], batch_size: int) -> Tensor | None:
    """Embeddings (tubes, S, D) of a whole video (C, n, h, w) before positions; None where windows do not share tubes."""
    step = vit.patch_embed.patch_size[0]
    overlap = len(starts) > 1 and min(np.diff(sorted(starts))) < vit.patch_embed.img_size[0]
    if vit.num_prefix_tokens or any(start % step for start in starts) or not overlap:
        return None
    places = vit.patch_embed.num_patches // vit.patch_embed.grid_size[0]
    whole = video[:, : video.shape[1] // step * step]
    pieces = whole.split(step * 8 * batch_size, dim=1)
    return torch.cat([vit.patch_embed(piece[None])[0].unflatten(0, (-1, places)) for piece in pieces])


def _from_tubes(vit: nn.Module, tubes: Tensor, starts: Sequence[int]) -> Tensor:
    """Features of windows put together from embedded tubes: the same numbers as `tokens.feature` on their frames."""
    step, steps = vit.patch_embed.patch_size[0], vit.patch_embed.grid_size[0]
    x = torch.stack([tubes[start // step : start // step + steps].flatten(0, 1) for start in starts])
    x = vit.norm_pre(vit.pos_drop(x if vit.pos_embed is None else x + vit.pos_embed))
    stream = tokens.run(vit, tokens.Stream(x, None, tuple(vit.patch_embed.grid_size)))
    return vit.forward_head(tokens.finish(vit, stream).all, pre_logits=True)
