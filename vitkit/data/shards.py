"""Tar shards in the WebDataset layout: `<key>.jpg` beside `<key>.cls`, archives called `train-0000.tar` and so on."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np

from ..errors import DataError
from . import pixels
from .dicom_tags import SUFFIXES as DICOM
from .found import Found, class_names, count, encode, some, split_name
from .stores import TarStore


def read_shards(paths: list[Path], deep: str, labelled: bool = True) -> Found:
    """Uncompressed tar archives -> a data set whose pictures are read in place; the split comes from the archive's name."""
    keys, words, splits, at = [], [], [], []
    for number, path in enumerate(paths):
        pictures, labels = _index(path)
        if not pictures:
            raise DataError(f"{path}: holds no images", fix="shards hold pairs <key>.jpg and <key>.cls")
        split = split_name(re.split(r"[-_.]", path.name)[0])
        for stem, (name, offset, size) in sorted(pictures.items()):
            keys.append(name)
            words.append(labels.get(stem))
            splits.append(split)
            at.append((number, offset, size))
    where = np.array(at, dtype=np.int64)
    store = TarStore([str(path) for path in paths], keys, where[:, 0], where[:, 1], where[:, 2], deep)
    names = [f"{paths[number].name}/{key}" for (number, _, _), key in zip(at, keys, strict=True)]
    folder = paths[0].parent
    found = Found(folder.name if len(paths) > 1 else paths[0].stem, store, names)
    found.said = [
        f"{count(len(keys), 'image')} in {count(len(paths), 'tar shard')}: {some(path.name for path in paths)}"
    ]
    if all(splits):
        found.split = np.array(splits)
    elif any(splits):
        odd = sorted({paths[number].name for (number, _, _), split in zip(at, splits, strict=True) if not split})
        raise DataError(
            f"{folder}: shards without a split in their name: {some(odd)}",
            fix="call them train-0000.tar, val-..., test-...",
        )
    missing = sum(word is None for word in words)
    if not labelled or missing == len(words):
        found.said.append("read without labels")
        return found
    if missing:
        example = next(name for name, word in zip(names, words, strict=True) if word is None)
        raise DataError(
            f"{folder}: {count(missing, 'image')} of {len(words):,} without a label, e.g. {example}",
            fix="add <key>.cls for each",
        )
    known, _, file = class_names(folder)
    found.task = "single"
    found.labels, found.classes = encode(words, known)
    source = f" (named by {file})" if known and found.classes == known else ""
    found.said.append(f"{count(len(found.classes), 'class', 'classes')}{source}: {some(found.classes, 20)}")
    return found


def _index(path: Path) -> tuple[dict[str, tuple[str, int, int]], dict[str, str]]:
    """({stem: (member, offset, size)}, {stem: label}) of one archive; only headers and labels are read."""
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")  # WebDataset: everything behind the first dot is the ending
                if not member.isfile() or file.startswith("."):
                    continue
                if pixels.is_image(file) or file.lower().endswith(DICOM):
                    pictures[folder + slash + stem] = (member.name, member.offset_data, member.size)
                elif ending.lower() == "cls":
                    content = archive.extractfile(member)
                    labels[folder + slash + stem] = content.read().decode().strip() if content else ""
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        fix = "write the archive again, without compression"
        raise DataError(f"{path}: cannot be read as an uncompressed tar archive ({error})", fix=fix) from None
    return pictures, labels
