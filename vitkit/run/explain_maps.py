"""The maps and figures of `vitkit explain`: pictures batched by size, every kind of map, curves, randomised weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkit import tokens
from vitkit.explain import attention, faithfulness, grad_cam, pca
from vitkit.explain.shared import has_head, predict
from vitkit.run.class_names import ClassNames
from vitkit.run.progress import Progress

KINDS = {
    "attention": "Attention",
    "rollout": "Attention rollout",
    "grad_cam": "Grad-CAM",
    "prompt_cam": "Prompt-CAM",
}
FOR_A_CLASS = ("grad_cam", "prompt_cam")
QUICK_STEPS = 14  # of a curve
DEPTHS = (1, None)  # randomised: head and last block; everything


@dataclass
class Shown:
    """One picture of the page: `pixels` uint8 (C, H, W) as the model sees it, its classes, maps and figures."""

    name: str
    pixels: Tensor
    label: str
    true: int | None  # the label as a class of the model
    probabilities: np.ndarray | None = None  # (classes,)
    maps: dict[tuple[str, int | None], np.ndarray] = field(default_factory=dict)  # (kind, class) -> (h, w)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # kind (or "random") -> figures
    features: Tensor | None = None  # (h, w, D)

    @property
    def predicted(self) -> int | None:
        return None if self.probabilities is None else int(self.probabilities.argmax())


@dataclass
class Work:
    """Maps and figures of pictures, batched by size."""

    vit: Any
    kinds: list[str]
    own: Any
    asked: list[int]
    device: torch.device
    batch_size: int

    def groups(self, shown: list[Shown]) -> Iterator[list[Shown]]:
        """Pictures of one size, a bounded number of patches at once."""
        sizes: dict[tuple[int, ...], list[Shown]] = {}
        for one in shown:
            sizes.setdefault(tuple(one.pixels.shape[-2:]), []).append(one)
        for size, members in sizes.items():
            patches = math.prod(tokens.grid_of(self.vit, size))
            step = max(1, min(self.batch_size, 32 * 256 // patches))
            yield from (members[i : i + step] for i in range(0, len(members), step))

    def steps(self, shown: list[Shown]) -> int:
        """What the progress bar counts: forward passes of one image."""
        total = 0
        for group in self.groups(shown):
            total += len(group) * (2 + len(self.kinds))
            if self.scored:
                size = tuple(group[0].pixels.shape[-2:])
                total += faithfulness.forwards(len(group), size, self.controls, self.rows(size))  # type: ignore[arg-type]
        return total + (len(shown) * len(self.kinds) * len(DEPTHS) if self.own.sanity != "off" else 0)

    @property
    def scored(self) -> bool:
        return self.own.sanity != "off" and has_head(self.vit)

    @property
    def controls(self) -> int:
        """Rankings that get curves: every map, random maps, and in full every map reversed."""
        return 1 + len(self.kinds) * (2 if self.own.sanity == "full" else 1)

    def rows(self, size: tuple[int, ...]) -> int:
        """Pixel rows a step of the curves: one as the definition has it, or so many that there are QUICK_STEPS steps."""
        return 1 if self.own.sanity == "full" else math.ceil(size[0] / QUICK_STEPS)

    def run(self, shown: list[Shown], seed: int, progress: Progress) -> None:
        def step(count: int) -> None:
            for _ in range(count):
                progress.step(images=1)

        for number, group in enumerate(self.groups(shown)):
            x = self.normalised(group)
            self.predictions(group, x)
            step(len(group))
            for one, part in zip(group, pca.features(self.vit, x, self._pca), strict=True):
                one.features = part.cpu()
            step(len(group))
            for kind in self.kinds:
                self.maps(kind, group, x)
                step(len(group))
            if self.scored:
                self.curves(group, x, 1000 * seed + number, step)
        if self.own.sanity != "off":
            self.randomised(shown, seed, step)

    def normalised(self, group: list[Shown]) -> Tensor:
        pixels = torch.stack([one.pixels for one in group]).to(self.device)
        return self.vit.passport.preprocess.normalise(pixels)

    def predictions(self, group: list[Shown], x: Tensor) -> None:
        if has_head(self.vit):
            for one, row in zip(group, predict(self.vit, x, self._task).cpu().numpy(), strict=True):
                one.probabilities = row

    def maps(self, kind: str, group: list[Shown], x: Tensor) -> None:
        """Maps of `kind` for every class that its picture is asked about; one where the kind knows no classes."""
        function = self.function(kind)
        if kind not in FOR_A_CLASS:
            for one, found in zip(group, function(self.vit, x, None).cpu().numpy(), strict=True):
                one.maps[kind, None] = found
            return
        for place in range(max(len(self.classes_of(one)) for one in group)):
            some = [i for i, one in enumerate(group) if len(self.classes_of(one)) > place]
            target = torch.tensor([self.classes_of(group[i])[place] for i in some], device=x.device)
            for i, cls, found in zip(
                some, target.tolist(), function(self.vit, x[some], target).cpu().numpy(), strict=True
            ):
                group[i].maps[kind, cls] = found

    def classes_of(self, one: Shown) -> list[int]:
        """Classes that a picture is asked about: the predicted one, then those named, or else the true one."""
        more = self.asked or ([] if one.true is None else [one.true])
        return list(dict.fromkeys([int(one.predicted or 0), *more]))

    def function(self, kind: str) -> faithfulness.MapFunction:
        own = self.own
        if kind == "grad_cam":
            return lambda vit, x, target: grad_cam.saliency(vit, x, target, grad_cam.Settings(layer=own.layer))
        if kind == "prompt_cam":
            from vitkit.explain import prompt_cam

            return lambda vit, x, target: prompt_cam.saliency(vit, x, _given(target))
        settings = attention.Settings(layer=own.layer, head=own.head, fusion=own.fusion, discard=own.discard)
        chosen = attention.saliency if kind == "attention" else attention.rollout
        return lambda vit, x, target: chosen(vit, x, target, settings)

    def curves(self, group: list[Shown], x: Tensor, seed: int, step: Callable[[int], None]) -> None:
        """Insertion and deletion areas of the predicted class."""
        found = {
            kind: torch.from_numpy(np.stack([main_map(one, kind) for one in group])).to(x.device) for kind in self.kinds
        }
        if self.own.sanity == "full":
            found |= {f"reversed {kind}": -one for kind, one in list(found.items())}
        grid = tokens.grid_of(self.vit, x.shape[2:])
        found["random"] = faithfulness.random_maps(len(group), grid, seed).to(x.device)  # type: ignore[arg-type]
        target = torch.tensor([one.predicted for one in group], device=x.device)
        rows, batch = self.rows(x.shape[2:]), min(16, self.batch_size)
        result = faithfulness.curves(
            self.vit, x, found, target, rows=rows, batch_size=batch, task=self._task, progress=step
        )
        for name, curve in result.items():
            for i, one in enumerate(group):
                one.scores.setdefault(name, {}).update(
                    insertion=float(curve.insertion_area[i]), deletion=float(curve.deletion_area[i])
                )

    def randomised(self, shown: list[Shown], seed: int, step: Callable[[int], None]) -> None:
        """Rank correlation of every map with the one of a model whose weights are randomised."""
        for depth in DEPTHS:
            vit = faithfulness.randomise(self.vit, depth, seed)
            name = "top" if depth else "all"
            for group in self.groups(shown):
                x = self.normalised(group)
                for kind in self.kinds:
                    target = None
                    if kind in FOR_A_CLASS:
                        target = torch.tensor([one.predicted for one in group], device=x.device)
                    known = torch.from_numpy(np.stack([main_map(one, kind) for one in group]))
                    other = self.function(kind)(vit, x, target).cpu()
                    for one, value in zip(group, faithfulness.rank_correlation(known, other).tolist(), strict=True):
                        one.scores.setdefault(kind, {})[f"correlation_{name}"] = value
                    step(len(group))

    @property
    def _task(self) -> str:
        return self.vit.passport.task or "single"

    @property
    def _pca(self) -> pca.Settings:
        return pca.Settings(layer=self.own.layer)


def _given(target: Tensor | None) -> Tensor:
    assert target is not None  # kinds in FOR_A_CLASS are always asked about one
    return target


def main_map(one: Shown, kind: str) -> np.ndarray:
    """The map of the predicted class, or the only one."""
    return one.maps[kind, one.predicted if kind in FOR_A_CLASS else None]


def trait_panels(vit: Any, shown: list[Shown], asked: list[int], names: ClassNames) -> list[tuple[str, np.ndarray]]:
    """Panels of the asked classes, or of the four most often predicted, on the pictures of the most common size."""
    from vitkit.explain import traits

    sizes = [tuple(one.pixels.shape) for one in shown]
    common = max(sizes, key=sizes.count)
    some = [one for one in shown if tuple(one.pixels.shape) == common]
    predicted = [int(one.predicted or 0) for one in some]
    classes = asked or sorted(set(predicted), key=lambda c: (-predicted.count(c), c))[:4]
    labels = [one.true for one in some]
    pixels = torch.stack([one.pixels for one in some])
    return traits.panels(vit, pixels, list(classes), names.names, labels, heads=4)
