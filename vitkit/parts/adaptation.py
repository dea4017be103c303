"""What every adaptation of a ViT to labelled images shares: a new head, its loss, and a set of trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.parts.heads import class_loss, install_head, set_pooling, soft_cross_entropy
from vitkit.parts.optim import layer_decay_groups, weight_decay_groups
from vitkit.settings import Classify, Task


class Adaptation(nn.Module):
    """A ViT with something added, a head for `task`, and only what the method names trainable.

    A method file gives `inject(vit, settings) -> vit` and `trains(name) -> bool`; its class passes both here.
    `forward({"image": (B, C, H, W) normalised, "label": (B,) int64 or (B, C) float})` -> {"loss", "logits"}.
    """

    needs_labels = True
    kinds: tuple[str, ...] = ("image", "volume", "video")

    def __init__(
        self,
        vit: nn.Module,
        settings: Any,
        *,
        task: Task,
        classify: Classify = Classify(),
        inject: Callable[[nn.Module, Any], nn.Module],
        trains: Callable[[str], bool],
    ):
        super().__init__()
        tokens.require_vit(vit)
        before = {name for name, _ in vit.named_parameters()}
        if classify.pool != "keep":
            set_pooling(vit, classify.pool)
        pooling = {name for name, _ in vit.named_parameters()} - before  # a new fc_norm has nothing to preserve
        self.vit = inject(vit, settings)
        self.settings, self.task, self.classify = settings, task, classify
        self.make_head()
        for name, parameter in self.vit.named_parameters():
            parameter.requires_grad_(name.startswith("head.") or name in pooling or trains(name))

    def make_head(self) -> None:
        """A new head on the pooled feature; a method that reads out otherwise overrides this."""
        install_head(self.vit, self.classify.head, len(self.task.classes))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, labels = batch["image"], batch["label"]
        if self.training and (self.classify.mixup or self.classify.cutmix):
            images, labels = self._mix(images, labels)
        scores = tokens.logits(self.vit, images)
        return {"loss": self.objective(images, scores, labels), "logits": scores}

    def objective(self, images: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of class `scores` (B, C) of `images` (as mixed) against hard or soft `labels`."""
        if self.task.kind == "single" and labels.is_floating_point():
            return soft_cross_entropy(scores, labels)
        return class_loss(scores, labels, smoothing=self.classify.smoothing if self.training else 0.0)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities (B, C): softmax for one label an image, sigmoid for many. Several views of each video,
        (B, V, C, T, H, W), give the mean of their probabilities."""
        if images.ndim == 6:
            return torch.stack([self.predict(view) for view in images.unbind(1)]).mean(0)
        scores = tokens.logits(self.vit, images).float()
        return scores.softmax(-1) if self.task.kind == "single" else scores.sigmoid()

    def test_view(self, preprocess: Any) -> Any:
        """The view of test images: of videos as many clips and crops as `classify` asks for."""
        from vitkit.data.transforms import eval_view
        from vitkit.data.video_views import test_views

        several = self.classify.test_clips * self.classify.test_crops > 1
        if not several:
            return eval_view(preprocess)
        if preprocess.kind != "video":
            raise ConfigError("test_clips and test_crops are for videos", fix="leave them out")
        return test_views(preprocess, segments=self.classify.test_clips, crops=self.classify.test_crops)

    def param_groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
        if layer_decay != 1.0:
            return layer_decay_groups(self.vit, weight_decay=weight_decay, layer_decay=layer_decay, prefix="vit.")
        return weight_decay_groups(self.vit.named_parameters(), weight_decay)

    def finish(self) -> nn.Module:
        """The adapted ViT, head included; it still answers `tokens.encode`."""
        return self.vit

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from vitkit.parts.mixup import mix

        if not labels.is_floating_point():
            labels = nn.functional.one_hot(labels, len(self.task.classes)).to(images.dtype)
            labels = labels * (1 - self.classify.smoothing) + self.classify.smoothing / len(self.task.classes)
        return mix(images, labels, mixup=self.classify.mixup, cutmix=self.classify.cutmix)
