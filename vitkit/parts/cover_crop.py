"""A crop of full height or full width: the short side is resized to the model's, the long side cut at random or centrally."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitkit.data.transforms import to_channels


@dataclass(frozen=True)
class CoverCrop:
    """uint8 (C, H, W) of any size -> uint8 (in_chans, height, width): resized by PIL (bicubic) until it just covers the
    `image_size`, then cut anywhere along the side that is too long, or in its middle. No mirroring.

    Source: PH-Reg, datasets/flickr30k_dataset.py, which reads grey pictures and small ones not at all; here they work.
    """

    preprocess: Any
    central: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        want = self.preprocess.image_size
        have = image.shape[-2:]
        ratio = max(side / own for side, own in zip(want, have, strict=True))
        size = [max(side, int(own * ratio + 1e-6)) for side, own in zip(want, have, strict=True)]
        array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        resized = Image.fromarray(np.ascontiguousarray(array)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        image = torch.from_numpy(np.array(resized))
        image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
        spare = [own - side for own, side in zip(size, want, strict=True)]
        top, left = (round(one / 2) if self.central else int(torch.randint(0, one + 1, ())) for one in spare)
        image = image[..., top : top + want[0], left : left + want[1]]
        return to_channels(image, self.preprocess.in_chans).contiguous()
