"""Slide-level evaluation: features of tiles, a small head per slide, AUC or C-index with intervals.

`store` embeds slides tile by tile, `bags` loads them with labels, `heads` and `transformers` are the heads, `train` fits many
at once, `protocols` are nested cross-validation and external cohorts, `ensemble` answers, `inference` holds statistics,
`survival` Cox and Harrell, `pictures` heatmaps.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bags import Bags, load_bags
    from .ensemble import Ensemble
    from .pictures import heatmap
    from .protocols import compare_encoders, cross_validate, external, nested, one_shot
    from .store import embed_slides, read_features
    from .train import HEADS, Recipe

_WHERE = {
    "Bags": "bags",
    "load_bags": "bags",
    "heatmap": "pictures",
    "Ensemble": "ensemble",
    "compare_encoders": "protocols",
    "cross_validate": "protocols",
    "external": "protocols",
    "nested": "protocols",
    "one_shot": "protocols",
    "embed_slides": "store",
    "read_features": "store",
    "HEADS": "train",
    "Recipe": "train",
}
__all__ = [
    "HEADS",
    "Bags",
    "Ensemble",
    "Recipe",
    "compare_encoders",
    "cross_validate",
    "embed_slides",
    "external",
    "heatmap",
    "load_bags",
    "nested",
    "one_shot",
    "read_features",
]


def __getattr__(name: str) -> object:
    """Import on first use: torch takes seconds."""
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
