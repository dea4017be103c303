"""Good parts to learn from and parts to test on: folders laid out as MVTec AD, or simpler ones.

    train/good/*.png                                learnt from
    validation/good/*.png                           optional; else cut out of train/good
    test/good/*.png, test/<defect>/*.png            measured on
    ground_truth/<defect>/<stem>_mask.png           optional, picture by picture: white is defective

A folder with good/ beside folders of defects is read likewise, and one that only holds images counts as good throughout.
"digits" is scikit-learn's handwriting with zeros as good parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from . import folders, pixels
from .found import SPLIT_NAMES, by_name, count, some
from .images import Images
from .splits import draw, leaks
from .stores import FileStore

GOOD = ("good", "ok", "normal", "nominal", "defect_free", "defect-free")
TRUTH = ("ground_truth", "groundtruth")
_LAYOUT = "train/good/, test/good/, test/<defect>/ and ground_truth/<defect>/<name>_mask.png, as MVTec AD has them"


@dataclass(frozen=True)
class Defects:
    """`images`: class 0 is good, the others are kinds of defects; only good ones are in train and val. `masks`: file of the
    mask by name of the picture; a defect without one counts for the picture as a whole only."""

    images: Images
    masks: dict[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """Kinds of defects."""
        return self.images.classes[1:]

    def mask(self, name: str, picture: tuple[int, int]) -> Tensor | None:
        """(H, W) bool of the picture `name` of `picture` (height, width) pixels; None where there is no mask."""
        if name not in self.masks:
            return None
        path = self.masks[name]
        array = torch.from_numpy(np.ascontiguousarray(pixels.decode_mask(pixels.read_bytes(path), path) > 0))
        if tuple(array.shape) != tuple(picture):
            raise DataError(
                f"{path}: the mask has {array.shape[1]} x {array.shape[0]} pixels, its picture {picture[1]} x {picture[0]}",
                fix="a mask of the picture's own size",
            )
        return array


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) bool to `size`: pixels that are defective by half of their area or more; a defect that is smaller than that keeps
    the pixels that it covers most."""
    if tuple(mask.shape) == tuple(size) or not bool(mask.any()):
        return mask if tuple(mask.shape) == tuple(size) else torch.zeros(size, dtype=torch.bool)
    area = F.interpolate(mask[None, None].float(), size=tuple(size), mode="area")[0, 0]
    return area >= min(0.5, float(area.max()))


def read_defects(
    spec: str | Path,
    *,
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    seed: int = 0,
    group_column: str | None = None,
    say: Callable[[str], object] | None = None,
) -> Defects:
    """Index such a folder and say aloud what was understood. Raises DataError where there is nothing good to learn from.

    group_column: column of the table beside the folders (index.csv, labels.csv) whose values, such as one part photographed
    several times, must not be divided between training and validation.
    """
    if str(spec) == "digits":
        return _told(_digits(val_fraction, seed), say)
    root = Path(spec).expanduser()
    if not root.is_dir():
        what = "is a file" if root.exists() else "there is no such folder"
        raise DataError(f"{spec}: {what}", fix=f"a folder with {_LAYOUT}")
    tree = folders.scan(root)
    if not tree.files:
        raise DataError(f"{spec}: the folder holds no image files", fix=f"a folder with {_LAYOUT}")
    rows, said = _sorted_out(tree)
    named = [row for row in rows if row[1] != "truth"]
    kinds = sorted({kind for _, _, kind in named if kind})
    names = [name for name, _, _ in named]
    labels = np.array([kinds.index(kind) + 1 if kind else 0 for _, _, kind in named], dtype=np.int64)
    images = Images(
        name=root.name,
        task="single",
        classes=["good", *kinds],
        labels=labels,
        split=np.array([split for _, split, _ in named], dtype="<U10"),
        group=_groups(root, names, group_column, spec),
        store=FileStore([str(root / name) for name in names]),
        rows=np.arange(len(names)),
        names=names,
    )
    images, more = _completed(images, val_fraction, test_fraction, seed)
    masks, about = _masks(root, rows, images)
    images = replace(images, understood=[*said, *more, *about, *_leaking(images)])
    return _told(Defects(images, masks), say)


def _told(found: Defects, say: Callable[[str], object] | None) -> Defects:
    for sentence in found.images.understood if say is not None else ():
        say(sentence)  # type: ignore[misc]
    return found


def _digits(val: float, seed: int) -> Defects:
    """scikit-learn's handwriting: zeros are good parts, every other digit is a defect; a toy that needs no download."""
    from .sources import read

    digits = read("digits", val_fraction=val, split_seed=seed)
    rows = np.flatnonzero((digits.labels == 0) | (digits.split == "test"))
    images = digits.subset(rows)
    said = ["digits: zeros are good, every other digit is defective", f"{dict(images.counts)}; no masks"]
    return Defects(replace(images, classes=["good", *(f"digit {k}" for k in range(1, 10))], understood=said))


def _sorted_out(tree: folders.Tree) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(name, split or "truth", kind of defect or "" for good) of every file that is used, and what was left out."""
    tops = {top: SPLIT_NAMES.get(top.lower(), "truth" if top.lower() in TRUTH else "") for top in tree.tops}
    if "train" in tops.values():
        rows, left = _mvtec(tree, tops)
    else:
        rows, left = _simple(tree, tops)
    good = sum(split == "train" for _, split, _ in rows)
    if not good:
        there = some(sorted({PurePosixPath(name).parent.as_posix() for name in tree.files}), 6)
        raise DataError(
            f"{tree.root}: no good parts to learn from ({there})",
            fix=f"put pictures of parts without defects into train/good/; the layout is {_LAYOUT}",
        )
    said = [f"{count(good, 'picture')} of good parts from {tree.root.name} to learn from"]
    if left:
        said.append(f"left out: {count(len(left), 'image')} that cannot be used ({some(left, 3)})")
    return rows, said


def _mvtec(tree: folders.Tree, tops: dict[str, str]) -> tuple[list[tuple[str, str, str]], list[str]]:
    rows, left = [], []
    for name in tree.files:
        top, _, rest = name.partition("/")
        split, kind = tops.get(top, ""), rest.partition("/")[0] if "/" in rest else ""
        good = kind.lower() in GOOD or (not kind and split in ("train", "val"))
        if split in ("truth", "test"):
            rows.append((name, split, "" if good else kind)) if kind else left.append(name)
        elif split in ("train", "val") and good:
            rows.append((name, split, ""))
        else:
            left.append(name)  # defects beside the good parts of train, and other folders
    return rows, left


def _simple(tree: folders.Tree, tops: dict[str, str]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """good/ beside folders of defects, or images only."""
    good = [top for top in tree.tops if top.lower() in GOOD]
    if not good and all(not split for split in tops.values()) and len(tree.tops) < 2:
        return [(name, "train", "") for name in tree.files], []
    if not good:
        return [], []
    rows, left = [], []
    for name in tree.files:
        top, _, rest = name.partition("/")
        if not rest:
            left.append(name)
        elif tops[top] == "truth":
            rows.append((name, "truth", rest.partition("/")[0] if "/" in rest else ""))
        else:
            rows.append((name, "train", "") if top in good else (name, "test", top))
    return rows, left


def _completed(images: Images, val: float, test: float, seed: int) -> tuple[Images, list[str]]:
    """Validation (and, where there are defects but no good test parts, test) parts cut out of train."""
    said = []
    there, good = images.split, images.labels == 0
    needs_test = bool((there == "test").any()) and not bool((good & (there == "test")).any())
    needs_val = not bool((there == "val").any())
    shares = (val if needs_val else 0.0, test if needs_test else 0.0)
    if int((there == "train").sum()) < 2 and needs_val:
        raise DataError(
            f"{images.name}: {count(int((there == 'train').sum()), 'good part')} to learn from",
            fix="at least 2, of which one is kept for the threshold; some hundred are usual",
        )
    if any(shares):
        what = "cut out of the good parts" + (
            ": validation, and a test part, which has defects only" if needs_test else ""
        )
        split, more = draw(images, there == "train", val=shares[0], test=shares[1], seed=seed, what=what)
        images, said = replace(images, split=split), more
    if needs_val and not bool((images.split == "val").any()):
        raise DataError(
            f"{images.name}: no good part could be put aside for the threshold",
            fix="a larger val_fraction, more good parts, or a folder validation/good/",
        )
    tested = images.split == "test"
    if tested.any():
        kinds = [f"{name} {int((tested & (images.labels == k)).sum())}" for k, name in enumerate(images.classes)]
        said.append(f"test parts: {', '.join(kinds)}")
    else:
        said.append("there are no test parts: heatmaps and a threshold, but no scores")
    return images, said


def _masks(root: Path, rows: list, images: Images) -> tuple[dict[str, str], list[str]]:
    """Files of the masks by picture, found by kind and stem."""
    truth: dict[tuple[str, str], str] = {}
    for name, split, kind in rows:
        if split == "truth":
            stem = PurePosixPath(name).stem
            truth[kind, stem] = truth[kind, stem.removesuffix("_mask")] = str(root / name)
    found = {}
    defective = [
        (name, images.classes[label])
        for name, label in zip(images.names, np.asarray(images.labels).tolist(), strict=True)
        if label > 0
    ]
    for name, kind in defective:
        if (kind, PurePosixPath(name).stem) in truth:
            found[name] = truth[kind, PurePosixPath(name).stem]
    if not defective:
        return {}, []
    if not found:
        return {}, ["no ground_truth/ masks: whole pictures are scored, where a defect lies cannot be"]
    if len(found) < len(defective):
        without = [name for name, _ in defective if name not in found]
        return found, [
            f"masks for {len(found)} of {len(defective)} defective pictures; the others count as whole pictures only "
            f"({some(without, 3)})"
        ]
    return found, [f"masks for all {len(found)} defective pictures"]


def _groups(root: Path, names: list[str], column: str | None, spec: str | Path) -> np.ndarray | None:
    if column is None:
        return None
    from . import tables

    table_path = next((root / f"{stem}.csv" for stem in tables.BESIDE if (root / f"{stem}.csv").is_file()), None)
    if table_path is None:
        raise DataError(
            f"{spec}: group_column={column}, but there is no table",
            fix=f"one of {', '.join(f'{stem}.csv' for stem in tables.BESIDE)} with file and {column}",
        )
    table = tables.load(table_path)
    files = by_name(table, ["file", "path", "image", "filename", "name"], set())
    if files is None or column not in table:
        missing = column if files is not None else "file"
        raise DataError(f"{table_path}: there is no column {missing}", fix=f"columns: {some(table.columns, 12)}")
    known = dict(zip(table[files], table[column].astype(str), strict=True))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"{table_path}: {count(len(unknown), 'picture')} without a row ({some(unknown, 3)})",
            fix=f"column {files} with paths relative to the folder",
        )
    return np.array([known[name] for name in names], dtype=object)


def _leaking(images: Images) -> list[str]:
    shared = leaks(images)
    if not shared:
        return []
    group, parts = next(iter(shared.items()))
    return [f"WARNING: {count(len(shared), 'group')} in more than one split, e.g. {group} in {' and '.join(parts)}"]
