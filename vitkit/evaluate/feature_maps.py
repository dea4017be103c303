"""Feature maps of a frozen ViT with their masks, computed once and kept on disk: what decoders are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitkit import tokens
from vitkit.data.images import UNKNOWN, Images
from vitkit.data.transforms import to_channels
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.evaluate.features import cache_key
from vitkit.evaluate.rescale import min_max
from vitkit.run.files import atomic


@dataclass
class Cached:
    """Feature maps of the last n blocks in half precision (N, n, D, h, w) and masks (N, H, W) uint8."""

    maps: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.maps)

    def joined(self, other: Cached) -> Cached:
        return Cached(torch.cat([self.maps, other.maps]), torch.cat([self.masks, other.masks]))

    def rows(self, index: np.ndarray) -> Cached:
        return Cached(self.maps[index], self.masks[index])

    def last(self, needs: int) -> Cached:
        """The same with the maps of the last `needs` blocks only; nothing is copied."""
        return Cached(self.maps[:, -needs:], self.masks)


def highest_class(*parts: Cached) -> int:
    """The highest class number of all masks, at least 1; 255 is no class."""
    return max(1, *(int(torch.where(part.masks == UNKNOWN, 0, part.masks).max()) for part in parts))


def require_depth(vit: nn.Module, needs: int, what: str = "this decoder") -> None:
    """Raise ConfigError where the ViT has fewer blocks than a decoder reads."""
    depth = len(tokens.require_vit(vit).blocks)
    if needs > depth:
        raise ConfigError(
            f"{what} reads {needs} blocks of a ViT with {depth}", fix="a linear or light decoder reads one"
        )


def cache(
    vit: nn.Module,
    images: Images,
    rows: np.ndarray,
    needs: int,
    size: tuple[int, int],
    masks: Sequence[np.ndarray] | None = None,
    *,
    rescale: bool = False,
    flips: bool = False,
    batch_size: int = 16,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Cached:
    """Feature maps and masks of some images, both at `size`: images bicubic, masks by nearest; mirrored copies after them.

    folder: keeps the maps in a file named by a hash of the model, images, size and `needs`, so that other weights never
    find it. progress: called with (images done, images in all).
    """
    found = []
    for mirrored in (False, True)[: 1 + flips]:
        path = None
        if folder is not None:
            what = {"maps": needs, "size": size, "rescale": rescale, "mirrored": mirrored}
            path = Path(folder) / f"maps-{cache_key(vit, images.subset(rows), **what)}.npy"
        found.append(_kept(vit, images, rows, needs, size, masks, rescale, mirrored, batch_size, path, progress))
    return found[0] if len(found) == 1 else found[0].joined(found[1])


def _kept(
    vit: nn.Module,
    images: Images,
    rows: np.ndarray,
    needs: int,
    size: tuple[int, int],
    masks: Sequence[np.ndarray] | None,
    rescale: bool,
    mirrored: bool,
    batch_size: int,
    path: Path | None,
    progress: Callable[[int, int], None] | None,
) -> Cached:
    """From the file at `path` where it is whole, else computed, and written there."""
    truth = torch.stack([_resized(images, int(row), masks, size) for row in rows])
    truth = truth.flip(-1) if mirrored else truth
    stored = None if path is None else _stored(path, len(rows), needs)
    if stored is not None:
        return Cached(stored, truth)
    batches = _computed(vit, images, rows, needs, size, rescale, mirrored, batch_size, progress)
    if path is None:
        return Cached(torch.cat([torch.from_numpy(one) for one in batches]), truth)
    with atomic(path) as file:
        for count, one in enumerate(batches):
            if not count:
                shape = (len(rows), *one.shape[1:])
                np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
            file.write(np.ascontiguousarray(one).tobytes())
    stored = _stored(path, len(rows), needs)
    assert stored is not None
    return Cached(stored, truth)


def _computed(vit, images, rows, needs, size, rescale, mirrored, batch_size, progress) -> Iterator[np.ndarray]:
    """(B, needs, D, h, w) float16, batch by batch, in eval mode and without gradients."""
    training = [m for m in vit.modules() if m.training]
    try:
        vit.eval()
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            pixels = torch.stack([picture(vit, images, int(row), size) for row in some])
            with torch.inference_mode():
                x = prepared(vit, pixels.flip(-1) if mirrored else pixels, rescale)
                maps = torch.stack(tokens.maps(vit, x, layers=needs), 1).half()
            if not torch.isfinite(maps).all():
                raise WeightsError(
                    f"the model gives feature maps that are not finite or too large for float16, in the batch of "
                    f"{len(some)} images that begins with {images.path(int(some[0]))}",
                    fix="check the weights; a model whose features pass 65,504 needs a final norm",
                )
            yield maps.cpu().numpy()
            if progress is not None:
                progress(start + len(some), len(rows))
    finally:
        for module in training:
            module.training = True


def _stored(path: Path, n: int, needs: int) -> Tensor | None:
    """The maps of a file, which stay on disk; None where there are none or the file is damaged."""
    try:
        maps = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = maps.ndim == 5 and maps.shape[:2] == (n, needs) and maps.dtype == np.float16
    return torch.from_numpy(maps) if whole else None


def picture(vit: nn.Module, images: Images, row: int, size: tuple[int, int]) -> Tensor:
    """uint8 (in_chans, *size) of one picture, as the decoders' trunk sees it before normalisation."""
    image = to_channels(images.decode(row), vit.passport.preprocess.in_chans)
    return F.resize(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _resized(images: Images, row: int, masks: Sequence[np.ndarray] | None, size: tuple[int, int]) -> Tensor:
    """The mask of a picture, checked against it, at `size`."""
    mask = images.mask(row) if masks is None else torch.as_tensor(np.asarray(masks[row]))
    shape = tuple(images.decode(row).shape[1:])
    if shape != tuple(mask.shape):
        raise DataError(
            f"{images.path(row)} is {shape}, its mask {tuple(mask.shape)}", fix="a mask has the size of its image"
        )
    return F.resize(mask[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0].to(torch.uint8)


def prepared(vit: nn.Module, pixels: Tensor, rescale: bool) -> Tensor:
    """Pixels in the model's own space, on its device; `rescale` stretches each channel to [0, 1] first."""
    x = min_max(pixels) if rescale else pixels
    return vit.passport.preprocess.normalise(x.to(next(vit.parameters()).device))
