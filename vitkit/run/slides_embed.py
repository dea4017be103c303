"""`vitkit slides embed`: slides through the encoder, with progress, a table and a page of what was kept."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vitkit.data.slide import Tiling, find_slides, stem
from vitkit.errors import ConfigError, DataError
from vitkit.evaluate.mil import pictures, store
from vitkit.run.batches import open_model, require_images, speaker
from vitkit.run.config import Config
from vitkit.run.environment import environment
from vitkit.run.files import atomic_write
from vitkit.run.measure import device_of, short_name, write_results
from vitkit.run.page import Report
from vitkit.run.progress import clock
from vitkit.run.slides import Embed
from vitkit.settings import Inputs, Machine

FACTS = "embedding.json"


def embed_job(config: Config, vit: Any = None) -> store.Embedded:
    """Embed the slides of `config` with its model (or `vit`), then write the table and the page."""
    own: Embed = config.own
    say = speaker(own.quiet)
    device = device_of(Machine(accelerator=own.accelerator), "slides embed")
    paths = find_slides(own.data)
    say(f"{own.data}: {len(paths):,} slides")
    vit = _model(own, say) if vit is None else vit
    size = vit.passport.preprocess.image_size[0] if own.size == "auto" else own.size
    tiling = Tiling(size=size, mpp=own.mpp, min_tissue=own.min_tissue, slide_mpp=own.slide_mpp)
    precision = own.precision if own.precision != "auto" else "fp16" if device.type == "cuda" else "float32"
    workers = max(1, (os.cpu_count() or 2) - 1) if own.workers == "auto" else own.workers
    facts = {"key": store.features_key(vit, tiling, precision), "model": short_name(own.model), "precision": precision}
    facts |= {"size": size, "mpp": own.mpp, "min_tissue": own.min_tissue, "slide_mpp": own.slide_mpp}
    out = Path(own.out)
    _refuse_others(out, facts, own)
    shown = "stored pixels" if own.mpp is None else f"{own.mpp:g} um a pixel"
    say(
        f"tiles of {size} px, {shown}, {own.min_tissue:.0%} tissue; {precision} on {device.type}, {workers} reading threads"
    )
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / FACTS, json.dumps(facts, indent=1) + "\n")
    vit.passport.save(out)
    began = time.perf_counter()
    with Meter(quiet=own.quiet) as meter:
        found = store.embed_slides(
            vit,
            own.data,
            out,
            tiling=tiling,
            batch_size=own.batch_size,
            workers=workers,
            device=device,
            precision=precision,
            on_bad=own.on_bad,
            progress=meter,
        )
    seconds = time.perf_counter() - began
    if len(found.bad) == len(paths):
        name, reason = next(iter(found.bad.items()))
        raise DataError(f"none of {len(paths)} slides could be used; {name}: {reason}", fix=_advice(reason))
    for name, reason in found.bad.items():
        say(f"left out: {reason}" if name in reason else f"left out: {name}: {reason}")
    facts["tiles_per_second"] = round(found.tiles / seconds, 1) if found.tiles else None
    write_results(out / FACTS, {**facts, "bad": found.bad, "environment": environment()})
    rows = _table(out, paths, found)
    say(f"page: {_page(out, rows, found, facts, config)}")
    return found


def _advice(reason: str) -> str:
    if "micrometres" in reason:
        return "--slide_mpp 0.5 (20x) or 0.25 (40x) where the files do not say it; --mpp null takes stored pixels as they are"
    if "tissue" in reason:
        return "--min_tissue 0.3, or 0 for pictures that are not stained tissue"
    return "check that the files are whole; vitkit slides embed --on_bad raise stops at the first with its own advice"


def _model(own: Embed, say: Any) -> Any:
    inputs = Inputs(
        model=own.model,
        arch=own.arch,
        arch_kwargs=own.arch_kwargs,
        pretrained=own.pretrained,
        patch_size=own.patch_size,
        image_size=None if own.size == "auto" else own.size,
    )
    vit = open_model(inputs, seed=own.seed, say=say, num_classes=0).eval()
    require_images(vit.passport.preprocess.kind, "slides")
    return vit


def _refuse_others(out: Path, facts: dict[str, Any], own: Embed) -> None:
    """Hours of another model's features are not replaced because of a mistyped folder."""
    if own.replace or not (out / FACTS).is_file() or not any(out.glob("*.safetensors")):
        return
    before = json.loads((out / FACTS).read_text(encoding="utf-8"))
    if before.get("key") == facts["key"]:
        return
    names = ("model", "size", "mpp", "min_tissue", "slide_mpp", "precision")
    changed = [f"{name} {before.get(name)} -> {facts[name]}" for name in names if before.get(name) != facts[name]]
    what = ", ".join(changed) or "other weights or package versions"
    raise ConfigError(
        f"{out} holds features of another model or tiling ({what})",
        fix="another --out, or --replace true to make them anew",
    )


class Meter:
    """Tiles a second and the time left, on a line that is redrawn on a terminal, else on a line every ten seconds."""

    def __init__(self, *, quiet: bool, every: float = 10.0):
        self.live = not quiet and sys.stderr.isatty()
        self.quiet, self.every = quiet, 0.2 if self.live else every
        self.share: float | None = None

    def __enter__(self) -> Meter:
        self.began = time.perf_counter()
        self.next = self.began + min(self.every, 2.0)
        return self

    def __call__(self, so_far: store.Embedded) -> None:
        now = time.perf_counter()
        if self.share is None:  # finished slides that were found; the first batch is counted as time already spent
            self.share = (len(so_far.skipped)) / max(so_far.total, 1)
        if self.quiet or now < self.next:
            return
        self.next = now + self.every
        print(f"\r\033[K{self.line(so_far, now)}" if self.live else self.line(so_far, now), end="" if self.live else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def line(self, so_far: store.Embedded, now: float) -> str:
        """The state in one line."""
        seconds, gone = max(now - self.began, 1e-9), so_far.share - (self.share or 0.0)
        left = f", about {clock((1 - so_far.share) / gone * seconds)} left" if gone > 0 else ""
        done = len(so_far.done) + len(so_far.skipped) + len(so_far.bad)
        pace = f"{so_far.tiles:,} tiles, {so_far.tiles / seconds:,.0f} tiles/s"
        return f"slide {min(done + 1, so_far.total)} of {so_far.total} ({so_far.slide}): {pace}{left}"

    def __exit__(self, *_: object) -> None:
        if self.live:
            print(file=sys.stderr)


def _table(out: Path, paths: list[Path], found: store.Embedded) -> list[dict[str, Any]]:
    """slides.csv: a row a slide."""
    import pandas as pd

    rows = []
    for path in paths:
        name = stem(path.name)
        row: dict[str, Any] = {"slide": name, "file": path.name, "tiles": 0, "of": None, "mpp": None}
        row["left_out"] = found.bad.get(name, "")
        if not row["left_out"]:
            places = store.read_features(out / f"{name}.safetensors", only_places=True)
            row |= {"tiles": len(places.coords), "of": places.grid, "mpp": places.mpp}
        rows.append(row)
    frame = pd.DataFrame(rows).astype({"of": "Int64"})
    atomic_write(out / "slides.csv", frame.to_csv(index=False))
    return rows


# ---------------------------------------------------------------- the page


def _page(out: Path, rows: list[dict[str, Any]], found: store.Embedded, facts: dict[str, Any], config: Config) -> Path:
    good = [row for row in rows if not row["left_out"]]
    tiles = sum(row["tiles"] for row in good)
    report = Report("Slides", f"{facts['model']} on {Path(config.own.data).name}", kicker="vitkit slides embed")
    bad = f"; {_count(len(found.bad))} could not be used" if found.bad else ""
    report.sentence(f"{tiles:,} tiles of {_count(len(good))} were kept and embedded{bad}.")
    speed = facts["tiles_per_second"]
    pixel = "stored pixels" if facts["mpp"] is None else f"{facts['mpp']:g} µm a pixel"
    counts = sorted(row["tiles"] for row in good)
    report.facts(
        [
            ("tile", f"{facts['size']} px", pixel),
            ("tiles a slide, median", f"{counts[len(counts) // 2]:,}", f"{counts[0]:,} to {counts[-1]:,}"),
            (
                "tiles a second",
                "–" if speed is None else f"{speed:,.0f}",
                "all found finished" if speed is None else "",
            ),
        ]
    )
    if found.bad:
        report.table("Left out", ["slide", "why"], [[name, reason] for name, reason in found.bad.items()])
    note = "Full colour: tiles that were kept. Faded: too little tissue, or outside the grid."
    names = [row["slide"] for row in good]
    add_gallery(report, "Tiles that were kept", [_picture(out, row) for row in good], names, note)
    few = [[row["slide"], row["tiles"], row["of"], row["mpp"]] for row in good]
    report.table("All slides", ["slide", "tiles kept", "of", "µm a pixel"], few)
    report.details("Settings", config.values)
    report.details("Environment", environment())
    return report.write(out / "slides.html")


def _count(slides: int) -> str:
    return f"{slides:,} slide" + ("" if slides == 1 else "s")


def _picture(out: Path, row: dict[str, Any]) -> tuple[np.ndarray, str]:
    places = store.read_features(out / f"{row['slide']}.safetensors", only_places=True)
    picture = places.thumbnail
    if places.placed and row["of"] != row["tiles"]:
        assert places.size is not None
        picture = pictures.kept_tiles(picture, places.coords, places.side, places.size)
    return picture, f"{row['slide']}: {row['tiles']:,}" + (f" of {row['of']:,}" if row["of"] != row["tiles"] else "")


def add_gallery(
    report: Report, title: str, shown: list[tuple[np.ndarray, str]], names: list[str], note: str = "", size: int = 256
) -> None:
    """Pictures with captions, three in a row; JPEG, so that hundreds of slides fit into one file."""
    import base64

    from PIL import Image

    size = size if len(shown) <= 300 else 140
    cells = []
    for (picture, caption), name in zip(shown, names, strict=True):
        image = Image.fromarray(picture)
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        uri = "data:image/jpeg;base64," + base64.b64encode(pictures.jpeg(np.asarray(image))).decode()
        figure = '<figure><img src="{}" width="{}" height="{}" alt="{}"><figcaption>{}</figcaption></figure>'
        cells.append(Markup(figure).format(uri, *image.size, name, caption))
    block = Markup('<div class="gallery"><div class="block" style="--n:{};--size:{}px">{}</div></div>')
    report._add(title, block.format(max(1, 800 // (size + 10)), size, Markup("").join(cells)), note)
