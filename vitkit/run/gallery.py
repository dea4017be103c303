"""A page to look at features: a map of all images, their nearest neighbours, near duplicates. One file, no server.

Pictures are small copies; neighbours are found over all images, not only over those shown.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.data.images import Images
from vitkit.run.document import document, embedded

NEIGHBOURS = 12
MOST_QUERIES = 300  # pictures that can be asked for their neighbours
MOST_PICTURES = 1200  # small copies in the file, neighbours included: keeps it at a few MB
MOST_POINTS = 5000  # on the map
MOST_COMPARED = 20_000  # images among which near duplicates are searched: N^2 similarities
MOST_TWINS = 60
ALIKE = 0.99  # cosine similarity from which two images are listed as near duplicates
SIDE = 96  # pixels of a small copy's longer side


def write(
    path: str | Path, images: Images, features: np.ndarray, *, title: str, facts: Mapping[str, str], seed: int = 0
) -> dict[str, Any]:
    """Write the page for `features` (N, D) of `images`; returns {"explained": (pc1, pc2), "agreement", "asked", "twins"}.

    agreement: share of the `asked` images whose nearest neighbour has the same label (None without labels); twins: pairs
    above 0.99. `facts` are printed under the title.
    """
    from vitkit.run.files import atomic_write

    positions, explained = principal_axes(features)
    asked = spread(images, MOST_QUERIES, seed)
    near = nearest(features, asked)
    twins, searched = near_duplicates(features, images, near, seed)
    asked = _within_budget(asked, near)
    shown = _pictured(asked, near, twins)
    points = np.union1d(asked, spread(images, MOST_POINTS, seed))
    found = {"explained": explained, "agreement": agreement(images, near), "asked": len(near), "twins": len(twins)}
    data = {
        "points": {
            "i": points.tolist(),
            "x": positions[points, 0].round(4).tolist(),
            "y": positions[points, 1].round(4).tolist(),
        },
        "explained": [round(100 * value, 1) for value in explained],
        "colours": colourings(images, points),
        "items": {int(i): _item(images, int(i)) for i in np.union1d(points, shown)},
        "pictures": {int(i): thumbnail(images.picture(int(i)).numpy()) for i in shown},
        "asked": asked.tolist(),
        "near": {int(i): [[int(j), round(float(s), 3)] for j, s in near[int(i)]] for i in asked},
        "twins": [
            [int(i), int(j), round(float(s), 4), images.split[i] != images.split[j]] for i, j, s in twins[:MOST_TWINS]
        ],
        "twinNote": _twin_note(twins, len(features), searched),
        "total": len(images),
    }
    lines = {**facts, **_facts(found, images)}
    atomic_write(path, page(title, lines, data))
    return found


def page(title: str, facts: Mapping[str, str], data: Mapping[str, Any]) -> str:
    """The HTML document; `data` travel as JSON inside it."""
    return document("gallery.html", title=title, facts=facts, data=embedded(data))


def principal_axes(features: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Coordinates (N, 2) on the first two principal axes, and the share of the variance that each explains.

    Signs are fixed by making each axis' largest loading positive, so that the map does not flip between runs.
    """
    x = features.astype(np.float64)
    x = x - x.mean(0)
    covariance = x.T @ x / max(1, len(x) - 1)
    values, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    if axes.shape[1] < 2:
        axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
    total = max(float(values.clip(0).sum()), np.finfo(float).tiny)
    shares = [float(value) / total for value in values[::-1][:2].clip(0)]
    return x @ axes, (shares[0], shares[1] if len(shares) > 1 else 0.0)


def spread(images: Images, count: int, seed: int) -> np.ndarray:
    """At most `count` rows, in order, drawn so that every label (or split) gets its turn."""
    if len(images) <= count:
        return np.arange(len(images))
    kind = images.split if images.labels is None else _codes(images.labels)
    order = np.random.default_rng(seed).permutation(len(images))
    turn = np.empty(len(images), dtype=np.int64)  # this image is its kind's n-th
    for value in np.unique(kind):
        mine = order[kind[order] == value]
        turn[mine] = np.arange(len(mine))
    return np.sort(order[np.argsort(turn[order], kind="stable")][:count])


def nearest(features: np.ndarray, asked: np.ndarray, k: int = NEIGHBOURS) -> dict[int, list[tuple[int, float]]]:
    """The `k` other images most similar to each asked one, by cosine over all; every image where that is affordable."""
    rows = np.arange(len(features)) if len(features) <= MOST_COMPARED else asked
    return _search(features, rows, rows, k) if len(rows) == len(features) else _search(features, None, rows, k)


def _search(
    features: np.ndarray, among: np.ndarray | None, rows: np.ndarray, k: int
) -> dict[int, list[tuple[int, float]]]:
    """Neighbours of `rows` among the images `among` (all where None), themselves left out."""
    from vitkit.evaluate.knn import neighbours

    pool = np.arange(len(features)) if among is None else among
    similarity, index = neighbours(features[pool], features[rows], k + 1)
    found = {}
    for row, near, which in zip(rows.tolist(), similarity, pool[index], strict=True):
        found[row] = [(int(j), float(s)) for j, s in zip(which, near, strict=True) if j != row][:k]
    return found


def near_duplicates(
    features: np.ndarray, images: Images, near: Mapping[int, list[tuple[int, float]]], seed: int
) -> tuple[list[tuple[int, int, float]], int]:
    """Pairs (i, j, similarity) above `ALIKE`, those across splits first, then the most similar; and how many were searched."""
    searched = len(features)
    if searched > MOST_COMPARED:
        sample = spread(images, MOST_COMPARED, seed)
        near, searched = _search(features, sample, sample, NEIGHBOURS), len(sample)
    pairs = {(min(i, j), max(i, j)): s for i, found in near.items() for j, s in found if s > ALIKE}
    twins = [(i, j, s) for (i, j), s in pairs.items()]
    return sorted(twins, key=lambda t: (images.split[t[0]] == images.split[t[1]], -t[2], t[0], t[1])), searched


def agreement(images: Images, near: Mapping[int, list[tuple[int, float]]]) -> float | None:
    """Share of labelled images whose nearest neighbour has the same label (single-label data only)."""
    if images.task != "single" or images.labels is None:
        return None
    pairs = [(images.labels[i], images.labels[found[0][0]]) for i, found in near.items() if found]
    same = [a == b for a, b in pairs if a >= 0 and b >= 0]
    return float(np.mean(same)) if same else None


def colourings(images: Images, rows: np.ndarray) -> list[dict[str, Any]]:
    """What the map can be coloured by: {"name", "names", "codes"}; code -1 is unknown."""
    found = []
    if images.labels is not None and images.task == "single":
        found.append({"name": "label", "names": list(images.classes), "codes": images.labels[rows].tolist()})
    elif images.labels is not None:
        for c, name in enumerate(images.classes):
            column = images.labels[rows, c]
            known = np.where(np.isnan(column), -1, column > 0.5).astype(int)
            found.append({"name": name, "names": ["no", "yes"], "codes": known.tolist()})
    names = [name for name in ("train", "val", "test", "unlabelled") if (images.split == name).any()]
    codes = [names.index(one) if one in names else -1 for one in images.split[rows].tolist()]
    found.append({"name": "split", "names": names, "codes": codes})
    return found


def thumbnail(array: np.ndarray) -> dict[str, Any]:
    """uint8 (C, H, W) as {"u": data URI, "w", "h"}; pictures smaller than the page shows them are kept pixel by pixel."""
    from PIL import Image, features

    picture = Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    out, kind = io.BytesIO(), "png"
    if max(picture.size) <= SIDE // 2:
        picture.save(out, "PNG", optimize=True)
    else:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        kind = "webp" if features.check("webp") else "jpeg"
        picture.save(out, kind.upper(), quality=78)
    return {
        "u": f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}",
        "w": picture.width,
        "h": picture.height,
    }


def label_text(images: Images, i: int) -> str:
    """The label(s) of image `i` in words; empty where unknown."""
    if images.labels is None or images.task not in ("single", "multi"):
        return ""
    if images.task == "single":
        return images.classes[images.labels[i]] if images.labels[i] >= 0 else ""
    return "|".join(name for name, value in zip(images.classes, images.labels[i], strict=True) if value == 1)


def _within_budget(asked: np.ndarray, near: Mapping[int, list[tuple[int, float]]]) -> np.ndarray:
    """As many of `asked` as fit `MOST_PICTURES` together with their neighbours, still spread over all of them."""
    order = [int(i) for start in range(7) for i in asked[start::7]]
    seen: set[int] = set()
    kept = []
    for i in order:
        more = {i, *(j for j, _ in near[i])}
        if len(seen | more) <= MOST_PICTURES:
            seen |= more
            kept.append(i)
    return np.sort(np.array(kept, dtype=np.int64))


def _pictured(
    asked: np.ndarray, near: Mapping[int, list[tuple[int, float]]], twins: list[tuple[int, int, float]]
) -> np.ndarray:
    rows = set(asked.tolist()) | {j for i in asked.tolist() for j, _ in near[i]}
    return np.array(sorted(rows | {row for i, j, _ in twins[:MOST_TWINS] for row in (i, j)}), dtype=np.int64)


def _codes(labels: np.ndarray) -> np.ndarray:
    """(N,) class numbers, -1 where there is none; of several labels the first."""
    if labels.ndim == 1:
        return labels
    known = np.nan_to_num(labels) > 0.5
    return np.where(known.any(1), known.argmax(1), -1)


def _item(images: Images, i: int) -> list[str]:
    return [images.names[i], label_text(images, i), str(images.split[i])]


def _facts(found: Mapping[str, Any], images: Images) -> dict[str, str]:
    lines = {"first two axes": f"{sum(found['explained']):.0%} of the variance"}
    if found["agreement"] is not None:
        among = "" if found["asked"] == len(images) else f" of {found['asked']:,} images, drawn evenly from the labels"
        lines["nearest neighbour"] = f"same label for {found['agreement']:.1%}{among}"
    return lines


def _twin_note(twins: list[tuple[int, int, float]], total: int, searched: int) -> str:
    """What the list of near duplicates covers, in words."""
    among = f"all {total:,} images" if searched == total else f"{searched:,} of {total:,} images, drawn at random"
    if not twins:
        return f"No two images are more than {ALIKE} alike, among {among}."
    rows = {row for i, j, _ in twins for row in (i, j)}
    note = f"{len(twins):,} pairs are more than {ALIKE} alike (cosine), among {among}."
    if len(twins) > MOST_TWINS:
        note += f" The first {MOST_TWINS} are shown: pairs in different splits, then the most alike."
    if len(rows) > searched / 5:
        note += " So many pairs mean that this model hardly tells these images apart; they need not be duplicates."
    return note
