"""Pictures with a mask of what is hidden in each, made once: a frozen model's masks never change while another learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .images import Images
from .loader import loader
from .transforms import crop_box, eval_view

KEPT = 2 << 30  # bytes of resized pictures that are held in memory; more are decoded again in every epoch


@dataclass(frozen=True, eq=False)
class HiddenStore:
    """Entries {"image": uint8 (C, H, W), "hidden": bool (1, H, W)}; masks are held as bits."""

    base: Images
    view: Any
    bits: np.ndarray  # uint8 (N, ceil(H W / 8))
    size: tuple[int, int]
    pictures: Tensor | None  # uint8 (N, C, H, W)
    kind: str = "hidden"

    @property
    def in_memory(self) -> bool:
        return self.pictures is not None

    def name(self, row: int) -> str:
        return self.base.path(row)

    def stamp(self, row: int) -> str:
        return self.base.store.stamp(int(self.base.rows[row]))

    def raw(self, row: int) -> bytes | None:
        return None

    def array(self, row: int) -> Any:
        count = self.size[0] * self.size[1]
        hidden = np.unpackbits(self.bits[row], count=count).reshape(1, *self.size).astype(bool)
        picture = self.view(self.base.decode(row)) if self.pictures is None else self.pictures[row]
        return {"image": picture, "hidden": torch.from_numpy(hidden)}


@dataclass(frozen=True)
class HiddenView:
    """A crop of `scale` of the area and a flip, of picture and mask alike; as they are where nothing is asked for."""

    size: tuple[int, int]
    scale: tuple[float, float] | None = None
    hflip: bool = False

    def __call__(self, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        image, hidden = entry["image"], entry["hidden"]
        if self.scale is not None:
            top, left, height, width = crop_box(*self.size, self.scale)
            box = (slice(None), slice(top, top + height), slice(left, left + width))
            image = F.resize(image[box], list(self.size), antialias=True)
            hidden = F.resize(hidden[box].to(torch.uint8), list(self.size), interpolation=InterpolationMode.NEAREST)
        if self.hflip and torch.rand(()) < 0.5:
            image, hidden = image.flip(-1), hidden.flip(-1)
        return {"image": image.contiguous(), "hidden": hidden.bool().contiguous()}


def with_hidden(
    images: Images,
    preprocess: Any,
    hide: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    workers: int,
    max_bad: float,
) -> tuple[Images, list[str]]:
    """`images` with the masks that `hide` makes of uint8 batches (B, C, H, W), and the files that could not be read: these are
    left out. More than the share `max_bad` of them is a DataError."""
    view = eval_view(preprocess)
    index, bits, pictures, bad = [], [], [], []
    fits = len(images) * preprocess.in_chans * int(np.prod(preprocess.image_size)) <= KEPT
    for batch in loader(images, view, batch_size=batch_size, seed=0, shuffle=False, workers=workers, max_bad=max_bad):
        hidden = hide(batch["image"]).flatten(1).cpu().numpy()
        index += batch["index"].tolist()
        bits.append(np.packbits(hidden, axis=1))
        bad += batch["bad"]
        if fits:
            pictures.append(batch["image"])
    rows, first = np.unique(index, return_index=True)  # a damaged file is replaced by its neighbour, which came already
    base = images.subset(rows)
    held = torch.cat(pictures)[first] if fits else None
    store = HiddenStore(base, view, np.concatenate(bits)[first], tuple(preprocess.image_size), held)
    return replace(base, store=store, rows=np.arange(len(base))), list(dict.fromkeys(bad))


def shares(images: Images) -> np.ndarray:
    """(N,) share of each picture of `with_hidden` that is hidden."""
    store = images.store
    assert isinstance(store, HiddenStore)
    return np.bitwise_count(store.bits).sum(1) / (store.size[0] * store.size[1])
