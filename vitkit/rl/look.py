"""Look into an encoder of frames: collapse, similarity, sparsity, attention and a map of observations, in one page.

Source: the analysis of Goulao & Oliveira (arXiv 2209.10901), `vitkit.evaluate.representation`, against the same
architecture with random weights.

What happens, and where: at most `observations` moments of the held-out part pass both encoders (`analyse`); the page shows the
spectrum of the covariance of their features, cosine similarities within and across streams and of consecutive
observations, sparsity of every block, attention of the last block head by head, and a t-SNE map (`page`).

Differs from the paper: it gives no threshold for sparsity, so `threshold` is an argument and Hoyer's measure stands beside.

Cost: two passes over the observations; t-SNE takes some ten seconds for a thousand.

    vitkit rl look --model runs/tov --data streams/ --out look/
    vitkit.rl("look", model="runs/tov", data="streams/", out="look/")
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from vitkit.errors import ConfigError
from vitkit.settings import check_choices


@dataclass(frozen=True)
class Settings:
    """Which encoder, which streams, and what is drawn."""

    model: str = ""
    """encoder: run folder, weights file or timm name"""
    data: str = ""
    """streams of frames"""
    out: str = ""
    """folder to write: look.html, results.json"""
    pretrained: bool = True
    """load the released weights of a timm name; false starts from random ones"""
    arch_kwargs: dict[str, Any] | None = None
    """keywords of the architecture that differ from its name"""
    image_size: int | None = None
    """pixels that the encoder sees; by default the model's own"""
    patch_size: int | None = None
    """pixels of a patch; by default the model's own"""
    part: Literal["test", "val", "train", "all"] = "test"
    """split that is looked at"""
    observations: int = 1000
    """at most so many, in runs of 20 neighbours"""
    threshold: float = 0.1
    """entries below this share of their layer's root mean square count as zero"""
    frames: int = 3
    """frames of an observation"""
    map: bool = True
    """draw the t-SNE map"""
    seed: int = 0
    """of random weights and of the map"""
    quiet: bool = False
    """no words on the terminal"""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.observations < 40 or self.threshold <= 0:
            raise ConfigError(
                f"observations {self.observations}, threshold {self.threshold:g}", fix="40 or more, and above 0"
            )


def run(settings: Settings) -> dict[str, Any]:
    """Figures of the encoder and of random weights, with "verdict" and "report" (the page)."""
    from dataclasses import replace

    from vitkit.data import read
    from vitkit.evaluate.representation import analyse
    from vitkit.rl.encoders import open_encoder, view_of
    from vitkit.run.batches import speaker

    say = speaker(settings.quiet)
    images = read(settings.data, kind="frames", say=say)
    images = images if settings.part == "all" else images.part(settings.part)
    vit = open_encoder(settings, say)
    passport = vit.passport
    kwargs = {k: v for k, v in passport.arch_kwargs.items() if k not in ("num_classes",)}
    plain = replace(
        settings, model=passport.arch, arch_kwargs=kwargs, pretrained=False, image_size=None, patch_size=None
    )
    random = open_encoder(plain, lambda text: None)
    random.passport.preprocess = passport.preprocess
    view = view_of(vit, settings.frames)
    limits: dict[str, Any] = {"threshold": settings.threshold, "limit": settings.observations}
    both = {
        "this encoder": analyse(vit, images, view, **limits),
        "random weights": analyse(random, images, view, **limits),
    }
    return page(settings, images, both)


def page(settings: Settings, images: Any, both: dict[str, Any]) -> dict[str, Any]:
    """Write look.html and results.json."""
    from pathlib import Path

    from vitkit.evaluate.representation import tsne
    from vitkit.run.files import atomic_write
    from vitkit.run.page import Report

    own, random = both["this encoder"], both["random weights"]
    found: dict[str, Any] = {name: _figures(one) for name, one in both.items()}
    found["verdict"] = verdict(own, random)
    report = Report(
        "Inside an encoder of frames", f"{settings.model} on {images.name}, {len(own.features):,} observations"
    )
    report.sentence(found["verdict"])
    report.facts(
        [("effective rank", own.rank), ("of", float(own.features.shape[1])), ("streams", float(len(set(own.stream))))]
    )
    report.table("Similarity and rank", ["", *both], _rows(both), "cosine similarity of pooled features")
    spectra = {name: spectrum(one.singular) for name, one in both.items()}
    report.curves("Singular values of the covariance", spectra, "number", "share of the largest", log_y=True)
    sparse = [[f"{i}", *(v for name in both for v in both[name].sparse[i].values())] for i in range(len(own.sparse))]
    columns = ["block", *(f"{what}, {name}" for name in both for what in ("near zero", "Hoyer"))]
    note = f"near zero: below {settings.threshold:g} of the block's root mean square"
    report.table("Sparsity of every block's output", columns, sparse, note)
    names = sorted({images.store.streams[s].name: s for s in own.stream}.items(), key=lambda pair: pair[1])
    _attention(report, own)
    if settings.map:
        places = tsne(own.features, seed=settings.seed)
        groups = {name: [tuple(map(float, p)) for p in places[own.stream == s]] for name, s in names}
        report.scatter(
            "Observations by t-SNE", groups, note="coloured by stream; distances between far points mean little"
        )
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "look.html", report.html())
    found["report"] = str(folder / "look.html")
    atomic_write(folder / "results.json", json.dumps(found, indent=1) + "\n")
    return found


def spectrum(values: Any) -> list[tuple[float, float]]:
    """Points (number, share of the largest), down to where only rounding is left."""
    top = max(float(values[0]), 1e-300)
    return [(i + 1.0, float(value) / top) for i, value in enumerate(values) if value > 1e-10 * top]


def verdict(own: Any, random: Any) -> str:
    """Is it collapsed, in words."""
    dim = own.features.shape[1]
    near = own.similar["across streams"] if own.similar["across streams"] == own.similar["across streams"] else None
    alike = near if near is not None else own.similar["within a stream"]
    words = f"Its features use {own.rank:.1f} of {dim} directions (random weights: {random.rank:.1f})"
    if alike > 0.99:
        return f"{words}, but hardly differ between observations (cosine {alike:.4f}): collapsed, or hardly trained."
    if own.rank < 2:
        return f"{words}: hardly more than one, so that most differences between observations are lost (cosine {alike:.2f})."
    where = "of different streams" if near is not None else "of one stream"
    return f"{words}; observations {where} have a cosine of {alike:.2f}, consecutive ones {own.similar['consecutive']:.2f}."


def _figures(one: Any) -> dict[str, Any]:
    return {"effective_rank": one.rank, "values_in_use": one.used, **one.similar, "sparsity": one.sparse,
            "singular_values": one.singular.tolist()}  # fmt: skip


def _rows(both: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [["effective rank", *(one.rank for one in both.values())]]
    rows.append(["singular values above 0.001 of the largest", *(one.used for one in both.values())])
    for key in ("consecutive", "within a stream", "across streams"):
        rows.append([f"cosine, {key}", *(None if v != v else v for v in (one.similar[key] for one in both.values()))])
    return rows


def _attention(report: Any, own: Any) -> None:
    """Rows of an observation's middle frame and the attention of every head on it."""
    import numpy as np
    import torch

    rows = []
    for image, heads in zip(own.shown, own.looked, strict=True):
        middle = image[len(image) // 2].float()
        cells = [(middle.numpy().astype(np.uint8), "middle frame")]
        for number, head in enumerate(heads[:6]):
            weight = torch.nn.functional.interpolate(
                (head / head.max())[None, None], size=middle.shape, mode="nearest"
            )[0, 0]
            painted = torch.stack([0.4 * middle + 153 * weight, 0.4 * middle + 60 * weight, 0.4 * middle], -1)
            cells.append((painted.clamp(0, 255).numpy().astype(np.uint8), f"head {number}"))
        rows.append(cells)
    report.pictures(
        "Attention of the class token, last block", rows, note="brighter: more attention, each head by its largest"
    )
