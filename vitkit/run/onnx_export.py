"""A run as an ONNX graph that takes plain pixels: preprocessing, adapters and softmax are inside. Checked, then kept."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkit import tokens, weights
from vitkit.errors import DataError, MissingExtra, VitkitError, WeightsError
from vitkit.passport import Passport
from vitkit.run.exporting import ViT, difference, open_run, say, target_of

TOLERANCE = 1e-4  # of probabilities, and of the largest feature value, for another runtime's kernels
CHECKED = 16  # images that a graph is checked on


class Predictor(nn.Module):
    """Pixels (B, C, H, W) in [0, 1] to class probabilities (B, classes) and the pooled feature (B, D) under them."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: ViT, task: str | None):
        super().__init__()
        pixels = vit.passport.preprocess
        self.vit, self.task = vit, task
        self.register_buffer("mean", torch.tensor(pixels.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(pixels.std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        found = tokens.encode(self.vit, (pixels - self.mean) / self.std).all
        feature = self.vit.forward_head(found, pre_logits=True)
        if self.task is None:
            return (feature,)
        logits = self.vit.forward_head(found)
        return (logits.softmax(-1) if self.task == "single" else logits.sigmoid()), feature


@dataclass
class _Checked:
    """How far an ONNX graph is from the model, and on what that was measured."""

    probabilities: float | None
    feature: float
    images: str

    @property
    def worst(self) -> float:
        found = [self.feature] if self.probabilities is None else [self.feature, self.probabilities]
        return float(np.max(found))  # keeps nan


def write(run: Path, out: str | None = None) -> Path:
    """Write `run` as an ONNX graph: float pixels in [0, 1], (batch, C, H, W) of the model's own size, to
    `probabilities` (batch, classes) and `feature` (batch, D). A run without classes gives the feature alone.

    Checked in onnxruntime on 16 of the run's own test images; what was found is written to <out>.json. Raises
    WeightsError when the difference exceeds 1e-4 (of probabilities, or of the largest feature value), and MissingExtra
    without the packages of the extra "export".
    """
    _require_extra()
    run = Path(run)
    vit = open_run(run)
    target = target_of(run, out, "model.onnx", ".onnx")
    from vitkit.adapt.lora import merge

    passport = vit.passport
    task = (passport.task or "single") if vit.num_classes else None
    model = Predictor(vit, task).eval()
    merged = Predictor(merge(deepcopy(vit)), task).eval()
    images, where = check_images(run, passport)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        draft = Path(folder) / target.name
        _trace(merged, images[:2], draft)
        found = _check_onnx(draft, model, images, where)
        if not found.worst <= TOLERANCE:
            raise WeightsError(
                f"{target} was not written: in onnxruntime its outputs differ from the model's by {found.worst:.1e} "
                f"(allowed {TOLERANCE:.0e}) on {where}",
                fix="report this with the versions of torch, onnx and onnxruntime (vitkit doctor)",
            )
        certificate = Path(folder) / "certificate.json"
        certificate.write_text(json.dumps(_certificate(draft, vit, found), indent=1) + "\n", encoding="utf-8")
        os.replace(certificate, Path(f"{target}.json"))
        os.replace(draft, target)
    say(f"{target}: in onnxruntime its outputs differ from the model's by at most {found.worst:.1e} on {where}")
    return target


def _require_extra() -> None:
    import importlib.util

    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "export")


def _trace(model: Predictor, images: Tensor, path: Path) -> None:
    import io
    import warnings

    names = ["feature"] if model.task is None else ["probabilities", "feature"]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet_loggers():
        warnings.simplefilter("ignore")  # the exporter's notes on its own insides
        program = _program(model, images)
        torch.onnx.export(
            program,
            f=str(path),
            input_names=["pixels"],
            output_names=names,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _program(model: Predictor, images: Tensor) -> torch.export.ExportedProgram:
    """The model's graph for any batch size. Strict tracing also follows `len(x)`, which otherwise fixes the batch, but
    takes ten times as long."""
    shapes = {"pixels": {0: torch.export.Dim("batch")}}
    try:
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError:
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=True)


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    """No log lines of the exporter between ours."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._dynamo", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_images(run: Path, passport: Passport) -> tuple[Tensor, str]:
    """16 test images of the run in [0, 1] (16, C, H, W) and what they are; seeded noise where its data is gone."""
    try:
        images = _test_images(run, passport)
        if len(images) >= 2:
            return images, f"{len(images)} test images of the run"
        why = "the run has no test images"
    except (VitkitError, OSError) as error:
        why = str(error).splitlines()[0]
    pixels = passport.preprocess
    noise = torch.rand(CHECKED, pixels.in_chans, *pixels.image_size, generator=torch.Generator().manual_seed(0))
    say(f"checking on seeded noise: {why}")
    return noise, f"{CHECKED} images of seeded noise"


def _test_images(run: Path, passport: Passport) -> Tensor:
    from dataclasses import fields

    from vitkit.data.transforms import eval_view
    from vitkit.run.batches import open_data
    from vitkit.run.folder import RunFolder
    from vitkit.settings import Inputs

    kept = RunFolder(run).read_config()
    names = {f.name for f in fields(Inputs)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items() if k in names}
    if not values.get("data"):
        raise DataError("its config.yaml names no data")
    images = open_data(Inputs(**values), lambda text: None)
    part = images.part("test") if len(images.part("test")) else images.part("val")
    view = eval_view(passport.preprocess)
    rows = np.linspace(0, len(part) - 1, num=min(CHECKED, len(part))).astype(int)
    shown = [view(part.decode(int(i))) for i in rows]
    return torch.stack(shown).float() / 255 if shown else torch.zeros(0)


@torch.no_grad()
def _check_onnx(path: Path, model: Predictor, images: Tensor, where: str) -> _Checked:
    """Outputs of the graph against the model's, on a batch of another size than the traced one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(one) for one in session.run(None, {"pixels": images.numpy()})]
    wanted = model(images)
    probabilities = float((found[0] - wanted[0]).abs().max()) if len(wanted) == 2 else None
    return _Checked(probabilities, difference(found[-1], wanted[-1]), where)


def _certificate(path: Path, vit: ViT, found: _Checked) -> dict[str, Any]:
    """What the graph takes and gives, and how it was checked."""
    import hashlib

    import onnx
    import onnxruntime

    from vitkit import __version__

    passport = vit.passport
    pixels = passport.preprocess
    height, width = pixels.image_size
    short = min(round(side / pixels.crop_pct) for side in pixels.image_size)
    resize = f"short side to {short} pixels ({pixels.interpolation}), then the centre {height} x {width}"
    graph = onnx.load(str(path))
    outputs = {one.name: ["batch", one.type.tensor_type.shape.dim[1].dim_value] for one in graph.graph.output}
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "input": {
            "pixels": ["batch", pixels.in_chans, *pixels.image_size],
            "range": [0, 1],
            "channels": pixels.channels,
            "resize": resize,
        },
        "outputs": outputs,
        "classes": passport.classes,
        "task": passport.task,
        "weights": weights.sha256_of(vit.state_dict()),
        "max_difference": {"probabilities": found.probabilities, "feature": found.feature, "images": found.images},
        "allowed": TOLERANCE,
        "opset": max(one.version for one in graph.opset_import),
        "versions": {
            "vitkit": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
