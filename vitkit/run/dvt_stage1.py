"""DVT's first stage over many pictures: features of their crops, fields fitted to them, pairs of raw and clean maps on disk.

`stage1/00007.safetensors` holds "raw" and "clean" (n, h, w, D) of n pictures in bfloat16, and their names; a shard that is
there is not made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vitkit import tokens
from vitkit.clean.dvt import Settings, raw_features
from vitkit.data.images import Images
from vitkit.data.transforms import to_channels
from vitkit.errors import TrainingError, WeightsError
from vitkit.parts.crop_views import cut, draw_crops, patch_coordinates
from vitkit.parts.decomposition import Decomposition, Fit, Plan, coordinates, field_maps
from vitkit.parts.hash_grid import Level, grid_levels
from vitkit.parts.statefiles import save_state
from vitkit.passport import Preprocess
from vitkit.settings import Machine

FOLDER = "stage1"
MEMORY, MOST = 8e9, 16  # bytes of features that pictures fitted together may hold, and how many these are at most
CACHE = 2e9  # bytes of pairs that are kept in memory
TOLD = 50  # steps between losses read from the device


def plan_of(settings: Settings) -> Plan:
    """The schedule of one picture's fit."""
    return Plan(
        steps=settings.steps,
        pixels=settings.pixels,
        lr=settings.field_lr,
        min_lr=settings.field_lr / 10,
        warmup=settings.steps // 10,
        freeze_after=settings.freeze_after,
        weight_decay=settings.field_weight_decay,
        rows=settings.rows,
    )


def levels_of(settings: Settings, grid: tuple[int, int]) -> tuple[Level, ...]:
    """The field's grids for views of `grid` patches."""
    largest = finest(settings, grid)
    return grid_levels(min(settings.base_resolution, largest), largest, settings.levels, settings.log2_table)


def finest(settings: Settings, grid: tuple[int, int]) -> int:
    """Cells of the finest grid. Nothing finer than the samples of the smallest crop can be learnt, and it would only cost:
    37 patches of a crop of a tenth of the area are 117 samples along a side of the picture, so 128."""
    if settings.max_resolution != "auto":
        return settings.max_resolution
    samples = max(grid) / math.sqrt(settings.crop_area[0])
    return max(settings.base_resolution, 2 ** math.ceil(math.log2(samples)))


def together(settings: Settings, grid: tuple[int, int], dim: int, device: torch.device) -> int:
    """Pictures that are fitted at once."""
    if settings.together != "auto":
        return settings.together
    if device.type == "cpu":
        return 1
    each = 2 * (settings.views + 1) * grid[0] * grid[1] * dim  # bytes, bfloat16
    return max(1, min(MOST, int(MEMORY // each)))


def whole_picture(image: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (C, H, W) of any size to floats in the model's units (C, *image_size): both sides resized, nothing cut off."""
    image = to_channels(image, preprocess.in_chans).float().div(255)
    image = TF.resize(image, list(preprocess.image_size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return preprocess.normalise(image)


@torch.no_grad()
def view_features(
    vit: Any, picture: Tensor, crops: Tensor, *, device: torch.device, batch_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Features (V + 1, h, w, D) of the crops of a picture and of the whole (last), and their patches' coordinates."""
    size = picture.shape[1:]
    grid = tokens.grid_of(vit, size)
    rows = [*crops.tolist(), [0, 0, *size, 0]]
    found = []
    for start in range(0, len(rows), batch_size):
        batch = torch.stack([cut(picture, crop, size) for crop in rows[start : start + batch_size]]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(raw_features(vit, batch).to(dtype))
    places = [patch_coordinates(crop, size, grid) for crop in rows[:-1]]
    return torch.cat(found), torch.stack([*places, coordinates((grid[0], grid[1]))]).to(device)


def decompose(
    vit: nn.Module,
    pictures: Sequence[Tensor],
    settings: Settings,
    *,
    seeds: Sequence[int],
    device: torch.device,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[dict[str, Tensor]], None] | None = None,
) -> tuple[Tensor, Tensor, Decomposition]:
    """Stage 1 of some pictures (C, H, W) in the model's units: raw and clean features (I, h, w, D) of the whole pictures, and
    what was fitted. `seeds`: one a picture; the result of a picture does not depend on the others."""
    views, places = [], []
    for picture, seed in zip(pictures, seeds, strict=True):
        crops = draw_crops(settings.views, picture.shape[1:], settings.crop_area, seed=seed)
        features, where = view_features(vit, picture, crops, device=device, batch_size=batch_size, dtype=dtype)
        views.append(features)
        places.append(where)
    maps, where = torch.stack(views), torch.stack(places)
    if not torch.isfinite(maps[:, -1]).all():
        raise WeightsError("the features of this model are not finite", fix="precision=32, or other weights")
    grid = (maps.shape[2], maps.shape[3])
    levels = levels_of(settings, grid)
    model = Decomposition(
        maps.shape[-1], grid, levels, features=settings.features, count=len(maps), seeds=[s + 1 for s in seeds]
    )
    model.to(device)
    Fit(model, maps, where, plan_of(settings), seeds=[s + 2 for s in seeds]).run(tick)
    clean = field_maps(model)
    if not torch.isfinite(clean).all():
        raise TrainingError("a field has become infinite in stage 1", fix="a lower field_lr")
    return maps[:, -1].float(), clean, model


class Pairs:
    """Raw and clean maps of `rows` of `images`, in shards of `size` pictures under `folder`."""

    def __init__(self, folder: Path, images: Images, rows: np.ndarray, size: int):
        self.folder, self.images, self.size = folder / FOLDER, images, size
        self.shards = [rows[start : start + size] for start in range(0, len(rows), size)]
        self.place = {int(row): (shard, at) for shard, own in enumerate(self.shards) for at, row in enumerate(own)}
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.bytes = 0

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be made. A leftover of another run is refused."""
        out = []
        for shard, own in enumerate(self.shards):
            if not self.path(shard).is_file():
                out.append(shard)
                continue
            with safe_open(self.path(shard), "pt") as file:
                names = json.loads((file.metadata() or {}).get("names", "[]"))
            if names != [self.images.names[row] for row in own]:
                raise TrainingError(
                    f"{self.path(shard)} holds other pictures than this run's", fix=f"delete {self.folder}"
                )
        return out

    def write(self, shard: int, raw: Tensor, clean: Tensor) -> None:
        names = json.dumps([self.images.names[row] for row in self.shards[shard]])
        save_state(self.path(shard), {"raw": raw.bfloat16(), "clean": clean.bfloat16()}, {"names": names})

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """(raw, clean), each (h, w, D) in bfloat16, of picture `row`."""
        if row not in self.cache:
            shard, at = self.place[row]
            with safe_open(self.path(shard), "pt") as file:
                pair = file.get_slice("raw")[at], file.get_slice("clean")[at]
            if self.bytes > CACHE:
                return pair
            self.cache[row] = pair
            self.bytes += 2 * pair[0].nbytes
        return self.cache[row]

    def batch(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """{"raw", "target": (B, h, w, D) float32, "image": the rows}."""
        pairs = [self.read(int(row)) for row in rows]
        raw, clean = (torch.stack([pair[k] for pair in pairs]).float() for k in (0, 1))
        return {"raw": raw, "target": clean, "image": torch.as_tensor(np.asarray(rows))}


def run_stage1(
    vit: nn.Module,
    pairs: Pairs,
    settings: Settings,
    machine: Machine,
    device: torch.device,
    shards: list[int],
    progress: Any,
) -> None:
    """Make `shards`, one after the other."""
    preprocess = vit.passport.preprocess
    dtype = torch.bfloat16 if machine.precision == "bf16" else torch.float32
    vit.eval().to(device)
    done = 0
    for shard in shards:
        rows = [int(row) for row in pairs.shards[shard]]
        pictures = [whole_picture(pairs.images.decode(row), preprocess) for row in rows]
        raw, clean, _ = decompose(
            vit,
            pictures,
            settings,
            seeds=[seed_of(machine.seed, row) for row in rows],
            device=device,
            batch_size=machine.batch_size,
            dtype=dtype,
            tick=_ticks(progress, settings.steps, len(rows), done),
        )
        done += len(rows)
        pairs.write(shard, raw, clean)


def seed_of(seed: int, row: int) -> int:
    """Three numbers from here on belong to picture `row`: of its crops, of its weights, of its pixels."""
    return (seed * 1_000_003 + row * 3) % (2**63 - 3)


def _ticks(progress: Any, steps: int, pictures: int, before: int) -> Callable[[dict[str, Tensor]], None]:
    done = iter(range(1, steps + 1))

    def tick(losses: dict[str, Tensor]) -> None:
        step = next(done)
        if step % TOLD == 0 or step == steps:
            progress.step(loss=float(sum(value.mean() for value in losses.values())))
        count = before + (pictures if step == steps else 0)
        progress.step(images=pictures if step == steps else 0, pictures=count)

    return tick


def order(rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The pictures in the order of an epoch, a function of (seed, epoch) alone."""
    return rows[np.random.RandomState([seed & 0xFFFFFFFF, epoch]).permutation(len(rows))]


def batches(
    pairs: Pairs, rows: np.ndarray, machine: Machine, steps: int, rank: int, world: int
) -> Callable[[int, int], Any]:
    """batches(epoch, start) of pairs for the loop."""

    def make(epoch: int, start: int) -> Iterator[dict[str, Any]]:
        mixed, each = order(rows, machine.seed, epoch), machine.batch_size
        for step in range(start, steps):
            own = mixed[step * each * world : (step + 1) * each * world][rank::world]
            yield pairs.batch(own)

    return make
