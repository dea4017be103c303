"""The errors that vitkit raises on purpose: each says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitkitError(Exception):
    """Base of every deliberate error. `what` names the file, key or value; `fix` says what to do about it."""

    def __init__(self, what: str, *, fix: str | None = None):
        self.what, self.fix = what, fix
        super().__init__(what if fix is None else f"{what}\n  fix: {fix}")


class ConfigError(VitkitError):
    """A setting that does not exist, has the wrong type, or contradicts another one or an earlier run."""


class DataError(VitkitError):
    """A file, label or split that cannot be used as it is."""


class WeightsError(VitkitError):
    """Weights that cannot be found, read safely, or matched to an architecture."""


class TrainingError(VitkitError):
    """Training that had to stop: a non-finite loss or gradient, or no memory for the batch."""


class MissingExtra(VitkitError):
    """An optional dependency that the asked-for feature needs."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"this needs the package '{package}', which is not installed", fix=f"pip install 'vitkit[{extra}]'"
        )


def nearest(name: str, valid: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` entries of `valid` spelled most like `name`, best first (empty when nothing is close)."""
    return difflib.get_close_matches(str(name), list(valid), n=n, cutoff=0.5)
