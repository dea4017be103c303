"""What a weight file stands for: a `Source`, a native architecture and tensors that fit it exactly.

Names are `vitkit.parts.named`'s part; adapting and building the model is `vitkit.parts.building`'s; run folders, which
need a whole model to start from, are `vitkit.weights`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkit import layouts
from vitkit.errors import WeightsError, nearest
from vitkit.layouts import ANCHOR, Reading
from vitkit.parts import architecture, configs, dinov3
from vitkit.parts.adapt_tensors import ViT, adapt_pixels
from vitkit.parts.configs import BARE, Said
from vitkit.parts.hf_names import processor_pixels
from vitkit.parts.positions import AXES, square_grid
from vitkit.parts.statefiles import json_beside, read_state
from vitkit.passport import IMAGENET_MEAN, IMAGENET_STD, Passport, Preprocess
from vitkit.tokens import RULE_OF, kind_of

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
HUB = ("hf-hub:", "hf_hub:")
HEADS = ("head.", "head_dist.")


@dataclass
class Report:
    """Sentences for the user, said as they come and kept."""

    say: Callable[[str], None] | None
    lines: list[str] = field(default_factory=list)

    def __call__(self, sentence: str) -> None:
        self.lines.append(sentence)
        if self.say is not None:
            self.say(sentence)


@dataclass
class Source:
    """Where the numbers come from: a native architecture and, unless random, the tensors that fit it exactly."""

    arch: str
    kwargs: dict[str, Any]
    preprocess: Preprocess
    base: dict[str, Any]  # as in a passport, still without hash and seed
    state: dict[str, Tensor] | None = None  # trunk tensors by timm's names; None: random weights
    head: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    positions: str = ""  # rule of resampling the position table; "": the usual one of the model's kind
    rope: str = "float32"
    licence: str | None = None
    classes: list[str] | None = None
    task: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    native: ViT | None = None  # `arch` with `kwargs` on the meta device, where it has been built already
    ready: ViT | None = None  # a finished trunk, used when nothing has to be adapted


def is_path(ref: str | Path) -> bool:
    """Whether a reference means something on disk: it exists, ends like a weight file, or has folders in it."""
    text = str(ref)
    if isinstance(ref, Path) or text.endswith(SUFFIXES) or Path(text).exists():
        return True
    return ("/" in text or "\\" in text) and not text.startswith(("timm/", *HUB))


def split_head(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trunk tensors and classifier tensors of a timm state dict."""
    head = {name: value for name, value in tensors.items() if name.startswith(HEADS)}
    return {name: value for name, value in tensors.items() if name not in head}, head


def preprocess_of(pixels: Mapping[str, Any], native: ViT, report: Report) -> Preprocess:
    """Preprocessing as recorded; where nothing is, ImageNet's mean and std, and that is said."""
    known = {key: value for key, value in pixels.items() if key != "image_size"}
    kind = kind_of(native)
    if "mean" not in known or "std" not in known:
        if kind == "volume":
            known |= {"mean": (0.0,), "std": (1.0,)}
            report("no preprocessing is recorded: intensities from 0 to 1 are assumed")
        else:
            known |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
            report("no preprocessing is recorded: ImageNet mean and std are assumed")
    if kind == "video":
        known.setdefault("interpolation", "bilinear")  # VideoMAE's, whose recipes these models have
    size = tuple(native.patch_embed.img_size)
    return adapt_pixels(Preprocess(image_size=size, kind=kind, **known), native.in_chans)


def from_file(path: Path, arch: str | None, arch_kwargs: Mapping[str, Any] | None, report: Report) -> Source:
    """A weight file, or a folder that holds exactly one, in any layout of `vitkit.layouts`."""
    if not path.exists() and path.suffix not in SUFFIXES:
        raise WeightsError(
            f"{path} does not exist", fix=f"check the path, or write hf-hub:{path} for a Hugging Face id"
        )
    path = _weight_file(path)
    tensors, meta = read_state(path)
    if meta.get("vitkit") == "delta":
        raise WeightsError(
            f"{path} holds only the trained part of a run, and the run's passport.json is not beside it",
            fix="name the run folder",
        )
    if meta.get("vitkit") == "full" and isinstance(meta.get("passport"), Mapping) and arch is None and not arch_kwargs:
        passport = Passport.from_dict(dict(meta["passport"]), where=f"the passport in {path}")
        report(f"{path.name}: a whole model with its passport, {len(tensors)} tensors")
        return from_passport(passport, tensors, {"kind": "file", "ref": str(path.resolve()), "load": {}})
    if meta["left"]:
        report(f"{path.name}: read '{meta['container']}', left {', '.join(repr(key) for key in meta['left'])}")
    said = _said(path, meta, arch, arch_kwargs)
    reading = layouts.read(tensors, plain=said.arch is not None and architecture.is_eva(said.arch))
    report(f"{path.name}: {reading.summary(len(tensors))}")
    for note in reading.notes:
        report(note)
    if said.unused:
        report(f"not used from {said.where}: {', '.join(said.unused)}")
    cast = _to_float32(reading)
    if cast:
        report(f"weights were {', '.join(cast)}, used as float32")
    named, kwargs = _resolve(said, reading, report)
    plan = architecture.build(named, kwargs, meta=True)
    if kind_of(plan) == "video":  # its positions are fixed, and the authors' files do not hold them
        reading.vit.setdefault("pos_embed", plan.pos_embed)
    base = {"kind": "file", "ref": str(path.resolve()), "load": {"arch": named, "arch_kwargs": kwargs}}
    pixels = preprocess_of({**reading.hints.get("pixels", {}), **said.pixels}, plan, report)
    source = Source(named, kwargs, pixels, base, state=reading.vit, head=reading.head)
    source.native = plan
    positions = said.other.get("positions") or ("timm" if said.timm else reading.positions)
    if source.preprocess.kind != "image" and AXES[positions] == 2:
        positions = RULE_OF[source.preprocess.kind]
    source.extras, source.positions, source.rope = reading.extras, positions, said.other.get("rope")
    source.rope = source.rope or reading.hints.get("rope", "float32")
    source.licence, source.classes, source.task = (said.other.get(key) for key in ("licence", "classes", "task"))
    return source


def kind_of_file(path: Path, arch: str | None, arch_kwargs: Mapping[str, Any] | None) -> str:
    """What the model in a weight file takes: only a patch embedding with three axes needs a closer look."""
    path = _weight_file(path)
    tensors, meta = read_state(path)
    stems = [value for name, value in tensors.items() if "patch_embed" in name and value.ndim == 5]
    if not stems:
        return "image"
    said = _said(path, meta, arch, arch_kwargs)
    return said.kwargs.get("kind") or layouts.read(tensors).hints.get("kind") or "image"


def from_passport(passport: Passport, tensors: Mapping[str, Tensor], base: dict[str, Any]) -> Source:
    """A whole model as vitkit saved it: `tensors` fit what the passport says, steps included."""
    trunk, head = split_head(tensors)
    return Source(
        passport.arch,
        dict(passport.arch_kwargs),
        passport.preprocess,
        base,
        state=trunk,
        head=head,
        positions=passport.feature.positions,
        rope=passport.feature.rope,
        licence=passport.licence,
        classes=passport.classes,
        task=passport.task,
        steps=list(passport.steps),
        lineage=list(passport.lineage),
    )


def without_weights(source: Source, report: Report) -> Source:
    """The architecture of a file with random weights."""
    report("pretrained=False: its architecture with random weights")
    base = {"kind": "random", "ref": source.arch, "load": {"arch_kwargs": source.kwargs, "pretrained": False}}
    plain = Source(source.arch, source.kwargs, source.preprocess, base)
    return replace(plain, positions=source.positions, rope=source.rope)


def _weight_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if not (path / "model.safetensors").is_file():
        require_model(path)
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    named = [p for p in found if p.name == "model.safetensors"]
    if len(named) == 1:
        return named[0]
    inside = f"{len(found)} weight files ({', '.join(p.name for p in found[:4])})" if found else "no weight file"
    raise WeightsError(f"{path} is no run folder (no passport.json) and holds {inside}", fix="name the weight file")


def require_model(folder: Path) -> None:
    """Raise WeightsError where `folder` is a run that holds no ViT: one that only measures or draws, or is not finished."""
    from vitkit.run.folder import RunFolder

    run = RunFolder(folder)
    if not run.is_run():
        return
    if "." in run.kind:  # a method that trains
        raise WeightsError(
            f"the run {folder} has not saved its model yet",
            fix="the command that began it resumes it (see its config.yaml)",
        )
    model = run.read_config().get("model")
    raise WeightsError(
        f"{folder} is a run of vitkit {run.kind}, and there is no ViT in it",
        fix=f"the model that it was made from: {model}" if model else "a run of vitkit adapt or pretrain",
    )


def _said(path: Path, meta: Mapping[str, Any], arch: str | None, arch_kwargs: Mapping[str, Any] | None) -> Said:
    """What is known about a file's architecture and pixels: the caller first, then the file itself, then a
    config.json beside it. The first that says anything about the architecture decides it; pixels likewise."""
    found = [*_own_words(meta), *_config_beside(path), *_processor_beside(path)]
    speaker = next((s for s in found if s.arch or s.kwargs), Said())
    said = replace(speaker, kwargs=dict(speaker.kwargs))
    said.pixels = next((s.pixels for s in found if s.pixels), {})
    said.other = {key: value for s in reversed(found) for key, value in s.other.items()}
    if arch is not None:
        zoo = configs.zoo_model(arch)
        known = None if zoo else configs.known_arch(arch)
        if zoo is None and known is None:
            close = nearest(arch, [*BARE, *configs.zoo().list_models()])
            raise WeightsError(
                f"arch {arch!r} is unknown", fix=f"did you mean {', '.join(close)}?" if close else "a timm name"
            )
        trunk = {key: value for key, value in (zoo or {}).items() if not key.startswith("decoder")}
        same = said.timm and known == said.arch
        said = replace(said, arch=known, kwargs=trunk, where=f"arch {arch}", timm=same, zoo=zoo is not None, unused=[])
    if arch_kwargs:
        mine = configs.parse_config(arch_kwargs, "arch_kwargs", strict=True)
        said.kwargs, said.pixels = said.kwargs | mine.kwargs, {**said.pixels, **mine.pixels}
        said.zoo = said.zoo and "num_heads" not in mine.kwargs
        said.other |= mine.other
        said.where = f"{said.where} and arch_kwargs" if said.where else "arch_kwargs"
    return said


def _own_words(meta: Mapping[str, Any]) -> list[Said]:
    found = []
    if isinstance(meta.get("passport"), Mapping):
        found.append(_passport_words(Passport.from_dict(meta["passport"], where="the file's own passport")))
    if isinstance(meta.get("config"), Mapping):
        found.append(configs.parse_config(meta["config"], "the file's own config"))
    args = meta["args"] if isinstance(meta.get("args"), Mapping) else {}
    if isinstance(meta.get("arch"), str):
        args = {**args, "arch": args.get("arch", meta["arch"])}
    if args:
        found.append(configs.parse_args(args, "the file's own arguments"))
    return found


def _config_beside(path: Path) -> list[Said]:
    content, config = json_beside(path, "config.json")
    if content is None:
        return []
    if {"format", "preprocess"} <= set(content):
        return [_passport_words(Passport.from_dict(dict(content), where=config))]
    return [configs.parse_config(content, config)]


def _processor_beside(path: Path) -> list[Said]:
    content, file = json_beside(path, "preprocessor_config.json")  # Hugging Face's
    return [Said(file, pixels=processor_pixels(content or {}))]


def _passport_words(passport: Passport) -> Said:
    prepared = passport.preprocess
    pixels = {key: getattr(prepared, key) for key in configs.PIXELS}
    other: dict[str, Any] = {"positions": passport.feature.positions, "rope": passport.feature.rope}
    other |= {"licence": passport.licence, "classes": passport.classes, "task": passport.task}
    return Said("its passport", passport.arch, dict(passport.arch_kwargs), pixels, other)


def _to_float32(reading: Reading) -> list[str]:
    """Floating tensors to float32 in place; the names of the precisions they had."""
    cast: dict[str, None] = {}
    for group in (reading.vit, reading.head, reading.extras):
        for name, value in group.items():
            if value.is_floating_point() and value.dtype != torch.float32:
                cast[str(value.dtype).removeprefix("torch.")] = None
                group[name] = value.float()
    return list(cast)


def _resolve(said: Said, reading: Reading, report: Report) -> tuple[str, dict[str, Any]]:
    """The architecture (timm name or bare class) and keywords that the file's tensors fit natively."""
    if said.arch is not None and said.arch not in BARE:
        return said.arch.split(".")[0], _fit_named(said.arch, said, reading, report)
    if "rotary" in reading.hints:
        return "Eva", _fit_rotary(said, reading, report)
    if said.arch == "Eva":
        return "Eva", said.kwargs
    found = architecture.facts(reading, said.kwargs)
    _require_agreement(found, said)
    kwargs = found | said.kwargs | {key: found[key] for key in ("mlp_ratio", "img_size")}
    why = f"heads from {said.where}"
    if "num_heads" not in kwargs or (said.zoo and "num_heads" in reading.hints):
        kwargs["num_heads"], why = architecture.num_heads(reading, found)
    if kwargs["embed_dim"] % kwargs["num_heads"]:
        raise WeightsError(
            f"{kwargs['num_heads']} heads do not divide a width of {kwargs['embed_dim']}", fix=f"correct {said.where}"
        )
    distilled = "dist_token" in reading.vit
    size = f"{kwargs['embed_dim']} wide, {kwargs['depth']} deep, {kwargs['num_heads']} heads ({why})"
    patch, pixels = ("x".join(map(str, kwargs[key])) for key in ("patch_size", "img_size"))
    report(f"architecture: {size}, patch {patch}, {pixels} px, {kwargs['in_chans']} channels")
    return ("VisionTransformerDistilled" if distilled else "VisionTransformer"), kwargs


def _fit_rotary(said: Said, reading: Reading, report: Report) -> dict[str, Any]:
    """Keywords of the `Eva` that a DINOv3 file is: the tensors prove nearly all of it."""
    found = dinov3.facts(reading.vit, reading.hints, said.kwargs.get("img_size"))
    _require_agreement(found, said)
    heads = said.kwargs.get("num_heads", found["num_heads"])
    if heads != found["num_heads"]:
        raise WeightsError(
            f"{said.where} says {heads} heads, the rotary periods are those of {found['num_heads']}", fix="correct it"
        )
    kept = ("norm_eps", "global_pool", "use_fc_norm")
    kwargs = found | {key: said.kwargs[key] for key in kept if key in said.kwargs}
    where = f"from {said.where}" if "norm_eps" in said.kwargs else "as in every released model"
    report(
        f"architecture: {kwargs['embed_dim']} wide, {kwargs['depth']} deep, {kwargs['num_heads']} heads (from the rotary "
        f"periods), patch {kwargs['patch_size'][0]}x{kwargs['patch_size'][1]}, norm eps {kwargs['norm_eps']:g} ({where})"
    )
    return kwargs


def _require_agreement(found: Mapping[str, Any], said: Said) -> None:
    """A config may not contradict the shapes."""
    wrong = []
    for key in ("embed_dim", "depth", "patch_size", "in_chans", "class_token", "reg_tokens", "qkv_bias"):
        if key in said.kwargs and said.kwargs[key] != found[key]:
            wrong.append(f"{key} is {said.kwargs[key]}, the tensors have {found[key]}")
    ratio = said.kwargs.get("mlp_ratio")
    hidden = int(found["embed_dim"] * found["mlp_ratio"])
    if ratio is not None and int(found["embed_dim"] * ratio) != hidden:
        wrong.append(f"mlp_ratio is {ratio}, the tensors have {hidden / found['embed_dim']:.4g}")
    if found.get("fc_norm") and said.kwargs.get("global_pool", "avg") == "token":
        wrong.append("global_pool is the class token, but the tensors have fc_norm for average pooling")
    if wrong:
        close = architecture.nearest_arch(found)
        raise WeightsError(
            f"{said.where} contradicts the tensors: {'; '.join(wrong)}",
            fix="correct it, or name the architecture with --arch" + (f" (the nearest is {close})" if close else ""),
        )


def _fit_named(arch: str, said: Said, reading: Reading, report: Report) -> dict[str, Any]:
    """Keywords that make a named architecture native to the file: its channels, grid and pooling."""
    kwargs, vit = dict(said.kwargs), reading.vit
    plan = architecture.build(arch, kwargs, meta=True)
    report(f"architecture: {arch}, from {said.where}")
    biases = [name for name in vit if name.endswith((".attn.q_bias", ".attn.v_bias"))]
    surplus = "rotary" in reading.hints and biases and biases[0] not in plan.state_dict()
    if surplus and not any(bool(vit[name].any()) for name in biases):  # the released S, B and L
        report(f"its {len(biases)} query and value biases are all zero and {arch} has none: left out")
        reading.vit = vit = {name: value for name, value in vit.items() if name not in biases}
    stem, own = vit[ANCHOR], plan.state_dict().get(ANCHOR)
    if own is not None and stem.ndim == own.ndim and stem.shape[1] != own.shape[1] and stem.shape[0] == own.shape[0]:
        kwargs["in_chans"] = stem.shape[1]
    table, rows = vit.get("pos_embed"), getattr(plan, "pos_embed", None)
    if table is not None and rows is not None and table.shape[1] != rows.shape[1] and "img_size" not in kwargs:
        patches = plan.patch_embed.num_patches
        grid = square_grid(table.shape[1] - (rows.shape[1] - patches))
        if grid is not None:
            scale = [
                side / old for side, old in zip(plan.patch_embed.img_size, plan.patch_embed.grid_size, strict=True)
            ]
            kwargs["img_size"] = [round(side * step) for side, step in zip(grid, scale, strict=True)]
            report(f"its position table is {grid[0]}x{grid[1]}, so it is native to {kwargs['img_size']} px")
    if (
        "fc_norm.weight" in vit
        and "norm.weight" not in vit
        and "global_pool" not in kwargs
        and plan.global_pool == "token"
    ):
        kwargs |= {"global_pool": "avg", "fc_norm": True}
        report("it has fc_norm, so the feature is the average of the patch tokens")
    return kwargs
