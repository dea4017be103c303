"""`vitkit slides predict`: new slides by the ensemble that `vitkit slides evaluate` kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.errors import ConfigError, nearest
from vitkit.evaluate.mil.bags import feature_files, read_bags
from vitkit.evaluate.mil.ensemble import Ensemble
from vitkit.evaluate.mil.store import read_features
from vitkit.run.batches import speaker
from vitkit.run.files import atomic_write
from vitkit.run.folder import RunFolder
from vitkit.run.slides_evaluate import KIND, columns

PART = 64  # slides in memory at once


def predict_job(
    run: Any, features: Any, *, out: Any = None, heatmaps: Any = None, head: str | None = None, quiet: bool = True
) -> Any:
    """A table with a row a slide: tiles, probability of every class (or risk), the class, and the members' spread."""
    import pandas as pd

    say = speaker(quiet)
    files = feature_files(features)
    ensemble, name = _ensemble(Path(run), head, str(next(iter(files.values()))))
    say(f"{name}: {len(ensemble.members)} models, {len(files)} slides")
    frames = []
    slides = list(files)
    for at in range(0, len(slides), PART):
        bags = read_bags(features, slides[at : at + PART])
        members = ensemble.member_scores(bags)
        scores = members.mean(0)
        frame = pd.DataFrame({"slide": bags.names, "tiles": bags.lengths, **columns(ensemble.classes, scores)})
        if ensemble.classes:
            whole = np.concatenate([1 - scores, scores], axis=1) if scores.shape[1] == 1 else scores
            frame["predicted"] = [ensemble.classes[i] for i in whole.argmax(1)]
        frame["spread"] = members.std(0).max(1)  # of the members' scores: how far they disagree
        frames.append(frame)
        say(f"{min(at + PART, len(slides))} of {len(slides)} slides")
    table = pd.concat(frames, ignore_index=True)
    if out is not None:
        atomic_write(out, table.to_csv(index=False))
    if heatmaps is not None:
        _draw(Path(heatmaps), files, ensemble, say)
    return table


def _ensemble(run: Path, head: str | None, example: str) -> tuple[Ensemble, str]:
    """The heads of `head`, or of the first arm that was trained on features like these."""
    folder = RunFolder(run)
    if not folder.is_run() or folder.kind != KIND or not (run / "results.json").is_file():
        raise ConfigError(f"{run} is no finished `vitkit slides evaluate`", fix="give the folder that its --out named")
    arms = json.loads((run / "results.json").read_text(encoding="utf-8"))["arms"]
    key, names = read_features(example, only_places=True).key, [arm["name"] for arm in arms]
    if head is not None:
        arms = [arm for arm in arms if head in (arm["name"], arm["head"])]
        if not arms:
            close = nearest(head, names) or names
            raise ConfigError(f"{run} has no head '{head}'", fix=f"did you mean {' or '.join(close)}?")
    loaded = [(Ensemble.load(run / arm["file"]), str(arm["name"])) for arm in arms]
    fitting = [one for one in loaded if one[0].key == key]
    if not fitting:
        raise ConfigError(
            "these features are of another encoder or tiling than those the heads were trained on",
            fix="embed the new slides with the same model, size, mpp and min_tissue (embedding.json beside the features)",
        )
    return fitting[0]


def _draw(out: Path, files: dict[str, Path], ensemble: Ensemble, say: Any) -> None:
    """A heatmap a slide; slides whose tiles have no places are named."""
    from vitkit.run.pictures import png
    from vitkit.run.slides_page import heatmap

    lost = []
    for name, path in files.items():
        slide = read_features(path)
        if slide.placed:
            atomic_write(out / f"{name}.png", png(heatmap(slide, ensemble)))
        else:
            lost.append(name)
    if lost:
        say(f"no heatmap of {len(lost)} slides whose tiles have no places, e.g. {lost[0]}")
