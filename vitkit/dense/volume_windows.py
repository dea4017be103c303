"""Segmenting a volume larger than the model's crop: overlapping windows, many in one batch, merged by their mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitkit.errors import ConfigError, MissingExtra

BLENDS = ("constant", "gaussian")


@torch.no_grad()
def sliding_windows(
    predict: Callable[[Tensor], Tensor],
    volume: Tensor,
    crop: Sequence[int],
    *,
    overlap: float = 0.5,
    windows: int = 4,
    blend: str = "constant",
) -> Tensor:
    """Mean of `predict` over the windows that cover each voxel: (B, classes, a, b, c) of `volume` (B, C, a, b, c).

    MONAI's `sliding_window_inference`: a volume smaller than `crop` is padded with zeros on both sides, steps are
    int(crop (1 - overlap)), the last window ends at the border. windows: how many are computed together; the result is the
    same. blend: "constant", or "gaussian", which trusts the middle of a window more.
    """
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap is {overlap}", fix="a share from 0 to below 1, e.g. 0.5")
    if blend not in BLENDS:
        raise ConfigError(f"blend is {blend!r}", fix=f"one of {', '.join(BLENDS)}")
    try:
        from monai.inferers.utils import sliding_window_inference
    except ImportError:
        raise MissingExtra("monai", "medical") from None
    merged = sliding_window_inference(
        volume, tuple(crop), windows, predict, overlap=overlap, mode=blend, padding_mode="constant"
    )
    assert isinstance(merged, Tensor)  # a predictor with several outputs would give several
    return merged
