"""Hardening: fine-tune a model on the adversarial images that its public trunk allows, so that they stop working.

Paper: Zheng et al., "Downstream Transfer Attack", 2024 (arXiv 2408.01705), whose abstract reports that adversarial training
with its examples protects downstream models; the recipe is this project's.

What happens, and where: the loss is CE(clean) + weight x CE(DTA example), same label (`Harden.forward`). Since the attacker
has the public trunk only, examples are made on a frozen copy of that trunk and do not depend on the model that is trained;
each step draws fresh random starts. The model goes on with what its last adaptation trains (adapters and head, or all); one
without an adaptation and a head gets a new head and trains all of it.

Differs from the paper: see above. `examples=cached` makes each image's example once, which needs unchanging images.

Cost: 2 forward-backwards for clean and adversarial images, and `steps` more through part of the trunk for fresh examples;
cached ones cost nothing from the second epoch on.

    vitkit attack harden --model runs/a --data photos/ --out runs/a-hardened
    vitkit.attack("harden", model="runs/a", data="photos/", out="runs/a-hardened")
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.parts.adaptation import Adaptation
from vitkit.parts.heads import class_loss, install_head, set_pooling, soft_cross_entropy
from vitkit.settings import Classify, Task, check_choices

RECIPE = {
    "epochs": 10,  # this project's: a fine-tuned model goes on for a few epochs, below its own learning rate
    "warmup_epochs": 1.0,
    "optimizer": "adamw",
    "blr": 2.5e-4,
    "weight_decay": 0.05,
    "crop_scale": (0.5, 1.0),
    "head": "linear",
}


@dataclass(frozen=True)
class Settings:
    """Adversarial fine-tuning against the Downstream Transfer Attack."""

    eps: float = 10 / 255
    """largest change of a pixel value in [0, 1] in the examples"""
    steps: int = 10
    """gradient steps an example, each of 2.5 eps / steps; 3 are nearly as strong"""
    layer: int | tuple[int, ...] | Literal["auto", "output"] = "auto"
    """block of the public trunk that examples attack; auto = searched on the first training images"""
    calibration: int = 32
    """images that the search looks at, at most one batch"""
    weight: float = 1.0
    """weight of the adversarial images' loss beside the clean images'"""
    examples: Literal["fresh", "cached"] = "fresh"
    """new examples in every step, or each image's first one kept (with augment=false, or mirrored images at most)"""
    encoder: str | None = None
    """public trunk that the attacker has; by default the base that the model was fine-tuned from"""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.eps <= 1:
            hint = f"{self.eps:g}/255" if 1 < self.eps <= 255 and self.eps == int(self.eps) else "8/255"
            raise ConfigError(f"eps is {self.eps:g}, and pixels are in [0, 1]", fix=f"a share of it, e.g. {hint}")
        if self.steps < 1 or self.calibration < 1:
            raise ConfigError(f"steps is {self.steps}, calibration {self.calibration}", fix="1 or more")
        if self.weight <= 0:
            raise ConfigError(f"weight is {self.weight:g}", fix="a positive number, e.g. 1")


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Nothing is added."""
    return vit


def trains(name: str) -> bool:
    """What trains is decided by the adaptation that goes on; see `Harden`."""
    return True


class Harden(Adaptation):
    """A model and its public trunk. The model keeps the head it has for `task`'s classes."""

    keeps_head = True
    kinds = ("image",)

    def __init__(self, vit: nn.Module, settings: Settings = Settings(), *, task: Task, classify: Classify = Classify()):
        from vitkit.attack.dta import DTA
        from vitkit.attack.dta import Settings as AttackSettings
        from vitkit.attack.encoder import named_encoder, preprocess_of, public_trunk

        nn.Module.__init__(self)
        tokens.require_vit(vit)
        self.vit, self.task, self.classify, self.given = vit, task, classify, settings
        self.preprocess = preprocess_of(vit)
        base = getattr(getattr(vit, "passport", None), "base", {}).get("ref", "")
        encoder = named_encoder(settings.encoder, base, self.preprocess) if settings.encoder else public_trunk(vit)
        own = {name: getattr(settings, name) for name in ("eps", "steps", "layer", "calibration")}
        # eps / 4 at 10 steps, as in the attack; few steps must be longer to reach the edge of the budget.
        own["step_size"] = settings.eps * min(1.0, 2.5 / settings.steps)
        self._attack = (DTA(encoder, AttackSettings(**own)),)  # in a tuple: its weights are not the method's
        self._cache: dict[bytes, Tensor] = {}
        self._views: dict[int, set[bytes]] = {}
        # The block, kept in checkpoints so that a resumed run attacks the same one; -1 = not searched, depth = output.
        chosen = self._attack[0].layers
        self.register_buffer("attacked", torch.tensor([-1] if chosen is None else _numbers(chosen[0], vit)))
        self._choose_weights()

    def _choose_weights(self) -> None:
        """What trains: as the model's last adaptation says; everything, and a new head, where there was none."""
        from importlib import import_module

        passport = getattr(self.vit, "passport", None)
        steps = [step["method"] for step in getattr(passport, "steps", []) if step["method"] != "attack.harden"]
        if not (passport is not None and passport.classes):
            if self.classify.pool != "keep":
                set_pooling(self.vit, self.classify.pool)
            install_head(self.vit, self.classify.head, len(self.task.classes))
        elif tuple(passport.classes) != self.task.classes:
            raise ConfigError(
                f"the model knows the classes {', '.join(passport.classes)}, the data {', '.join(self.task.classes)}",
                fix="the data that the model was adapted to, or a model without a head",
            )
        chosen = import_module(f"vitkit.{steps[-1]}").trains if steps else trains
        for name, parameter in self.vit.named_parameters():
            parameter.requires_grad_(name.startswith(("head.", "fc_norm.")) or chosen(name))

    @property
    def settings(self) -> Settings:
        """The settings with the block that a search chose."""
        found = tuple(self.attacked.tolist())
        if self.given.layer != "auto" or found == (-1,):
            return self.given
        return replace(self.given, layer=found[0] if len(found) == 1 else found)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"loss", "logits"}; in training the loss of clean and adversarial images, otherwise of the clean ones."""
        images, labels = batch["image"], batch["label"]
        if not self.training:
            scores = tokens.logits(self.vit, images)
            return {"loss": self._loss(scores, labels, 0.0), "logits": scores}
        if self.classify.mixup or self.classify.cutmix:
            images, labels = self._mix(images, labels)
        changed = self.examples(images, batch.get("seed"), batch.get("index"))
        # One pass over both, so that a normalising head sees the mixture that it will be used on.
        clean, adversarial = tokens.logits(self.vit, torch.cat([images, changed])).chunk(2)
        loss = self._loss(clean, labels, self.classify.smoothing)
        attacked = self._loss(adversarial, labels, self.classify.smoothing)
        return {"loss": loss + self.given.weight * attacked, "logits": clean}

    def examples(self, images: Tensor, seeds: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
        """Adversarial images (B, C, H, W), normalised like `images`, which are clean and normalised."""
        pixels = self.preprocess.denormalise(images.detach())
        attack = self._attack[0]
        attack.encoders[0].to(images.device)
        if attack.layers is None:
            self._find_block(pixels)
        if self.given.examples == "fresh":
            changed = attack(pixels, None if seeds is None else seeds.cpu())
        else:
            changed = self._cached(pixels, indices)
        return self.preprocess.normalise(changed).to(images.dtype)

    def _find_block(self, pixels: Tensor) -> None:
        """Search on these images, or take what a resumed run has found; all processes go by the first one's choice."""
        attack = self._attack[0]
        if int(self.attacked[0]) < 0:
            (profile,) = attack.search(pixels)
            self.attacked.copy_(torch.tensor(profile.chosen))
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(self.attacked, 0)
        attack.layers = [tuple(self.attacked.tolist())]

    def _cached(self, pixels: Tensor, indices: Tensor | None) -> Tensor:
        """Examples in 8 bits by the content of the image, whose hash is also the seed of the start."""
        from vitkit.attack.pgd import eight_bit

        shown = (pixels.cpu() * 255).round().byte()
        keys = [hashlib.blake2b(one.numpy().tobytes(), digest_size=8).digest() for one in shown]
        for index, key in zip([] if indices is None else indices.tolist(), keys, strict=False):
            seen = self._views.setdefault(index, set())
            seen.add(key)
            if len(seen) > 2:
                raise ConfigError(
                    "examples=cached, but augmentation changes the images from epoch to epoch",
                    fix="--augment false, or --examples fresh",
                )
        new = [i for i, key in enumerate(keys) if key not in self._cache]
        if new:
            seeds = torch.tensor([int.from_bytes(keys[i], "big") >> 1 for i in new])
            made = eight_bit(self._attack[0](pixels[new], seeds), pixels[new], self.given.eps).cpu()
            self._cache |= {keys[i]: row for i, row in zip(new, made, strict=True)}
        return torch.stack([self._cache[key] for key in keys]).to(pixels.device).float() / 255

    def _loss(self, scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        if self.task.kind == "single" and labels.is_floating_point():
            return soft_cross_entropy(scores, labels)
        return class_loss(scores, labels, smoothing=smoothing)

    def __deepcopy__(self, memo: dict[int, Any]) -> Harden:
        import copy

        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        for key, value in self.__dict__.items():  # the public trunk and its examples never change: copies share them
            shared = key in ("_attack", "_cache", "_views")
            twin.__dict__[key] = value if shared else copy.deepcopy(value, memo)
        return twin


def _numbers(layers: tuple[int, ...] | str, vit: nn.Module) -> list[int]:
    return [len(tokens.require_vit(vit).blocks)] if isinstance(layers, str) else list(layers)
