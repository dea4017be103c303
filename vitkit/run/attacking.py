"""`vitkit attack RUN --data D`: how far a model is fooled by someone who has its public trunk only.

Examples are made on the trunk alone; the model sees them afterwards, once each, to be counted. Labels serve the count (and
the white-box ceiling, where it is asked for), never the trunk attacks or their layer search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkit import tokens, weights
from vitkit.attack import baselines
from vitkit.attack.dta import DTA, Profile, Settings
from vitkit.attack.encoder import encoder_of, named_encoder, require_same_view, run_folder
from vitkit.attack.pgd import eight_bit
from vitkit.data.images import Images
from vitkit.data.transforms import eval_view
from vitkit.errors import ConfigError, DataError, MissingExtra, nearest
from vitkit.passport import Preprocess
from vitkit.run.batches import evaluation_batches, open_data, open_model, require_images, speaker
from vitkit.run.config import Config
from vitkit.run.measure import _home, device_of, labels_of, overlap_with_training, short_name
from vitkit.run.progress import Progress

WORDS = {
    "dta": "DTA",
    "dta_8bit": "DTA, rounded to 8 bits",
    "noise": "random noise",
    "l4a": "L4A",
    "ssp": "SSP",
    "std": "dispersion reduction",
    "fff": "fast feature fool",
    "pgd": "PGD on the model itself",
    "mifgsm": "MI-FGSM on the model itself",
}
# (name, eps, clean pixels, labels, seeds) -> adversarial pixels
Maker = Callable[[str, float, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Attempt:
    """One attack at one budget on every image: predicted classes, the largest change of a pixel, and the seconds."""

    name: str
    eps: float
    predicted: list[np.ndarray] = field(default_factory=list)
    reach: float = 0.0
    seconds: float = 0.0

    @property
    def classes(self) -> np.ndarray:
        return np.concatenate(self.predicted)


@dataclass
class Attacked:
    """Everything that an attack found, for its files and its report."""

    images: Images  # those attacked
    split: str
    labels: np.ndarray  # by the model's classes
    classes: list[str]
    clean: np.ndarray  # predicted classes of the clean images
    attempts: list[Attempt]
    encoders: list[str]
    layers: list[Any]
    profiles: list[Profile] | None
    searched_on: str
    examples: np.ndarray  # (N, H, W, C) uint8
    cautions: list[str]

    def find(self, name: str, eps: float) -> Attempt:
        return next(one for one in self.attempts if one.name == name and abs(one.eps - eps) < 1e-9)


def attack_job(config: Config) -> dict[str, Any]:
    """Attack the model of `config` through its public trunk: {"verdict", "report", "clean_accuracy", "attacks": {name:
    {"asr_all", "asr_flip", ...}}, "curve", "layers", "profile"}. Files and a report are written to `out`.

    Raises ConfigError and DataError on settings and data that do not fit, WeightsError where no public trunk is found.
    """
    own, settings = config.own, config.method
    _check(own, settings)
    inputs = config.inputs
    require_images(weights.kind(inputs.model, arch=inputs.arch, arch_kwargs=inputs.arch_kwargs), "attack")
    device = device_of(config.machine, "attack")
    say = speaker(config.machine.quiet)
    with torch.random.fork_rng(devices=[]), _home(config, "attack") as folder:
        images = open_data(config.inputs, say)
        vit: Any = open_model(config.inputs, seed=config.machine.seed, say=say, num_classes=None).eval()
        part, split, labels = scored(images, vit.passport, own.max_images, config.machine.seed)
        encoders = open_encoders(config, vit, say)
        for one in (vit, *encoders):
            one.to(device)
        attack = DTA(encoders, settings)
        profiles, where = None, ""
        if attack.layers is None:
            where, pixels = calibration(images, settings.calibration, vit.passport.preprocess, config.machine.seed)
            say(f"searching the most vulnerable block on {len(pixels)} {where} images, without labels")
            profiles = attack.search(pixels.to(device), _seeds(config.machine.seed, torch.arange(len(pixels))))
            say(f"attacking {_blocks(attack.layers or [])}")
        found = attack_all(vit, attack, part, labels, config, device)
        refs = own.encoder or (str(encoders[0].passport.base["ref"]),)
        names = [encoder_name(str(ref)) for ref in refs]
        cautions = overlap_with_training(vit, images)
        attacked = Attacked(
            part,
            split,
            labels,
            list(vit.passport.classes),
            encoders=names,
            layers=list(attack.layers or []),
            profiles=profiles,
            searched_on=where,
            cautions=cautions,
            **found,
        )
        from vitkit.run.attacked import write_attack

        return write_attack(folder, attacked, vit.passport, config, say)


def _check(own: Any, settings: Settings) -> None:
    """Raise ConfigError on attacks and budgets that do not exist, MissingExtra where one needs what is not installed."""
    for name in own.baselines:
        if name not in baselines.NAMES:
            close = nearest(name, baselines.NAMES, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"there is no baseline '{name}'", fix=f"{hint}baselines: {', '.join(baselines.NAMES)}")
    if set(own.baselines) & set(baselines.WHITE_BOX):
        try:
            import torchattacks  # noqa: F401
        except ImportError:
            raise MissingExtra("torchattacks", "attack") from None
    for level in own.curve:
        if not 0 <= level <= 255:
            raise ConfigError(f"curve holds {level:g}", fix="budgets in 255ths, 0 to 255, e.g. 2,4,8,10")
        if 0 < level < 0.05:  # 2/255 was meant
            hint = f"curve counts 255ths: {level * 255:.3g} instead of {level:.3g}"
            raise ConfigError(f"curve holds {level:g}, a change too small to see any effect of", fix=hint)
    if own.max_images < 1:
        raise ConfigError(f"max_images is {own.max_images}", fix="1 or more")


def scored(images: Images, passport: Any, most: int, seed: int) -> tuple[Images, str, np.ndarray]:
    """The labelled test images (validation images where there are none), their split, and their labels by the model's
    classes."""
    if not passport.classes:
        raise ConfigError(
            "the model has no classes, so it cannot be fooled",
            fix="an adapted run: vitkit adapt linear --model ... first",
        )
    if passport.task == "multi" or images.task != "single" or images.labels is None:
        raise DataError(
            f"{images.name}: an attack is counted on images of one class each, and these have {images.task or 'no'} labels",
            fix="class folders, or a CSV with path,label, and a run adapted to such data",
        )
    unknown = [name for name in images.classes if name not in passport.classes]
    if unknown:
        close = nearest(unknown[0], passport.classes, n=1)
        raise DataError(
            f"{images.name} has the class '{unknown[0]}', which the model does not know",
            fix=f"did you mean '{close[0]}'?" if close else f"the model's classes: {', '.join(passport.classes)}",
        )
    to_model = np.array([passport.classes.index(name) for name in images.classes])
    for split in ("test", "val"):
        part = images.part(split)
        part = part.subset(labels_of(part) >= 0)
        if len(part):
            if len(part) > most:
                rows = np.sort(np.random.default_rng(seed).choice(len(part), most, replace=False))
                part = part.subset(rows)
            return part, split, to_model[labels_of(part)]
    raise DataError(
        f"{images.name}: no labelled test or validation images to attack",
        fix="--test_fraction 0.2 cuts some off, or label some images of the test split",
    )


def open_encoders(config: Config, vit: nn.Module, say: Any) -> list[nn.Module]:
    """The attacker's encoders: those named, or the public base of the run."""
    model, seen = config.inputs.model, vit.passport.preprocess
    if not config.own.encoder:
        if run_folder(model) is None:
            raise ConfigError(
                f"{model} is not a run, so nothing says which public trunk it was fine-tuned from",
                fix="--encoder NAME, the public trunk that an attacker would use",
            )
        encoder = encoder_of(model, say=say)
        require_same_view(encoder.passport.preprocess, seen, str(encoder.passport.base["ref"]))
        return [encoder]
    return [named_encoder(ref, model, seen, say=say) for ref in config.own.encoder]


def calibration(images: Images, count: int, preprocess: Preprocess, seed: int) -> tuple[str, Tensor]:
    """Up to `count` images for the layer search, from other splits than the test where there are any; no labels."""
    for split in ("train", "unlabelled", "val", "test"):
        part = images.part(split)
        if len(part):
            rows = np.random.default_rng(seed).permutation(len(part))[:count]
            view = eval_view(preprocess)
            words = {"train": "training", "val": "validation"}.get(split, split)
            return words, torch.stack([view(part.decode(int(row))) for row in np.sort(rows)])
    raise DataError(f"{images.name}: no images", fix="vitkit check --data ... shows the splits")


def attack_all(
    vit: nn.Module, attack: DTA, part: Images, labels: np.ndarray, config: Config, device: torch.device
) -> dict[str, Any]:
    """Make and count every attack, batch by batch."""
    own, settings, machine = config.own, config.method, config.machine
    preprocess = vit.passport.preprocess
    plan = list(_plan(own, settings.eps))
    attempts = [Attempt(name, eps) for name, eps in plan]
    rounded = Attempt("dta_8bit", settings.eps)
    clean, examples = [], []
    make = maker(attack, vit, machine.seed)
    count = -(-len(part) // machine.batch_size)
    with Progress(count * len(plan), machine.batch_size, quiet=machine.quiet) as progress:
        for batch in evaluation_batches(part, eval_view(preprocess), machine):
            pixels = batch["image"].to(device).float() / 255
            truth = torch.from_numpy(labels)[batch["index"]]
            seeds = _seeds(machine.seed, batch["index"])
            clean.append(predict(vit, pixels))
            for attempt in attempts:
                began = time.perf_counter()
                changed = make(attempt.name, attempt.eps, pixels, truth, seeds)
                attempt.seconds += time.perf_counter() - began
                attempt.reach = max(attempt.reach, float((changed - pixels).abs().max()))
                attempt.predicted.append(predict(vit, changed))
                if (attempt.name, attempt.eps) == ("dta", settings.eps):
                    stored = eight_bit(changed, pixels, settings.eps)
                    rounded.predicted.append(predict(vit, stored.float() / 255))
                    rounded.reach = max(rounded.reach, float((stored.float() / 255 - pixels).abs().max()))
                    examples.append(stored.permute(0, 2, 3, 1).cpu().numpy())
                progress.step(images=len(pixels), waited=0.0)
    attempts.insert(1, rounded)
    return {"clean": np.concatenate(clean), "attempts": attempts, "examples": np.concatenate(examples)}


def _plan(own: Any, eps: float) -> Iterator[tuple[str, float]]:
    """Every (attack, budget): DTA first, the noise control always, then baselines, then the curve."""
    yield from (("dta", eps), ("noise", eps))
    yield from ((name, eps) for name in dict.fromkeys(own.baselines))
    for level in dict.fromkeys(own.curve):
        if abs(level / 255 - eps) > 1e-9:
            yield from (("dta", level / 255), ("noise", level / 255))


def maker(attack: DTA, vit: nn.Module, seed: int) -> Maker:
    """How examples are made. The downstream model is handed to the white-box attacks only."""
    at_budget: dict[float, DTA] = {attack.settings.eps: attack}

    def make(name: str, eps: float, pixels: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        settings = replace(attack.settings, eps=eps)
        if name == "noise":
            return baselines.noise(pixels, settings, seeds)
        if name in baselines.WHITE_BOX:
            return baselines.white_box(name, vit, pixels, labels, settings, seed=int(seeds[0]) + seed)
        if name != "dta":
            return baselines.encoder_attack(name, attack.encoders[0], pixels, settings, seeds)
        if eps not in at_budget:
            at_budget[eps] = DTA(attack.encoders, settings)
            at_budget[eps].layers = attack.layers  # searched once, at the main budget
        return at_budget[eps](pixels, seeds)

    return make


@torch.no_grad()
def predict(vit: nn.Module, pixels: Tensor) -> np.ndarray:
    """Predicted classes (B,) of pixels in [0, 1]."""
    return tokens.logits(vit, vit.passport.preprocess.normalise(pixels)).argmax(1).cpu().numpy()


def encoder_name(ref: str) -> str:
    """A short name; files called model.safetensors and the like are told by their folder, too."""
    name = short_name(ref)
    return f"{Path(ref).parent.name}/{name}" if name.startswith("model.") and Path(ref).parent.name else name


def _seeds(seed: int, index: Tensor) -> Tensor:
    return seed * 1_000_003 + index


def _blocks(layers: Sequence[Any]) -> str:
    """Attacked blocks in words, one phrase an encoder."""
    parts = ["the output" if one == "output" else "block " + " and ".join(map(str, one)) for one in layers]
    return "; ".join(parts)
