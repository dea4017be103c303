"""The files of a writer's run: texts as CSV, summary, and a page with images, true and written texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup

from vitkit.data.images import Images
from vitkit.run.captioning_job import ROWS, Judged, Part, perplexity
from vitkit.run.config import Config
from vitkit.run.files import atomic_write
from vitkit.run.folder import RunFolder
from vitkit.run.pictures import data_uri, png
from vitkit.run.report import Report

SHOWN = 12
ROW = (
    '<div style="display:grid;grid-template-columns:160px minmax(0,1fr);gap:0 20px;margin:0 0 18px">'
    '<div>{}</div><div class="prose">{}</div></div>'
)
BASELINES = {
    "nearest image": "the text of the most similar training image",
    "most frequent": "the most frequent training text",
}


def finish(
    folder: RunFolder,
    config: Config,
    vit: Any,
    images: Images,
    parts: dict[str, Part],
    judged: Judged,
    state: Any,
    trained: int,
    say: Callable,
) -> None:
    """predictions.csv, splits.csv, report.html, and the summary last."""
    import pandas as pd

    from vitkit.data.splits import save

    part = parts[judged.split]
    frame = pd.DataFrame({"image": part.images.names, "true": [" | ".join(cell) for cell in part.texts]})
    for name in ROWS:
        frame[name.replace(" ", "_")] = judged.said[name]
    atomic_write(folder.path / "predictions.csv", frame.to_csv(index=False))
    save(images, folder.path / "splits.csv")
    text = verdict(judged, len(parts["train"]))
    path = page(folder, config, vit, images, parts, judged, text, state).write(folder.path / "report.html")
    total = trained + sum(p.numel() for p in vit.parameters())
    summary = {
        "verb": "caption",
        "verdict": text,
        "metrics": _metrics(judged, len(part)),
        "trained_parameters": trained,
        "total_parameters": total,
        "seconds": round(state.seconds, 2),
        "steps": state.step,
        "best_step": state.best_step,
    }
    folder.finish(summary)
    say(text)
    say(f"report: {path}")


def _metrics(judged: Judged, n: int) -> list[dict[str, Any]]:
    rows = []
    for name in ROWS:
        for metric, found in (("rouge_l", judged.rouge), ("bleu4", judged.bleu)):
            one = found[name]
            label = metric if name == "written" else f"{metric} {name}"
            rows.append({"name": label, "value": one.value, "low": one.low, "high": one.high})
    for name, one in (("nats a token", judged.loss), ("nats a token lost with another image", judged.loss_gain)):
        rows.append({"name": name, "value": one.value, "low": one.low, "high": one.high})
    distinct = len(set(judged.said["written"])) / n
    rows.append({"name": "distinct texts", "value": distinct, "low": None, "high": None})
    return [{**row, "n": n, "split": judged.split} for row in rows]


def looks(judged: Judged) -> bool | None:
    """Whether the writer uses the image: its text is likelier, or closer to the truth, than with another one. None: the
    opposite is not shown either."""
    if judged.loss_gain.low > 0 or judged.gain["other image"].low > 0:
        return True
    return None if judged.loss_gain.high > 0 or np.isnan(judged.loss_gain.high) else False


def verdict(judged: Judged, count: int) -> str:
    """ROUGE-L against the best baseline, whether it looks at the image, whether it repeats itself."""
    own = judged.rouge["written"]
    best = max(("nearest image", "most frequent"), key=lambda name: judged.rouge[name].value)
    gain = judged.gain[best]
    word = "above" if gain.low > 0 else "below" if gain.high < 0 else "not told apart from"
    n = len(judged.said["written"])
    text = (
        f"ROUGE-L {own.value:.3f} on {n:,} {judged.split} images after {count:,} to learn from, {word} "
        f"{BASELINES[best]} ({judged.rouge[best].value:.3f})."
    )
    text += {
        True: " It does look at the image: with another one the true text is less expected.",
        None: " That it looks at the image is not shown.",
        False: " It does not look at the image: the true text is no less expected with another one.",
    }[looks(judged)]
    distinct = len(set(judged.said["written"]))
    if n > 1 and distinct <= n / 2:
        text += f" It repeats itself: {distinct:,} different texts for {n:,} images."
    return text


def page(
    folder: RunFolder,
    config: Config,
    vit: Any,
    images: Images,
    parts: dict[str, Part],
    judged: Judged,
    text: str,
    state: Any,
) -> Report:
    """Verdict, the writer beside its baselines, pictures with texts, the training curve, settings."""
    from vitkit.run.environment import environment
    from vitkit.run.measure import short_name

    part = parts[judged.split]
    report = Report("Writer", f"{short_name(config.inputs.model)} on {images.name}", kicker="vitkit caption")
    report.sentence(text)
    shape = part.patches.shape
    learnt = sum(len(cell) for cell in parts["train"].texts)
    report.facts(
        [
            ("images to learn from", f"{len(parts['train']):,}", f"{learnt:,} texts"),
            (f"{judged.split} images", f"{len(part):,}"),
            ("patch tokens an image", f"{shape[1]:,}", f"{shape[2]:,} values each"),
        ]
    )
    report.section("Results")
    _table(report, judged, part)
    report.section("What it writes")
    _texts(report, vit, part, judged)
    records = folder.records()
    lines = {
        "training": [(r["epoch"], r["loss"]) for r in records if r.get("loss") is not None],
        "validation": [(r["epoch"], r["val_loss"]) for r in records if r.get("val_loss") is not None],
    }
    report.section("Training")
    note = (
        f"Cross-entropy in nats a token. The epoch with the lowest validation loss is kept (step {state.best_step:,})."
    )
    report.curves("Loss", {k: v for k, v in lines.items() if v}, "epoch", "", note=note if lines["validation"] else "")
    report.section("How it was run")
    report.details("Settings", config.values)
    report.details("Model", vit.passport.to_dict())
    report.details("Data", {"read as": images.understood, "fingerprint": images.fingerprint})
    report.details("Environment", environment())
    return report


def _table(report: Report, judged: Judged, part: Part) -> None:
    rows = []
    for name in ROWS:
        said = judged.said[name]
        words = float(np.mean([len(one.split()) for one in said]))
        gain = judged.gain.get(name)
        rows.append([name, judged.rouge[name], gain, judged.bleu[name], len(set(said)), round(words, 1)])
    drawn = "whole groups" if part.images.group is not None else "images"
    note = (
        f"Small figures: 95 % interval, bootstrap over {drawn}. ROUGE-L: longest common subsequence of words, best of "
        "an image's references. Other image: what was written for another one. Nearest image: the text of the training "
        "image with the most similar mean patch token. Most frequent: one training text for all. Ahead by: the writer's "
        "ROUGE-L minus this row's, on the same images. Words in common are no measure of a report's being right: "
        "CheXbert and RadGraph scores need models of their own and are not computed."
    )
    columns = ["text", "ROUGE-L", "ahead by", "BLEU-4", "different", "words"]
    report.table("The writer and what needs no writer", columns, rows, note)
    own, other = judged.loss.value, judged.loss.value + judged.loss_gain.value
    report.sentence(
        f"Perplexity of the true text: {perplexity(own):,.1f} with its own image, {perplexity(other):,.1f} with another one "
        f"(difference {judged.loss_gain.value:.3f} nats a token, {judged.loss_gain.low:.3f} to {judged.loss_gain.high:.3f})."
    )


def _texts(report: Report, vit: Any, part: Part, judged: Judged) -> None:
    """A few images, evenly spread over the scored ones, each beside what is true and what was written."""
    from vitkit.data.transforms import eval_view

    view = eval_view(vit.passport.preprocess)
    chosen = np.unique(np.linspace(0, len(part) - 1, min(SHOWN, len(part))).round().astype(int)).tolist()
    blocks = []
    for i in chosen:
        array = view(part.images.decode(i)).numpy()
        pixels = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
        lines = [("true", one) for one in part.texts[i][:2]]
        lines += [(name, judged.said[name][i]) for name in ("written", "nearest image")]
        words = Markup("").join(
            Markup("<p><b>{}</b>&ensp;{}</p>").format(name, text or "(nothing)") for name, text in lines
        )
        name = part.images.names[i]
        image = Markup('<img src="{}" alt="{}" width="160">').format(data_uri(png(pixels)), name)
        blocks.append(Markup(ROW).format(image, words))
    note = "As the model sees them. All of them: predictions.csv."
    report._add("Images with true and written texts", Markup("").join(blocks), note)
