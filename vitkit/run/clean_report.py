"""The end of `vitkit clean`: how clean the features were before and are after, as a table and pictures of the run's report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitkit.data.images import Images
from vitkit.errors import DataError
from vitkit.run.folder import RunFolder

PICTURES = "Patch features before and after"
NOTE = (
    "Three principal components as colours, one basis for both models: equal colours are equal features. Norms on one "
    "scale; bright is high. Scored images, none of which was fitted on."
)


def add_cleanliness(
    folder: RunFolder,
    summary: dict[str, Any],
    before: nn.Module,
    after: nn.Module,
    images: Images,
    *,
    device: torch.device | str,
    seed: int,
    say: Callable[[str], None],
) -> str:
    """Measure two models on the images, put table and pictures into the report of `folder`, say and return the verdict.

    Data of fewer than 4 images are too few to measure on: that is said, and nothing is added.
    """
    from vitkit.evaluate.cleanliness import before_after

    try:
        found = before_after(before, after, images, device=device, seed=seed)
    except DataError as error:
        if len(images) >= 4:
            raise
        say(f"the features before and after were not measured: {error.what}")
        return ""
    summary["tables"] = [*summary.get("tables", []), *found.tables]
    summary["cleanliness"] = {name: list(values) for name, values in found.figures.items()}
    if found.pictures:
        folder.save_pictures(PICTURES, found.pictures, columns=found.columns, note=NOTE)
    say(found.verdict)
    return found.verdict
