"""What the page of an anomaly run says: detectors side by side, each kind of defect, pictures, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitkit.data.defects import Defects, resize_mask
from vitkit.data.images import Images
from vitkit.evaluate import metrics
from vitkit.evaluate.localisation import pixel_auroc, pro
from vitkit.evaluate.statistics import bootstrap, paired_bootstrap
from vitkit.run.anomaly_jobs import Facts, Scored, Work
from vitkit.run.files import atomic_write
from vitkit.run.folder import RunFolder
from vitkit.run.results import minutes

COLUMNS = ("picture", "seen", "restored", "map", "alarm", "truth")
SHOWN = 3  # pictures of each kind
MEANING = (
    "EAR hides what the ViT attends to and shows a mosaic of it; no hint: the same masks, emptied; random masks: cells in "
    "several passes, as RIAD; nothing hidden: an autoencoder; patch memory: distance of the same ViT's patch features to the "
    "nearest good one."
)


@dataclass(frozen=True)
class Truth:
    """Masks (n, H, W) bool of the test parts, at the size of the maps; `known` (n,) where they can be trusted."""

    masks: np.ndarray
    known: np.ndarray
    said: list[str]


def judge(work: Work, summary: dict, method: Any, found: Sequence[Scored], facts: Facts) -> None:
    """Fill `summary` with figures and tables, write predictions.csv and pictures."""
    test = work.defects.images.part("test")
    summary["tables"] += [mask_table(facts)] if method.settings.mask == "attention" else []
    summary["tables"] += [scale_table(facts, method.scale)] if facts.scales else []
    if len(test):
        truth = read_truth(work.defects, test, work.size)
        for sentence in truth.said:
            work.say(sentence)
        rows = [figures(one, test, truth) for one in found]
        summary["metrics"] = metric_rows(rows[0], found[0], test)
        summary["tables"] = [
            detector_table(rows, found, test, truth),
            cost_table(rows, found, test),
            kind_table(found[0], test, truth),
            *summary["tables"],
        ]
        write_scores(work.folder, test, found)
        save_pictures(work, method, found[0], test, truth)
    summary["verdict"] = verdict(summary, found, work, test)


def read_truth(defects: Defects, test: Images, size: tuple[int, int]) -> Truth:
    """Masks at the size of the maps, checked against their pictures."""
    masks, known = np.zeros((len(test), *size), bool), ~defective(test)
    empty: list[str] = []
    full: list[str] = []
    for i in np.flatnonzero(defective(test)).tolist():
        name = test.names[i]
        height, width = test.picture(i).shape[1:]
        mask = defects.mask(name, (height, width))
        if mask is None:
            continue
        known[i] = bool(mask.any())
        masks[i] = resize_mask(mask, size).numpy()
        if not mask.any():
            empty.append(name)
        elif mask.all():
            full.append(name)
    said = []
    if empty:
        said.append(f"WARNING: {len(empty)} masks are empty and are not used, e.g. that of {empty[0]}")
    if full:
        said.append(
            f"WARNING: {len(full)} masks cover the whole picture, e.g. that of {full[0]}: no place to find there"
        )
    return Truth(masks, known, said)


def defective(test: Images) -> np.ndarray:
    """(n,) bool of the test parts."""
    return np.asarray(test.labels) > 0


def figures(one: Scored, test: Images, truth: Truth) -> dict[str, Any]:
    """Every figure of a detector; None where the data do not allow it."""
    bad, scores = defective(test), one.scores.astype(float)
    both = bad.any() and not bad.all()
    auc = (
        bootstrap(metrics.mean_auc, bad[:, None].astype(float), scores[:, None], groups=test.group, seed=0)
        if both
        else None
    )
    masks, maps = list(truth.masks[truth.known]), list(one.maps[truth.known])
    located = bool((truth.known & bad).any())
    alarms = scores > one.limit
    return {
        "auc": auc,
        "pixel": pixel_auroc(masks, maps) if located else None,
        "pro": pro(masks, maps) if located else None,
        "found": float(alarms[bad].mean()) if bad.any() else None,
        "false": float(alarms[~bad].mean()) if not bad.all() else None,
    }


def metric_rows(row: dict[str, Any], one: Scored, test: Images) -> list[dict[str, Any]]:
    auc, bad = row["auc"], defective(test)
    named = [
        ("image AUROC", auc and auc.value, auc and auc.low, auc and auc.high, len(test)),
        ("pixel AUROC", row["pixel"], None, None, len(test)),
        ("PRO", row["pro"], None, None, len(test)),
        ("defects found", row["found"], None, None, int(bad.sum())),
        ("false alarms", row["false"], None, None, int((~bad).sum())),
        ("U-Net passes", one.passes, None, None, len(test)),
        ("share hidden", None if one.hidden is None else float(one.hidden.mean()), None, None, len(test)),
    ]
    return [
        {"name": name, "value": value, "low": low, "high": high, "n": n, "split": "test"}
        for name, value, low, high, n in named
        if value is not None
    ]


def detector_table(rows: list[dict], found: Sequence[Scored], test: Images, truth: Truth) -> dict[str, Any]:
    """All detectors on the same test parts."""
    table = [
        [
            one.words,
            row["auc"] and row["auc"].value,
            span(row["auc"]),
            row["pixel"],
            row["pro"],
            row["found"],
            row["false"],
        ]
        for one, row in zip(found, rows, strict=True)
    ]
    note = (
        f"{MEANING} AUROC: of whole pictures, with intervals over redrawn test parts. Found and false: above a threshold set "
        f"on {len(found[0].val)} good validation parts for at most {found[0].rate:.1%} false alarms. PRO: overlap up to 30 % "
        "false-positive pixels."
    )
    if not (truth.known & defective(test)).any():
        note += " No ground-truth masks: pixel figures need them."
    columns = ["detector", "AUROC", "95 % interval", "pixel AUROC", "PRO", "found", "false"]
    return {"title": "Detectors side by side", "columns": columns, "rows": table, "note": note}


def cost_table(rows: list[dict], found: Sequence[Scored], test: Images) -> dict[str, Any]:
    """What each detector costs, and what the first one gains over it."""
    table, bad = [], defective(test).astype(float)[:, None]
    for one, row in zip(found, rows, strict=True):
        gain: Any = None
        if one is not found[0] and row["auc"] is not None:
            a, b = (np.asarray(v, float)[:, None] for v in (found[0].scores, one.scores))
            gap = paired_bootstrap(metrics.mean_auc, bad, a, b, groups=test.group, seed=0)
            gain = f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
        table.append([one.words, round(one.seconds, 1), round(one.ms, 1), round(one.passes, 1), gain])
    return {
        "title": "What is worth its cost",
        "columns": [
            "detector",
            "training, s",
            "ms a picture",
            "U-Net passes",
            f"{found[0].words} minus this, image AUROC",
        ],
        "rows": table,
        "note": "equal network, data, epochs and seed; the patch memory trains nothing",
    }


def span(found: Any) -> str:
    """An interval in words."""
    if found is None:
        return ""
    return f"{found.low:.3f} to {found.high:.3f}" if found.low == found.low else found.note


def kind_table(one: Scored, test: Images, truth: Truth) -> dict[str, Any]:
    """The first detector by kind of defect."""
    good, rows = one.scores[~defective(test)], []
    for k, kind in enumerate(test.classes):
        own = np.asarray(test.labels == k)
        if not own.any():
            continue
        scores = one.scores[own]
        auc = None
        if k and len(good):
            y = np.r_[np.zeros(len(good)), np.ones(len(scores))][:, None]
            auc = metrics.mean_auc(y, np.r_[good, scores][:, None].astype(float))
        places = own & truth.known
        reach = None
        if k and one.hidden is not None and places.any() and truth.masks[places].any():
            reach = float((one.hidden[places] & truth.masks[places]).sum() / truth.masks[places].sum())
        rows.append([kind, int(own.sum()), auc, float((scores > one.limit).mean()), reach])
    return {
        "title": "By kind of defect",
        "columns": ["kind", "pictures", "AUROC", "alarms", "defect pixels hidden"],
        "rows": rows,
        "note": "AUROC against good parts. What is not hidden is copied: a defect that no mask reaches can hardly be found",
    }


def mask_table(facts: Facts) -> dict[str, Any]:
    s = facts.shares
    return {
        "title": "Share of a good picture that is hidden",
        "columns": ["pictures", "mean", "smallest", "largest", "none hidden"],
        "rows": [[len(s), float(s.mean()), float(s.min()), float(s.max()), int((s == 0).sum())]],
        "note": "10 to 40 % is usual",
    }


def scale_table(facts: Facts, chosen: int | None) -> dict[str, Any]:
    return {
        "title": "Scale of the mosaic",
        "columns": ["pixels of a cell", "lost, good", "lost, pasted", "gap in deviations", ""],
        "rows": [
            [int(r["scale"]), r["normal"], r["pasted"], r["gap"], "taken" if r["scale"] == chosen else ""]
            for r in facts.scales
        ],
        "note": "mean change of hidden pixels by the mosaic, in good training parts and in the same with a patch pasted in",
    }


def write_scores(folder: RunFolder, test: Images, found: Sequence[Scored]) -> None:
    """predictions.csv: a row a test part, its score and whether it is above the threshold, by every detector."""
    import pandas as pd

    frame = pd.DataFrame({"image": test.names, "label": [test.classes[k] for k in np.asarray(test.labels)]})
    for number, one in enumerate(found):
        last = "" if not number else f"({one.name})"
        frame[f"score{last}"] = one.scores
        frame[f"defective{last}"] = one.scores > one.limit
        if not number and one.hidden is not None:
            frame["hidden"] = one.hidden.reshape(len(test), -1).mean(1).round(4)
    atomic_write(folder.path / "predictions.csv", frame.to_csv(index=False))


# ---- pictures ----------------------------------------------------------------------------------------------------------


def save_pictures(work: Work, method: Any, one: Scored, test: Images, truth: Truth) -> None:
    """Of each kind the highest, middle and lowest score: picture, what was hidden, what was restored, where they differ."""
    from vitkit.data.transforms import eval_view

    view, top = eval_view(work.preprocess), scale_of(one)
    for k in range(len(test.classes)):
        own = np.flatnonzero(np.asarray(test.labels == k))
        if not len(own):
            continue
        order = own[np.argsort(-one.scores[own], kind="stable")]
        rows = []
        for i in dict.fromkeys(
            order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)].tolist()
        ):
            pixels = view(test.decode(i))
            out = method.inspect(work.prepare(pixels[None]))
            base = as_picture(pixels)
            flag = "above" if one.scores[i] > one.limit else "below"
            cells = [base, as_picture(out["input"][0]), as_picture(out["restored"][0]), overlay(base, one.maps[i], top)]
            cells += [outlined(base, one.maps[i] > one.limit)]
            cells += [outlined(base, truth.masks[i])] if truth.known[i] else []
            words = [f"score {one.scores[i]:.3f}, {flag}", *[""] * (len(cells) - 1)]
            rows.append(list(zip(cells, words, strict=True)))
        work.folder.save_pictures(
            "Good parts" if not k else f"Defect: {test.classes[k]}",
            rows,
            columns=COLUMNS[: max(map(len, rows))],
            note="highest, middle and lowest score of this kind; all maps in one scale",
        )


def scale_of(one: Scored) -> float:
    """The value of a map that is drawn in full colour: well above the threshold."""
    return float(max(2 * one.limit, np.quantile(one.maps, 0.999) if one.maps.size else 0.0, 1e-6))


def as_picture(pixels: torch.Tensor) -> np.ndarray:
    """(C, H, W) uint8 or in [0, 1] to uint8 (H, W, 3)."""
    if pixels.is_floating_point():
        pixels = (pixels.detach().cpu().clamp(0, 1) * 255).round().byte()
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy().copy()


def overlay(base: np.ndarray, found: np.ndarray, top: float) -> np.ndarray:
    """A heatmap over a grey picture: nothing where the map is 0, from yellow to red where it is `top`."""
    from matplotlib import colormaps

    grey = np.repeat(base.mean(2, keepdims=True), 3, 2)
    strength = np.clip(found / top, 0, 1)[..., None]
    colour = colormaps["YlOrRd"](0.25 + 0.75 * strength[..., 0])[..., :3] * 255
    mix = np.sqrt(strength) * 0.85
    return (grey * (1 - mix) + colour * mix).round().astype(np.uint8)


def outlined(base: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with `mask` in red."""
    out = base.astype(float)
    out[mask] = 0.35 * out[mask] + 0.65 * np.array([220, 30, 30])
    return out.round().astype(np.uint8)


def verdict(summary: dict, found: Sequence[Scored], work: Work, test: Images) -> str:
    """What was found, at which rate of false alarms, and what else was as good or better."""
    figures = {row["name"]: row for row in summary["metrics"]}
    asked, certain = work.config.method.false_alarms, found[0].rate
    rate = f"{certain:.1%} false alarms"
    if certain > asked:
        rate += f" ({asked:.1%} was asked for, but {len(found[0].val)} good validation parts cannot certify less)"
    learnt = f"learnt from {work.defects.images.counts.get('train', 0):,} good parts in {minutes(summary['seconds'])}"
    limit = f"scores above {found[0].limit:.4g} are alarms (at most {found[0].rate:.1%} of good parts)"
    if "image AUROC" not in figures:
        return f"{learnt[0].upper()}{learnt[1:]}; {limit}. There were no test parts of both kinds to score it on."
    auc = figures["image AUROC"]
    text = (
        f"Image AUROC {auc['value']:.3f} (95 % interval {auc['low']:.3f} to {auc['high']:.3f}) on {auc['n']:,} test parts; "
        f"at a threshold for {rate} it finds {figures['defects found']['value']:.0%} of the defects "
        f"and calls {figures['false alarms']['value']:.1%} of the good parts defective; {learnt}."
    )
    table = summary["tables"][0]["rows"]
    better = [row[0] for row in table[1:] if row[1] is not None and row[1] > auc["value"]]
    if better:
        text += f" Higher image AUROC at equal data: {' and '.join(better)}."
    if "pixel AUROC" not in figures:
        text += " Without ground-truth masks, where defects lie was not measured."
    return text
