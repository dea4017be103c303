"""Going on with the head of a model that knows more classes: VideoMAE V2's step from 710 mixed classes to 400, 600 or 700."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vitkit.errors import ConfigError, DataError


def read_label_map(path: str | Path, classes: int) -> list[int]:
    """A JSON list: for each of the data's `classes`, in order, the class of the model's head that it is."""
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no label map can be read ({error})", fix="a JSON list of class numbers") from None
    if not isinstance(rows, list) or len(rows) != classes:
        what = f"{len(rows)} entries" if isinstance(rows, list) else "no list"
        raise DataError(f"{path}: the label map has {what} for {classes} classes", fix="one number for each class")
    return rows


def convert_head(head: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """A head of many classes as one of `len(rows)`: class i takes row rows[i] of every tensor (label_710to400.json)."""
    classes = min(len(value) for value in head.values())
    wrong = [row for row in rows if not isinstance(row, int) or not 0 <= row < classes]
    if wrong or not rows:
        what = f"names class {wrong[0]!r}" if wrong else "is empty"
        raise ConfigError(
            f"the label map {what} of a head of {classes} classes", fix=f"numbers from 0 to {classes - 1}"
        )
    index = torch.as_tensor(list(rows))
    return {name: value[index.to(value.device)] for name, value in head.items()}
