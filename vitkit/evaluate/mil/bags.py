"""Bags: the tile features of slides with one label each, kept as one array, gathered into padded batches by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkit.data.found import choose, some
from vitkit.errors import ConfigError, DataError

from .survival import check_times


def collate(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags (T_i, D) of different lengths -> zero-padded (B, T, D) and mask (B, T), True where padded."""
    longest = max(map(len, bags))
    x = bags[0].new_zeros(len(bags), longest, bags[0].shape[1])
    mask = torch.ones(len(bags), longest, dtype=torch.bool)
    for row, bag in enumerate(bags):
        x[row, : len(bag)] = bag
        mask[row, : len(bag)] = False
    return x, mask


@dataclass(frozen=True, eq=False, kw_only=True)
class Bags:
    """Slides `names` (N,), the rows start[i]:stop[i] of `features` being the tiles of slide i.

    labels: (N,) int64 classes, or (N,) float64 signed survival times (negative = censored). patients: (N,) whom a slide is
    of; patients never straddle folds. `key` says which encoder and tiling made the features.
    """

    features: Tensor  # (all tiles, D)
    start: np.ndarray
    stop: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    names: list[str]
    classes: list[str] = field(default_factory=list)
    key: str = ""

    def __post_init__(self) -> None:
        n = len(self.names)
        for what in ("start", "stop", "labels", "patients"):
            if len(getattr(self, what)) != n:
                raise DataError(f"{len(getattr(self, what))} {what} for {n} slides", fix="one a slide")
        empty = [name for name, few in zip(self.names, self.stop <= self.start, strict=True) if few]
        if empty:
            raise DataError(f"slides without a tile: {some(empty)}", fix="leave them out, or lower min_tissue")
        if self.survival:
            check_times(self.labels)
        elif n and (self.labels.min() < 0 or self.labels.max() >= len(self.classes)):
            raise DataError(f"labels lie outside 0..{len(self.classes) - 1}", fix="one class number a slide")

    @classmethod
    def of(
        cls,
        features: Sequence[Tensor | np.ndarray],
        labels: Sequence[int] | np.ndarray,
        *,
        patients: Sequence[Any] | None = None,
        names: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        key: str = "",
    ) -> Bags:
        """From arrays (T_i, D) in memory. Without `patients` every slide is a patient of its own."""
        tensors = [torch.as_tensor(np.asarray(bag)) if not isinstance(bag, Tensor) else bag for bag in features]
        names = [str(i) for i in range(len(tensors))] if names is None else [str(name) for name in names]
        for name, bag in zip(names, tensors, strict=True):
            if bag.ndim != 2 or bag.shape[1] != tensors[0].shape[1]:
                fix = "one (tiles, features) array a slide, all of one encoder"
                raise DataError(f"slide {name}: features of shape {tuple(bag.shape)}", fix=fix)
            if not torch.isfinite(bag).all():
                raise DataError(f"slide {name}: features that are not finite", fix="extract them again in float32")
        if not tensors:
            raise DataError("there are no slides", fix="check the folder of features and the table of labels")
        values = np.asarray(labels)
        values = values.astype(np.float64 if np.issubdtype(values.dtype, np.floating) else np.int64)
        if not classes and values.dtype == np.int64:
            classes = [str(i) for i in range(int(values.max()) + 1)]
        stop = np.cumsum([len(bag) for bag in tensors])
        return cls(
            features=torch.cat(tensors),
            start=np.concatenate([[0], stop[:-1]]),
            stop=stop,
            labels=values,
            patients=np.array(names if patients is None else [str(p) for p in patients]),
            names=names,
            classes=[str(c) for c in classes or ()],
            key=key,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def survival(self) -> bool:
        return bool(np.issubdtype(self.labels.dtype, np.floating))

    @property
    def dim(self) -> int:
        return self.features.shape[1]

    @property
    def outputs(self) -> int:
        """Logits a head needs: one for two classes and for survival, else one a class."""
        return 1 if self.survival or len(self.classes) <= 2 else len(self.classes)

    @property
    def lengths(self) -> np.ndarray:
        return self.stop - self.start

    def tiles(self, i: int) -> Tensor:
        """Features (T, D) of slide i."""
        return self.features[self.start[i] : self.stop[i]]

    def subset(self, rows: Sequence[int] | np.ndarray) -> Bags:
        """The slides at `rows`, in that order; features are shared, not copied."""
        rows = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            start=self.start[rows],
            stop=self.stop[rows],
            labels=self.labels[rows],
            patients=self.patients[rows],
            names=[self.names[i] for i in rows.tolist()],
        )

    def matching(self, other: Bags) -> Bags:
        """These slides in the order of `other`, which must hold the same ones with the same labels."""
        where = {name: i for i, name in enumerate(self.names)}
        missing = [name for name in other.names if name not in where]
        if missing or len(self) != len(other):
            few = some(missing) if missing else f"{len(self)} against {len(other)} slides"
            raise DataError(f"the two encoders do not hold the same slides: {few}", fix="extract both for all slides")
        found = self.subset([where[name] for name in other.names])
        if not np.array_equal(found.labels, other.labels) or not np.array_equal(found.patients, other.patients):
            raise DataError("the two encoders' slides differ in label or patient", fix="read both with one table")
        return found

    def places(self, rows: np.ndarray, *, n_tiles: int | None = None, rng: np.random.Generator | None = None) -> Tensor:
        """Rows of `features` (M, T) for the slides `rows` (M,), -1 where padded; with `rng` at most `n_tiles` random tiles
        of each slide (the order within a bag says nothing to a head but TransMIL)."""
        rows = np.asarray(rows).reshape(-1)
        start, length = self.start[rows], self.lengths[rows]
        if rng is None or n_tiles is None or not (length > n_tiles).any():
            steps = np.arange(length.max())
            return torch.from_numpy(np.where(steps < length[:, None], start[:, None] + steps, -1))
        out = np.full((len(rows), min(n_tiles, int(length.max()))), -1, dtype=np.int64)
        for row, (first, count) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
            chosen = rng.choice(count, n_tiles, replace=False) if count > n_tiles else np.arange(count)
            out[row, : len(chosen)] = first + chosen
        return torch.from_numpy(out)

    def flat(self, places: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The real tiles of `places` (..., B, T) only: float32 rows (..., M, D), and where each place finds its tile among
        them (..., B, T), -1 where padded. Several models' rows are as many as the longest's."""
        real = (places >= 0).flatten(-2)  # (..., B T)
        at = real.cumsum(-1) - 1
        counts = real.sum(-1)
        rows = places.new_zeros(*counts.shape, int(counts.max()))
        filled = torch.arange(rows.shape[-1]) < counts.unsqueeze(-1)
        rows[filled] = places.flatten(-2)[real]
        x = self.features[rows].to(device).float()
        return x, at.masked_fill(~real, -1).view(places.shape).to(device)

    def pooled(self, how: str) -> Bags:
        """Every slide as a bag of one vector: the mean or the maximum of its tiles. What mean- and max-pooling heads see."""
        rows = [self.tiles(i).float() for i in range(len(self))]
        x = torch.stack([row.mean(0) if how == "mean" else row.amax(0) for row in rows])
        at = np.arange(len(self))
        return replace(self, features=x, start=at, stop=at + 1)

    def batch(self, places: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """float32 bags (..., T, D) with zeros where padded, and the mask (..., T), for `places` (..., T)."""
        mask = (places < 0).to(device)
        x = self.features[places.clamp_min(0)].to(device).float()
        return (x.masked_fill_(mask.unsqueeze(-1), 0.0) if mask.any() else x), mask


def load_bags(
    folder: str | Path,
    table: str | Path,
    *,
    slide: str = "slide",
    label: str = "label",
    patient: str | None = "patient",
    event: str | None = None,
    positive: str | None = None,
    missing: str = "raise",
    max_tiles: int | None = None,
    seed: int = 0,
) -> Bags:
    """Feature files that `embed_slides` wrote in `folder`, with the labels of a CSV or Parquet table.

    slide: column with the slides' names (with or without ending). label: column of classes, or of times when `event` names
    a column of 0/1 (1 = event, 0 = censored). patient: column of patients; a table without a column of the default name
    makes every slide a patient of its own. positive: the class that scores are of, where there are two (by default the
    last in order). missing: what labels of slides without features do: "raise", or "skip" them. max_tiles: keep so many
    random tiles of each slide in memory. Slides without labels are left out (`without_labels` lists them).
    """
    if missing not in ("raise", "skip"):
        raise ConfigError(f"missing is {missing!r}", fix='use "raise" or "skip"')
    rows = _table(table, slide, patient)
    needed = [slide, label, *([event] if event else []), *([patient] if patient not in (None, "patient") else [])]
    for column in needed:
        if column not in rows:
            raise ConfigError(f"{table} has no column '{column}'", fix=choose(column, list(rows.columns)))
    for column in {*needed, *({patient} & {*rows.columns})}:
        what = "patient" if column == patient else "label" if column != slide else "name"
        _require_filled(rows, column, slide, f"{table}: no {what}")
    rows = rows.assign(**{slide: [_stem(name) for name in rows[slide]]})
    twice = sorted({*rows.loc[rows[slide].duplicated(), slide]})
    if twice:
        raise DataError(f"{table}: slides with several rows: {some(twice)}", fix="one row a slide")
    files = feature_files(folder)
    unknown = [name for name in rows[slide] if name not in files]
    if unknown and (missing == "raise" or len(unknown) == len(rows)):
        raise DataError(
            f"{table} has labels for {len(unknown)} of {len(rows)} slides without features in {folder}: {some(unknown)}",
            fix="embed these slides first, remove their rows, or leave them out with missing=skip",
        )
    rows = rows[~rows[slide].isin(unknown)]
    names = rows[slide].tolist()
    values, classes = _labels(rows, label, event, str(table))
    if positive is not None and event is None:
        values, classes = _positive_last(values, classes, positive)
    loaded = read_bags(folder, names, max_tiles=max_tiles, seed=seed)
    patients = rows[patient].tolist() if patient in rows else names
    return replace(loaded, labels=values, patients=np.array([str(p) for p in patients]), classes=classes)


def _require_filled(rows: Any, column: str, slide: str, what: str) -> None:
    lacking = rows[column].isna()
    if lacking.any():
        few = some([str(name) for name in rows.loc[lacking, slide].tolist()])
        raise DataError(f"{what} for {few}", fix="fill the cells or remove the rows")


def feature_files(folder: str | Path) -> dict[str, Path]:
    """{slide: its file} of a folder that `embed_slides` wrote."""
    found = {path.stem: path for path in sorted(Path(folder).glob("*.safetensors"))}
    if not found:
        raise DataError(f"{folder}: holds no slide features", fix="a folder that `vitkit slides embed --out` wrote")
    return found


def without_labels(folder: str | Path, bags: Bags) -> list[str]:
    """Slides that have features but are not among `bags`."""
    return sorted({*feature_files(folder)} - {*bags.names})


def read_bags(
    folder: str | Path, names: Sequence[str] | None = None, *, max_tiles: int | None = None, seed: int = 0
) -> Bags:
    """Slides of a folder of feature files (all, or those of `names` in that order), every one labelled 0 of one class."""
    from .store import read_features, shape_of

    if max_tiles is not None and max_tiles < 1:
        raise ConfigError(f"max_tiles is {max_tiles}", fix="at least 1 tile of each slide, or none to keep all")
    files = feature_files(folder)
    names = list(files) if names is None else list(names)
    shapes = [shape_of(files[name]) for name in names]
    widths = sorted({dim for _, dim in shapes})
    keep = np.array([min(n, max_tiles or n) for n, _ in shapes])
    if len(widths) > 1:
        raise _mixed(folder, [names[[dim for _, dim in shapes].index(width)] for width in widths])
    stop, rng = np.cumsum(keep), np.random.default_rng(seed)
    out, keys = torch.empty(int(stop[-1]), widths[0], dtype=torch.float16), {}
    for name, last, count in zip(names, stop, keep, strict=True):
        found = read_features(files[name])
        keys.setdefault(found.key, name)
        x = found.features
        if not torch.isfinite(x).all():
            raise DataError(f"slide {name}: features that are not finite", fix="remove its file and embed it again")
        out[last - count : last] = x if len(x) == count else x[torch.from_numpy(rng.permutation(len(x))[:count])]
    if len(keys) > 1:
        raise _mixed(folder, list(keys.values()))
    return Bags(
        features=out,
        start=stop - keep,
        stop=stop,
        labels=np.zeros(len(names), np.int64),
        patients=np.array(names),
        names=names,
        classes=["-"],
        key=next(iter(keys)),
    )


def _mixed(folder: str | Path, examples: list[str]) -> DataError:
    return DataError(
        f"{folder} mixes features of {len(examples)} encoders or tilings (e.g. {' and '.join(examples[:2])})",
        fix="run the embedding again with one model and one tiling: other files are made anew",
    )


def _positive_last(values: np.ndarray, classes: list[str], positive: str) -> tuple[np.ndarray, list[str]]:
    if positive not in classes:
        raise ConfigError(f"positive is {positive}, which no slide is", fix=choose(positive, classes))
    order = [name for name in classes if name != positive] + [positive]
    return np.array([order.index(classes[value]) for value in values], dtype=np.int64), order


def _table(path: str | Path, slide: str, patient: str | None) -> Any:
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such table", fix="a CSV or Parquet file with the columns slide and label")
    names = [slide, *([patient] if patient else [])]
    try:
        if path.suffix == ".parquet":
            rows = pd.read_parquet(path)
            texts = {name: rows[name].map(str, na_action="ignore") for name in names if name in rows}
            return rows.assign(**texts)
        separator = "\t" if path.suffix == ".tsv" else ","
        return pd.read_csv(path, sep=separator, dtype=dict.fromkeys(names, str))  # 007 stays 007
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error})", fix="CSV with a header, or Parquet") from None


def _labels(rows: Any, label: str, event: str | None, table: str) -> tuple[np.ndarray, list[str]]:
    if event is None:
        words = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in rows[label].tolist()]
        classes = sorted(set(words), key=lambda w: (not w.isdecimal(), int(w) if w.isdecimal() else 0, w))
        if len(classes) < 2:
            raise DataError(f"{table}: all slides are of one class, {some(classes)}", fix="at least two classes")
        return np.array([classes.index(word) for word in words], dtype=np.int64), classes
    try:
        times, events = rows[label].astype(float).to_numpy(), rows[event].astype(float).to_numpy()
    except ValueError as error:
        raise DataError(
            f"{table}: times and events must be numbers ({error})", fix=f"check {label} and {event}"
        ) from None
    if not np.isin(events, (0, 1)).all() or (times <= 0).any():
        raise DataError(f"{table}: {event} must be 0 or 1 and {label} positive", fix="1 = event, 0 = censored")
    return np.where(events == 1, times, -times), []


def _stem(name: str) -> str:
    """`a/b/case.svs` -> `case`: how `embed_slides` calls its files."""
    from vitkit.data.slide import stem

    return stem(name)
