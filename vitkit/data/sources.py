"""`read`: from whatever the user points at to `Images`, saying what was understood."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError, nearest
from . import folders, tables
from .found import Found, count, some
from .images import Images
from .pixels import DEEP
from .scans import How, ScanStore, kind
from .splits import complete, leaks
from .stores import FileStore
from .unfold import unfold

BUILT_IN = ("digits",)
READERS = {
    "image": ("sources", "_find"),
    "volume": ("volumes", "read_volumes"),
    "video": ("video", "read_videos"),
    "frames": ("frames", "read_frames"),
}
_ACCEPTED = "a folder, a .csv, .parquet or .npz file, tar shards, a DICOM or NIfTI file, or " + ", ".join(BUILT_IN)


def read(
    spec: str | Path | Images,
    *,
    image_column: str | None = None,
    label_columns: str | Sequence[str] | None = None,
    mask_column: str | None = None,
    group_column: str | None = None,
    split_seed: int = 0,
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    deep: str = "full",
    frames: str | int = "all",
    plane: str = "axial",
    window: tuple[float, float] | None = None,
    kind: str = "image",
    keep_columns: str | Sequence[str] = (),
    say: Callable[[str], object] | None = None,
) -> Images:
    """Index a data set: a folder (class folders, splits above them, images/ + masks/, or no labels), a table, an .npz,
    tar shards, a DICOM or NIfTI file, or "digits".

    `label_columns` is a list, or one string with commas; `[]` reads without labels. Splits that the data give are
    kept; missing ones are drawn with `split_seed` (see `splits.complete`). `deep`: what 16-bit pictures become, see
    `pixels`. DICOM and NIfTI: every frame and slice is an image; `frames` takes "all", the "middle" one or so many of
    each volume, `plane` says how NIfTI is cut (axial, coronal, sagittal), `window` is (centre, width) in HU or the
    file's units instead of the file's own. `kind`: what one entry is: an "image", a whole "volume", a "video", or a place in a
    stream of "frames"; a model of volumes or videos asks for its own. `keep_columns`: columns of a table whose text stays in
    `Images.columns`. `say` gets every sentence of
    `Images.understood`. Raises DataError naming file, value and fix.
    """
    if isinstance(spec, Images):
        return spec
    if kind not in READERS:
        raise ConfigError(f"kind={kind!r}", fix=f"one of {', '.join(READERS)}")
    if deep not in DEEP:
        raise ConfigError(f"deep={deep!r} is not a way to read 16-bit images", fix=f"one of {', '.join(DEEP)}")
    if isinstance(label_columns, str):
        label_columns = label_columns.split(",")
    labels = None if label_columns is None else [name.strip() for name in label_columns if name.strip()]
    kept = (keep_columns,) if isinstance(keep_columns, str) else tuple(dict.fromkeys(keep_columns))
    columns = tables.Columns(image_column, labels, mask_column, group_column, kept)
    how = How(frames, plane, window)
    if kind == "image":
        found = unfold(_find(spec, columns, deep), how)
    else:
        # Streams are cut by time, which only their reader can do.
        shares = {"val": val_fraction, "test": test_fraction} if kind == "frames" else {}
        found = _reader(kind)(spec, columns, **shares)
    if how != How() and not isinstance(found.store, ScanStore):
        raise ConfigError(f"{spec}: frames, plane and window are for DICOM and NIfTI", fix="leave them out")
    images = _finish(found, val=val_fraction, test=test_fraction, seed=split_seed)
    if say is not None:
        for sentence in images.understood:
            say(sentence)
    return images


def _reader(kind: str) -> Callable[..., Found]:
    """The function that reads data whose entries are no single pictures."""
    module, name = READERS[kind]
    return getattr(importlib.import_module(f"vitkit.data.{module}"), name)


def _find(spec: str | Path, columns: tables.Columns, deep: str) -> Found:
    if isinstance(spec, str) and spec in BUILT_IN:
        from .arrays import read_digits

        found = read_digits()
        if Path(spec).exists():
            found.said.append(f"(a folder {spec} lies here too: write ./{spec} to read that)")
        return _without_table(found, columns, spec)
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(f"{spec}: there is no such file or folder", fix=_like(path))
    if path.is_dir():
        return _folder(path, columns, deep)
    if kind(str(path)) in ("dicom", "nifti"):
        one = Found(path.name, FileStore([str(path)], deep), [path.name], said=[f"one file, {path.name}"])
        return _without_table(one, columns, str(spec))
    suffix = path.suffix.lower()
    if suffix in tables.SUFFIXES:
        return tables.read_table(path, columns, deep)
    if suffix == ".npz":
        from .arrays import read_npz

        return _without_table(read_npz(path, columns.labels != []), columns, str(spec))
    if suffix == ".tar":
        from .shards import read_shards

        return _without_table(read_shards([path], deep, columns.labels != []), columns, str(spec))
    fix = f"give {_ACCEPTED}"
    if suffix in (".zip", ".gz", ".tgz", ".7z", ".rar"):
        fix = "unpack it and give the folder"
    raise DataError(f"{spec}: files of this kind are not read as a data set", fix=fix)


def _like(path: Path) -> str:
    try:
        near = nearest(path.name, [*(entry.name for entry in path.parent.iterdir()), *BUILT_IN])
    except OSError:
        near = []
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}data are {_ACCEPTED}"


def _folder(path: Path, columns: tables.Columns, deep: str) -> Found:
    """The first of these that fits: split and class folders, images with masks, a table, other files, no labels."""
    tree = folders.scan(path)
    table = _table_beside(path)
    if columns.by_hand:
        if not table:
            what = f"{path}: columns were named ({some(columns.by_hand)}), but there is no table"
            raise DataError(what, fix=f"add one of {', '.join(f'{name}.csv' for name in tables.BESIDE)}")
        return tables.read_table(table, columns, deep)
    if not tree.files:
        return _other_files(path, tree, table, columns, deep)
    found = folders.read_masks(tree, deep)
    if found and found.split is None and table:
        found = _splits_of_table(found, table, columns, deep)
    if found is None and folders.has_classes(tree):
        found = folders.read_classes(tree, deep)
        if table:
            found.said.append(f"{table.name} in the folder is not used (give {table} to read it instead)")
    if found is None and table:
        return tables.read_table(table, columns, deep)
    if found is None:
        found = folders.read_unlabelled(tree, deep, folders.one_class(tree))
    return _with_note(_unlabelled_if_asked(found, columns), tree)


def _splits_of_table(found: Found, table: Path, columns: tables.Columns, deep: str) -> Found:
    """Images and masks without split folders: the table beside them when it lists the same pairs with a split."""
    try:
        listed = tables.read_table(table, columns, deep)
    except DataError as error:
        found.said.append(f"{table.name} in the folder is not used: {error.what}")
        return found
    if listed.task == "mask" and listed.split is not None:
        return listed
    found.said.append(f"{table.name} in the folder is not used: it does not give masks with splits")
    return found


def _with_note(found: Found, tree: folders.Tree) -> Found:
    note = folders.left_out(tree)
    if note:
        found.said.append(note)
    return found


def _other_files(path: Path, tree: folders.Tree, table: Path | None, columns: tables.Columns, deep: str) -> Found:
    """A folder without a single image file: a table with an .npz, shards, or one .npz."""
    if table:
        return tables.read_table(table, columns, deep) if not list(path.glob("*.tar")) else _shards(path, columns, deep)
    if list(path.glob("*.tar")):
        return _shards(path, columns, deep)
    arrays_here = sorted(path.glob("*.npz"))
    if len(arrays_here) == 1:
        from .arrays import read_npz

        found = read_npz(arrays_here[0], columns.labels != [])
        found.name = path.name
        return found
    if not tree.others:
        raise DataError(f"{path}: the folder is empty", fix=f"data are {_ACCEPTED}")
    endings = some([f"{n} {ending}" for ending, n in tree.others.most_common()], 6)
    tables_here = sorted(file.name for file in path.iterdir() if file.suffix in (*tables.SUFFIXES, ".npz"))
    fix = f"give one of these files: {some(tables_here)}" if tables_here else "convert the files to PNG or JPEG"
    raise DataError(f"{path}: holds no image files ({endings})", fix=fix)


def _shards(path: Path, columns: tables.Columns, deep: str) -> Found:
    from .shards import read_shards

    return read_shards(sorted(path.glob("*.tar")), deep, columns.labels != [])


def _table_beside(path: Path) -> Path | None:
    names = (f"{stem}{suffix}" for stem in tables.BESIDE for suffix in tables.SUFFIXES)
    return next((path / name for name in names if (path / name).is_file()), None)


def _without_table(found: Found, columns: tables.Columns, spec: str) -> Found:
    if columns.by_hand:
        what = f"{spec}: columns were named ({some(columns.by_hand)}), but it is not a table"
        raise DataError(what, fix="give a .csv or .parquet file")
    return _unlabelled_if_asked(found, columns)


def _unlabelled_if_asked(found: Found, columns: tables.Columns) -> Found:
    if columns.labels == [] and found.task is not None:
        found.task, found.labels, found.masks, found.classes = None, None, None, []
        found.said.append("labels left aside, as asked")
    return found


def _finish(found: Found, *, val: float, test: float, seed: int) -> Images:
    """Complete splits and say what a user should know before trusting the data."""
    n = len(found.names)
    images = Images(
        name=found.name,
        task=found.task,
        classes=found.classes,
        labels=found.labels,
        split=np.full(n, "train"),
        group=found.group,
        store=found.store,
        rows=np.arange(n) if found.rows is None else found.rows,
        names=found.names,
        masks=found.masks,
        columns=found.columns,
        understood=found.said,
    )
    images = complete(images, found.split, val=val, test=test, seed=seed)
    return replace(images, understood=[*images.understood, *_warnings(images)])


def _warnings(images: Images) -> list[str]:
    said = []
    if images.labels is not None and len(images):
        used = images.split != "unlabelled"
        labels = images.labels[used]
        sizes = (
            np.bincount(labels[labels >= 0], minlength=len(images.classes))
            if labels.ndim == 1
            else (labels == 1).sum(0)
        )
        single = [name for name, size in zip(images.classes, sizes, strict=True) if size == 1]
        if single:
            words = "has a single image: it stays" if len(single) == 1 else "have a single image each: these stay"
            said.append(
                f"WARNING: {count(len(single), 'class', 'classes')} ({some(single)}) {words} where given, else in train"
            )
        untrained = _untrained(images.labels[images.split == "train"], images.classes)
        if untrained:
            said.append(f"WARNING: no training image of {count(len(untrained), 'class', 'classes')}: {some(untrained)}")
    shared = leaks(images)
    if shared:
        group, parts = next(iter(shared.items()))
        said.append(
            f"WARNING: {count(len(shared), 'group')} in more than one split, e.g. {group} in {' and '.join(parts)}"
        )
    return said


def _untrained(train: np.ndarray, classes: list[str]) -> list[str]:
    if not len(train):
        return []
    seen = set(train.tolist()) if train.ndim == 1 else set(np.flatnonzero((train == 1).any(axis=0)).tolist())
    return [name for k, name in enumerate(classes) if k not in seen]
