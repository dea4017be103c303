"""Full fine-tuning: every weight trains, with layer-wise learning-rate decay, drop path and RandAugment.

Recipe: Xiao et al., "Delving into Masked Autoencoders for Multi-Label Thorax Disease Classification", WACV 2023
(arXiv 2210.12843), table of section 4: layer decay 0.55, RandAugment magnitude 6 and drop path 0.2 are the three knobs
it calls significant. Official code: lambert-x/medical_mae (main_finetune_chestxray.py), a fork of facebookresearch/mae.

What happens, and where: parameter groups by depth (`parts.optim.layer_decay_groups`): scale of layer i is
decay^(depth + 1 - i); binary cross-entropy over labels or cross-entropy over classes (`parts.heads.class_loss`). With
`pool=avg` patch tokens are averaged and normalised by a new `fc_norm`, and the final norm is dropped
(`parts.heads.set_pooling`), as MAE's fine-tuning does. `label_map` starts the head from rows of the loaded model's own
(`parts.label_maps`); `teacher` adds the divergence from another adapted model (`parts.logit_distillation`).

Differs from the paper: the model is chosen on validation images, not on the test set. `hflip` can be switched off.

Cost: forward, backward to activations and to weights; optimiser state for every weight.

    vitkit adapt full --model runs/mae --data labels.csv --out runs/full --pool avg
    vitkit.adapt("full", model="runs/mae", data="labels.csv", out="runs/full", pool="avg")
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitkit.errors import ConfigError
from vitkit.parts.adaptation import Adaptation
from vitkit.parts.label_maps import convert_head, read_label_map
from vitkit.parts.logit_distillation import Teacher, distillation_loss, load_teacher
from vitkit.settings import Classify, Task

RECIPE = {
    "epochs": 75,  # medical_mae FINETUNE.md, ViT on ChestX-ray14
    "warmup_epochs": 5.0,
    "optimizer": "adamw",
    "blr": 2.5e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "layer_decay": 0.55,
    "drop_path": 0.2,
    "randaug": "rand-m6-mstd0.5-inc1",
    "batch_size": 128,
    "head": "linear",
}


@dataclass(frozen=True)
class Settings:
    """Full fine-tuning."""

    label_map: str | None = None
    """JSON list with one class of the loaded model's head for each class of the data: its rows start the new head (VideoMAE
    V2, label_710to400.json); by default the head is new"""
    teacher: str | None = None
    """run folder or weight file of a model adapted to the same classes, whose probabilities are learnt beside the labels"""
    teacher_weight: float = 1.0
    """teacher: its share of the loss; 1 leaves the labels out (logit distillation, arXiv 1503.02531; VideoMAE V2's own
    distillation is not published)"""
    temperature: float = 1.0
    """teacher: both sides' scores are divided by this"""

    def __post_init__(self) -> None:
        if not 0 <= self.teacher_weight <= 1:
            raise ConfigError(f"teacher_weight is {self.teacher_weight}", fix="a share from 0 to 1")
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}", fix="above 0, e.g. 1")


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Nothing is added."""
    return vit


def trains(name: str) -> bool:
    """Everything trains."""
    return True


class Full(Adaptation):
    """A ViT and a new head for `task`, all trainable."""

    shards = True

    def __init__(self, vit: nn.Module, settings: Settings = Settings(), *, task: Task, classify: Classify = Classify()):
        known = {name: value.detach().clone() for name, value in vit.head.named_parameters()}
        super().__init__(vit, settings, task=task, classify=classify, inject=inject, trains=trains)
        if settings.label_map is not None:
            self._start_head(known, settings.label_map)
        self.teacher: Teacher | None = None
        if settings.teacher is not None:
            if task.kind != "single":
                raise ConfigError("a teacher needs one label an image", fix="leave teacher out")
            self.teacher = load_teacher(settings.teacher, vit, task.classes)

    def _start_head(self, known: dict[str, Tensor], path: str) -> None:
        if not known or not isinstance(self.vit.head, nn.Linear):
            what = "the model has no head" if not known else f"head is {self.classify.head}"
            raise ConfigError(f"label_map, but {what}", fix="a model with a linear head, and head=linear")
        self.vit.head.load_state_dict(convert_head(known, read_label_map(path, len(self.task.classes))))

    def objective(self, images: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        loss = super().objective(images, scores, labels)
        if self.teacher is None or not self.training:
            return loss
        weight = self.settings.teacher_weight
        return (1 - weight) * loss + weight * distillation_loss(scores, self.teacher(images), self.settings.temperature)
