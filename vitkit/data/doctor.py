"""`vitkit check`: looks at every picture and label once, before a training run finds out the hard way."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from . import hashes, scan_check
from .found import count, some
from .images import SPLITS, Images
from .inspection import Seen, inspect
from .sources import read
from .splits import leaks

SEVERITIES = ("error", "warning", "note")
_HELD_OUT = ("val", "test")
_MEND = "replace by intact copies, or remove them from the data"


class Problem(NamedTuple):
    """One kind of problem. `files` names all it concerns: files, or `a = b` for copies, groups, classes."""

    severity: str  # "error": mend it before training; "warning": look at it; "note": good to know
    kind: str
    files: list[str]
    advice: str

    def line(self) -> str:
        """`truncated file (3): a.jpg, b.jpg, c.jpg`."""
        number = f" ({len(self.files):,})" if len(self.files) > 1 else ""
        return f"{self.kind}{number}" + (f": {some(self.files)}" if self.files else "")


@dataclass
class CheckReport:
    """What `check` found. `facts` are sentences about the data as a whole, `classes` the images of each class and split."""

    name: str
    understood: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    classes: list[list[Any]] = field(default_factory=list)  # rows of (class, train, val, test)
    mean: list[float] = field(default_factory=list)  # of the training pictures, by channel, in [0, 1]
    std: list[float] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No errors; there may be warnings."""
        return not any(problem.severity == "error" for problem in self.problems)

    @property
    def verdict(self) -> str:
        number = Counter(problem.severity for problem in self.problems)
        parts = [count(number[severity], severity) for severity in SEVERITIES if number[severity]]
        found = ", ".join(parts) or "nothing to complain about"
        return f"{'ok' if self.ok else 'NOT OK'}: {found}"

    def rows(self) -> list[list[str]]:
        """Problems as table rows: severity, problem, number, examples, advice."""
        return [[p.severity, p.kind, str(len(p.files) or ""), some(p.files), p.advice] for p in self.problems]

    def tables(self) -> list[tuple[str, list[str], list[list[Any]]]]:
        """(title, columns, rows) for a report page."""
        found: list[tuple[str, list[str], list[list[Any]]]] = []
        if self.problems:
            found.append(("Problems", ["severity", "problem", "number", "examples", "advice"], self.rows()))
        if self.classes:
            found.append(("Images of each class", ["class", "train", "val", "test"], self.classes))
        return found

    def text(self) -> str:
        """The report for a terminal."""
        lines = [self.name, *(f"  {line}" for line in (*self.understood, *self.facts))]
        if self.classes:
            lines += ["", *_columns([["class", "train", "val", "test"], *self.classes[:40]])]
            if len(self.classes) > 40:
                lines.append(f"  and {count(len(self.classes) - 40, 'class', 'classes')} more")
        for severity in SEVERITIES:
            found = [problem for problem in self.problems if problem.severity == severity]
            if found:
                lines += ["", f"{severity}s" if len(found) > 1 else severity]
            for problem in found:
                lines += [f"  {problem.line()}", *([f"    -> {problem.advice}"] if problem.advice else [])]
        return "\n".join([*lines, "", self.verdict])


def check(
    spec: str | Path | Images,
    *,
    progress: Callable[[int, int], object] | None = None,
    workers: int | None = None,
    **how: Any,
) -> CheckReport:
    """Read a data set (`how` goes to `read`), decode every picture once and report what is wrong with it.

    `progress(done, total)` is called now and then; `workers` threads decode (by default the cores, at most 8).
    Never raises for bad data: data that cannot be indexed at all are a report with one error.
    """
    from . import video_check

    if "kind" not in how and video_check.are_videos(spec):
        how["kind"] = "video"
    try:
        images = read(spec, **how)
    except DataError as error:
        report = CheckReport(str(spec))
        report.problems.append(Problem("error", f"the data cannot be read: {error.what}", [], error.fix or ""))
        return report
    report = CheckReport(images.name, list(images.understood))
    if images.kind == "video":
        for severity, kind, files, advice in video_check.problems(images, report.facts, workers or 2):
            _add(report, severity, kind, files, advice)
        _groups(report, images)
        _labels(report, images)
        report.problems.sort(key=lambda problem: SEVERITIES.index(problem.severity))
        return report
    seen = _look(images, progress, workers or min(8, os.cpu_count() or 1))
    _broken(report, images, seen)
    _duplicates(report, images, seen)
    _groups(report, images)
    _labels(report, images)
    _sizes(report, images, seen)
    _kinds(report, images, seen)
    _colour(report, images, seen)
    for severity, kind, files, advice in scan_check.problems(images, report.facts):
        _add(report, severity, kind, files, advice)
    report.problems.sort(key=lambda problem: SEVERITIES.index(problem.severity))
    return report


def _look(images: Images, progress: Callable[[int, int], object] | None, workers: int) -> list[Seen]:
    seen: list[Seen] = []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(images), 256):
            piece = range(start, min(start + 256, len(images)))
            seen += pool.map(lambda i: inspect(images, i), piece)
            if progress:
                progress(len(seen), len(images))
    return seen


def _add(report: CheckReport, severity: str, kind: str, files: Iterable[str], advice: str = "") -> None:
    files = list(files)
    if files:
        report.problems.append(Problem(severity, kind, files, advice))


def _broken(report: CheckReport, images: Images, seen: Sequence[Seen]) -> None:
    kinds: dict[str, list[str]] = defaultdict(list)
    masks: dict[str, list[str]] = defaultdict(list)
    for name, one in zip(images.names, seen, strict=True):
        if one.trouble:
            kinds[one.trouble].append(name)
        for kind, text in one.mask_trouble.items():
            masks[kind].append(text)
    for kind, names in kinds.items():
        _add(report, "error", kind, names, scan_check.MEND.get(kind, _MEND))
    for kind, texts in masks.items():
        _add(report, "error", kind, texts, "mend the masks: same size as the image, one class number a pixel")
    named = list(zip(images.names, seen, strict=True))
    flat = [name for name, one in named if one.flat and one.size != (1, 1)]
    flat = scan_check.without_edges(images, flat)
    _add(report, "warning", "constant picture: shows nothing", flat, "remove them unless emptiness is a class")
    _add(report, "warning", "a single pixel", [name for name, one in named if one.size == (1, 1)], _MEND)
    half = [name for name, one in named if one.half]
    _add(report, "warning", "ends in plain grey: the file probably lost its last part", half, _MEND)


def _duplicates(report: CheckReport, images: Images, seen: Sequence[Seen]) -> None:
    by_pixels: dict[bytes, list[int]] = defaultdict(list)
    for i, one in enumerate(seen):
        if one.pixels and not one.flat:
            by_pixels[one.pixels].append(i)
    copies = [rows for rows in by_pixels.values() if len(rows) > 1]
    across = [rows for rows in copies if _across(images, rows)]
    within = [rows for rows in copies if not _across(images, rows)]
    contradicting = [rows for rows in copies if _different_labels(images, rows)]
    name = lambda rows: " = ".join(_at(images, i) for i in rows)  # noqa: E731
    advice = "keep one copy: what is measured on a picture seen in training is worth nothing"
    _add(report, "error", "the same picture in several splits", map(name, across), advice)
    advice = "find out which label is right"
    _add(report, "error", "the same picture with different labels", map(name, contradicting), advice)
    _add(report, "warning", "the same picture twice", map(name, within), "keep one copy unless the repetition is meant")
    firsts = np.array([rows[0] for rows in by_pixels.values()], np.int64)  # copies are reported already
    _near(report, images, seen, np.sort(firsts))


def _near(report: CheckReport, images: Images, seen: Sequence[Seen], rows: np.ndarray) -> None:
    if not len(rows):
        return
    codes = np.array([seen[i].hash for i in rows], np.uint64)
    thumbs = np.stack([seen[i].thumb for i in rows])
    wide = len(rows) <= hashes.ALL_PAIRS
    pairs, cut = hashes.near_pairs(codes, thumbs, hashes.ALIKE if wide else hashes.SAME)
    same = hashes.are(codes, thumbs, pairs, hashes.SAME)
    text = lambda found: [f"{_at(images, i)} ~ {_at(images, j)}" for i, j in rows[found].tolist()]  # noqa: E731
    across = np.array([_across(images, rows[pair].tolist()) for pair in pairs], bool)
    advice = "saved again or hardly changed: keep one, or give both the same group"
    more = ", the first of many" if cut else ""
    _add(report, "warning", f"nearly the same picture in several splits{more}", text(pairs[same & across]), advice)
    apart = ~scan_check.neighbours(images, rows[pairs])  # slices of one volume are meant to be alike
    _add(report, "note", f"nearly the same picture twice{more}", text(pairs[same & ~across & apart]), advice)
    unlike = np.array([_different_labels(images, rows[pair].tolist()) for pair in pairs], bool)
    advice = "find out which label is right"
    _add(report, "warning", f"nearly the same picture with different labels{more}", text(pairs[same & unlike]), advice)
    # Small pictures look alike by nature, and those of one group are meant to.
    large = np.array([min(seen[i].size) >= 48 for i in rows], bool)
    alike = ~same & across & large[pairs].all(1) & ~_one_group(images, rows[pairs])
    advice = "look at them: frames of one scene or one patient's images belong into one group"
    _add(report, "note", "pictures that look alike in several splits", text(pairs[alike]), advice)


def _at(images: Images, i: int) -> str:
    """Name and split of a picture."""
    name, split = images.names[i], str(images.split[i])
    return name if name.startswith(f"{split}/") else f"{name} ({split})"


def _across(images: Images, rows: Sequence[int]) -> bool:
    """Whether pictures lie in several splits of which one is held out (unlabelled pictures may be trained on too)."""
    parts = {"train" if images.split[i] == "unlabelled" else str(images.split[i]) for i in rows}
    return len(parts) > 1


def _different_labels(images: Images, rows: Sequence[int]) -> bool:
    if images.labels is None:
        return False
    labels = images.labels[list(rows)]
    if labels.ndim == 1:
        return len(set(labels[labels >= 0].tolist())) > 1
    known = ~np.isnan(labels)
    return bool(((known & (labels == 1)).any(0) & (known & (labels == 0)).any(0)).any())


def _one_group(images: Images, pairs: np.ndarray) -> np.ndarray:
    if images.group is None:
        return np.zeros(len(pairs), bool)
    return images.group[pairs[:, 0]] == images.group[pairs[:, 1]]


def _groups(report: CheckReport, images: Images) -> None:
    if images.group is None:
        return
    shared = [f"{group} ({', '.join(parts)})" for group, parts in leaks(images).items()]
    advice = "divide by group (leave out the split column and give group_column): the test would be too easy"
    _add(report, "error", "groups in several splits", shared, advice)
    unlabelled = set(images.group[images.split == "unlabelled"].tolist())
    held = set(images.group[np.isin(images.split, _HELD_OUT)].tolist())
    both = sorted(map(str, unlabelled & held))
    advice = "pre-training on the unlabelled part would see groups that are tested on"
    _add(report, "warning", "groups that are unlabelled and held out", both, advice)


def _labels(report: CheckReport, images: Images) -> None:
    if images.labels is None:
        return
    multi = images.labels.ndim == 2
    table = np.zeros((len(images.classes), 3), np.int64)
    for k, split in enumerate(SPLITS[:3]):
        labels = images.labels[images.split == split]
        table[:, k] = (labels == 1).sum(0) if multi else np.bincount(labels[labels >= 0], minlength=len(table))
    report.classes = [[name, *row] for name, row in zip(images.classes, table.tolist(), strict=True)]
    total, train = table.sum(1), table[:, 0]
    names = np.array(images.classes, dtype=object)
    _add(report, "warning", "class with a single image", names[total == 1], "add images or leave the class out")
    advice = "it cannot be learnt: add images or leave it out (anomaly detection is meant to be so)"
    _add(report, "warning", "class without a training image", names[(train == 0) & (total > 0)], advice)
    for k, split in enumerate(_HELD_OUT, 1):
        if table[:, k].any():
            advice = f"nothing can be said about it from the {split} part"
            _add(report, "note", f"class without any image in {split}", names[(table[:, k] == 0) & (total > 1)], advice)
    present = train[train > 0]
    if len(present) > 1 and present.max() / present.min() > 10:
        k, j = int(train.argmax()), int(np.where(train > 0, train, train.max() + 1).argmin())
        text = f"{names[k]} {train[k]:,}, {names[j]} {train[j]:,} training images"
        advice = "judge by balanced accuracy or the AUC of each class, not by plain accuracy; reweight or resample"
        kind = f"imbalanced classes, {train[k] / train[j]:.0f} to 1"
        _add(report, "warning", kind, [text], advice)
    if multi:
        empty = np.isnan(images.labels).all(1) & (images.split != "unlabelled")
        files = np.array(images.names, dtype=object)[empty]
        _add(report, "warning", "no label at all", files, "fill in, or mark as unlabelled")
    else:
        lost = (images.labels < 0) & (images.split != "unlabelled")
        _add(report, "error", "no label", np.array(images.names, dtype=object)[lost], "label or mark as unlabelled")


def _sizes(report: CheckReport, images: Images, seen: Sequence[Seen]) -> None:
    rows = [i for i, one in enumerate(seen) if not one.trouble]
    if not rows:
        return
    size = np.array([seen[i].size for i in rows])
    names = np.array(images.names, dtype=object)[rows]
    order = np.argsort(size.prod(1), kind="stable")
    words = [f"{size[order[at], 0]} x {size[order[at], 1]}" for at in (0, len(order) // 2, -1)]
    same = bool((size == size[0]).all())
    report.facts.append(
        f"all {words[0]} pixels" if same else "height x width: smallest {}, median {}, largest {}".format(*words)
    )
    short = size.min(1)
    small = (short < 32) & (short > 1)
    _add(report, "warning", "smaller than 32 pixels", names[small], "a ViT sees only a few patches of them")
    sizes, number = np.unique(size, axis=0, return_counts=True)
    usual = sizes[number.argmax()]
    odd = (size != usual).any(1)
    if 0 < odd.sum() <= 0.05 * len(rows):
        listed = [f"{name} ({h} x {w})" for name, (h, w) in zip(names[odd], size[odd].tolist(), strict=True)]
        _add(report, "warning", f"not {usual[0]} x {usual[1]} like all others", listed, "wrongly exported, perhaps")
    aspect = np.log(size[:, 1] / size[:, 0])
    wild = (np.abs(aspect - np.median(aspect)) > np.log(3)) & (short > 1)
    advice = "the centre crop shows a small part of them: crop or tile them first"
    _add(report, "note", "shape unlike the others (over 3 times longer)", names[wild], advice)


def _kinds(report: CheckReport, images: Images, seen: Sequence[Seen]) -> None:
    named = [(name, one.facts) for name, one in zip(images.names, seen, strict=True) if one.facts]
    if named:
        formats = Counter(facts.format for _, facts in named)
        report.facts.append("files: " + ", ".join(f"{n:,} {kind}" for kind, n in formats.most_common()))
    channels = Counter(one.channels for one in seen if not one.trouble)
    if channels:
        report.facts.append(
            "channels: " + ", ".join(f"{n:,} {'grey' if c == 1 else 'RGB'}" for c, n in sorted(channels.items()))
        )
    pick = lambda test: [name for name, facts in named if test(facts)]  # noqa: E731
    deep = [facts for _, facts in named if facts.low == facts.low and facts.mode != "F"]
    if deep and max(facts.high for facts in deep) < 65535 / 8 and getattr(images.store, "deep", "full") == "full":
        kind = f"16-bit pictures that use only values up to {max(facts.high for facts in deep):g}"
        advice = 'they become nearly black: read with deep="minmax"'
        _add(report, "warning", kind, pick(lambda f: f.low == f.low), advice)
    notes = [
        ("more than 8 bits a value", lambda f: f.low == f.low, "scaled to 8 bits"),
        ("CMYK", lambda f: f.mode == "CMYK", "converted to RGB without their colour profile"),
        ("palette", lambda f: f.mode in ("P", "PA"), "read as RGB"),
        ("transparency", lambda f: f.alpha, "put on white"),
        (
            "turned by EXIF",
            lambda f: f.orientation != 1,
            "read upright; masks and boxes must be made for the upright picture",
        ),
        ("several frames or pages", lambda f: f.frames > 1, "only the first is read"),
    ]
    for kind, test, advice in notes:
        _add(report, "note", kind, pick(test), advice)
    wrong = [name for name, one in zip(images.names, seen, strict=True) if one.wrong_ending]
    _add(
        report, "note", "ending that does not fit the content", wrong, "read by content; other programs may refuse them"
    )


def _colour(report: CheckReport, images: Images, seen: Sequence[Seen]) -> None:
    """Mean and standard deviation over all pixels of the training pictures; grey ones count in every channel."""
    chosen = [(seen[i].size, seen[i].sums) for i in np.flatnonzero(~np.isin(images.split, _HELD_OUT)).tolist()]
    readable = [(size, sums) for size, sums in chosen if sums is not None]
    if not readable:
        return
    channels = max(len(sums[0]) for _, sums in readable)
    weight = np.array([height * width for (height, width), _ in readable], float)[:, None]
    mean, square = (np.stack([np.broadcast_to(sums[k], channels) for _, sums in readable]) for k in (0, 1))
    centre = (mean * weight).sum(0) / weight.sum()
    spread = np.sqrt(np.maximum((square * weight).sum(0) / weight.sum() - centre**2, 0))
    report.mean, report.std = centre.round(4).tolist(), spread.round(4).tolist()
    words = [", ".join(f"{value:.3f}" for value in values) for values in (report.mean, report.std)]
    report.facts.append(f"training pixels in [0, 1]: mean {words[0]}; standard deviation {words[1]}")


def _columns(rows: list[list[Any]]) -> list[str]:
    width = min(40, max(len(str(row[0])) for row in rows))
    found = []
    for row in rows:
        name = str(row[0]) if len(str(row[0])) <= width else str(row[0])[: width - 1] + "…"
        cells = [f"{cell:>8,}" if isinstance(cell, int) else f"{cell:>8}" for cell in row[1:]]
        found.append(f"  {name.ljust(width)}{''.join(cells)}")
    return found
