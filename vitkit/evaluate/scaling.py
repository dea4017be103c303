"""Scaling study: which frozen backbone at which input size is worth its cost on your images: score, FLOPs, speed and memory.

Paper: Liu et al., "Does DINOv3 Set a New Medical Vision Standard?", arXiv 2509.06467, 2025. Its tables hold three sizes of
one family, its figures inputs from 256 to 1024 px; neither larger models nor larger inputs help on every task.

What happens, and where: every backbone x input size x share of training labels is a cell, scored by the code of `vitkit
evaluate` on the same test images (`vitkit.run.scaling`); features are computed once a backbone and size. `flops` follows one
image through torch's counter, `speed` and `peak_memory` measure. Cells are compared on the same redrawn test images: all
pairs of backbones at one size and of sizes of one backbone (`statistics.compare_all`, Holm over each family), and the two
questions of the study by `mean_difference`: score(largest) - score(smallest), averaged over the other axis. `pareto` marks
the cells that nothing cheaper reaches.

Differs from the paper: it prints single numbers; here every one has an interval, a difference counts when it is shown on the
same images, and cost stands beside it. Heads are the exact linear probe and kNN instead of 50 epochs of gradient descent.

Cost: one pass of the images through every backbone at every size; twice as many pixels a side cost 4 to 16 times as much.
Heads take seconds. A finished cell is not computed again while weights, data and settings are the same.

    vitkit scaling --models deit_tiny_patch16_224,deit_small_patch16_224 --sizes 96,160,224 --data photos/ --out scaling
    vitkit.scaling(models=["runs/a", "runs/b"], sizes=(96, 160, 224), data="photos/", out="scaling")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vitkit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from vitkit.evaluate.statistics import Difference


@dataclass(frozen=True)
class Settings:
    """What is compared, and where it goes."""

    models: tuple[str, ...] = ()
    """backbones with commas between: timm name, hub id, weights file, run folder; "random:NAME" is NAME with random weights"""
    sizes: tuple[int, ...] | Literal["auto"] = "auto"
    """input sizes in pixels (square); auto = half, one and one and a half times the first model's own"""
    protocols: tuple[str, ...] = ("linear", "knn")
    """how frozen features are scored, as in vitkit evaluate; the first decides. Data with masks: a decoder instead"""
    fractions: tuple[float, ...] = (1.0,)
    """shares of the training labels; a smaller share is contained in a larger one"""
    decoder: Literal["linear", "light", "unet"] = "linear"
    """for data with masks: what is trained on the frozen feature maps (vitkit.dense.decoders)"""
    epochs: int = 30
    """for data with masks: passes of the decoder over the training images, for each of three learning rates"""
    out: str = "scaling"
    """folder for scaling.html, results.json, results.csv, features and finished cells"""

    def __post_init__(self) -> None:
        if self.sizes != "auto" and (not self.sizes or min(self.sizes) < 1):
            raise ConfigError(f"sizes is {self.sizes}", fix="pixels with commas between, e.g. --sizes 96,160,224")
        if not self.fractions or min(self.fractions) <= 0 or max(self.fractions) > 1:
            raise ConfigError(
                f"fractions is {self.fractions}", fix="shares above 0 up to 1, e.g. --fractions 0.1,0.5,1"
            )
        if self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}", fix="at least 1")
        for name in ("models", "sizes", "protocols", "fractions"):
            values = getattr(self, name)
            if values != "auto" and len(set(values)) < len(values):
                raise ConfigError(f"{name} names something twice: {','.join(map(str, values))}", fix="name each once")


@dataclass(frozen=True)
class Cost:
    """What a backbone at one input size costs. `memory`: weights, and the most that a pass of `batch` images holds at once."""

    parameters: int
    tokens: int
    flops: float
    images_per_second: float
    batch: int
    memory: int


def cost_of(vit: Any, size: int, *, batch: int = 16, device: Any = "cpu", seconds: float = 0.5) -> Cost:
    """Count and measure the frozen backbone in float32, in eval mode, where it is."""
    import math

    import torch

    from vitkit import tokens

    x = torch.zeros(batch, vit.passport.preprocess.in_chans, size, size, device=device)
    run = lambda: tokens.feature(vit, x)  # noqa: E731
    weights = sum(p.numel() * p.element_size() for p in vit.parameters())
    with torch.inference_mode():
        memory = weights + peak_memory(run, device)  # first: it also warms up
        pace = speed(run, batch, device, seconds)
    return Cost(
        sum(p.numel() for p in vit.parameters()),
        int(math.prod(tokens.grid_of(vit, (size, size)))) + int(vit.num_prefix_tokens),
        flops(vit, size),
        pace,
        batch,
        memory,
    )


def flops(vit: Any, size: int) -> float:
    """Floating-point operations of one image (a multiply and an add count two), matrix products and convolutions alone.

    Shapes are followed on torch's meta device: nothing is computed. Attention is counted in full.
    """
    import copy

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from vitkit import tokens

    shell = copy.deepcopy(vit).to("meta").eval()
    counter = FlopCounterMode(display=False)
    x = torch.zeros(1, vit.passport.preprocess.in_chans, size, size, device="meta")
    with sdpa_kernel(SDPBackend.MATH), counter, torch.inference_mode():
        tokens.feature(shell, x)
    return float(counter.get_total_flops())


def speed(run: Callable[[], Any], batch: int, device: Any = "cpu", seconds: float = 0.5) -> float:
    """Images a second: the median over at least 3 calls and about `seconds`."""
    import statistics
    import time

    import torch

    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times)


def peak_memory(run: Callable[[], Any], device: Any = "cpu") -> int:
    """The largest number of bytes that tensors made during `run` hold at once."""
    import os

    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes lines of its own to the terminal otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    assert profiler.profiler is not None
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)


def share(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Rows (sorted) of a share of the images: of every class its share, at least one image; for several labels an image, of
    all images. With one seed a smaller share is contained in a larger one."""
    import numpy as np

    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}", fix="above 0, up to 1")
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 2:
        return np.sort(order[: max(1, round(fraction * len(order)))])
    parts = [order[labels[order] == c] for c in np.unique(labels)]
    return np.sort(np.concatenate([part[: max(1, round(fraction * len(part)))] for part in parts]))


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Which points no other beats: none is at least as good for less, or better for the same. NaN never is on the front."""
    points = list(zip(costs, values, strict=True))

    def beaten(cost: float, value: float) -> bool:
        return any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)

    return [cost == cost and value == value and not beaten(cost, value) for cost, value in points]


def mean_difference(
    metric: Callable,
    y: np.ndarray,
    more: Sequence[np.ndarray],
    less: Sequence[np.ndarray],
    *,
    groups: np.ndarray | None = None,
    n: int = 5000,
    seed: int = 0,
) -> Difference:
    """mean over pairs of metric(more) - metric(less), all on the same redrawn cases: `statistics.paired_bootstrap` for several
    pairs of models at once (three backbones, each with a large and with a small input)."""
    import numpy as np

    from vitkit.evaluate.resampling import Difference, Plan, evaluate, interval_of, shrink

    pairs = list(zip(more, less, strict=True))
    if not pairs:
        raise ConfigError("no pair of cells to compare", fix="two sizes of one backbone, or two backbones at one size")
    first, second = (float(np.mean([float(metric(y, pair[i])) for pair in pairs])) for i in (0, 1))
    plan = Plan.of(len(y), groups, None)
    blocks = []
    for w in plan.draws(n, seed):
        gaps = [evaluate(metric, (y, a), w) - evaluate(metric, (y, b), w) for a, b in pairs]
        blocks.append(np.mean(gaps, axis=0))
    draws = np.concatenate(blocks)
    interval = interval_of(None, first - second, draws, plan, 0.95)
    kept = draws[~np.isnan(draws)]
    if np.isnan(interval.low):
        p = 1.0 if len(kept) and not kept.any() else float("nan")
    else:
        tail = min((kept <= 0).sum(), (kept >= 0).sum())
        p = min(1.0, 2 * shrink((tail + 1) / (len(kept) + 1), plan.units, plan.layers))
    ends = (interval.low, interval.high, plan.units, 0.95, interval.note)
    return Difference(first - second, *ends, p, first, second)


def pooled_iou(y: np.ndarray, tables: np.ndarray) -> float:
    """Foreground IoU, mean over classes, from the pixel counts (N, C * C) of each image (`masks.confusion`, flat), pixels of
    all images together. `y` is not looked at: the truth is in the counts."""
    import numpy as np

    return float(weighted_iou(y, tables, np.ones((len(tables), 1)))[0])


def weighted_iou(y: np.ndarray, tables: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`pooled_iou` (B,) under case weights (N, B): many bootstrap draws at once."""
    import numpy as np

    classes = round(tables.shape[1] ** 0.5)
    total = (np.asarray(tables, dtype=float).T @ weights).reshape(classes, classes, -1)
    hit = np.einsum("iib->ib", total)
    union = (total.sum(0) + total.sum(1) - hit)[1:]
    each = np.divide(hit[1:], union, out=np.full(union.shape, np.nan), where=union > 0)
    known = ~np.isnan(each)
    return np.divide(np.nansum(each, 0), known.sum(0), out=np.full(each.shape[1], np.nan), where=known.any(0))


def map_agreement(vit: Any, images: Any, *, factor: int = 2, centred: bool = False, batch_size: int = 16) -> np.ndarray:
    """(N,) how alike the patch maps of normalised `images` (N, C, H, W) and of the same enlarged `factor` times are.

    The larger map is averaged over factor x factor patches; what is given is the correlation of both over all values: 1 where
    a larger input only refines the map. centred: each channel's mean over the map is taken off first, so that what all
    patches share does not count.
    """
    import torch
    import torch.nn.functional as F

    from vitkit import tokens

    if factor < 2:
        raise ConfigError(f"factor is {factor}", fix="2 or more")
    found, axes = [], (2, 3) if centred else (1, 2, 3)
    with torch.inference_mode():
        for x in images.split(batch_size):
            large = F.interpolate(x, scale_factor=factor, mode="bicubic", align_corners=False)
            a, b = tokens.maps(vit, x)[0], F.avg_pool2d(tokens.maps(vit, large)[0], factor)
            a, b = (m - m.mean(axes, keepdim=True) for m in (a, b))
            found.append(F.cosine_similarity(a.flatten(1), b.flatten(1)))
    return torch.cat(found).float().cpu().numpy()
