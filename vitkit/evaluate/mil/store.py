"""From slides to feature files: tiles of many slides stream through the encoder, one safetensors file a slide.

A file holds `features` (n, D) float16, `coords` (n, 2) int32 (x, y in level-0 pixels), a small `thumbnail` (JPEG), so that
heatmaps need the slide no more, and, in its metadata, a key made of everything the features depend on: weights, structure
and preprocessing of the model, the tiling, package versions and the slide's size and time. A run that was stopped goes on:
finished slides whose key fits are skipped, others are made anew. Files are replaced in one step. Batches run across slides,
so that small slides waste nothing; tiles are read ahead by threads.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkit.data.slide import TileFolder, Tiles, Tiling, dicom_slide, find_slides, open_slide, stem, tile, tile_folder
from vitkit.errors import ConfigError, DataError, WeightsError

if TYPE_CHECKING:
    from vitkit.passport import Preprocess

_FORMAT = "vitkit.slide/2"
THUMBNAIL = 640  # pixels of its long side
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Embedded:
    """What became of the slides: embedded now, found finished, and {name: why not} of those that could not be used."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    tiles: int = 0

    total: int = 0
    slide: str = ""  # the one that tiles are read of
    share: float = 0.0  # of all slides that is through, parts of slides counted


Progress = Callable[[Embedded], None]


@dataclass(frozen=True)
class SlideFeatures:
    """One slide's file: `features` (n, D) float16, `coords` (n, 2) and `side` of tiles and `size` (width, height) of the slide
    in level-0 pixels (None unknown), tiles' `mpp`, how many tiles there were to choose from, `thumbnail` uint8 (h, w, 3)."""

    name: str
    features: Tensor
    coords: np.ndarray
    side: float
    mpp: float | None
    key: str
    size: tuple[int, int] | None
    grid: int
    jpeg: bytes

    @property
    def placed(self) -> bool:
        """Whether it is known where the tiles lie."""
        return self.size is not None and self.side > 0 and bool((self.coords >= 0).all())

    @property
    def thumbnail(self) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(self.jpeg)) as picture:
            return np.asarray(picture.convert("RGB"))


def embed_slides(
    vit: nn.Module,
    source: str | Path,
    out: str | Path,
    *,
    tiling: Tiling | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str | torch.device | None = None,
    precision: str = "float32",
    on_bad: str = "raise",
    progress: Progress | None = None,
) -> Embedded:
    """Features of all slides in `source` (see `find_slides`) into `out`/<slide>.safetensors.

    tiling: by default the model's image size at 0.5 micrometres a pixel with 60 % tissue; tiles of tile folders are taken as
    they are and prepared like any image. workers: threads that read tiles ahead. precision: float32, bf16 or fp16 (autocast).
    on_bad: "raise" stops at a slide that cannot be read, has no resolution or no tissue; "skip" lists it, removes what an
    earlier run wrote of it, and goes on.
    progress: called after every batch with what was done so far.
    """
    from vitkit.evaluate.features import _evaluating

    if on_bad not in ("raise", "skip"):
        raise ConfigError(f"on_bad is {on_bad!r}", fix='use "raise" or "skip"')
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}", fix=f"one of {', '.join(PRECISIONS)}")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}", fix="at least 1 tile")
    preprocess = _preprocess(vit)
    tiling = tiling or replace(Tiling(), size=preprocess.image_size[0])
    key = features_key(vit, tiling, precision)
    paths, out, report = find_slides(source), Path(out), Embedded()
    waiting = []
    for path in paths:
        finished = _finished(out / f"{stem(path.name)}.safetensors", key, path)
        report.skipped += [stem(path.name)] if finished else []
        waiting += [] if finished else [path]
    report.total = len(paths)
    rows: dict[str, _Rows] = {}
    with (
        _evaluating(vit, device) as at,
        torch.inference_mode(),
        closing(_stream(waiting, tiling, preprocess, workers, 2 * batch_size, on_bad, report)) as stream,
    ):
        for batch in _batches(stream, batch_size):
            x = preprocess.normalise(torch.stack([pixels for _, _, pixels in batch]).to(at, non_blocking=True))
            _take(batch, _features(vit, x, precision), rows, out, key, report)
            if progress is not None:
                progress(report)
    for name in report.bad:  # what an earlier run wrote is of another tiling, model or version of the slide
        if _facts(out / f"{name}.safetensors"):
            (out / f"{name}.safetensors").unlink()
    return report


def _take(
    batch: list[tuple], features: np.ndarray, rows: dict[str, _Rows], out: Path, key: str, report: Embedded
) -> None:
    """Keep a batch's features with their slides, write the slides that are complete, and count."""
    for (slide, number, _), feature in zip(batch, features, strict=True):
        if slide.name in report.bad:
            rows.pop(slide.name, None)
            continue
        held = rows.setdefault(slide.name, _Rows(len(slide.tiles), len(feature)))
        if held.put(number, feature):
            del rows[slide.name]
            _write(out / f"{slide.name}.safetensors", slide, held.x, key)
            report.done.append(slide.name)
    report.tiles += len(batch)
    report.slide = batch[-1][0].name
    inside = sum(1 - held.missing / len(held.x) for held in rows.values())
    report.share = (len(report.done) + len(report.skipped) + len(report.bad) + inside) / report.total


@dataclass(frozen=True, eq=False)
class _Open:
    """A slide on its way through the encoder."""

    name: str
    path: Path
    tiles: Tiles | TileFolder
    thumbnail: np.ndarray
    size: tuple[int, int] | None


class _Rows:
    """Features of one slide as they come, batch by batch."""

    def __init__(self, tiles: int, dim: int):
        self.x, self.missing = np.empty((tiles, dim), np.float16), tiles

    def put(self, number: int, feature: np.ndarray) -> bool:
        """Keep tile `number`; True when it was the last."""
        self.x[number] = feature
        self.missing -= 1
        return self.missing == 0


def _stream(
    paths: list[Path],
    tiling: Tiling,
    preprocess: Preprocess,
    workers: int,
    ahead: int,
    on_bad: str,
    report: Embedded,
) -> Iterator[tuple[_Open, int, Tensor]]:
    """(slide, tile number, uint8 pixels (C, H, W)) of all slides in order, read `ahead` by threads."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        queue: deque[tuple[_Open, int, Future]] = deque()

        def oldest() -> Iterator[tuple[_Open, int, Tensor]]:
            slide, number, future = queue.popleft()
            try:
                pixels = future.result()
                if slide.name not in report.bad:
                    yield slide, number, pixels
            except DataError as error:
                if on_bad == "raise":
                    raise
                report.bad.setdefault(slide.name, error.what)
            finally:
                if number + 1 == len(slide.tiles) and isinstance(slide.tiles, Tiles):
                    slide.tiles.slide.close()

        coming = deque([pool.submit(_opened, path, tiling) for path in paths[:1]])
        try:
            for index, path in enumerate(paths):
                coming += [pool.submit(_opened, later, tiling) for later in paths[index + 1 : index + 2]]
                try:  # tissue of the next slide is sought while this one's tiles are embedded
                    slide = coming.popleft().result()
                except DataError as error:
                    if on_bad == "raise":
                        raise
                    report.bad[stem(path.name)] = error.what
                    continue
                for number in range(len(slide.tiles)):
                    if len(queue) >= ahead:
                        yield from oldest()
                    queue.append((slide, number, pool.submit(_pixels, slide.tiles, number, preprocess)))
            while queue:
                yield from oldest()
        finally:
            for future in (*coming, *(one for _, _, one in queue)):
                future.cancel()


def _batches(stream: Iterator[tuple], size: int) -> Iterator[list[tuple]]:
    batch = []
    for item in stream:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _opened(path: Path, tiling: Tiling) -> _Open:
    from .pictures import stitched

    name = stem(path.name)
    if path.is_dir() and not dicom_slide(path):
        folder = tile_folder(path)
        return _Open(name, path, folder, *stitched(folder, THUMBNAIL))
    slide = open_slide(path)
    try:
        tiles = tile(slide, tiling)
        thumbnail = tiles.thumbnail(THUMBNAIL)
        return _Open(name, path, replace(tiles, overview=None), thumbnail, slide.size)
    except BaseException:
        slide.close()
        raise


def _pixels(tiles: Tiles | TileFolder, number: int, preprocess: Preprocess) -> Tensor:
    """uint8 (C, H, W) as the model takes it: tiles cut here already have their size, others are resized and cropped."""
    from vitkit.data.transforms import eval_view, to_channels

    array = tiles.read(number)
    x = torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
    return to_channels(x, preprocess.in_chans) if isinstance(tiles, Tiles) else eval_view(preprocess)(x)


def _features(vit: nn.Module, x: Tensor, precision: str) -> np.ndarray:
    """float16 (B, D)."""
    from vitkit import tokens

    dtype = PRECISIONS[precision]
    with torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        y = tokens.feature(vit, x)
    if y.ndim != 2:
        fix = 'load it with a pooling, for example global_pool="avg"'
        raise WeightsError(f"the model gives {y.ndim - 1} axes a tile instead of one pooled feature", fix=fix)
    y = y.to(torch.float16)
    if not torch.isfinite(y).all():
        raise WeightsError(
            "features are not finite or too large for float16",
            fix="check the weights; a model whose features pass 65,504 needs a final norm",
        )
    return y.cpu().numpy()


def _preprocess(vit: nn.Module) -> Preprocess:
    found = getattr(vit, "passport", None)
    if found is None:
        raise WeightsError(f"this {type(vit).__name__} has no passport", fix="load it with vitkit.weights.load")
    if found.preprocess.image_size[0] != found.preprocess.image_size[1]:
        raise ConfigError(
            f"tiles are square, the model's images {found.preprocess.image_size}", fix="a square image_size"
        )
    return found.preprocess


# ---------------------------------------------------------------- files


def features_key(vit: nn.Module, tiling: Tiling, precision: str = "float32") -> str:
    """Hash of what features depend on but for the slide itself; any change is another key."""
    from vitkit.evaluate.features import cache_key

    content = json.dumps([_FORMAT, asdict(tiling), precision], sort_keys=True)
    return cache_key(vit, SimpleNamespace(fingerprint=content))  # type: ignore[arg-type]


def _stamp(path: Path) -> str:
    """Changes when the slide's file, or the files of its folder, change."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _facts(path: Path) -> dict[str, Any]:
    """The metadata of a feature file; {} where there is none or it is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(_FORMAT, "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}


def _finished(path: Path, key: str, slide: Path) -> bool:
    facts = _facts(path) if path.is_file() else {}
    return facts.get("key") == key and facts.get("stamp") == _stamp(slide)


def _write(path: Path, slide: _Open, x: np.ndarray, key: str) -> None:
    from safetensors.numpy import save

    from vitkit.run.files import atomic_write

    from .pictures import jpeg

    tiles = slide.tiles
    facts: dict[str, Any] = {"key": key, "stamp": _stamp(slide.path), "side": tiles.side, "mpp": tiles.mpp}
    facts |= {"slide": slide.path.name, "size": slide.size, "grid": len(tiles)}
    tensors = {"features": x, "coords": tiles.coords.astype(np.int32)}
    if isinstance(tiles, Tiles):
        facts["grid"] = tiles.grid
        tensors["tissue"] = tiles.tissue.astype(np.float32)
    tensors["thumbnail"] = np.frombuffer(jpeg(slide.thumbnail), np.uint8)
    facts["side"] = None if np.isnan(tiles.side) else tiles.side
    atomic_write(path, save(tensors, {_FORMAT: json.dumps(facts)}))


def shape_of(path: str | Path) -> tuple[int, int]:
    """(tiles, dimensions) of a feature file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            rows, dim = file.get_slice("features").get_shape()
    except (OSError, SafetensorError, ValueError):
        raise _damaged(Path(path)) from None
    return int(rows), int(dim)


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path}: not a file of slide features, or one that is cut short",
        fix="run `vitkit slides embed` again: damaged files are made anew; remove files that are something else",
    )


def read_features(path: str | Path, *, only_places: bool = False) -> SlideFeatures:
    """One file that `embed_slides` wrote. DataError where it is cut short, or something else. only_places: without its
    features (n, 0)."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    facts = _facts(path)
    try:
        with safe_open(path, "pt") as file:
            names = ("coords", "thumbnail") if only_places else ("features", "coords", "thumbnail")
            tensors = {name: file.get_tensor(name) for name in names} if facts else {}
    except (OSError, SafetensorError):
        tensors = {}
    if not tensors:
        raise _damaged(path)
    if not len(tensors["coords"]):
        raise DataError(f"{path}: a slide without a tile", fix="remove it, or embed the slide again")
    return SlideFeatures(
        path.stem,
        torch.empty(len(tensors["coords"]), 0) if only_places else tensors["features"],
        tensors["coords"].numpy(),
        float("nan") if facts["side"] is None else float(facts["side"]),
        facts["mpp"],
        str(facts["key"]),
        None if facts["size"] is None else (int(facts["size"][0]), int(facts["size"][1])),
        int(facts["grid"]),
        tensors["thumbnail"].numpy().tobytes(),
    )
