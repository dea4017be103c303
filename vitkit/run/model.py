"""A model with its passport, ready to use on files, arrays or tensors: what `vitkit.load` gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkit.errors import ConfigError
from vitkit.passport import Passport
from vitkit.settings import Machine


@dataclass(frozen=True)
class Predictions:
    """`scores` (N, C) class probabilities for `names`, in order; `labels` in words."""

    names: list[str]
    classes: list[str]
    scores: np.ndarray
    task: str

    @property
    def labels(self) -> list[str]:
        """The most likely class of each image, or every class with probability >= 0.5 joined by `|`."""
        if self.task == "single":
            return [self.classes[i] for i in self.scores.argmax(1)]
        return ["|".join(c for c, s in zip(self.classes, row, strict=True) if s >= 0.5) for row in self.scores]

    def table(self) -> Any:
        """A pandas frame: image, predicted, one probability a class."""
        import pandas as pd

        columns: dict[str, Any] = {"image": self.names, "predicted": self.labels}
        columns |= {f"p({name})": self.scores[:, i].round(6) for i, name in enumerate(self.classes)}
        return pd.DataFrame(columns)


class Model:
    """`vit` is a plain timm model; `passport` says how images are prepared for it and what it predicts."""

    def __init__(self, vit: nn.Module):
        self.vit = vit.eval()

    @property
    def passport(self) -> Passport:
        return self.vit.passport

    @property
    def classes(self) -> list[str] | None:
        return self.passport.classes

    def __repr__(self) -> str:
        size = "x".join(str(n) for n in self.passport.preprocess.image_size)
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"Model({self.passport.arch}, {size}, {self.passport.preprocess.channels}{classes})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (or features where there is no head) of pixels (B, C, H, W), uint8 or in [0, 1]; normalised here."""
        from vitkit import tokens

        self.vit.eval()
        device = next(self.vit.parameters()).device
        return tokens.logits(self.vit, self.passport.preprocess.normalise(images.to(device)))

    def predict(
        self, data: Any, *, batch_size: int = 64, workers: int = 0, clips: int = 1, crops: int = 1
    ) -> Predictions:
        """Class probabilities for a folder, file, table, `Images` or anything else that vitkit reads. Videos: the mean over
        `clips` x `crops` views of each."""
        if not self.classes:
            raise ConfigError(
                f"{self!r} has no classes to predict", fix="adapt it first: vitkit adapt linear --model ... --data ..."
            )
        images = self._images(data)
        task = self.passport.task or "single"
        if clips * crops > 1:
            from vitkit.run.multi_clip import mean_scores

            scores = mean_scores(self, images, clips, crops, batch_size, workers)
        else:
            scores = self._run(images, batch_size, workers)
            scores = scores.softmax(1) if task == "single" else scores.sigmoid()
        return Predictions(list(images.names), list(self.classes), scores.numpy(), task)

    def embed(self, data: Any, *, batch_size: int = 64, workers: int = 0) -> np.ndarray:
        """Pooled features (N, D), float32, in image order."""
        from vitkit.evaluate.features import features

        return features(self.vit, self._images(data), batch_size=batch_size, workers=workers)

    def _images(self, data: Any) -> Any:
        return _images(data, self.passport.preprocess.kind)

    def _run(self, images: Any, batch_size: int, workers: int) -> Tensor:
        from vitkit.data.transforms import eval_view
        from vitkit.run.batches import evaluation_batches

        view = eval_view(self.passport.preprocess)
        machine = Machine(batch_size=batch_size, workers=workers)
        rows = [self(batch["image"]).float().cpu() for batch in evaluation_batches(images, view, machine)]
        return torch.cat(rows)


def _images(data: Any, kind: str = "image") -> Any:
    from vitkit.data import read
    from vitkit.data.images import Images

    return data if isinstance(data, Images) else read(data, kind=kind, say=lambda text: None)


@dataclass(frozen=True)
class Run:
    """A finished run folder."""

    path: Path

    @property
    def summary(self) -> dict[str, Any]:
        from vitkit.run.folder import RunFolder

        return RunFolder(self.path).read_summary() or {}

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics by name."""
        return {metric["name"]: metric["value"] for metric in self.summary.get("metrics", [])}

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def model(self) -> Model:
        """The trained model, ready to predict."""
        from vitkit.run.verbs import load

        return load(self.path)
