"""vitkit: pre-train further, adapt, explain, attack and measure Vision Transformers on your own images, by published methods.

Every command-line verb is a function here, with the same words:

    vitkit.pretrain("mae", model=..., data=..., out=...)      vitkit.evaluate(model=..., data=..., protocols="knn,linear")
    vitkit.adapt("adaptformer", model=..., data=..., out=...) vitkit.embed(model=..., data=..., out=...)
    vitkit.explain("runs/a", "new/", classes="cat,dog")       vitkit.attack("runs/a", data="photos/", eps=8 / 255)
    vitkit.load("runs/a").predict("new/")                     vitkit.compare("runs/a", "runs/b")
    vitkit.predict("runs/a", "new/")                          vitkit.export("runs/a", format="onnx")
    vitkit.scaling(models="A,B", sizes=(96, 224), data=...)   # what larger inputs and backbones buy
    vitkit.rl("rainbow", env="ALE/Pong-v5", model=..., out=...)   # games: frames, an agent, probes
    vitkit.caption(model=..., data=..., text_column="report", out=...)   # a language model writes the text of images
    vitkit.report("runs/a")   vitkit.check("photos/")         vitkit.methods()   vitkit.doctor()

Loaded lazily: `import vitkit` costs milliseconds.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

VERBS = (
    "adapt", "anomaly", "attack", "caption", "check", "clean", "compare", "demo", "doctor", "embed", "evaluate",
    "explain", "export", "load", "methods", "predict", "pretrain", "report", "rl", "scaling",
)  # fmt: skip
_ELSEWHERE = {
    "VitkitError": "errors", "ConfigError": "errors", "DataError": "errors", "WeightsError": "errors",
    "TrainingError": "errors", "MissingExtra": "errors", "Passport": "passport", "Model": "run.model", "Run": "run.model",
}  # fmt: skip
__all__ = ["__version__", "slides", "tokens", "weights", *VERBS, *_ELSEWHERE]

if TYPE_CHECKING:
    from vitkit import tokens, weights
    from vitkit.errors import ConfigError, DataError, MissingExtra, TrainingError, VitkitError, WeightsError
    from vitkit.passport import Passport
    from vitkit.run import slides
    from vitkit.run.captioning import caption
    from vitkit.run.model import Model, Run
    from vitkit.run.verbs import (
        adapt,
        anomaly,
        attack,
        check,
        clean,
        compare,
        demo,
        doctor,
        embed,
        evaluate,
        explain,
        export,
        load,
        methods,
        predict,
        pretrain,
        report,
        rl,
        scaling,
    )  # fmt: skip


class _VerbPackage(types.ModuleType):
    """A verb's package (vitkit.adapt holds the adaptation methods) that is also the verb: `vitkit.adapt(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        verbs = importlib.import_module("vitkit.run.verbs")
        return getattr(verbs, self.__name__.rpartition(".")[2])(*args, **kwargs)


def _callable_package(name: str) -> None:
    """Make the package `name` callable as its verb (called by that package's `__init__`)."""
    sys.modules[name].__class__ = _VerbPackage


def __getattr__(name: str) -> Any:
    if name in ("adapt", "anomaly", "attack", "clean", "evaluate", "explain", "pretrain", "rl", "tokens", "weights"):
        return importlib.import_module(f"vitkit.{name}")
    if name == "slides":  # three words of one verb: vitkit.slides.embed, .evaluate, .predict
        return importlib.import_module("vitkit.run.slides")
    if name == "caption":
        return importlib.import_module("vitkit.run.captioning").caption
    if name in VERBS:
        return getattr(importlib.import_module("vitkit.run.verbs"), name)
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(f"vitkit.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module 'vitkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
