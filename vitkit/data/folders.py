"""Folders of image files, scans among them: class folders, perhaps below splits, images with masks, no labels."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from . import scans
from .found import Found, class_names, count, encode, some, split_name
from .images import SPLITS, Masks
from .stores import FileStore

_IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "frames", "pictures", "photos", "imagestr"})
# In this order when there are several; the last ones hold numbers of objects rather than of classes.
_MASK_FOLDERS = [
    "masks",
    "mask",
    "labels",
    "label",
    "semantic",
    "segmentation",
    "segmentations",
    "segmentationclass",
    "annotations",
    "labelstr",
    "instances",
]
_MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_seg", "_gt", "_segmentation", "-mask")
_SKIPPED = frozenset({"__MACOSX", "@eaDir", "__pycache__"})


@dataclass(frozen=True)
class Tree:
    """All image files under `root` as sorted relative paths with `/`, and what else lies there by ending."""

    root: Path
    files: list[str]
    others: Counter[str]
    empty_folders: list[str]  # top-level folders without any image

    @property
    def tops(self) -> dict[str, list[str]]:
        """First folder -> the files below it, without that folder."""
        found: dict[str, list[str]] = {}
        for file in self.files:
            top, slash, rest = file.partition("/")
            if slash:
                found.setdefault(top, []).append(rest)
        return found


def scan(root: Path) -> Tree:
    """Walk `root`, following links to folders once each; hidden files and system folders are left out."""
    files: list[str] = []
    others: Counter[str] = Counter()
    seen = {os.path.realpath(root)}
    stack = [(str(root), "")]
    while stack:
        folder, prefix = stack.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{folder}: the folder cannot be read ({error.strerror})", fix="check its permissions"
            ) from None
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _SKIPPED:
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if not (entry.is_symlink() and real in seen):
                    seen.add(real)
                    stack.append((entry.path, f"{prefix}{entry.name}/"))
            elif scans.kind(entry.path):
                files.append(prefix + entry.name)
            else:
                others[Path(entry.name).suffix.lower() or entry.name] += 1
    files.sort()
    tops = {file.partition("/")[0] for file in files}
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    return Tree(root, files, others, [name for name in folders if name not in tops and name not in _SKIPPED])


def files_of(tree: Tree, names: list[str], deep: str) -> FileStore:
    return FileStore([str(tree.root / name) for name in names], deep)


def read_masks(tree: Tree, deep: str) -> Found | None:
    """images/ and masks/ side by side, splits above or below them; None when the folder is not laid out so."""
    located = [_locate(file) for file in tree.files]
    images = {(at[1], at[2]): file for file, at in zip(tree.files, located, strict=True) if at and at[0] == "image"}
    kinds = {at[0] for at in located if at} - {"image"}
    kind = next((kind for kind in _MASK_FOLDERS if kind in kinds), None)
    if kind is None or not images:
        return None
    masks = {(at[1], _plain(at[2])): file for file, at in zip(tree.files, located, strict=True) if at and at[0] == kind}
    first = lambda stem: stem.removesuffix("_0000")  # nnU-Net's name for the first channel  # noqa: E731
    pairs = [
        (image, masks.get((split, stem)) or masks.get((split, first(stem)), ""), split)
        for (split, stem), image in images.items()
    ]
    paired = [pair for pair in pairs if pair[1]]
    if not paired:
        examples = f"images: {some(images.values(), 2)}; {kind}: {some(masks.values(), 2)}"
        fix = "give mask and image the same stem, e.g. images/a.jpg and masks/a.png"
        raise DataError(f"{tree.root}: no image has a mask of the same name ({examples})", fix=fix)
    said = [f"images with masks: {count(len(paired), 'pair')} from {tree.root.name} (folder {kind}/)"]
    if len(paired) < len(pairs):
        missing = [image for image, mask, _ in pairs if not mask]
        said.append(f"left out: {count(len(missing), 'image')} without a mask ({some(missing, 3)})")
    if len(kinds) > 1:
        said.append(f"other folders with masks are not used: {some(sorted(kinds - {kind}))}")
    names = [pair[0] for pair in paired]
    split = np.array([pair[2] or "" for pair in paired])
    found = Found(tree.root.name, files_of(tree, names, deep), names, "mask", said=said)
    found.split = split if (split != "").all() else None
    found.masks, found.classes, more = describe_masks(
        FileStore([str(tree.root / pair[1]) for pair in paired]), np.arange(len(paired)), kind, tree.root
    )
    found.said += more
    return found


def describe_masks(store: FileStore, there: np.ndarray, kind: str, folder: Path) -> tuple[Masks, list[str], list[str]]:
    """(masks, classes, sentences): a few masks are opened to learn whether their values are classes or 0/255."""
    rows = there[np.unique(np.linspace(0, len(there) - 1, 8).astype(int))].tolist()
    values: set[int] = set()
    for row in rows:
        try:
            if scans.kind(store.paths[row]) == "nifti":
                values |= scans.mask_values(store.paths[row])
            else:
                values |= set(np.unique(Masks(store, binary=kind == "instances").array(row)).tolist())
        except DataError:
            continue  # one damaged mask must not stop reading: it is named when it is used, and by `vitkit check`
    names, ignore, file = class_names(folder)
    if kind == "instances":
        return (
            Masks(store, binary=True),
            names or ["background", "object"],
            ["instances/ numbers single objects: read as 0 = background, 1 = object"],
        )
    if values and values <= {0, 255} and 255 in values:
        return (
            Masks(store, binary=True),
            names or ["background", "foreground"],
            ["mask values are 0 and 255: read as background and foreground"],
        )
    said = [f"mask values in {count(len(rows), 'sampled file')}: {some(sorted(values), 24)}"]
    if names:
        note = f"; value {ignore} is to be ignored" if ignore is not None else ""
        said.append(f"{count(len(names), 'class', 'classes')} named by {file}: {some(names, 12)}{note}")
    elif values <= {0, 1}:
        names = ["background", "foreground"]
    return Masks(store, ignore=ignore), names, said


def _locate(file: str) -> tuple[str, str | None, str] | None:
    """images/train/a.jpg or train/images/a.jpg -> ("image", "train", "a"); masks alike with their folder's name."""
    parts = re.sub(r"(\.nii)?\.[^./]*$", "", file).split("/")
    split = None
    for _ in range(2):  # the split may stand before the folder or after it
        if len(parts) > 1 and split is None and split_name(parts[0]):
            split = split_name(parts.pop(0))
        elif len(parts) > 2 and split is None and split_name(parts[1]):
            split = split_name(parts.pop(1))
    kind = parts[0].lower() if len(parts) > 1 else ""
    kind = "image" if kind in _IMAGE_FOLDERS else kind
    return (kind, split, "/".join(parts[1:])) if kind == "image" or kind in _MASK_FOLDERS else None


def _plain(stem: str) -> str:
    return next((stem[: -len(end)] for end in _MASK_ENDINGS if stem.lower().endswith(end)), stem)


def splits_above(tree: Tree) -> dict[str, str]:
    """Folder -> split, when the top folders are splits (train must be among them, or every folder is one)."""
    words = {top: split_name(top) for top in tree.tops}
    splits = {
        top: split
        for top, split in sorted(words.items(), key=lambda item: SPLITS.index(item[1] or SPLITS[-1]))
        if split
    }
    return splits if "train" in splits.values() or len(splits) == len(words) else {}


def class_folders(files: list[str]) -> list[str]:
    """First folders that hold images themselves (`cat/1.jpg`) or in one folder called images (`cat/images/1.jpg`)."""
    found = set()
    for file in files:
        parts = file.split("/")
        if len(parts) == 2 or (len(parts) == 3 and parts[1].lower() in _IMAGE_FOLDERS):
            found.add(parts[0])
    return sorted(found)


def has_classes(tree: Tree) -> bool:
    """Whether folder names can be labels: split folders over class folders, or at least two class folders."""
    above = splits_above(tree)
    if above:
        return any(class_folders(tree.tops[top]) for top in above)
    classes = class_folders(tree.files)
    return len(classes) > 1 and not any(name.lower() in _IMAGE_FOLDERS for name in classes)


def read_classes(tree: Tree, deep: str) -> Found:
    """Class folders -> single-label data; splits from the folders above them when there are any."""
    above, tops = splits_above(tree), tree.tops
    names, words, split, said = [], [], [], []
    if above:
        for top in above:
            names += [f"{top}/{file}" for file in tops[top]]
            labelled = above[top] != "unlabelled"
            words += [file.partition("/")[0] if labelled and "/" in file else None for file in tops[top]]
            split += [above[top]] * len(tops[top])
        outside = [file for file in tree.files if file.partition("/")[0] not in above]
        if outside:
            said.append(f"left out: {count(len(outside), 'image')} outside the split folders ({some(outside, 3)})")
    else:
        names = list(tree.files)
        words = [file.partition("/")[0] if "/" in file else None for file in names]
    labels, classes = encode(words)
    where = f"{'/'.join(above)} folders of class folders" if above else "one folder a class"
    said.insert(
        0, f"{count(len(names), 'image')} in {count(len(classes), 'class', 'classes')} from {tree.root.name}: {where}"
    )
    said.append(f"classes: {some(classes, 20)}")
    if (labels < 0).any():
        loose = [name for name, label in zip(names, labels, strict=True) if label < 0]
        said.append(f"{count(len(loose), 'image')} outside any class folder: unlabelled ({some(loose, 3)})")
    if tree.empty_folders:
        said.append(f"folders without an image, not counted as classes: {some(tree.empty_folders)}")
    found = Found(tree.root.name, files_of(tree, names, deep), names, "single", classes, labels, said=said)
    if above:
        found.split = np.where(labels < 0, "unlabelled", np.array(split))
    return found


def read_unlabelled(tree: Tree, deep: str, why: str = "") -> Found:
    """Every image below the folder, without labels; splits are kept when the top folders are called so."""
    above = splits_above(tree)
    said = [f"{count(len(tree.files), 'image')} without labels from {tree.root.name}{why}"]
    if len(tree.tops) > 1:
        said.append("folders: " + some([f"{top} {len(files):,}" for top, files in tree.tops.items()], 12))
    found = Found(tree.root.name, files_of(tree, tree.files, deep), list(tree.files), said=said)
    if above:
        found.split = np.array([above.get(file.partition("/")[0], "unlabelled") for file in tree.files])
    return found


def one_class(tree: Tree) -> str:
    """Why a folder is read without labels, in words for the user."""
    classes = class_folders(tree.files)
    if len(classes) == 1 and classes[0].lower() not in _IMAGE_FOLDERS:
        return f" (a single folder, {classes[0]}/: one class is nothing to tell apart)"
    if not classes and tree.tops:
        return " (the first folders hold no images themselves, so their names are not classes)"
    return ""


def left_out(tree: Tree) -> str | None:
    """A sentence about files that are no images, or None."""
    ignored = {".csv", ".json", ".txt", ".md", ".parquet", ".tsv", ".yaml", ".yml", ".xml", ".npz"}
    others = {ending: n for ending, n in tree.others.items() if ending not in ignored and "." in ending}
    if not others:
        return None
    return "left out, not image files: " + ", ".join(
        f"{n} {ending}" for ending, n in sorted(others.items(), key=lambda item: -item[1])[:6]
    )
