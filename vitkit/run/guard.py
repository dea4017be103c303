"""Guarded continuation: watch held-out images while released weights are trained on, and say at the end whether it helped.

Before training the original's features of some held-out images are kept. At every validation the teacher is judged on
the same images: with labels by nearest neighbours, each image by the others (labels are read for this, never trained
on); without labels by whether an image is found again in another view. Training ends when that falls more than the
tripwire below the original's, when the features use less than half of its effective rank, or when hardly any image
keeps its neighbours; the loop then puts the best state back. Where no state was better than the original, the original
is given back. The verdict is that of `vitkit compare` on the test images: a paired difference with its interval, not the
score that chose the state.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from vitkit.data.images import Images
from vitkit.errors import DataError
from vitkit.settings import Inputs, Machine

MOST = 1500  # images looked at in a validation
FEWEST = 20
LEAST_RANK = 0.5  # of the original's
LEAST_KEPT = 0.1  # of the original's nearest neighbours, above chance
NEIGHBOURS = 10


@dataclass
class Guard:
    """Watches `teacher_of(method)` on held-out images."""

    original: nn.Module
    images: Images
    tripwire: float
    machine: Machine
    device: torch.device
    say: Callable[[str], None]
    hflip: bool = True

    def __post_init__(self) -> None:
        self.labelled = self.images.task in ("single", "multi") and self.images.labels is not None
        self.views = () if self.labelled else self._views()
        self.start = self.original_features()
        self.first, self.rank = self.score(self.original, self.start), self._rank(self.start)
        what = "kNN of each image by the others" if self.labelled else "images found again in another view"
        self.measure = what
        self.say(f"guard: {what}, {self.first:.3f} of the original on {len(self.images)} held-out images")
        self.best = self.first

    @classmethod
    def of(
        cls, method: Any, images: Images, machine: Machine, device: torch.device, say: Any, hflip: bool
    ) -> Guard | None:
        """A guard for a method that wants one, over held-out images; None, said aloud, where there are too few."""
        if not getattr(method, "guarded", False) or not method.settings.tripwire:
            return None
        some = watched(images, machine.seed)
        if len(some) < FEWEST:
            say(
                f"guard: {len(some)} images cannot be watched ({FEWEST} or more can); training goes on without a tripwire"
            )
            return None
        return cls(deepcopy(method.teacher).to(device), some, method.settings.tripwire, machine, device, say, hflip)

    def original_features(self) -> np.ndarray:
        return self.features(self.original, self.images)

    def features(self, vit: nn.Module, images: Images) -> np.ndarray:
        from vitkit.evaluate.features import features
        from vitkit.run.batches import worker_count

        extracted = features(
            vit, images, batch_size=self.machine.batch_size, workers=worker_count(self.machine, images),
            device=self.device, on_bad="skip",
        )  # fmt: skip
        return np.nan_to_num(extracted.x)

    def score(self, vit: nn.Module, x: np.ndarray) -> float:
        """What decides, between 0 and 1."""
        from vitkit.evaluate import knn, label_free, metrics

        if self.labelled:
            y = np.asarray(self.images.labels)
            found = knn.scores(x, y, n_classes=len(self.images.classes), groups=self.images.group)
            return float(getattr(metrics, metrics.main_metric(str(self.images.task)))(y, found))
        one, two = (self.features(vit, view) for view in self.views)
        return float((label_free.found_again(one, two)[0].mean() + label_free.found_again(two, one)[0].mean()) / 2)

    def check(self, method: Any) -> tuple[float, dict[str, float], str]:
        """(score, what is logged, why training must end or "") of the teacher as it is now."""
        from vitkit.evaluate import label_free

        x = self.features(method.teacher, self.images)
        finite = bool(np.isfinite(x).all())
        score = self.score(method.teacher, x) if finite else 0.0
        rank = self._rank(x) if finite else 0.0
        k = min(NEIGHBOURS, len(x) - 2)
        kept = float(label_free.neighbour_overlap(self.start, x, k).mean()) if finite else 0.0
        chance = k / (len(x) - 1)
        reason = ""
        if score < self.first - self.tripwire:
            reason = f"{self.measure}: {score:.3f}, {self.first:.3f} of the original (tripwire {self.tripwire:g})"
        elif rank < LEAST_RANK * self.rank:
            reason = f"effective rank of the features {rank:.1f}, {self.rank:.1f} of the original"
        elif kept < chance + LEAST_KEPT * (1 - chance):
            reason = f"only {kept:.0%} of the original's nearest neighbours are left"
        if reason:
            self.say(f"guard: {reason}; training ends and the best state is put back")
        else:
            self.best = max(self.best, score)
        figures = {"val_guard": score, "guard_rank": rank, "neighbours_kept": kept}
        return (-1.0 if reason else score), figures, reason  # a state that trips is never the best one

    def settle(self, method: Any, state: Any) -> bool:
        """After training: give the original back where no state was better; whether that was done."""
        if state.best is not None and state.best > self.first:
            return False
        method.teacher.load_state_dict(self.original.state_dict())
        self.say("guard: no state was better than the original, which is given back")
        return True

    def verdict(self, vit: nn.Module, images: Images, inputs: Inputs, given_back: bool, state: Any) -> tuple[str, dict]:
        """(sentences, table): did it help, on the test images with an interval."""
        from vitkit.run import helped_measure, helped_words
        from vitkit.run.helped_models import Side

        rows = [[self.measure, self.first, self.best if not given_back else self.first, len(self.images)]]
        table = {
            "title": "Guard",
            "columns": ["held-out score", "original", "given back", "images"],
            "rows": rows,
            "note": "this score chose the state; the verdict above is of other images where there are any",
        }
        said = [f"Ended early: {state.ended}."] if state.ended else []
        if given_back:
            return " ".join(
                [*said, "It did not help: no state was better than the original, whose weights are given back."]
            ), table
        sides = (Side("A", "original", self.original, ""), Side("B", "continued", vit, ""))
        bench = helped_measure.Bench(
            sides, inputs, self.machine, self.device, None, lambda text: None, MOST, self.hflip
        )
        if not self.labelled and len(held_out := held_out_of(images)) >= FEWEST:
            images = held_out
        try:
            found = helped_measure.measure_two(bench, images, "guard", full=False, shots=0)
        except DataError as error:
            return " ".join([*said, f"Whether it helped cannot be told: {error.what}."]), table
        best = f"The state of step {state.best_step:,} is given back."
        return " ".join([*said, *helped_words.verdict(sides, found), best]), table

    def _views(self) -> tuple[Images, Images]:
        from vitkit.evaluate import label_free

        one, two = (label_free.views(self.images, "view", seed=seed, hflip=self.hflip) for seed in (1, 2))
        return one, two

    @staticmethod
    def _rank(x: np.ndarray) -> float:
        from vitkit.evaluate import label_free

        return label_free.effective_rank(x - x.mean(0))


def held_out_of(images: Images) -> Images:
    """Images that training does not see: validation and test."""
    return images.part("val", "test")


def watched(images: Images, seed: int) -> Images:
    """What a guard looks at: validation images, with labelled training images beside them where those are few (labels never
    enter training); never test images. Without any held-out image, training images."""
    val = images.part("val")
    some = val if len(val) >= 300 else images.part("train", "val")
    if images.task in ("single", "multi") and images.labels is not None:
        known = some.labels >= 0 if images.task == "single" else ~np.isnan(some.labels).all(1)
        some = some.subset(np.asarray(known))
    elif len(val) >= FEWEST:
        some = val
    else:
        some = images.part("train", "val", "unlabelled")
    if len(some) > MOST:
        some = some.subset(np.sort(np.random.default_rng(seed).permutation(len(some))[:MOST]))
    return replace(some, masks=None)
