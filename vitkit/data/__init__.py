"""Files in, batches out: `read` a data set, look at it with `check`, feed it with `loader.loader`.

`images` what a data set is, `sources` what can be read, `pixels` how files are decoded, `dicom` and `volume` how scans
are, `splits`, `transforms` (views), `loader` (batches), `doctor` (the checks).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .doctor import CheckReport, check
    from .images import Images
    from .sources import read

__all__ = ["CheckReport", "Images", "check", "read"]
_WHERE = {"CheckReport": "doctor", "check": "doctor", "Images": "images", "read": "sources"}
_MODULES = frozenset(
    {"dicom", "doctor", "images", "loader", "pixels", "scans", "sources", "splits", "transforms", "volume"}
)


def __getattr__(name: str) -> object:
    """Import on first use: torch takes seconds, and `--help` needs none of this."""
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
