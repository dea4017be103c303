"""The models that `vitkit compare A B ... --data D` looks at: opened, named as a person would, differences said aloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vitkit.errors import ConfigError
from vitkit.settings import Inputs

RANDOM = "random"  # in place of a model: the architecture of the first other one that is no run, with random weights
_PLAIN = ("model", "pytorch_model", "checkpoint", "weights", "last")  # file names that say nothing


@dataclass
class Side:
    """One of the models."""

    letter: str
    name: str
    vit: Any
    ref: str

    def __str__(self) -> str:
        return f"{self.letter} ({self.name})" if self.name else self.letter

    @property
    def random(self) -> bool:
        """Whether it has learnt nothing."""
        passport = self.vit.passport
        return passport.base.get("kind") == "random" and not passport.lineage

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies the model, as plain values."""
        import json

        passport = self.vit.passport
        preprocess = json.loads(json.dumps(passport.to_dict()["preprocess"]))
        known = {"arch": passport.arch, "sha256": passport.base.get("sha256"), "preprocess": preprocess}
        return {"name": self.name, "ref": self.ref, **known}


def open_sides(models: Sequence[Any], inputs: Inputs, seed: int, say: Callable[[str], None]) -> tuple[Side, ...]:
    """All models; a name that was given twice is opened once. A model is a name, path, ViT with a passport, or
    `vitkit.Model`; the word "random" stands for the architecture of the first other one that is no run.
    """
    from vitkit.run.batches import open_model, require_images

    named = [one for one in models if not _is_random(one)]
    real = next((one for one in named if not _is_run(one)), named[0] if named else None)
    if real is None:
        raise ConfigError("every model is random", fix="name at least one model")
    vits: dict[str, Any] = {}
    found, refs = [], []
    for letter, model in zip(ascii_uppercase, models, strict=False):
        vit = getattr(model, "vit", model)
        if hasattr(vit, "passport"):
            ref = str(vit.passport.base.get("ref") or vit.passport.arch)
        elif _is_random(model):
            vit, ref = _untrained(real, inputs, seed, say), RANDOM
        else:
            ref = str(model)
            if ref not in vits:
                say(f"{letter}: {ref}")
                vits[ref] = open_model(replace(inputs, model=ref), seed=seed, say=say)
            vit = vits[ref]
        require_images(vit.passport.preprocess.kind, "compare --data")
        found.append(vit.eval())
        refs.append(ref)
    names = [_name(ref, vit) for ref, vit in zip(refs, found, strict=True)]
    for name in {name for name in names if names.count(name) > 1}:  # whole paths where these differ, else the letters
        same = [i for i, one in enumerate(names) if one == name]
        apart = len({refs[i] for i in same}) == len(same)
        for i in same:
            names[i] = refs[i] if apart else ""
    return tuple(Side(*one) for one in zip(ascii_uppercase, names, found, refs, strict=False))


def cautions(sides: Sequence[Side], images: Any) -> list[str]:
    """What differs in how the models see a picture, and which of them saw these images while training."""
    from vitkit.run.measure import overlap_with_training, straddling

    found = straddling(images)
    first = sides[0].vit.passport.preprocess
    for side in sides[1:]:
        different = first.differences(side.vit.passport.preprocess)
        if different:
            which = f"({sides[0].letter}, then {side.letter})"
            found.append(
                f"each model sees the images as it was trained to, and that differs {which}: {'; '.join(different)}"
            )
    for side in sides:
        found += [f"{side.letter}: {text}" for text in overlap_with_training(side.vit, images)]
    return found


def _is_random(model: Any) -> bool:
    return isinstance(model, str) and model == RANDOM


def _is_run(model: Any) -> bool:
    return isinstance(model, str | Path) and Path(model).is_dir()


def _untrained(real: Any, inputs: Inputs, seed: int, say: Callable[[str], None]) -> Any:
    """A copy of the real model's structure and preprocessing with random weights."""
    from vitkit.run.batches import open_model

    vit = getattr(real, "vit", real)
    if hasattr(vit, "passport"):
        raise ConfigError(
            f"{RANDOM} stands for the architecture of a model that is named, and this one is an object in memory",
            fix="give its name or path, or a model with random weights",
        )
    if _is_run(real):
        raise ConfigError(
            f"{RANDOM} stands for the architecture of {real}, which is a run", fix="name the base that it started from"
        )
    say(f"{RANDOM}: the architecture of {real} with random weights")
    return open_model(replace(inputs, model=str(real), pretrained=False), seed=seed, say=lambda text: None)


def _name(ref: str, vit: Any) -> str:
    """What a person would call the model: without folders, or by its folder where the file is called model.safetensors."""
    from vitkit.run.measure import short_name

    path = Path(ref)
    plain = path.suffix and path.name.partition(".")[0] in _PLAIN
    name = path.parent.name if plain and path.parent.name else short_name(ref)
    if ref == RANDOM:
        return "random weights"
    return f"{name}, random weights" if vit.passport.base.get("kind") == "random" else name
