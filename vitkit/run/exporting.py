"""One file that works without vitkit: merged timm weights, or an ONNX graph with its preprocessing inside.

Nothing is put in place before what was written, read back, gives the model's own numbers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitkit import tokens, weights
from vitkit.errors import ConfigError, WeightsError
from vitkit.parts import architecture
from vitkit.passport import FILE, Passport

ViT = Any  # a timm ViT with its passport: attributes of a module have no static type

MODEL = "model.safetensors"
TOLERANCE = 1e-5  # of the largest logit, for weights; float32 rounding of a merged layer stays below it
# timm names whose every keyword can be given, for weights whose architecture is known only as a class.
STAND_INS = {
    "VisionTransformer": "vit_base_patch16_224",
    "VisionTransformerDistilled": "deit_base_distilled_patch16_224",
}


def export_safetensors(run: Path, out: str | None = None) -> Path:
    """Write the complete model of `run` as one safetensors file with config.json (timm's format) beside it.

    LoRA is merged and a head's batch normalisation folded, so that timm alone loads the file; adapters that no merging
    removes are kept, with a passport.json from which `vitkit.load` rebuilds them, and that is said. Default `out`:
    export/model.safetensors in the run. Raises WeightsError when the file, read back, gives other logits.
    """
    run = Path(run)
    vit = open_run(run)
    target = target_of(run, out, MODEL, ".safetensors")
    plain = simplified(vit)
    extra = _not_timm(plain)
    chosen = vit if extra else plain
    if extra and target.name != MODEL:
        raise ConfigError(
            f"{target.name}: this run's {_adapters(vit)} cannot be merged, and vitkit.load finds them through a passport.json "
            f"that belongs to a file called {MODEL}",
            fix=f"--out {target.with_suffix('') / MODEL}",
        )
    chosen.passport = _exported_passport(vit, chosen, merged=not extra)
    pixels = chosen.passport.preprocess
    probe = torch.randn(4, pixels.in_chans, *pixels.image_size, generator=torch.Generator().manual_seed(0))
    wanted = _logits(vit, probe)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        draft = Path(folder) / target.name
        words = None if extra else timm_words(chosen)
        _write(draft, chosen, words)
        worst = difference(_logits(weights.load(draft, num_classes=None, say=None), probe), wanted)
        if not worst <= TOLERANCE:
            raise WeightsError(
                f"{target} was not written: read back it gives logits that differ by {worst:.1e} of their size",
                fix=f"report this; the run itself is intact (vitkit.load({str(run)!r}))",
            )
        alone = "" if words is None else _reads_in_timm(draft, words, chosen, probe, wanted)
        for name in ("config.json", FILE, target.name):  # the weights last
            if (Path(folder) / name).is_file():
                os.replace(Path(folder) / name, target.parent / name)
    _explain(target, chosen, words, alone, extra, worst)
    return target


def simplified(vit: ViT) -> ViT:
    """A copy of `vit` with LoRA merged, EVA's biases under timm's names, and the head as one linear layer."""
    from vitkit.adapt.lora import merge
    from vitkit.parts.blocks import restore_qkv_biases

    plain = merge(deepcopy(vit).eval())
    restore_qkv_biases(plain)
    return fold_head(plain)


def fold_head(vit: ViT) -> ViT:
    """Turn FeatureNorm + Linear into the one Linear that computes the same, in place. With running mean m and variance
    v: W' = W / sqrt(v + eps), b' = b - W' m. A single head on both tokens of a distilled ViT becomes its two heads."""
    from vitkit.parts.blocks import unmix
    from vitkit.parts.heads import FeatureNorm, OneHead

    if isinstance(vit.head, nn.Sequential) and isinstance(vit.head[0], FeatureNorm):
        norm, linear = cast(Any, vit.head)
        weight = linear.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        bias = linear.bias.double() - weight @ norm.running_mean.double()
        folded = nn.Linear(linear.in_features, linear.out_features)
        folded.weight = nn.Parameter(weight.detach().float())
        folded.bias = nn.Parameter(bias.detach().float())
        vit.head = folded
    if isinstance(vit, OneHead) and isinstance(vit.head, nn.Linear):
        unmix(vit, OneHead)
        vit.head_dist = deepcopy(vit.head)  # the mean of two equal linear heads is the head of the mean
    return vit


def timm_words(vit: ViT) -> tuple[str, dict[str, Any]] | None:
    """Name and JSON keywords with which `timm.create_model` builds this model; None where timm takes no such words."""
    passport = vit.passport
    name = STAND_INS.get(passport.arch, passport.arch)
    kwargs = {key: value for key, value in passport.arch_kwargs.items() if value is not None}
    if kwargs.get("norm_eps") == 1e-6:  # timm's own default
        del kwargs["norm_eps"]
    if name == "Eva" or kwargs.keys() & {"norm_eps", "mlp_layer"}:
        return None
    if architecture.is_eva(name):
        kwargs = {{"fc_norm": "use_fc_norm", "reg_tokens": "num_reg_tokens"}.get(k, k): v for k, v in kwargs.items()}
    if kwargs.get("act_layer") == "gelu":
        del kwargs["act_layer"]
    kwargs.setdefault("img_size", list(passport.preprocess.image_size))
    return name, {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}


def open_run(run: Path) -> ViT:
    if not (run / FILE).is_file():
        started = (run / "config.yaml").is_file()
        what = "has no model yet" if started else "is not a run folder (it has no passport.json)"
        fix = "finish it: the same command resumes it" if started else "give the --out of a vitkit pretrain or adapt"
        raise ConfigError(f"{run} {what}", fix=fix)
    vit = weights.load(run, num_classes=None, say=None).eval()
    kind = vit.passport.preprocess.kind
    if kind != "image":
        raise ConfigError(
            f"{run} takes {kind}s, and only models of images are exported",
            fix=f"its {weights.MODEL} is a plain state dict that vitkit.load reads",
        )
    return vit


def target_of(run: Path, out: str | None, name: str, suffix: str) -> Path:
    """Where to write: the run's export folder, a folder, or a file. Never over a run or over something foreign."""
    target = Path(out) if out else run / "export" / name
    if target.is_dir() or not target.suffix:
        target = target / name
    if target.suffix != suffix:
        raise ConfigError(f"{target} does not end in {suffix}", fix=f"--out {target.with_suffix(suffix)}, or a folder")
    folder = target.parent
    if (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is a run folder; its own files would be replaced", fix=f"--out {folder / 'export' / name}"
        )
    foreign = [one for one in ("config.json", FILE) if (folder / one).is_file()] if suffix == ".safetensors" else []
    if foreign and not _ours(folder):
        raise ConfigError(
            f"{folder / foreign[0]} belongs to another model and would be replaced", fix="an --out folder of its own"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return target


def _ours(folder: Path) -> bool:
    """Whether an earlier export wrote this folder's config.json."""
    try:
        return "vitkit" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _not_timm(vit: ViT) -> list[str]:
    """Names of tensors that timm's own model does not have, or has and this one lacks."""
    passport = vit.passport
    expected = architecture.build(passport.arch, passport.arch_kwargs, meta=True, num_classes=vit.num_classes)
    own, theirs = vit.state_dict(), expected.state_dict()
    return sorted(set(own) ^ set(theirs)) + [n for n in own if n in theirs and own[n].shape != theirs[n].shape]


def _adapters(vit: ViT) -> str:
    names = list(dict.fromkeys(step["method"].rpartition(".")[2] for step in vit.passport.steps))
    return " and ".join(names) or "added tensors"


def _exported_passport(vit: ViT, chosen: ViT, *, merged: bool) -> Passport:
    """The passport of the file: no folders of this machine in it, and no steps that merging made part of the weights."""
    old = vit.passport
    base = {key: _without_folders(value) for key, value in old.base.items() if key != "relative"}
    if base.get("kind") in ("file", "run"):  # not where it lies on this machine
        base["name"] = base.pop("ref", "")
    entry = {"method": "export", "settings": {"merged": merged}, "sha256": weights.sha256_of(chosen.state_dict())}
    return replace(
        old,
        steps=[] if merged else old.steps,
        base=base,
        lineage=[*_without_folders(old.lineage), entry],
    )


def _without_folders(value: Any) -> Any:
    """`value` with absolute paths reduced to their last part: an exported file is meant to be given away."""
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(one) for one in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".."))):
        return Path(value).name
    return value


def _write(path: Path, vit: ViT, words: tuple[str, dict[str, Any]] | None) -> None:
    """Weights with the passport in their metadata; beside them config.json for timm, and passport.json for vitkit."""
    passport = vit.passport
    meta = {"format": "pt", "vitkit": "full", "passport": json.dumps(passport.to_dict())}
    weights.save_state(path, vit.state_dict(), meta)
    if path.name == MODEL:
        passport.save(path.parent)
    (path.parent / "config.json").write_text(json.dumps(_timm_config(vit, words), indent=1) + "\n", encoding="utf-8")


def _timm_config(vit: ViT, words: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
    """What timm's `local-dir:` and hub loading read."""
    from vitkit import __version__

    passport = vit.passport
    pixels = passport.preprocess
    name, kwargs = words or (passport.arch, passport.arch_kwargs)
    cfg = {
        "input_size": [pixels.in_chans, *pixels.image_size],
        "fixed_input_size": True,
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "interpolation": pixels.interpolation,
        "crop_pct": pixels.crop_pct,
        "crop_mode": pixels.crop_mode,
        "num_classes": vit.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": passport.licence,
    }
    content = {"architecture": name, "num_classes": vit.num_classes, "model_args": kwargs, "pretrained_cfg": cfg}
    if passport.classes:
        content["label_names"] = passport.classes
    return {**content, "vitkit": __version__}


@torch.no_grad()
def _logits(vit: ViT, images: Tensor) -> Tensor:
    return tokens.logits(vit.eval(), images)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference as a share of the largest value (of 1 where all are smaller); nan counts as nan."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / max(1.0, float(wanted.abs().max())))


@torch.no_grad()
def _reads_in_timm(draft: Path, words: tuple[str, dict[str, Any]], vit: ViT, probe: Tensor, wanted: Tensor) -> str:
    """Empty when timm alone, given only the file, computes the same logits; otherwise why not."""
    import timm
    from safetensors.torch import load_file

    name, kwargs = words
    try:
        alone = timm.create_model(name, num_classes=vit.num_classes, **kwargs).eval()
        alone.load_state_dict(load_file(draft))
        if draft.name == MODEL:
            timm.create_model(f"local-dir:{draft.parent}", pretrained=True)
    except Exception as error:  # whatever timm of this version objects to
        return f"timm does not rebuild it ({str(error).strip().splitlines()[0]})"
    if vit.passport.feature.rope == "bfloat16":  # too small a change for random probes to show on every model
        return "timm keeps rotary periods in float32, and these weights were trained with bfloat16 ones"
    worst = difference(alone(probe), wanted)
    return "" if worst <= TOLERANCE else f"timm alone computes other logits (by {worst:.1e})"


def _explain(
    target: Path,
    vit: ViT,
    words: tuple[str, dict[str, Any]] | None,
    alone: str,
    extra: list[str],
    worst: float,
) -> None:
    """Say what the file is and how to use it: lines to paste into its README."""
    say(f"{target}: {len(vit.state_dict())} tensors; read back, its logits agree to {worst:.1e}")
    if extra:
        say(
            f"{_adapters(vit)} cannot be merged into timm's own layers: all weights are in the file, and vitkit rebuilds it"
        )
    elif alone or words is None:
        why = alone or f"timm has no name for this {vit.passport.arch}"
        say(f"{why}; vitkit rebuilds it")
    pixels = vit.passport.preprocess
    say(
        f"\n    # pixels: {pixels.image_size[0]} x {pixels.image_size[1]}, {pixels.channels}, scaled to [0, 1], "
        f"minus {_short(pixels.mean)}, divided by {_short(pixels.std)}"
    )
    if extra or alone or words is None:
        where = target.parent if target.name == MODEL else target
        say(f'    import vitkit\n    model = vitkit.load("{where}")  # model(pixels), model.predict(folder)\n')
        return
    kwargs = "".join(f", {key}={value!r}" for key, value in words[1].items())
    say("    import timm\n    from safetensors.torch import load_file")
    say(f'    model = timm.create_model("{words[0]}", num_classes={vit.num_classes}{kwargs})')
    say(f'    model.load_state_dict(load_file("{target}"))\n    model.eval()\n')


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def export_onnx(run: Path, out: str | None = None) -> Path:
    """Write `run` as an ONNX graph with its preprocessing inside; see `vitkit.run.onnx_export.write`."""
    from vitkit.run.onnx_export import write

    return write(Path(run), out)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
