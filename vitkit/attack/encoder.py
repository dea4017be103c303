"""The public pre-trained trunk behind a fine-tuned model, and the pixels that both see.

An attacker downloads the trunk that everybody can download. `encoder_of` follows a run's passport to it and loads it as it
was before any fine-tuning: no adapters, prompts, head or trained weights of the run enter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitkit import weights
from vitkit.errors import WeightsError
from vitkit.parts.heads import remove_head
from vitkit.passport import FILE, Passport, Preprocess

Say = Callable[[str], None] | None


def encoder_of(run: str | Path, *, say: Say = None) -> nn.Module:
    """The trunk that the fine-tuned run folder `run` started from, at the image size and channels that the run sees.

    Runs made from fine-tuned runs (a hardened model) are followed to the first base that nothing was fine-tuned in; a
    self-supervised run of yours counts as that base. Raises WeightsError where there is no public trunk to find.
    """
    folder = run_folder(run)
    if folder is None:
        raise WeightsError(
            f"{run} is not a run, so nothing says which public trunk it was fine-tuned from",
            fix="name it: --encoder vit_small_patch16_224",
        )
    passport = Passport.read(folder)
    seen, place, base = passport.preprocess, folder, passport.base
    while base.get("kind") == "run":
        below = Path(weights._base_ref(place, base))
        inner = Passport.read(below)
        if not fine_tuned(inner):
            break
        place, base = below, inner.base
    if base.get("kind") not in ("timm", "file", "run"):
        raise WeightsError(
            f"{run} was trained from {base.get('kind', 'unknown')} weights: no public trunk stands behind it",
            fix="name the trunk that an attacker would use: --encoder vit_small_patch16_224",
        )
    asked = {**base.get("load", {}), "image_size": seen.image_size, "in_chans": seen.in_chans}
    encoder = weights.load(weights._base_ref(place, base), **asked, num_classes=0, say=say)
    found, noted = encoder.passport.base["sha256"], base.get("sha256")
    if noted and found != noted:
        raise WeightsError(
            f"the base of {run} has changed: {base['ref']} now has sha256 {found[:12]}, the run was made on {noted[:12]}",
            fix="restore the base as it was, or name the trunk with --encoder",
        )
    return encoder.eval().requires_grad_(False)


def public_trunk(vit: nn.Module) -> nn.Module:
    """The public trunk behind a loaded model: that of its run, or a frozen copy of the model where nothing was
    fine-tuned in it yet."""
    base = getattr(getattr(vit, "passport", None), "base", {})
    if base.get("kind") == "run" and fine_tuned(Passport.read(base["ref"])):
        return encoder_of(base["ref"])
    trunk = copy.deepcopy(vit)
    remove_head(trunk)
    return trunk.eval().requires_grad_(False)


def named_encoder(ref: str, model: str | Path, like: Preprocess, *, say: Say = None) -> nn.Module:
    """The encoder `ref` for images prepared for `model` (its preprocessing is `like`). Raises WeightsError when it is the
    model under attack, or was trained at another image size."""
    own, theirs = run_folder(ref), run_folder(model)
    if str(ref) == str(model) or (own is not None and own == theirs):
        raise WeightsError(
            f"the encoder {ref} is the model under attack: that would be a white-box attack",
            fix="leave --encoder out, or name the public trunk; --baselines pgd is the white-box attack",
        )
    size = None if own is not None else like.image_size  # a run has seen one size, which is its own
    encoder = weights.load(ref, image_size=size, in_chans=like.in_chans, num_classes=0, say=say)
    require_same_view(encoder.passport.preprocess, like, ref, strict=own is not None)
    return encoder.eval().requires_grad_(False)


def require_same_view(encoder: Preprocess, model: Preprocess, name: str, *, strict: bool = True) -> None:
    """Raise WeightsError unless both see the same pixels: between different sizes or crops a perturbation would be
    resampled. Mean and std may differ, each normalises for itself. Not `strict`: only size and channels count."""
    views = ("image_size", "channels", *(("crop_pct", "crop_mode", "interpolation") if strict else ()))
    odd = [one for one in encoder.differences(model) if one.startswith(views)]
    if odd:
        raise WeightsError(
            f"the encoder {name} and the model see different crops of an image: {'; '.join(odd)}",
            fix="an encoder of the model's image size and crop; a perturbation made for one is resampled by the other",
        )


def normaliser(vit: nn.Module) -> Callable[[Tensor], Tensor]:
    """Pixels in [0, 1] to what `vit` takes, in its precision: by its passport, else by the mean and std that timm notes on
    the model."""
    normalise = preprocess_of(vit).normalise
    return lambda pixels: normalise(pixels).to(next(vit.parameters()).dtype)


def preprocess_of(vit: nn.Module) -> Preprocess:
    """How images are prepared for `vit`. Raises WeightsError where nobody knows: a guess would change the budget."""
    passport = getattr(vit, "passport", None)
    if passport is not None:
        return passport.preprocess
    known: dict[str, Any] = getattr(vit, "pretrained_cfg", None) or {}
    if not known.get("mean") or not known.get("std"):
        raise WeightsError(
            f"this {type(vit).__name__} carries no mean and std, so pixels cannot be prepared for it",
            fix="load it with vitkit.weights.load, which gives every model a passport",
        )
    return Preprocess(known["mean"], known["std"], tuple(vit.patch_embed.img_size))


def fine_tuned(passport: Passport) -> bool:
    """Whether labels or adapters entered the model."""
    return bool(passport.steps or passport.classes)


def run_folder(ref: str | Path) -> Path | None:
    """The run folder that `ref` means, resolved; None when it is something else."""
    path = Path(ref)
    folder = path.parent if path.name == weights.MODEL else path
    return folder.resolve() if (folder / FILE).is_file() else None
