"""The fixed positions of VideoMAE: one sinusoid over the flat token index, whatever the grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sinusoid(count: int, dim: int) -> Tensor:
    """(count, dim), float32 computed in float64: channel j of token n is sin (even j) or cos (odd j) of
    n / 10000^(2 floor(j / 2) / dim). Source: OpenGVLab/VideoMAEv2, get_sinusoid_encoding_table."""
    channels = np.arange(dim)
    angles = np.arange(count)[:, None] / np.power(10000.0, 2 * (channels // 2) / dim)
    table = np.where(channels % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.from_numpy(table.astype(np.float32))
