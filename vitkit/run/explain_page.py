"""The page of `vitkit explain`: pictures with their maps, and patches that can be clicked. One file, no server.

Maps travel as one byte a patch and are coloured in the browser, so that strength and smoothing can be changed there;
features as a few int8 a patch, so that the patches most like a clicked one are found there too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vitkit.explain import pca
from vitkit.run.document import document, embedded

SIDE = 448  # pixels of a picture's longer side in the file
BYTES = 4 << 20  # of features in the file
DIMS = 48


def write(path: Any, explained: Any, own: Any) -> dict[str, Any]:
    """Write the page; returns {"explained_variance": of the three colours, "similarity_kept": share kept of features}."""
    from vitkit.run.files import atomic_write

    shown = explained.shown
    features = [one.features for one in shown]
    basis = pca.fit(features)
    seen = pca.colours([basis.project(part) for part in features])
    patches = sum(part.shape[0] * part.shape[1] for part in features)
    rows = torch.cat([part.flatten(0, 1) for part in features])
    compact, kept = pca.compact(rows, max(8, min(DIMS, BYTES // patches)))
    front, parts = parts_of(features, basis)
    variance = [float(value) for value in basis.explained]
    data = {
        "items": [_item(one, explained.names) for one in shown],
        "grids": [list(part.shape[:2]) for part in features],
        "pca": [_b64(part.numpy()) for part in seen],
        "front": [_b64(part.numpy()) for part in front],
        "features": _b64(compact.numpy()),
        "dims": compact.shape[1],
        "kinds": [{"key": kind, "title": TITLES[kind], "what": WHAT[kind]} for kind in explained.kinds],
        "lut": _colours(),
    }
    facts = {
        **explained.facts,
        "patch colours": f"three components, {sum(variance):.0%} of the variance of {patches:,} patches "
        f"({', '.join(f'{value:.0%}' for value in variance)}); of the foreground alone {parts:.0%}",
    }
    tables = [_row(kind, explained.summary[kind]) for kind in explained.summary]
    pictures = [{"title": title, "picture": _picture(array, 4 * SIDE)} for title, array in explained.panels]
    text = page(
        title=f"Where {explained.facts['model']} looks",
        verdict=explained.verdict,
        facts=facts,
        rows=tables,
        scored="random" in explained.summary,
        steps="one pixel row a step" if own.sanity == "full" else "14 steps",
        panels=pictures,
        data=data,
    )
    atomic_write(path, text)
    return {"explained_variance": variance, "similarity_kept": kept, "patches": patches}


def parts_of(features: list[torch.Tensor], basis: pca.Basis) -> tuple[list[torch.Tensor], float]:
    """Colours of the foreground alone, by components fitted to it, and their share of its variance."""
    masks = pca.foreground([basis.project(part) for part in features])
    inside = torch.cat([part[mask] for part, mask in zip(features, masks, strict=True)])
    if len(inside) < 4:
        masks = [torch.ones_like(mask) for mask in masks]
        inside = torch.cat([part.flatten(0, 1) for part in features])
    inner = pca.fit([inside])
    coloured = pca.colours([inner.project(part) for part in features], masks)
    alpha = [
        torch.cat([part, 255 * mask.unsqueeze(-1).to(torch.uint8)], -1)
        for part, mask in zip(coloured, masks, strict=True)
    ]
    return alpha, float(inner.explained.sum())


TITLES = {"attention": "Attention", "rollout": "Rollout", "grad_cam": "Grad-CAM", "prompt_cam": "Prompt-CAM"}
WHAT = {
    "attention": "what the read token looks at in one block; the same for every class",
    "rollout": "what reaches it through all blocks; the same for every class",
    "grad_cam": "patches that raise the score of this class",
    "prompt_cam": "what the class' own prompt looks at",
}


def page(**values: Any) -> str:
    """The HTML document; `data` travel as JSON inside it."""
    return document("explain.html", trim=True, data=embedded(values.pop("data")), **values)


def _item(one: Any, names: Any) -> dict[str, Any]:
    """One picture: what it is, what the model says, its maps and their figures."""
    item: dict[str, Any] = {
        "name": one.name,
        "label": one.label,
        "picture": _picture(one.pixels.numpy().transpose(1, 2, 0)),
    }
    if one.probabilities is not None:
        best = np.argsort(-one.probabilities, kind="stable")[:3]
        item["top"] = [[names.names[i], round(float(one.probabilities[i]), 3)] for i in best]
        item["right"] = None if one.true is None else one.true == one.predicted
        item["label"] = one.label if one.true is None else names.names[one.true]
    item["maps"] = []
    for (kind, cls), found in one.maps.items():
        low, high = float(found.min()), float(found.max())
        scaled = np.zeros(found.shape) if high <= low else (found - low) / (high - low)
        entry: dict[str, Any] = {
            "kind": kind,
            "map": _b64(np.round(255 * scaled).astype(np.uint8)),
            "flat": high <= low,
        }
        if cls is not None:
            entry |= {"cls": names.names[cls], "p": round(float(one.probabilities[cls]), 3)}
            entry["role"] = "predicted" if cls == one.predicted else "true" if cls == one.true else "asked"
        if cls is None or cls == one.predicted:
            entry["scores"] = _rounded(one.scores.get(kind, {}))
        item["maps"].append(entry)
    item["random"] = _rounded(one.scores.get("random", {}))
    return item


def _rounded(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if value != value else round(value, 3) for key, value in scores.items()}


def _row(kind: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A kind's line of the table, in words and figures."""
    from vitkit.run.explain_figures import number, verdict_of

    text = {key: "–" if entry.get(key) is None else number(entry[key]) for key in _FIGURES}
    if entry.get("ahead_low") is not None:
        text["ahead"] += f" ({number(entry['ahead_low'])} to {number(entry['ahead_high'])})"
    words, control = verdict_of(entry), kind not in TITLES
    if control:
        words = "control" if kind == "random" else "control: should be behind random"
    title = TITLES.get(kind) or ("random maps" if kind == "random" else _reversed(kind))
    good = (entry.get("ahead_low") or 0) > 0 and entry.get("correlation_all", 0) <= 0.5
    return {"title": title, "control": control, "good": good and not control, "words": words, **text}


def _reversed(kind: str) -> str:
    return f"{TITLES[kind.removeprefix('reversed ')]}, reversed"


_FIGURES = ("insertion", "deletion", "gap", "ahead", "correlation_top", "correlation_all")


def _picture(array: np.ndarray, side: int = SIDE) -> dict[str, Any]:
    """uint8 (H, W, C) as {"u": data URI, "w", "h"}, at most `side` pixels; small pictures are kept pixel by pixel."""
    from PIL import Image, features

    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array))
    out = io.BytesIO()
    kind = "png"
    if max(picture.size) <= 64:
        picture.save(out, "PNG", optimize=True)
    else:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        kind = "webp" if features.check("webp") else "jpeg"
        picture.save(out, kind.upper(), quality=82)
    uri = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
    return {"u": uri, "w": picture.width, "h": picture.height}


def _colours(stops: int = 17) -> list[list[int]]:
    """Stops of matplotlib's inferno: perceptually uniform, and readable without colour vision."""
    import matplotlib

    table = matplotlib.colormaps["inferno"](np.linspace(0.08, 0.98, stops))
    return np.round(255 * table[:, :3]).astype(int).tolist()


def _b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
