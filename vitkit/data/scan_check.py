"""What `vitkit check` says of DICOM and NIfTI: from the headers that indexing has read, in words, without identities."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from .found import count
from .images import Images
from .scans import ScanStore, volumes

# What to do about the troubles that only scans have.
MEND = {
    "compressed in a way that cannot be read here": "each error names the package that reads it: "
    "pip install it, or save the files uncompressed",
    "DICOM tags missing or wrong": "export the files again from their source",
}
_ALIKE = 0.05  # spacings that differ by no more than this share count as the same
Finding = tuple[str, str, list[str], str]  # severity, kind, files, advice


def problems(images: Images, facts: list[str]) -> Iterator[Finding]:
    """Findings of a data set with scans; sentences about it as a whole are added to `facts`."""
    store = images.store
    if not isinstance(store, ScanStore) or not any(map(store.is_medical, images.rows.tolist())):
        return
    used = sorted(set(store.file[images.rows].tolist()))
    short = _short_names(images, store)
    headers = {k: store.headers[k] for k in used if k in store.headers and not store.headers[k].problem}
    facts += _facts(images, store, used)
    yield from _assumptions(store, headers, short)
    yield from _identities(headers, short)
    yield from _twice(headers, short)
    yield from _mixed(store, headers, used, short)
    order = [f"{name}: {note}" for name, notes in store.notes.items() for note in notes if not note.startswith("4-D")]
    kinds: dict[str, list[str]] = defaultdict(list)
    for text in order:
        kinds[_kind_of_note(text)].append(text)
    for what, texts in kinds.items():
        advice = "look at them: slices may be missing, double or of another series"
        yield "warning", what, texts, advice


def _short_names(images: Images, store: ScanStore) -> dict[int, str]:
    """File -> the name that the data set gives it."""
    found: dict[int, str] = {}
    for name, row in zip(images.names, images.rows.tolist(), strict=True):
        found.setdefault(int(store.file[row]), name.partition("[")[0] if store.is_medical(row) else name)
    return found


def _facts(images: Images, store: ScanStore, used: list[int]) -> list[str]:
    headers = [store.headers[k] for k in used if k in store.headers]
    kinds: Counter[str] = Counter(store.kinds[k] for k in used)
    words = {"dicom": "DICOM", "nifti": "NIfTI"}
    said = ["scans: " + ", ".join(f"{count(kinds[k], f'{word} file')}" for k, word in words.items() if kinds[k])]
    modalities = Counter(one.modality or "(none)" for one in headers if not one.problem)
    if modalities:
        said.append("modality: " + ", ".join(f"{name} {n:,}" for name, n in modalities.most_common()))
    found = volumes(images)
    if found is not None:
        sizes = np.bincount(found[0])
        real = sizes[sizes > 1]
        if len(real):
            few = f"{real.min()}" if real.min() == real.max() else f"{real.min()} to {real.max()}"
            said.append(f"{count(len(real), 'volume, film or slide', 'volumes, films or slides')} of {few} frames")
    return said


def _assumptions(store: ScanStore, headers: dict, short: dict[int, str]) -> Iterator[Finding]:
    """Files that left something out, by the rule that was used instead."""
    by_note = defaultdict(list)
    for k, one in headers.items():
        for note in one.notes:
            by_note[note].append(short[k])
    for note, files in by_note.items():
        missing = note.startswith("no ") and not note.startswith("no window")
        strange = missing or note.startswith(("Rescale", "only one", "Presentation", "window that"))
        if store.how.window is not None and "window" in note:
            continue
        yield "warning" if strange else "note", note, files, "see that the pictures look right" if strange else ""


def _identities(headers: dict, short: dict[int, str]) -> Iterator[Finding]:
    """Names of tags, never what they hold."""
    tags: Counter[str] = Counter()
    files = []
    for k, one in headers.items():
        tags.update(one.phi)
        files += [short[k]] if one.phi else []
    listed = ", ".join(tag for tag, _ in tags.most_common(6)) + (" and more" if len(tags) > 6 else "")
    advice = "vitkit never writes them down, but whoever gets the files gets them: de-identify before sharing"
    yield "warning", f"tags that identify persons are filled in ({listed})", files, advice
    burned = [short[k] for k, one in headers.items() if one.burned_in]
    yield "warning", "names or other text are burned into the pixels", burned, "black them out: they end up in reports"


def _twice(headers: dict, short: dict[int, str]) -> Iterator[Finding]:
    owners = defaultdict(list)
    for k, one in headers.items():
        if one.sop:
            owners[one.sop].append(short[k])
    copies = [" = ".join(names) for names in owners.values() if len(set(names)) > 1]
    yield "warning", "the same SOPInstanceUID in several files", copies, "one is a copy or was edited: keep one"


def _mixed(store: ScanStore, headers: dict, used: list[int], short: dict[int, str]) -> Iterator[Finding]:
    kinds = Counter("colour" if not one.photometric.startswith("MONO") else "grey" for one in headers.values())
    if len(kinds) > 1:
        rarer = kinds.most_common()[-1][0]
        odd = [short[k] for k, one in headers.items() if one.photometric.startswith("MONO") == (rarer == "grey")]
        yield "warning", f"grey and colour files are mixed: these are {rarer}", odd, "screenshots or reports, perhaps"
    turned = [short[k] for k, one in headers.items() if one.photometric == "MONOCHROME1"]
    if 0 < len(turned) < len(headers):
        yield "note", "MONOCHROME1 among MONOCHROME2", turned, "turned over after windowing: bright means bright in all"
    modality = Counter(one.modality for one in headers.values() if one.modality)
    if len(modality) > 1:
        usual = modality.most_common(1)[0][0]
        odd = [f"{short[k]} ({one.modality})" for k, one in headers.items() if one.modality not in ("", usual)]
        yield "warning", f"modality other than {usual}", odd, "one modality a data set, or their difference is learnt"
    spacing = {k: one.spacing for k, one in headers.items() if len(one.spacing) == 2}
    planes = {k: tuple(round(v, 1) for v in one.orientation) for k, one in headers.items() if len(one.orientation) == 6}
    for k in used:
        if k in store.grids:
            spacing[k] = store.grids[k].spacing
    yield from _odd(spacing, short, "mm of pixels or voxels unlike most", "resample: sizes in pixels mean nothing else")
    yield from _odd(planes, short, "plane (ImageOrientationPatient) unlike most", "localizers or other planes, perhaps")
    cut = [
        f"{short[k]} ({g.spacing[1]:g} x {g.spacing[2]:g} mm)"
        for k, g in store.grids.items()
        if max(g.spacing[1:]) > 2 * min(g.spacing[1:]) and k in short
    ]
    yield (
        "warning",
        f"{store.how.plane} slices have long pixels",
        cut,
        "cut along the thick axis: plane=coronal or sagittal",
    )


def _odd(values: dict[int, tuple[float, ...]], short: dict[int, str], what: str, advice: str) -> Iterator[Finding]:
    """Files whose numbers differ from the most frequent ones (of the same length)."""
    for length in sorted({len(v) for v in values.values()}):
        same = {k: np.array(v) for k, v in values.items() if len(v) == length}
        usual = np.array(Counter(tuple(np.round(v, 3)) for v in same.values()).most_common(1)[0][0])
        scale = np.abs(usual) * _ALIKE if "mm" in what else 0.25
        odd = [k for k, v in same.items() if (np.abs(v - usual) > scale).any()]
        texts = [f"{short[k]} ({' x '.join(f'{n:g}' for n in same[k])})" for k in odd]
        yield "warning", f"{what} ({' x '.join(f'{n:g}' for n in usual)})", texts, advice


def _kind_of_note(text: str) -> str:
    for word, kind in (
        ("mixed", "slices of one series that do not belong together"),
        ("gap", "gaps between slices"),
        ("uneven", "uneven distances between slices"),
        ("place that another", "several slices at one place"),
        ("no ImagePositionPatient", "slices without a position"),
        ("orientation", "no orientation in the header"),
    ):
        if word in text:
            return kind
    return "volumes with something missing"


def neighbours(images: Images, pairs: np.ndarray) -> np.ndarray:
    """(P,) whether both pictures of a pair are slices of one volume."""
    found = volumes(images)
    if found is None or not len(pairs):
        return np.zeros(len(pairs), bool)
    return found[0][pairs[:, 0]] == found[0][pairs[:, 1]]


def without_edges(images: Images, flat: Iterable[str]) -> list[str]:
    """Empty pictures, less those at either end of a volume: a scan begins and ends outside the body."""
    flat = list(flat)
    found = volumes(images)
    if found is None:
        return flat
    number, place = found
    empty = np.isin(np.array(images.names, dtype=object), flat)
    ends = np.zeros(len(images), bool)
    for one in np.unique(number[empty]):
        at = np.flatnonzero(number == one)
        at = at[np.argsort(place[at])]
        if len(at) > 1 and not empty[at].all():
            inside = np.flatnonzero(~empty[at])
            ends[at[: inside[0]]] = ends[at[inside[-1] + 1 :]] = True
    ends &= empty
    return [name for name, skip in zip(images.names, ends.tolist(), strict=True) if name in set(flat) and not skip]
