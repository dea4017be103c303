"""Features as Parquet shards: how `vitkit embed --format parquet` and `--engine ray` lay them out, and the way back.

    features/part-00000.parquet   name, split, label, group, features (a list of D float32)
    manifest.json                 what belongs together: shards, counts, files that could not be read
    passport.json                 the model: preprocessing, which tensor is the feature, lineage

A shard holds consecutive images, in the order in which the data were read. It is written beside its place and renamed, so
that it is whole or absent, and its footer says which weights, preprocessing and files it was computed from: a shard of
another model or of changed files is computed again, never reused, and one of unchanged files is kept where others changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vitkit.errors import ConfigError, DataError
from vitkit.run.files import atomic, atomic_write

if TYPE_CHECKING:
    from vitkit.data.images import Images

FOLDER, MANIFEST = "features", "manifest.json"
COLUMNS = ("name", "split", "label", "group", "features")
_META = b"vitkit"  # key of our JSON in a shard's footer


class Embedded(NamedTuple):
    """Everything in the order of the data: features (N, D) float32, and of each image its name, split, label and group.

    label: class names joined by "|", "" where unknown. group: "" where the data have none. Files that could not be read
    are not among them; `skipped` holds their (name, reason).
    """

    x: np.ndarray
    names: list[str]
    splits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class Plan:
    """Which images go into which shard. key: hash of the model and its preprocessing."""

    images: Images
    shard_rows: int
    dim: int
    key: str

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ConfigError(f"shard_rows is {self.shard_rows}", fix="images a Parquet file, e.g. 10000")

    @property
    def shards(self) -> int:
        return -(-len(self.images) // self.shard_rows)

    def size(self, shard: int) -> int:
        """Images of a shard."""
        return min(self.shard_rows, len(self.images) - shard * self.shard_rows)

    def part(self, shard: int) -> Images:
        first = shard * self.shard_rows
        return self.images.subset(np.arange(first, first + self.size(shard)))

    def identity(self, shard: int, part: Images) -> dict[str, Any]:
        """What a shard was computed from; another file, label, model or size gives another one."""
        return {"shard": shard, "key": self.key, "dim": self.dim, "data": part.fingerprint}


@dataclass
class Shard:
    """A finished shard: images written, and (name, reason) of the files that could not be read."""

    number: int
    rows: int
    identity: dict[str, Any]
    skipped: list[tuple[str, str]] = field(default_factory=list)


# ---------------------------------------------------------------- writing


def place(out: Path, shard: int) -> Path:
    """The file of a shard."""
    return out / FOLDER / f"part-{shard:05d}.parquet"


def write(out: Path, plan: Plan, shard: int, part: Images, x: np.ndarray, skipped: list[tuple[int, str]]) -> Shard:
    """Write one shard: `x` (n, D) are the features of the images `part` in order, without the `skipped` (position, reason)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from vitkit.run.gallery import label_text

    wrong = dict(skipped)
    kept = [i for i in range(len(part)) if i not in wrong]
    assert x.shape == (len(kept), plan.dim), (x.shape, len(kept), plan.dim)
    done = Shard(shard, len(kept), plan.identity(shard, part), [(part.names[i], why) for i, why in skipped])
    group = [None] * len(kept) if part.group is None else [str(part.group[i]) for i in kept]
    columns = {
        "name": pa.array([part.names[i] for i in kept], pa.string()),
        "split": pa.array([str(part.split[i]) for i in kept], pa.string()),
        "label": pa.array([label_text(part, i) for i in kept], pa.string()),
        "group": pa.array(group, pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).reshape(-1)), plan.dim),
    }
    meta = json.dumps({**done.identity, "rows": done.rows, "skipped": done.skipped}, ensure_ascii=False)
    table = pa.table(columns).replace_schema_metadata({_META: meta})
    with atomic(place(out, shard)) as file:
        # floats of features hardly compress and never repeat: dictionaries for text only
        pq.write_table(table, file, compression="zstd", use_dictionary=["split", "label", "group"])
    return done


def written(out: Path, plan: Plan, shard: int) -> Shard | None:
    """The shard if it is there, whole, and of this model and these files; else None."""
    meta = _footer(place(out, shard))
    if meta is None:
        return None
    identity = plan.identity(shard, plan.part(shard))
    if any(meta.get(name) != value for name, value in identity.items()):
        return None
    return Shard(shard, meta["rows"], identity, [(name, why) for name, why in meta["skipped"]])


def finish(out: Path, plan: Plan, shards: list[Shard], about: dict[str, Any]) -> dict[str, Any]:
    """Remove files that are no shard of this plan and write the manifest, which makes the folder readable; returns it."""
    shards = sorted(shards, key=lambda one: one.number)
    mine = {place(out, shard.number) for shard in shards}
    for file in (out / FOLDER).iterdir():
        if file not in mine and file.name.startswith(("part-", ".part-")):  # of another plan, or of a killed writer
            file.unlink()
    manifest = {
        **about,
        "images": len(plan.images),
        "rows": sum(shard.rows for shard in shards),
        "dim": plan.dim,
        "columns": list(COLUMNS),
        "skipped": [one for shard in shards for one in shard.skipped],
        "key": plan.key,
        "shards": [
            {"file": f"{FOLDER}/{place(out, s.number).name}", "rows": s.rows, "data": s.identity["data"]}
            for s in shards
        ],
    }
    atomic_write(out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


# ---------------------------------------------------------------- reading


def read(folder: str | Path) -> Embedded:
    """All features with their names, splits, labels and groups. Raises DataError on a folder that is not finished or in
    which a shard is missing, damaged or of another model."""
    manifest = read_manifest(folder)
    dim, count = manifest["dim"], manifest["rows"]
    x, at = np.empty((count, dim), np.float32), 0
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS[:-1]}
    for table in tables(folder):
        rows = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        x[at : at + len(table)] = rows.reshape(-1, dim)
        at += len(table)
        for name, values in columns.items():
            values += table[name].to_pylist()
    split, label, group = (np.array([v or "" for v in columns[name]], dtype=object) for name in COLUMNS[1:4])
    return Embedded(x, columns["name"], split, label, group, [(name, why) for name, why in manifest["skipped"]])


def tables(folder: str | Path) -> Iterator[Any]:
    """Shard by shard as `pyarrow.Table`, for archives that do not fit into memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, manifest = Path(folder), read_manifest(folder)
    for one in manifest["shards"]:
        file = folder / one["file"]
        meta = _footer(file)
        if meta is None:
            state = "is damaged" if file.exists() else "is missing"
            raise DataError(f"{file} {state}", fix="give the vitkit embed command again: it computes what is missing")
        if (meta["key"], meta["data"], meta["rows"]) != (manifest["key"], one["data"], one["rows"]):
            raise DataError(
                f"{file} is of other weights or data than {MANIFEST} says", fix="give the vitkit embed command again"
            )
        try:
            yield pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is damaged ({error})", fix="delete it and give the same command again") from None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """manifest.json of a finished folder."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        parts = len(list((Path(folder) / FOLDER).glob("part-*.parquet")))
        if parts:
            raise DataError(
                f"{folder} is not finished: {parts} shards are there", fix="give the same vitkit embed command again"
            )
        raise DataError(f"{folder} holds no embeddings in Parquet", fix="vitkit embed --format parquet writes them")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error})", fix="give the same vitkit embed command again") from None


def _footer(file: Path) -> dict[str, Any] | None:
    """What a shard says about itself; None where it is missing, cut short or not ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(file)
        meta = json.loads((found.metadata or {})[_META])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None
    return meta if found.num_rows == meta["rows"] else None
