"""From a `Source` to a model: the asked geometry, the tensors strictly in place, adapters, passport and head."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import WeightsError
from vitkit.parts import architecture
from vitkit.parts.adapt_tensors import Geometry, ViT, adapt_pixels, adapt_tensors
from vitkit.parts.sources import HEADS, Report, Source, split_head
from vitkit.parts.statefiles import sha256_of
from vitkit.passport import Feature, Passport


def trunk_state(vit: ViT) -> dict[str, Tensor]:
    """The state dict without the classifier head: what a passport's hash covers, before any adaptation."""
    return split_head(vit.state_dict())[0]


def build_trunk(source: Source, geometry: Geometry, drop_path_rate: float, report: Report) -> ViT:
    """The trunk of `source` with the asked geometry, its steps applied, and its passport on it."""
    native = source.native if source.native is not None else architecture.build(source.arch, source.kwargs, meta=True)
    changed = geometry.changes(native)
    kwargs, state = {**source.kwargs, **changed}, source.state
    if changed and state is not None:
        target = architecture.build(source.arch, kwargs, meta=True)
        state = adapt_tensors(state, native, target, rule=source.positions or _usual_rule(native), say=report)
        native = target
    if source.ready is not None and not changed:
        vit = source.ready
    elif state is None:
        vit = architecture.build(source.arch, kwargs, drop_path_rate=drop_path_rate)
    else:
        if drop_path_rate:
            native = architecture.build(source.arch, kwargs, drop_path_rate=drop_path_rate, meta=True)
        vit = _filled(source, native, kwargs, state, drop_path_rate, report)
    if source.rope == "bfloat16":
        _round_periods(vit, report)
    pixels = adapt_pixels(source.preprocess, vit.in_chans)
    pixels = replace(pixels, image_size=tuple(kwargs.get("img_size", pixels.image_size)))
    asked = {**source.base.get("load", {}), **geometry.given()}
    asked |= {"positions": source.positions or _usual_rule(vit), "rope": source.rope}
    # The hash is of the numbers before they were adapted: resampling differs in its last bits between machines.
    digest = sha256_of(trunk_state(vit) if source.state is None else source.state)
    base = {"kind": source.base["kind"], "ref": source.base["ref"], "sha256": digest, "load": asked}
    vit.passport = Passport(
        source.arch,
        kwargs,
        pixels,
        _feature(vit, source),
        licence=source.licence,
        base=base,
        steps=list(source.steps),
        lineage=list(source.lineage),
    )
    return vit


def _filled(
    source: Source, vit: ViT, kwargs: Mapping[str, Any], state: dict[str, Tensor], drop_path_rate: float, report: Report
) -> ViT:
    """A model holding `state` exactly, made of `vit` on the meta device. A VisionTransformer whose every tensor is given
    is never initialised first, which is most of the time that building one takes; others have tables that only a real
    construction computes."""
    from timm.models.vision_transformer import VisionTransformer

    own = vit.state_dict()
    given = {name: state[name].clone() for name in own if name in state and state[name].shape == own[name].shape}
    if isinstance(vit, VisionTransformer) and len(given) == len(own):
        vit.load_state_dict(given, assign=True)
    if any(tensor.is_meta for tensor in (*vit.parameters(), *vit.buffers())):
        vit = architecture.build(source.arch, kwargs, drop_path_rate=drop_path_rate)
    for step in source.steps:
        vit = apply_step(vit, step)
    _fill(vit, state, source, report)
    return vit


def _fill(vit: ViT, state: Mapping[str, Tensor], source: Source, report: Report) -> None:
    """Copy `state` into `vit`; every tensor must land and every tensor of the trunk must be given."""
    own = trunk_state(vit)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    odd = [name for name in own if name in state and own[name].shape != state[name].shape]
    pooled = missing and all(name.startswith("fc_norm.") for name in missing)
    if pooled and not odd and all(name.startswith("norm.") for name in unexpected):
        report(f"average pooling: the final norm ({len(unexpected)} tensors) is left out and fc_norm starts fresh")
    elif missing or unexpected or odd:
        first = odd[0] if odd else None
        parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        parts += [f"{len(unexpected)} unexpected ({_some(unexpected)})"] if unexpected else []
        if first:
            shapes = f"{tuple(state[first].shape)} in the file, {tuple(own[first].shape)} in the model"
            parts.append(f"{len(odd)} of another shape ({first}: {shapes})")
        close = _nearest(state)
        raise WeightsError(
            f"the tensors of {source.base['ref']} do not fit {source.arch}: {'; '.join(parts)}",
            fix="name the architecture with --arch" + (f" (the nearest is {close})" if close else ""),
        )
    vit.load_state_dict({name: state[name] for name in own if name in state}, strict=False)


def _nearest(state: Mapping[str, Tensor]) -> str | None:
    stem = state.get("patch_embed.proj.weight")
    blocks = [int(found[1]) for found in (re.match(r"blocks\.(\d+)\.", name) for name in state) if found]
    if stem is None or stem.ndim != 4 or not blocks:
        return None
    return architecture.nearest_arch(
        {"embed_dim": stem.shape[0], "depth": max(blocks) + 1, "patch_size": list(stem.shape[2:])}
    )


def _feature(vit: ViT, source: Source) -> Feature:
    """What timm's `forward_head` pools, and which norm made it."""
    norms = [name for name in ("fc_norm", "norm") if not isinstance(getattr(vit, name, nn.Identity()), nn.Identity)]
    return Feature(vit.global_pool, norms[0] if norms else "none", source.positions or _usual_rule(vit), source.rope)


def _usual_rule(vit: ViT) -> str:
    return tokens.RULE_OF[tokens.kind_of(vit)]


def _round_periods(vit: ViT, report: Report) -> None:
    periods = getattr(getattr(vit, "rope", None), "periods", None)
    if periods is None:
        raise WeightsError("rope='bfloat16' for a model without rotary periods", fix="leave rope out")
    periods.copy_(periods.bfloat16().to(periods.dtype))
    report("rotary periods are rounded to bfloat16, as DINOv3's authors keep them")


def attach_head(vit: ViT, head: Mapping[str, Tensor], num_classes: int | None, report: Report) -> bool:
    """Give `vit` its classifier; True when it is the file's own."""
    from vitkit.parts.heads import install_head

    kind: Literal["bn_linear", "linear"] = (
        "bn_linear" if {"head.0.running_mean", "head.1.weight"} <= set(head) else "linear"
    )
    weight = head.get("head.1.weight" if kind == "bn_linear" else "head.weight")
    own = weight.shape[0] if weight is not None else 0
    restore = getattr(vit, "restore_head", None)  # an adaptation that reads out in its own way knows its head
    if restore is not None and head and (count := restore(head, num_classes)):
        report(f"the head of {count} classes is kept")
        return True
    if head and weight is None:
        report(f"a head of unknown form ({_some(sorted(head))}) is left out")
    wanted = own if num_classes is None else num_classes
    if weight is None or wanted == 0 or wanted != own:
        if own:
            report(f"the head of {own} classes ({len(head)} tensors) is left out")
        if wanted:
            vit.reset_classifier(wanted)
            report(f"a new head of {wanted} classes, randomly initialised")
        else:
            vit.reset_classifier(0)
        return False
    distilled = "head_dist.weight" in head
    if kind == "bn_linear" or (hasattr(vit, "dist_token") and not distilled):
        install_head(vit, kind, own)
    elif "head.bias" not in head:
        vit.head, vit.num_classes = nn.Linear(weight.shape[1], own, bias=False), own
    else:
        vit.reset_classifier(own)
    mine = {name for name in vit.state_dict() if name.startswith(HEADS)}
    if mine != set(head):
        raise WeightsError(
            f"the head cannot be rebuilt: its tensors are {_some(sorted(head))}, the model's {_some(sorted(mine))}",
            fix="num_classes=0 to leave it out",
        )
    vit.load_state_dict(dict(head), strict=False)
    report(f"the head of {own} classes is kept")
    return True


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def apply_step(vit: ViT, step: Mapping[str, Any]) -> ViT:
    """`vit` changed by one entry of a passport's steps, {"method": "adapt.lora", "settings": {...}}: the method's own
    `inject` with its `Settings`."""
    method = str(step.get("method"))
    if not re.fullmatch(r"[a-z_]+\.[a-z0-9_]+", method):
        raise WeightsError(f"the passport names a step {method!r}", fix="a method of vitkit, e.g. adapt.adaptformer")
    try:
        module = importlib.import_module(f"vitkit.{method}")
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"the step {method!r} needs a method that is not in this vitkit", fix="update vitkit"
        ) from error
    if not hasattr(module, "inject") or not hasattr(module, "Settings"):
        raise WeightsError(f"{method!r} is no step that changes a model", fix="restore the passport.json of the run")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in dict(step.get("settings", {})).items()}
    try:
        settings = module.Settings(**values)
    except TypeError as error:
        raise WeightsError(
            f"the settings of step {method!r} are not those of this vitkit: {error}", fix="update vitkit"
        ) from error
    return module.inject(vit, settings)
