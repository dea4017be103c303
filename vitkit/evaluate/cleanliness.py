"""Cleanliness: how clean the patch features of any model are, before and after: outliers, position code, masks, pictures.

Paper: the outliers of Darcet et al., "Vision Transformers Need Registers", ICLR 2024 (arXiv 2309.16588); the position code
of Yang et al., "Denoising Vision Transformers", ECCV 2024 (arXiv 2401.02957); the robust threshold is Leys et al. 2013's.

What happens, and where: some images are for fitting, others are scored (`choose`). High-norm tokens are patches whose
norm exceeds median + 3 x 1.4826 x MAD, the median and MAD being of all scored patches (`limit_of`); about 0.13 % of
normally distributed norms do. `before_after` holds both models against the first one's limit, so that a narrower
distribution is not punished; before the final norm, which takes the scale away, in units of each one's median. Norms
are taken of what a dense head reads, and before the final norm, which hides most of an outlier. Position: a ridge
regression reads (row, column) from single patches (`patch_probes.position_errors`), on the images as they are, and with
their content rolled around by a random number of whole patches, so that only the model can tell where a patch is; what
the pixels of a patch give away stands beside it. With masks: mean IoU of a logistic regression on single patches, and
of the 20 nearest patches. Intervals and differences are bootstraps over scored images, groups whole.

Differs from the paper: a relative limit instead of one number for one model (150 for DINOv2-g).

Cost: two forward passes an image for each model, closed-form regressions; 64 + 64 images of a ViT-Ti take about a minute on
one core.

    vitkit evaluate --model vit_small_patch14_dinov2.lvd142m --data photos/ --protocols cleanliness --out runs/clean
    vitkit.evaluate(model="vit_small_patch14_dinov2.lvd142m", data="photos/", protocols="cleanliness", out="runs/clean")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkit.data.images import UNKNOWN, Images
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.evaluate import patch_probes as probes
from vitkit.evaluate.feature_maps import picture
from vitkit.evaluate.patch_views import Seen, evaluating, mask_of, patch_colours, seen
from vitkit.evaluate.resampling import case_mean
from vitkit.evaluate.statistics import Difference, Interval, bootstrap, paired_bootstrap

INTERVAL = "95 % interval"


@dataclass(frozen=True)
class Settings:
    """How much is looked at."""

    images: int = 64
    """images to fit on, and as many to score, at most"""
    sigmas: float = 3.0
    """robust standard deviations above the median at which a norm counts as high"""
    shown: int = 5
    """scored images with a picture"""
    batch_size: int = 16
    """images a forward pass"""

    def __post_init__(self) -> None:
        for name, least in (("images", 4), ("shown", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"at least {least}")
        if self.sigmas <= 0:
            raise ConfigError(f"sigmas is {self.sigmas}", fix="a positive number, e.g. 3")


@dataclass(frozen=True)
class Figure:
    """One figure: `rows` (T, ...) hold what each scored image contributes, `metric` turns any selection of them into it."""

    name: str
    better: str  # "lower", "higher"
    rows: np.ndarray
    metric: Callable[[np.ndarray], float]

    @property
    def value(self) -> float:
        return float(self.metric(self.rows))

    def interval(self, groups: np.ndarray | None, seed: int = 0) -> Interval:
        """95 % over scored images."""
        found = bootstrap(*self._paired(), self.rows, groups=groups, n=1000, seed=seed)
        assert isinstance(found, Interval)
        return found

    def less(self, before: Figure, groups: np.ndarray | None, seed: int = 0) -> Difference:
        """This minus `before`, on the same images."""
        metric, y = self._paired()
        return paired_bootstrap(metric, y, self.rows, before.rows, groups=groups, n=1000, seed=seed)

    def _paired(self) -> tuple[Callable, np.ndarray]:
        """The metric as a function of (nothing, rows), and the nothing."""
        metric = case_mean if self.metric is _mean else partial(_of_second, self.metric)
        return metric, np.zeros(len(self.rows))


@dataclass
class Measured:
    """One model on some images. `norms` (T, N) of what a dense head reads, `raw` before the final norm (or None where the
    model has none), `limits` of both; `scored` (T,) the images' rows, `shown` the numbers of those with a picture, `maps`
    (shown, N, D) their features."""

    figures: dict[str, Figure]
    norms: np.ndarray
    raw: np.ndarray | None
    limits: tuple[float, float | None]
    maps: Tensor
    shown: np.ndarray
    grid: tuple[int, ...]
    groups: np.ndarray | None
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    scored: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    def limit_before_norm(self, median: float) -> float | None:
        """The limit before the final norm of a model whose norms have this median there: the norm takes the scale away."""
        if self.limits[1] is None or self.raw is None:
            return None
        return self.limits[1] / float(np.median(self.raw)) * median

    def verdict(self) -> str:
        """The figures that matter most, in words."""
        return _verdict({key: (one.value,) for key, one in self.figures.items()})

    def table(self, title: str = "How clean the patch features are") -> dict[str, Any]:
        """{title, columns, rows, note} for a report."""
        rows = []
        for one in self.figures.values():
            found = one.interval(self.groups, self.seed)
            rows.append([one.name, found.value, _range(found), one.better])
        return {"title": title, "columns": ["figure", "value", INTERVAL, "better"], "rows": rows, "note": note_of(self)}


@dataclass
class BeforeAfter:
    """Two models on the same images: tables and pictures for a report, and a sentence."""

    before: Measured
    after: Measured
    differences: dict[str, Difference]
    tables: list[dict[str, Any]]
    pictures: list[list[tuple[np.ndarray, str]]]
    columns: list[str]
    verdict: str

    @property
    def figures(self) -> dict[str, tuple[float, float]]:
        """{name: (before, after)}."""
        return {name: (one.b, one.a) for name, one in self.differences.items()}


def before_after(
    before: nn.Module,
    after: nn.Module,
    images: Images,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    size: tuple[int, int] | None = None,
    settings: Settings = Settings(),
    names: tuple[str, str] = ("before", "after"),
) -> BeforeAfter:
    """Measure two models on the same images, in the same order, and compare them image by image.

    before, after: any timm trunks with a passport (ViTs, or ViTs that carry adapters); both see the same pixels. size: pixels
    of the images, by default the first model's. High norms are those above the first one's limits,
    before the final norm in units of each one's median.
    """
    from vitkit.evaluate.cleanliness_pictures import side_by_side

    size = size or _size(before)
    first = measure(before, images, device=device, seed=seed, size=size, settings=settings)
    second = measure(after, images, device=device, seed=seed, size=size, settings=settings, like=first, pixels=False)
    if first.grid != second.grid:
        raise WeightsError(
            f"the models cut images of {size} into {first.grid} and {second.grid} patches",
            fix="two models with one patch size, or measure each by itself",
        )
    found, rows = {}, []
    for key, figure in second.figures.items():
        if key in first.figures:
            found[key] = one = figure.less(first.figures[key], first.groups, seed)
            rows.append([figure.name, one.b, one.a, one.value, _range(one), figure.better])
    for key in first.figures.keys() - second.figures.keys():
        rows.append([first.figures[key].name, first.figures[key].value, None, None, "", ""])
    columns = ["figure", *names, "difference", INTERVAL, "better"]
    table = {"title": "How clean the patch features are", "columns": columns, "rows": rows, "note": note_of(first)}
    shown = [picture(before, images, int(row), size) for row in first.scored[first.shown]]
    rows_of, titles = side_by_side({names[0]: first, names[1]: second}, shown)
    said = _verdict({key: (one.b, one.a) for key, one in found.items()})
    return BeforeAfter(first, second, found, [table], rows_of, titles, said)


def measure(
    vit: nn.Module,
    images: Images,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    size: tuple[int, int] | None = None,
    settings: Settings = Settings(),
    like: Measured | None = None,
    pixels: bool = True,
) -> Measured:
    """Every figure of one model. like: another whose limits of high norms count, by default this model's own. pixels: also
    say what the pixels of single patches give away about position. The model comes back on its device, in its mode.

    Raises DataError for fewer than 4 images, WeightsError where features are not finite.
    """
    size = size or _size(vit)
    fit_rows, test_rows = choose(images, settings.images, seed)
    batch = settings.batch_size
    with evaluating(vit, device):
        fit, test = (seen(vit, images, rows, size, batch) for rows in (fit_rows, test_rows))
        rolled = [seen(vit, images, rows, size, batch, rolled=(test.grid, seed)) for rows in (fit_rows, test_rows)]
    groups = None if images.group is None else images.group[test_rows]
    norms, raw = np.linalg.norm(test.features, axis=-1), test.raw
    own = (limit_of(norms, settings.sigmas), None if raw is None else limit_of(raw, settings.sigmas))
    if like is not None:
        own = (like.limits[0], None if raw is None else like.limit_before_norm(float(np.median(raw))))
    figures = _norm_figures(norms, raw, own)
    code = {"position": (fit.features, test.features), "position_rolled": tuple(one.features for one in rolled)}
    if pixels:
        code["position_pixels"] = tuple(patch_colours(images, rows, size, test.grid) for rows in (fit_rows, test_rows))
    for key, (x, scored) in code.items():
        rows = probes.position_errors(x, scored, test.grid, seed)
        figures[key] = Figure(_POSITION[key], "" if key == "position_pixels" else "lower", rows, probes.r2_of)
    found, notes = (
        ({}, []) if images.masks is None else _mask_figures(images, fit_rows, test_rows, fit, test, size, seed)
    )
    shown = spread(len(test_rows), settings.shown)
    maps = torch.from_numpy(test.features[shown])
    return Measured(figures | found, norms, raw, own, maps, shown, test.grid, groups, notes, seed, test_rows)


def choose(images: Images, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to score, at most `count` each: training (and unlabelled) images and test (or validation)
    images where there are both, else two halves; groups stay whole."""
    fit = np.flatnonzero(np.isin(images.split, ("train", "unlabelled")))
    test = next((rows for name in ("test", "val") if len(rows := np.flatnonzero(images.split == name))), fit[:0])
    rng = np.random.default_rng(seed)
    if min(len(fit), len(test)) < 2:
        unit = np.arange(len(images)) if images.group is None else np.unique(images.group, return_inverse=True)[1]
        order = rng.permutation(unit.max() + 1 if len(unit) else 0)
        first = np.isin(unit, order[: (len(order) + 1) // 2])
        fit, test = np.flatnonzero(first), np.flatnonzero(~first)
    if min(len(fit), len(test)) < 2:
        raise DataError(
            f"{images.name}: {len(images)} images are too few to fit on some and score others",
            fix="at least 4 images (of at least 2 groups, where there are groups)",
        )
    return tuple(np.sort(rng.permutation(rows)[:count]) for rows in (fit, test))  # type: ignore[return-value]


def limit_of(norms: np.ndarray, sigmas: float) -> float:
    """median + sigmas x 1.4826 x MAD of all norms: a bound that the outliers themselves hardly move."""
    middle = float(np.median(norms))
    return middle + sigmas * 1.4826 * float(np.median(np.abs(norms - middle)))


# ---------------------------------------------------------------- figures

_POSITION = {
    "position": "position read from a patch, R²",
    "position_rolled": "position read from a patch, content rolled, R²",
    "position_pixels": "for scale: position read from a patch's pixels, R²",
}


def _norm_figures(norms: np.ndarray, raw: np.ndarray | None, limits: tuple[float, float | None]) -> dict[str, Figure]:
    found = {"high_norm": Figure("share of high-norm tokens", "lower", (norms > limits[0]).mean(1), _mean)}
    if raw is not None and limits[1] is not None:
        name = "share of high-norm tokens, before the final norm"
        found["high_norm_raw"] = Figure(name, "lower", (raw > limits[1]).mean(1), _mean)
    shown = norms if raw is None else raw
    ratio = shown.max(1) / np.maximum(np.median(shown, axis=1), 1e-12)
    name = "largest norm of an image over its median" + (", before the final norm" if raw is not None else "")
    found["norm_ratio"] = Figure(name, "lower", ratio, _mean)
    return found


def _mask_figures(
    images: Images, fit_rows: np.ndarray, test_rows: np.ndarray, fit: Seen, test: Seen, size: tuple[int, int], seed: int
) -> tuple[dict[str, Figure], list[str]]:
    """Mean IoU of the two read-outs; nothing but a note where the masks show one class only."""
    side = [n * max(1, round(one / n)) for one, n in zip(size, test.grid, strict=True)]
    masks = [np.stack([mask_of(images, int(row), side) for row in rows]) for rows in (fit_rows, test_rows)]
    labels = probes.patch_labels(masks[0], test.grid)
    known = masks[1] != UNKNOWN
    for what, values in (("fitted", labels[labels >= 0]), ("scored", masks[1][known])):
        if len(np.unique(values)) < 2:
            one = f"class {int(values[0])}" if len(values) else "nothing known"
            return {}, [f"no segmentation figures: all masks of the {what} images show {one} only"]
    classes = 1 + max(int(labels.max()), int(masks[1][known].max()), len(images.classes) - 1)
    found = {}
    for key, name, probe in (
        ("linear_iou", "linear segmentation, mean IoU", probes.linear_tables),
        ("neighbour_iou", "segmentation by 20 nearest patches, mean IoU", probes.neighbour_tables),
    ):
        tables = probe(fit.features, labels, test.features, masks[1], test.grid, classes, seed)
        if tables is not None:
            found[key] = Figure(name, "higher", tables, probes.iou_of)
    return found, []


def note_of(one: Measured) -> str:
    """What the figures of a table rest on."""
    high = f"high norm: above {one.limits[0]:.3g}"
    high += "" if one.limits[1] is None else f" ({one.limits[1]:.3g} before the final norm)"
    notes = [f"{len(one.norms)} scored images, {one.norms.shape[1]} patches each; {high}", *one.notes]
    return "; ".join(notes)


def _verdict(values: dict[str, tuple[float, ...]]) -> str:
    """One model's figures, or "before to after"."""
    parts = []
    raw = "high_norm_raw" if "high_norm_raw" in values else "high_norm"
    for key, words, style in (
        (raw, "high-norm tokens", "{:.1%}"),
        ("position_rolled", "position code (R²)", "{:.2f}"),
        ("linear_iou", "linear segmentation (IoU)", "{:.3f}"),
    ):
        if key in values:
            parts.append(f"{words} {' to '.join(style.format(value) for value in values[key])}")
    return "; ".join(parts)


def _range(found: Interval) -> str:
    return found.note if np.isnan(found.low) else f"{found.low:.3g} to {found.high:.3g}"


def _mean(rows: np.ndarray) -> float:
    return float(np.asarray(rows, dtype=float).mean())


def _of_second(metric: Callable[[np.ndarray], float], _: np.ndarray, rows: np.ndarray) -> float:
    return metric(rows)


def spread(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of `count` rows, evenly."""
    return np.linspace(0, count - 1, num=min(count, wanted)).round().astype(int)


def _size(vit: nn.Module) -> tuple[int, int]:
    """The model's own size; only models of images have patches on a page."""
    prepared = vit.passport.preprocess
    if prepared.kind != "image":
        raise ConfigError(
            f"cleanliness is measured on images, and this model takes {prepared.kind}s", fix="a ViT of images"
        )
    return int(prepared.image_size[0]), int(prepared.image_size[1])
