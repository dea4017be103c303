"""The backbones of a scaling study, the input sizes they can take, and pictures that are decoded once for all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.data.images import Images
from vitkit.errors import DataError
from vitkit.run.batches import open_model, require_images
from vitkit.run.config import Config

RANDOM = "random:"
REMEMBERED = 2 << 30  # bytes of decoded pictures that are kept, so that a sweep over sizes reads every file once


@dataclass
class Backbone:
    """One model of the study. `patch`: pixels of a patch, which an input size must be a multiple of."""

    ref: str
    name: str
    parameters: int
    patch: tuple[int, int]
    own_size: int
    random: bool
    shell: Any = field(repr=False)  # the model without its numbers, on the meta device: shapes and passport

    def facts(self) -> dict[str, Any]:
        """Plain values."""
        names = ("ref", "name", "parameters", "own_size", "random")
        return {name: getattr(self, name) for name in names} | {"patch": list(self.patch)}


# ---------------------------------------------------------------- models


def open_backbones(refs: Sequence[str], config: Config, say: Callable[[str], None]) -> list[Backbone]:
    """Open every model once at its own size, so that a wrong name stops the study before anything is computed."""
    found, names = [], []
    for ref in refs:
        vit = open_at(ref, None, config)
        require_images(vit.passport.preprocess.kind, "scaling")
        random = vit.passport.base.get("kind") == "random"
        names.append(short(ref) + (", random weights" if random else ""))
        count = sum(p.numel() for p in vit.parameters())
        patch = tuple(vit.patch_embed.patch_size)
        found.append(
            Backbone(ref, names[-1], count, patch, max(vit.passport.preprocess.image_size), random, vit.to("meta"))
        )
        say(
            f"{names[-1]}: {count / 1e6:.1f} million parameters, patches of {patch[0]} px, made for {found[-1].own_size} px"
        )
    for one in found:
        if names.count(one.name) > 1:
            one.name = one.ref
    return found


def open_at(ref: str, size: int | None, config: Config) -> Any:
    """The model for square inputs of `size` pixels, in eval mode."""
    inputs = config.inputs
    if ref.startswith(RANDOM):
        inputs, ref = replace(inputs, pretrained=False), ref.removeprefix(RANDOM)
    inputs = replace(inputs, model=ref, image_size=size)
    return open_model(inputs, seed=config.machine.seed, say=lambda text: None).eval()


def short(ref: str) -> str:
    """A model's name without folders; a file called model.safetensors is named by its folder."""
    from vitkit.run.measure import short_name

    ref = ref.removeprefix(RANDOM)
    path = Path(ref)
    plain = path.suffix and path.name.partition(".")[0] in ("model", "pytorch_model", "checkpoint", "weights", "last")
    return path.parent.name if plain and path.parent.name else short_name(ref)


def sizes_for(backbones: Sequence[Backbone]) -> list[int]:
    """Half, one and one and a half times the first model's own size, in whole patches of every model where that can be."""
    step = math.lcm(*(side for one in backbones for side in one.patch))
    if step > backbones[0].own_size // 2:
        step = max(backbones[0].patch)
    return sorted({max(step, round(backbones[0].own_size * f / step) * step) for f in (0.5, 1.0, 1.5)})


def misfit(backbone: Backbone, size: int) -> str:
    """Why this backbone cannot take inputs of `size` pixels; empty where it can."""
    if all(size % side == 0 for side in backbone.patch):
        return ""
    side = max(backbone.patch)
    near = [n for n in (size // side * side, -(-size // side) * side) if n]
    return f"{size} px is not a multiple of its patch of {side} px ({' or '.join(map(str, near))} would be)"


# ---------------------------------------------------------------- data


class Remembered:
    """A store whose pictures were decoded once and stay in memory; what could not be read is tried again when asked for."""

    def __init__(self, store: Any, arrays: dict[int, np.ndarray]):
        self.store, self.arrays = store, arrays

    def name(self, row: int) -> str:
        return self.store.name(row)

    def stamp(self, row: int) -> str:
        return self.store.stamp(row)

    def raw(self, row: int) -> bytes | None:
        return self.store.raw(row)

    def array(self, row: int) -> np.ndarray:
        known = self.arrays.get(row)
        return self.store.array(row) if known is None else known


def remember(images: Images, limit: int = REMEMBERED) -> Images:
    """The same images (same fingerprint) with every picture decoded once; as they are where that takes more than `limit`."""
    if images.in_memory or not len(images):
        return images
    rows = list(dict.fromkeys(images.rows.tolist()))
    few = rows[:: max(1, len(rows) // 16)][:16]
    tried = [one for one in (_decoded(images, row) for row in few) if one is not None]
    if not tried or np.mean([one.nbytes for one in tried]) * len(rows) > limit:
        return images
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        arrays = dict(zip(rows, pool.map(lambda row: _decoded(images, row), rows), strict=True))
    return replace(images, store=Remembered(images.store, {k: v for k, v in arrays.items() if v is not None}))


def _decoded(images: Images, row: int) -> np.ndarray | None:
    try:
        return images.store.array(row)
    except DataError:
        return None
