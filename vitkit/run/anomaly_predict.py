"""A trained anomaly run at work: scores, alarms and heatmaps of new pictures, on their own pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkit.anomaly.ear import EAR, Settings
from vitkit.anomaly.memory import PatchMemory, middle_layers
from vitkit.data.transforms import eval_view
from vitkit.errors import ConfigError
from vitkit.evaluate.localisation import threshold
from vitkit.settings import Machine

LIMIT = "anomaly.{}.limit"  # in the extras of a run: the threshold and the share of good parts above it, at most
FIRST = "ear"


@dataclass(frozen=True)
class AnomalyPredictions:
    """Scores (n,) of pictures, `limit` above which they are `defective`, the share of each that was `hidden`; `files` of the
    heatmaps that were written, or `maps` (H, W) float32 on each picture's own pixels where nothing was."""

    names: list[str]
    scores: np.ndarray
    limit: float
    rate: float
    hidden: np.ndarray
    files: list[str] = field(default_factory=list)
    maps: list[np.ndarray] = field(default_factory=list)
    good: np.ndarray = field(default_factory=lambda: np.zeros(0))  # scores of good validation parts

    @property
    def defective(self) -> np.ndarray:
        """(n,) bool: above the threshold."""
        return self.scores > self.limit

    def at(self, rate: float) -> tuple[float, float]:
        """Another threshold, for the false-alarm rate `rate`, and the rate that the validation parts can certify."""
        return threshold(self.good, rate)

    def table(self) -> Any:
        """A pandas frame: image, score, defective, hidden, heatmap."""
        import pandas as pd

        columns: dict[str, Any] = {"image": self.names, "score": self.scores.round(6), "defective": self.defective}
        columns["hidden"] = self.hidden.round(4)
        if self.files:
            columns["heatmap"] = self.files
        return pd.DataFrame(columns)


def finds_defects(run: str | Path) -> bool:
    """Whether a path is a run folder of `vitkit anomaly`; only names are read."""
    from safetensors import safe_open

    from vitkit.weights import EXTRAS

    path = Path(run) / EXTRAS
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return LIMIT.format(FIRST) in file.keys()  # noqa: SIM118  # a safetensors handle is no mapping


def load_detector(run: str | Path, detector: str = FIRST) -> tuple[Any, Any]:
    """(what looks at normalised images, the ViT) of a run: its U-Net, or with `detector` "memory" its patch memory."""
    from vitkit import weights

    vit = weights.load(run, say=None).eval()
    names = [key.split(".")[1] for key in vit.extras if key.startswith("anomaly.") and key.endswith(".limit")]
    kept = [name for name in names if name == FIRST or (name == "memory" and "memory.bank" in vit.extras)]
    if detector not in kept:
        raise ConfigError(
            f"{run} has no detector '{detector}'", fix=f"one of: {', '.join(kept) or 'none, as it is no anomaly run'}"
        )
    if detector == "memory":
        return PatchMemory(vit, vit.extras["memory.bank"], middle_layers(len(vit.blocks))), vit
    made = vit.passport.lineage[-1]["settings"]
    own = {key: value for key, value in made.items() if key in Settings.__dataclass_fields__}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    method = EAR(vit, Settings(**own))
    method.load_extras(vit.extras)
    return method.eval(), vit


@torch.inference_mode()
def predict_anomalies(
    run: str | Path,
    data: Any,
    *,
    out: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    detector: str = FIRST,
) -> AnomalyPredictions:
    """Scores and heatmaps for a folder, file or anything else that vitkit reads, by a run of `vitkit anomaly`.

    With `out`, a folder: scores.csv, heatmaps/NAME.png (the picture with its map) and maps/NAME.npy (float32), each of the
    picture's own size. `detector` "memory" uses the patch memory that the run kept, with its own threshold.
    """
    from vitkit.data import read
    from vitkit.data.images import Images
    from vitkit.run.batches import evaluation_batches
    from vitkit.run.files import atomic_write

    if out is not None and Path(out).is_file():
        raise ConfigError(f"{out} is a file; heatmaps and scores go into a folder", fix="--out FOLDER")
    machine = Machine(batch_size=batch_size, workers=workers)
    looking, vit = load_detector(run, detector)
    limit, rate = vit.extras[LIMIT.format(detector)].tolist()
    images = data if isinstance(data, Images) else _one_file(data) or read(data, label_columns=[], say=None)
    writer = _Writer(Path(out), images.names, limit) if out is not None else None
    scores, hidden, maps = [], [], []
    for batch in evaluation_batches(images, eval_view(vit.passport.preprocess), machine):
        found = looking.inspect(vit.passport.preprocess.normalise(batch["image"]))
        scores.append(found["score"].numpy())
        share = (
            found["hidden"].flatten(1).float().mean(1) if "hidden" in found else torch.full((len(scores[-1]),), np.nan)
        )
        hidden.append(share.numpy())
        for i, one in zip(batch["index"].tolist(), found["map"], strict=True):
            picture = images.picture(i)
            own = F.interpolate(one[None], size=picture.shape[1:], mode="bilinear", align_corners=False)[0, 0].numpy()
            writer.write(i, picture, own) if writer else maps.append(own)
    good = vit.extras[f"anomaly.{detector}.val"].numpy()
    files = writer.files if writer else []
    every = np.concatenate(scores) if scores else np.zeros(0, np.float32)
    shares = np.concatenate(hidden) if hidden else np.zeros(0, np.float32)
    predictions = AnomalyPredictions(list(images.names), every, limit, rate, shares, files, maps, good)
    if writer:
        atomic_write(Path(out) / "scores.csv", predictions.table().to_csv(index=False))  # type: ignore[arg-type]
    return predictions


def _one_file(data: Any) -> Any:
    """A single picture as a data set; None for anything else."""
    from vitkit.data import scans
    from vitkit.data.images import Images
    from vitkit.data.stores import FileStore

    path = Path(data) if isinstance(data, str | Path) else None
    if path is None or not path.is_file() or scans.kind(str(path)) != "picture":
        return None
    one = np.array(["unlabelled"])
    return Images(
        name=path.name, task=None, classes=[], labels=None, split=one, group=None, store=FileStore([str(path)]),
        rows=np.zeros(1, np.int64), names=[path.name],
    )  # fmt: skip


class _Writer:
    """Heatmaps and maps under the pictures' names."""

    def __init__(self, out: Path, names: list[str], limit: float):
        self.out, self.limit = out, limit
        stems = [name.rpartition(".")[0] or name for name in names]
        short = [stem.rpartition("/")[2] for stem in stems]
        self.stems = short if len(set(short)) == len(short) else [stem.strip("/").replace("/", "_") for stem in stems]
        if len(set(self.stems)) < len(self.stems):  # same name, other ending
            self.stems = [name.strip("/").replace("/", "_") for name in names]
        self.files: list[str] = []

    def write(self, index: int, picture: Tensor, found: np.ndarray) -> None:
        import io

        from PIL import Image

        from vitkit.run.anomaly_page import as_picture, overlay
        from vitkit.run.files import atomic_write

        drawn = io.BytesIO()
        Image.fromarray(overlay(as_picture(picture), found, 2 * self.limit)).save(drawn, "PNG")
        values = io.BytesIO()
        np.save(values, found.astype(np.float32))
        target = self.out / "heatmaps" / f"{self.stems[index]}.png"
        for path, content in ((target, drawn), (self.out / "maps" / f"{self.stems[index]}.npy", values)):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content.getvalue())
        self.files.append(str(target))
