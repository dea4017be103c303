"""The work behind `vitkit explain MODEL IMAGES`: maps with their sanity figures, patch colours and neighbours, one page.

Maps are computed for pictures of one size together. Every map of the predicted class is scored by deletion and insertion
against random maps, and by randomising the model's weights; figures and raw arrays are written beside the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkit import tokens
from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError
from vitkit.explain import attention
from vitkit.explain.shared import has_head
from vitkit.parts.attention import KINDS as ATTENTION
from vitkit.run.batches import Say, open_data, open_model, require_images, speaker
from vitkit.run.class_names import ClassNames
from vitkit.run.config import Config, main_line
from vitkit.run.explain_figures import headline, summarise
from vitkit.run.explain_maps import FOR_A_CLASS, KINDS, Shown, Work, trait_panels
from vitkit.run.files import atomic
from vitkit.run.folder import RunFolder
from vitkit.run.measure import FREE, device_of, short_name, write_results
from vitkit.run.progress import Progress

MOST_PATCHES = 4096  # of one picture: attention is patches x patches, and the page holds them all


@dataclass
class Explained:
    """Everything that the page shows."""

    shown: list[Shown]
    kinds: list[str]
    names: ClassNames
    summary: dict[str, dict[str, Any]]
    facts: dict[str, str]
    verdict: str
    basis: Any = None
    panels: list[tuple[str, np.ndarray]] = field(default_factory=list)


def explain_job(config: Config) -> dict[str, Any]:
    """Explain the model of `config` on its images; writes explain.html, maps.npz and results.json to `out`.

    Returns {"verdict", "report", "images", "kinds": {kind: figures}}. Raises WeightsError where the model is no ViT,
    ConfigError on a class or map that it does not have, DataError where no picture can be read.
    """
    own, machine = config.own, config.machine
    device, say = device_of(machine, "explain"), speaker(machine.quiet)
    _check(own)
    with torch.random.fork_rng(devices=[]), RunFolder(own.out) as folder:
        vit: Any = open_model(config.inputs, seed=machine.seed, say=say, num_classes=None)
        tokens.require_vit(vit)
        require_images(vit.passport.preprocess.kind, "explain")
        vit = vit.to(device).eval()
        names = ClassNames.of(vit, say)
        asked = names.find(own.classes or ())
        kinds = choose_kinds(vit, own.maps, say)
        _check_blocks(vit, own)
        _say_unused(own, kinds, say)
        folder.claim(config.values, "explain", free=FREE, command=_command())
        images, total = open_images(config.inputs, vit, say)
        shown, facts = choose(images, vit, own, names, machine.seed, say)
        work = Work(vit, kinds, own, asked, device, machine.batch_size)
        explained = Explained(shown, kinds, names, {}, {**_model_facts(vit, config, total), **facts}, "")
        with Progress(work.steps(shown), 1, quiet=machine.quiet) as progress:
            work.run(shown, machine.seed, progress)
        if "prompt_cam" in kinds:
            explained.panels = trait_panels(vit, shown, asked, names)
        return _write(folder, explained, own, config)


def _check(own: Any) -> None:
    if not own.out:
        raise ConfigError("out is empty, and vitkit explain writes its page", fix="--out explanations")
    if own.images < 1:
        raise ConfigError(f"images is {own.images}", fix="a positive number of pictures, e.g. 24")
    if not own.maps:
        raise ConfigError("maps names no map", fix=f"maps: {', '.join(KINDS)}, or auto")
    for kind in () if own.maps == "auto" else own.maps:
        if kind not in KINDS:
            raise ConfigError(f"there is no map '{kind}'", fix=f"maps: {', '.join(KINDS)}, or auto")


def _check_blocks(vit: Any, own: Any) -> None:
    """Raise ConfigError on a block or head that the model does not have, before any picture is looked at."""
    block = vit.blocks[attention.block_index(vit, own.layer)]
    heads = getattr(getattr(block, "attn", None), "num_heads", 0)  # 0: of a kind that has no map anyway
    if own.head is not None and heads and not -heads <= own.head < heads:
        raise ConfigError(f"head {own.head} does not exist", fix=f"the block has heads 0..{heads - 1}")


def _say_unused(own: Any, kinds: list[str], say: Say) -> None:
    """Settings that change nothing, as their kind of map is not drawn."""
    asked = {"head": own.head is not None, "fusion": own.fusion != "mean", "discard": own.discard != 0}
    for name, kind in {"head": "attention", "fusion": "rollout", "discard": "rollout"}.items():
        if asked[name] and kind not in kinds:
            say(f"{name} is for {KINDS[kind].lower()} maps, and none is drawn: it changes nothing")
    if own.classes and not set(kinds) & set(FOR_A_CLASS):
        say("classes are asked about by Grad-CAM and Prompt-CAM maps, and none is drawn: they change nothing")


def _command() -> str:
    import sys

    called = sys.argv[1:2] == ["explain"] and Path(sys.argv[0]).stem in ("vitkit", "__main__")
    return main_line() if called else "vitkit.explain(...)"


# ---------------------------------------------------------------- what is explained


def explains_itself(vit: Any) -> bool:
    """Whether the model scores classes from class prompts (Prompt-CAM), and no other head was put on top since."""
    return bool(getattr(vit, "reads_prompts", False))


def choose_kinds(vit: Any, wanted: Any, say: Say) -> list[str]:
    """The maps to draw: those asked for, or all that this model can give."""
    known = all(isinstance(getattr(block, "attn", None), ATTENTION) for block in vit.blocks)
    possible = {"attention": known, "rollout": known, "grad_cam": has_head(vit), "prompt_cam": explains_itself(vit)}
    if wanted == "auto":
        if not known:
            say(f"attention of type {type(vit.blocks[0].attn).__name__} has no map of weights: none is shown")
        if not possible["grad_cam"]:
            say("the model has no classification head: attention and patches are shown, nothing about classes")
        return [kind for kind, can in possible.items() if can]
    missing = [kind for kind in wanted if not possible[kind]]
    if missing:
        fix = {
            "attention": "a ViT whose attention has one map of weights a head",
            "rollout": "a ViT whose attention has one map of weights a head",
            "grad_cam": "a model with a classification head: vitkit adapt linear ...",
            "prompt_cam": "train class prompts first: vitkit explain prompt_cam --model ... --data ...",
        }
        raise ConfigError(f"this model cannot give {KINDS[missing[0]]} maps", fix=fix[missing[0]])
    return list(dict.fromkeys(wanted))


def open_images(inputs: Any, vit: Any, say: Say) -> tuple[Images, str]:
    """The images to choose from, and what they are in words: a test split where there is one, otherwise everything.

    Splits are drawn only for the data that the model itself was trained on, so that held-out pictures are shown.
    """
    silent: Say = lambda text: None  # noqa: E731
    path = Path(inputs.data).expanduser()
    from vitkit.data.pixels import is_image

    if path.is_file() and is_image(path.name):
        images = _one_file(path)
    else:
        images = open_data(inputs, silent)
        trained = {(step.get("data") or {}).get("name") for step in vit.passport.lineage}
        if images.name not in trained:
            images = open_data(replace(inputs, val_fraction=0.0, test_fraction=0.0), silent)
    for sentence in images.understood:
        say(sentence)
    if "test" in images.counts and len(images.counts) > 1:
        return images.part("test"), f"{images.counts['test']:,} of the test split of {images.name}"
    return images, f"{len(images):,} of {images.name}"


def _one_file(path: Path) -> Images:
    from vitkit.data.stores import FileStore

    return Images(
        name=path.name,
        task=None,
        classes=[],
        labels=None,
        split=np.array(["unlabelled"]),
        group=None,
        store=FileStore([str(path)]),
        rows=np.zeros(1, np.int64),
        names=[path.name],
        understood=[f"one image, {path.name}"],
    )


def choose(
    images: Images, vit: Any, own: Any, names: ClassNames, seed: int, say: Say
) -> tuple[list[Shown], dict[str, str]]:
    """The pictures to show, as the model sees them, and facts about how they were prepared."""
    from vitkit.data.transforms import eval_view
    from vitkit.run.gallery import label_text, spread

    view = NativeView(vit) if own.native else eval_view(vit.passport.preprocess)
    shown, sizes, errors = [], set(), []
    for i in spread(images, own.images, seed).tolist():
        try:
            pixels = images.decode(i)
            seen = view(pixels)
        except DataError as error:
            path = images.path(i)
            named = error if path in error.what else DataError(f"{path}: {error.what}", fix=error.fix)
            errors.append(named)
            say(f"left out: {named}")
            continue
        sizes.add(tuple(pixels.shape[-2:]))
        label = label_text(images, i)
        true = names.index(label) if label and images.task == "single" else None
        shown.append(Shown(images.names[i], seen, label, true))
    if not shown:
        raise errors[0] if errors else DataError(f"{images.name}: there is no image", fix="give a folder of images")
    facts = {"shown": f"{len(shown)}" + (f", {len(errors)} could not be read" if errors else "")}
    facts["size"] = sentence = _size_words(shown, sizes, own.native)
    say(f"images: {sentence}")
    return shown, facts


def _size_words(shown: list[Shown], sizes: set[tuple[int, ...]], native: bool) -> str:
    """How the pictures' sizes were treated, aloud."""
    after = {tuple(one.pixels.shape[-2:]) for one in shown}
    if native:
        kinds = "one size" if len(after) == 1 else f"{len(after)} sizes"
        return f"own size, edges cropped to whole patches ({kinds}, batched by size)"
    h, w = next(iter(after))
    if sizes == after:
        return f"{w} x {h} pixels, as they are"
    mixed = "of one size" if len(sizes) == 1 else f"of {len(sizes)} sizes"
    return f"{mixed}, resized and cropped to {w} x {h} by the model's preprocessing (--native keeps their own)"


class NativeView:
    """Pictures at their own size, cropped in the middle to whole patches; the model resamples its positions."""

    def __init__(self, vit: Any):
        self.patch = tuple(vit.patch_embed.patch_size)
        self.channels = vit.passport.preprocess.in_chans
        if not vit.dynamic_img_size:
            raise ConfigError("this model takes one size only", fix="leave --native out")

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import center_crop

        from vitkit.data.transforms import to_channels

        grid = [side // step for side, step in zip(image.shape[-2:], self.patch, strict=True)]
        words = f"a picture of {image.shape[-1]} x {image.shape[-2]} pixels"
        if min(grid) < 1:
            raise DataError(f"{words} is smaller than a patch {self.patch}", fix="leave --native out")
        if math.prod(grid) > MOST_PATCHES:
            raise DataError(
                f"{words} has {math.prod(grid):,} patches, more than {MOST_PATCHES:,}",
                fix="leave --native out, or shrink such pictures first",
            )
        size = [count * step for count, step in zip(grid, self.patch, strict=True)]
        return center_crop(to_channels(image, self.channels), size).contiguous()


# ---------------------------------------------------------------- files


def _model_facts(vit: Any, config: Config, total: str) -> dict[str, str]:
    own = config.own
    settings = attention.Settings(layer=own.layer, head=own.head, fusion=own.fusion, discard=own.discard)
    depth = len(vit.blocks)
    attention.block_index(vit, own.layer)
    return {
        "model": model_name(config.inputs.model),
        "images": total,
        "attention of": f"{attention.reads(vit, settings)}, block {own.layer % depth + 1} of {depth}"
        + (f", head {own.head}" if own.head is not None else ""),
    }


def model_name(model: str) -> str:
    """A model's name without the folders before it; the folder's where the file is only called model or weights."""
    name = short_name(model)
    plain = Path(name).name.partition(".")[0] in ("model", "weights", "checkpoint", "pytorch_model")
    return Path(model).resolve().parent.name if plain and Path(model).is_file() else name


def _write(folder: RunFolder, explained: Explained, own: Any, config: Config) -> dict[str, Any]:
    from vitkit.run import explain_page

    shown, kinds = explained.shown, explained.kinds
    explained.summary = summary = summarise(shown, kinds)
    explained.verdict = headline(summary, len(shown))
    seen = explain_page.write(folder.path / "explain.html", explained, own)
    with atomic(folder.path / "maps.npz") as file:
        np.savez_compressed(file, **_arrays(shown))
    names = explained.names
    entries = [
        {
            "name": one.name,
            "label": one.label,
            "predicted": None if one.predicted is None else names.names[one.predicted],
            "probability": None if one.probabilities is None else float(one.probabilities.max()),
            "maps": [f"{i:03d}.{map_name(key)}" for key in one.maps],
            "scores": one.scores,
        }
        for i, one in enumerate(shown)
    ]
    result = {"verdict": explained.verdict, "kinds": summary, "facts": explained.facts, **seen, "images": entries}
    write_results(folder.path / "results.json", result)
    folder.finish({"verb": "explain", "metrics": [], "verdict": explained.verdict, "images": len(shown)})
    report = str(folder.path / "explain.html")
    return {"verdict": explained.verdict, "report": report, "images": len(shown), "kinds": summary, **seen}


def map_name(key: tuple[str, int | None]) -> str:
    """The name of a map in maps.npz, after the picture's number: `attention`, `grad_cam.281`."""
    kind, cls = key
    return kind if cls is None else f"{kind}.{cls}"


def _arrays(shown: list[Shown]) -> dict[str, Any]:
    return {f"{i:03d}.{map_name(key)}": found for i, one in enumerate(shown) for key, found in one.maps.items()}
