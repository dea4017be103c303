"""One call from any name of weights to a timm ViT: `load`.

A name is a timm model, `hf-hub:org/model`, a .safetensors/.pth file in timm's or an author's layout, or a run folder.
The architecture comes from the file's own config or passport, a config.json beside it, shapes that leave no choice, or
`arch=`; never from the file's name. Channels, patch size and grid are adapted by stated rules, each of which is said
aloud (`say`, and `vit.load_report`). What was loaded is never initialised again; what was left out is counted.

    vit = load("vit_small_patch14_dinov2.lvd142m", image_size=224)
    vit = load("mae_pretrain_vit_base_full.pth", in_chans=1)     # vit.extras holds the decoder
    vit = load("runs/x", num_classes=None)                       # with the head it was trained with

Rules. Positions: resampled by the rule of the weights' authors (vitkit.parts.positions; timm names follow timm).
Channels: n -> 1 sums the kernel, otherwise it is repeated and scaled by old / new (timm's rule). Patch size: the
pseudo-inverse resize of FlexiViT (arXiv 2212.08013, timm's `resample_patch_embed`). Average pooling asked of weights
that have a final `norm`: it is left out and `fc_norm` starts fresh, as MAE fine-tunes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkit import tokens
from vitkit.errors import WeightsError
from vitkit.parts.adapt_tensors import Geometry, ViT
from vitkit.parts.building import apply_step, attach_head, build_trunk, trunk_state
from vitkit.parts.named import from_name
from vitkit.parts.sources import (
    Report,
    Source,
    from_file,
    from_passport,
    is_path,
    kind_of_file,
    require_model,
    without_weights,
)
from vitkit.parts.statefiles import read_state, save_state, sha256_of
from vitkit.passport import FILE, Passport

__all__ = ["apply_step", "kind", "load", "read_state", "save_run", "save_state", "sha256_of", "trunk_state"]
MODEL, EXTRAS = "model.safetensors", "extras.safetensors"
Say = Callable[[str], None] | None


def to_stderr(sentence: str) -> None:
    """The default of `say`."""
    print(sentence, file=sys.stderr)


class Extras(dict):
    """Tensors of a checkpoint that are not the ViT's. Copies of the ViT share them: they are read, never trained."""

    def __deepcopy__(self, memo: dict) -> Extras:
        return self


def load(
    ref: str | Path,
    *,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    image_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    patch_size: int | Sequence[int] | None = None,
    num_classes: int | None = 0,
    drop_path_rate: float = 0.0,
    seed: int | None = 0,
    positions: str | None = None,
    rope: str | None = None,
    say: Say = to_stderr,
) -> ViT:
    """The timm ViT (`VisionTransformer` or `Eva`) that `ref` names, with `.passport`, `.load_report` (what was said)
    and `.extras` (tensors of the file that are not the ViT's: decoder, adapters, prompts). In train mode, as timm's are.

    arch: a timm name or bare class, for files whose architecture is not recorded; arch_kwargs: keywords of it, winning
        over a config.json.
    pretrained: False gives the architecture with random weights drawn from `seed`. torch's generators are not touched.
    image_size, in_chans, patch_size: native input of the result ((height, width) or one number), adapted by rule. At
        call time the model takes any multiple of the patch, whatever its native size.
    num_classes: 0 without a head, None with the head of the file (if any), n with n classes (the file's if it has n).
    positions, rope: override the weights' rule for position tables ("timm", "dinov2", "mae") and the precision of
        rotary periods ("float32", "bfloat16").
    """
    report = Report(say)
    with _seeded(seed):
        if not is_path(ref):
            if arch is not None:
                raise WeightsError(
                    f"arch={arch!r} beside the model name {ref!r}", fix="give arch only with a weight file"
                )
            source = from_name(
                str(ref), arch_kwargs, pretrained=pretrained, drop_path_rate=drop_path_rate, report=report
            )
        elif (folder := _run_folder(Path(ref))) is not None:
            if not pretrained or arch is not None or arch_kwargs:
                raise WeightsError(
                    f"{ref} is a run: its passport gives its architecture and it has no untrained form",
                    fix="leave out arch, arch_kwargs and pretrained=False, or name the run's base",
                )
            source = _from_run(folder, drop_path_rate, report)
        else:
            source = from_file(Path(ref), arch, arch_kwargs, report)
            source = source if pretrained else without_weights(source, report)
        if arch_kwargs and "num_classes" in arch_kwargs and num_classes == 0:
            report("num_classes in arch_kwargs builds no head: ask with num_classes=")
        source.positions, source.rope = positions or source.positions, rope or source.rope
        vit = build_trunk(source, Geometry(image_size, in_chans, patch_size), drop_path_rate, report)
        kept = attach_head(vit, source.head, num_classes, report)
    vit.passport.base["seed"] = seed if source.base["kind"] == "random" else None
    if kept:
        vit.passport.classes, vit.passport.task = source.classes, source.task
    vit.extras, vit.load_report = Extras(source.extras), report.lines
    return vit


def save_run(
    folder: str | Path,
    vit: ViT,
    *,
    trained: Iterable[str] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `vit` and its passport as a run folder that `load` reads; the path of the weight file.

    trained: names of the tensors that differ from the passport's base (parameters and buffers, new head included):
        only these are stored, and the base is loaded again from where it came. None stores everything.
    extras: further tensors to keep beside, e.g. a decoder under its official names; `load` gives them as `vit.extras`.
    """
    state = vit.state_dict()
    if trained is not None:
        names = list(trained)
        unknown = [name for name in names if name not in state]
        if unknown:
            raise WeightsError(
                f"{len(unknown)} trained tensors are not in the model, e.g. {unknown[0]}",
                fix="names of its state_dict()",
            )
        state = {name: state[name] for name in names}
    path = Path(folder) / MODEL
    save_state(path, state, {"vitkit": "full" if trained is None else "delta"})
    if extras:
        save_state(Path(folder) / EXTRAS, extras)
    vit.passport.save(folder)
    return path


def kind(ref: str | Path, *, arch: str | None = None, arch_kwargs: Mapping[str, Any] | None = None) -> str:
    """What the model that `ref` names takes, "image", "volume" or "video", without building it; "image" where `load` would
    refuse `ref` anyway."""
    if not is_path(ref):
        from vitkit.parts import architecture, configs

        name = str(ref).split(".")[0]
        own = configs.zoo().is_model(name) and configs.zoo().model_entrypoint(name).__module__.startswith("vitkit.")
        if own:
            return tokens.kind_of(architecture.build(name, {}, meta=True))
        return str((arch_kwargs or {}).get("kind", "image"))
    path = Path(ref)
    folder = _run_folder(path)
    if folder is not None:
        return Passport.read(folder).preprocess.kind
    if not path.exists() or (path.is_dir() and not (path / MODEL).is_file()):
        return "image"
    return kind_of_file(path, arch, arch_kwargs)


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed` inside and leave the CPU generator as it was; models are built on the CPU."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


# --- run folders -------------------------------------------------------------------------------------------------------


def _run_folder(path: Path) -> Path | None:
    """The run folder that a path means: itself, or the one whose model.safetensors it is."""
    folder = path.parent if path.name == MODEL else path
    return folder if (folder / FILE).is_file() else None


def _from_run(folder: Path, drop_path_rate: float, report: Report, seen: frozenset[Path] = frozenset()) -> Source:
    folder = folder.resolve()
    if folder in seen:
        raise WeightsError(f"the run {folder} is its own base", fix="restore the passport.json of one of the runs")
    passport = Passport.read(folder)
    if not (folder / MODEL).is_file():
        require_model(folder)
    tensors, meta = read_state(folder / MODEL)
    extras = read_state(folder / EXTRAS)[0] if (folder / EXTRAS).is_file() else {}
    stored = meta.get("vitkit")
    if stored not in ("full", "delta"):
        raise WeightsError(
            f"{folder / MODEL} does not say whether it is whole", fix="load it as a file elsewhere, with --arch"
        )
    source = from_passport(passport, tensors, {"kind": "run", "ref": str(folder), "load": {}})
    source.extras = extras
    if stored == "full":
        report(f"{folder.name}: a whole model, {len(tensors)} tensors")
        return source
    vit = _rebuilt(folder, passport, drop_path_rate, seen | {folder})
    trunk, own = source.state or {}, trunk_state(vit)
    odd = [name for name, value in trunk.items() if name not in own or own[name].shape != value.shape]
    if odd:
        raise WeightsError(
            f"{len(odd)} of {len(trunk)} trained tensors of {folder} do not fit its base, e.g. {odd[0]}",
            fix="restore the passport.json that belongs to the run",
        )
    vit.load_state_dict(trunk, strict=False)
    report(f"{folder.name}: {len(tensors)} trained tensors on top of {passport.base['ref']}")
    source.ready, source.state = vit, trunk_state(vit)
    return source


def _rebuilt(folder: Path, passport: Passport, drop_path_rate: float, seen: frozenset[Path]) -> ViT:
    """The model that a run trained parts of: its base, unchanged since, with the run's own steps applied."""
    from vitkit.parts.heads import set_pooling

    ref = _base_ref(folder, passport.base)
    vit = _load_base(folder, ref, passport.base, drop_path_rate, seen)
    found, noted = vit.passport.base["sha256"], passport.base.get("sha256")
    if noted and found != noted:
        raise WeightsError(
            f"the base of run {folder} has changed: {ref} now has sha256 {found[:12]}, the run was made on {noted[:12]}",
            fix="restore the base as it was, or repeat the run",
        )
    done = vit.passport.steps
    if passport.steps[: len(done)] != done:
        raise WeightsError(
            f"the steps of run {folder} do not continue those of its base {ref}",
            fix="restore the passport.json of both",
        )
    pool = passport.arch_kwargs.get("global_pool")
    if pool in ("token", "avg"):
        set_pooling(vit, pool)
    for step in passport.steps[len(done) :]:
        vit = apply_step(vit, step)
    return vit


def _base_ref(folder: Path, base: Mapping[str, Any]) -> str:
    """Where a base is now: beside the run as it was saved, else at its absolute place."""
    if base.get("kind") not in ("file", "run"):
        return base.get("ref", "")
    places = [folder / base["relative"]] if base.get("relative") else []
    places.append(Path(base["ref"]))
    for place in places:
        if place.exists():
            return str(place.resolve())
    raise WeightsError(
        f"the base of run {folder} is gone: looked for {' and '.join(str(place) for place in places)}",
        fix="put it back, or correct base.ref in the run's passport.json",
    )


def _load_base(folder: Path, ref: str, base: Mapping[str, Any], drop_path_rate: float, seen: frozenset[Path]) -> ViT:
    asked, seed = dict(base.get("load", {})), base.get("seed")
    geometry = Geometry(asked.pop("image_size", None), asked.pop("in_chans", None), asked.pop("patch_size", None))
    quiet = Report(None)
    rules = {"positions": asked.pop("positions", None), "rope": asked.pop("rope", None)}
    try:
        with _seeded(0 if seed is None else seed):
            if base["kind"] == "run":
                source = _from_run(Path(ref), drop_path_rate, quiet, seen)
            elif base["kind"] == "file":
                source = from_file(Path(ref), asked.get("arch"), asked.get("arch_kwargs"), quiet)
            else:
                source = from_name(
                    ref,
                    asked.get("arch_kwargs"),
                    pretrained=asked.get("pretrained", True),
                    drop_path_rate=drop_path_rate,
                    report=quiet,
                )
            source = replace(source, **{key: value for key, value in rules.items() if value})
            return build_trunk(source, geometry, drop_path_rate, quiet)
    except WeightsError as error:
        raise WeightsError(f"the base of run {folder}: {error.what}", fix=error.fix) from error
