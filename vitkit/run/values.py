"""Values as JSON and YAML hold them, and the comparison of two settings files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_ABSENT = object()


def plain(value: Any, *, finite: bool = False, key: str = "") -> Any:
    """`value` from dicts, lists, text, numbers, booleans and None only.

    Arrays and tensors become numbers or lists, dataclasses mappings, paths and enum members text. With `finite`, NaN and
    infinities become None. Raises TypeError naming the key of anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value, finite=finite, key=key)
    if hasattr(value, "tolist"):  # NumPy and torch, scalars included
        return plain(value.tolist(), finite=finite, key=key)
    if isinstance(value, float):
        return None if finite and not math.isfinite(value) else float(value)
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str(value)
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, finite=finite, key=f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return [plain(v, finite=finite, key=f"{key}[{i}]") for i, v in enumerate(value)]
    raise TypeError(f"{key or 'the value'} is a {type(value).__name__}, which JSON and YAML do not hold")


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists and empty mappings stay values."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, name + "."))
        else:
            out[name] = value
    return out


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ or that only one side has, in the order of `old`, then of `new`."""
    a, b = flatten(old), flatten(new)
    keys = [*a, *(key for key in b if key not in a)]
    return [key for key in keys if not _equal(a.get(key, _ABSENT), b.get(key, _ABSENT))]


def shown(flat: Mapping[str, Any], key: str) -> str:
    """A setting as a person would type it; "(not set)" when it is not there."""
    if key not in flat:
        return "(not set)"
    value = flat[key]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(shown({"": one}, "") for one in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {shown(value, k)}" for k in value) + "}"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def not_storable(value: Any, key: str = "") -> Iterator[str]:
    """Names ("optimizer.state[0] (ndarray)") of what `torch.load(weights_only=True)` would refuse to read back."""
    import torch

    if isinstance(value, Mapping):
        for k, v in value.items():
            if type(k) not in (str, int, float, bool, tuple):
                yield f"key {k!r} of {key or 'the state'} ({type(k).__name__})"
            yield from not_storable(v, f"{key}.{k}" if key else str(k))
    elif type(value) in (list, tuple):
        for i, v in enumerate(value):
            yield from not_storable(v, f"{key}[{i}]")
    elif type(value) not in (torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device) and not (
        value is None or type(value) in (bool, int, float, complex, str, bytes)
    ):
        yield f"{key} ({type(value).__name__})"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, bool) != isinstance(b, bool):
        return False  # True == 1 in Python, but a setting that turned from a number to a switch has changed
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
