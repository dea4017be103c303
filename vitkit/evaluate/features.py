"""Pooled features of a data set, computed once: what kNN, the linear probe, galleries and duplicate search work on.

The feature is the tensor that the model's passport names (`vitkit.tokens.feature`), of images prepared as the
passport says, in image order. With `cache` they are kept in a memory-mapped `.npy` under a name that is a hash of
everything they depend on: weights, structure and settings of the model, preprocessing, data and package versions. Any
change is another name, so that a stale hit cannot happen; the device is not part of it, as it changes features only
by rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import nn

from vitkit.errors import ConfigError, DataError, WeightsError

if TYPE_CHECKING:
    from vitkit.data.images import Images
    from vitkit.passport import Passport

Progress = Callable[[int, int], None]
_FORMAT = 1  # of the cache: raise it when features change for the same model and data


class Extracted(NamedTuple):
    """Features (N, D), NaN where a file could not be read; which rows are good (N,); the names of the others."""

    x: np.ndarray
    good: np.ndarray
    bad: list[str]


@overload
def features(
    vit: nn.Module,
    images: Images,
    *,
    batch_size: int = ...,
    workers: int = ...,
    device: str | torch.device | None = ...,
    progress: Progress | None = ...,
    cache: str | Path | None = ...,
    blocks: int = ...,
    on_bad: Literal["raise"] = ...,
) -> np.ndarray: ...
@overload
def features(
    vit: nn.Module,
    images: Images,
    *,
    batch_size: int = ...,
    workers: int = ...,
    device: str | torch.device | None = ...,
    progress: Progress | None = ...,
    cache: str | Path | None = ...,
    blocks: int = ...,
    on_bad: Literal["skip"],
) -> Extracted: ...
def features(
    vit: nn.Module,
    images: Images,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    cache: str | Path | None = None,
    blocks: int = 0,
    on_bad: str = "raise",
) -> np.ndarray | Extracted:
    """float32 features (N, D) in image order.

    device: where to compute, by default where the model is; it is moved back afterwards, and its train or eval mode is
    restored. progress: called with (images done, images in all) after each batch. cache: a folder. on_bad: what a
    file that cannot be decoded does. "raise": DataError names it. "skip": the result is an `Extracted`, whose NaN
    rows no evaluation accepts by mistake; cached rows of such files are tried again the next time. blocks: put the
    linear input of so many last blocks behind the pooled feature, (N, F + D * (blocks + 1)); see `evaluate.pooling`.
    """
    if on_bad not in ("raise", "skip"):
        raise ConfigError(f"on_bad is {on_bad!r}", fix='use "raise" or "skip"')
    if not len(images):
        raise DataError(f"{images.name}: no images to extract features of", fix="check the split and the path")
    path = None if cache is None else Path(cache) / f"features-{cache_key(vit, images, blocks)}.npy"
    known = None if path is None else _read(path, len(images))
    run = partial(
        _extract, vit, batch_size=batch_size, workers=workers, device=device, progress=progress, blocks=blocks
    )
    max_bad = 0.0 if on_bad == "raise" else 1.0
    x = run(images, max_bad=max_bad) if known is None else _completed(known, images, run, on_bad)
    if path is not None and x is not known:
        _write(path, x)
        stored = _read(path, len(images))
        x = x if stored is None else stored
    if on_bad == "raise":
        return x
    good = ~np.isnan(x[:, 0])
    return Extracted(x, good, [images.path(i) for i in np.flatnonzero(~good).tolist()])


def cache_key(vit: nn.Module, images: Images, blocks: int = 0, **more: object) -> str:
    """Hash of everything that the features depend on, `more` included: 32 hexadecimal digits."""
    from vitkit.weights import sha256_of, trunk_state

    passport = _passport(vit).to_dict()
    outside = {name: buffer for name, buffer in vit.named_buffers() if name not in vit.state_dict()}
    content = {
        "format": _FORMAT,
        "versions": {name: version(name) for name in ("vitkit", "timm", "torch", "torchvision")},
        "weights": sha256_of(trunk_state(vit)),
        "buffers": sha256_of(outside),  # e.g. rotary periods, which no state dict holds
        "structure": _structure(vit),
        "passport": {name: passport[name] for name in ("preprocess", "feature", "steps")},
        "data": images.fingerprint,
        **({"blocks": blocks} if blocks else {}),
        **more,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _passport(vit: nn.Module) -> Passport:
    found = getattr(vit, "passport", None)
    if found is None:
        raise WeightsError(
            f"this {type(vit).__name__} has no passport, which says how images are prepared and what the feature is",
            fix="load it with vitkit.weights.load",
        )
    return found


def _structure(vit: nn.Module) -> list[list]:
    """Every module but the head with its plain settings (eps, heads, an adapter's scale): what tensors do not tell."""
    found = []
    for name, module in vit.named_modules():
        if name == "head" or name.startswith("head."):
            continue
        plain = {k: str(v) for k, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
        for ignored in ("training", "num_classes", "grad_checkpointing"):  # these do not change the feature
            plain.pop(ignored, None)
        found.append([name, type(module).__name__, plain])
    return found


# ---------------------------------------------------------------- the model


def _extract(
    vit: nn.Module,
    images: Images,
    batch_size: int,
    workers: int,
    device: str | torch.device | None,
    progress: Progress | None,
    max_bad: float,
    blocks: int = 0,
) -> np.ndarray:
    """(N, D), NaN where a file could not be decoded and `max_bad` allows that."""
    from vitkit import tokens
    from vitkit.data.loader import loader
    from vitkit.data.transforms import eval_view
    from vitkit.evaluate.pooling import feature_and_inputs

    preprocess = _passport(vit).preprocess
    batches = loader(
        images,
        eval_view(preprocess),
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        workers=workers,
        max_bad=max_bad,
    )
    out, done = np.empty((0, 0), np.float32), 0
    with _evaluating(vit, device) as at, torch.inference_mode():
        for batch in batches:
            x = preprocess.normalise(batch["image"].to(at, non_blocking=True))
            pooled = feature_and_inputs(vit, x, blocks) if blocks else tokens.feature(vit, x)
            rows = pooled.float().cpu().numpy()
            if rows.ndim != 2:
                raise WeightsError(
                    f"the model gives {rows.ndim - 1} axes a picture instead of one pooled feature",
                    fix='load it with a pooling, for example global_pool="avg"',
                )
            if not done:
                out = np.full((len(images), rows.shape[1]), np.nan, dtype=np.float32)
            # in place of an unreadable file the loader gives another one, under that one's index
            real = batch["index"].numpy() == np.arange(done, done + len(rows))
            _require_finite(rows, real, images, done)
            out[done : done + len(rows)][real] = rows[real]
            done += len(rows)
            if progress is not None:
                progress(done, len(images))
    return out


def _readable(images: Images, i: int) -> bool:
    try:
        images.decode(i)
    except DataError:
        return False
    return True


def _require_finite(rows: np.ndarray, real: np.ndarray, images: Images, first: int) -> None:
    wrong = np.flatnonzero(real & ~np.isfinite(rows).all(1))
    if len(wrong):
        raise WeightsError(
            f"the model gives features that are not finite, first for {images.path(first + int(wrong[0]))}",
            fix="the weights may be damaged or overflow in low precision; load them again in float32",
        )


@contextmanager
def _evaluating(vit: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """Every module in eval mode, on `device`; afterwards all as it was."""
    home = next(vit.parameters()).device
    training = [module for module in vit.modules() if module.training]
    there = home if device is None else torch.device(device)
    try:
        vit.eval()
        vit.to(there)
        yield there
    finally:
        vit.to(home)
        for module in training:
            module.training = True


# ---------------------------------------------------------------- the cache


def _read(path: Path, n: int) -> np.ndarray | None:
    """The stored features, or None where there are none or the file is damaged."""
    try:
        x = np.load(path, mmap_mode="c", allow_pickle=False)  # copy on write: changes stay in memory
    except (OSError, ValueError, EOFError):
        return None
    return x if x.ndim == 2 and len(x) == n and x.dtype == np.float32 else None


def _write(path: Path, x: np.ndarray) -> None:
    from vitkit.run.files import atomic

    with atomic(path) as file:
        np.save(file, x, allow_pickle=False)


def _completed(x: np.ndarray, images: Images, run: Callable[..., np.ndarray], on_bad: str) -> np.ndarray:
    """`x` itself, or a copy with the rows filled whose files could not be read before and can be now."""
    missing = np.flatnonzero(np.isnan(x[:, 0]))
    if on_bad == "skip":
        missing = missing[[_readable(images, i) for i in missing.tolist()]] if len(missing) else missing
    if not len(missing):
        return x
    x = np.array(x)
    x[missing] = run(images.subset(missing), max_bad=0.0)
    return x
