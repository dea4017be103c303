"""The files of `vitkit slides evaluate`: results.json, predictions and the report with its heatmaps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.errors import ConfigError
from vitkit.evaluate.mil import pictures
from vitkit.evaluate.mil.bags import feature_files
from vitkit.evaluate.mil.ensemble import Ensemble
from vitkit.evaluate.mil.store import SlideFeatures, read_features
from vitkit.evaluate.statistics import Interval
from vitkit.run.config import Config
from vitkit.run.environment import environment
from vitkit.run.measure import write_results
from vitkit.run.page import Report
from vitkit.run.slides_embed import add_gallery
from vitkit.run.slides_evaluate import INTERNAL, Arm, Found, write_predictions

LEVEL = 0.05
LOOKS = ("abmil", "dsmil", "chowder", "hipt")  # heads that say which tiles counted


def write(path: Path, found: Found, config: Config) -> None:
    """Everything but the summary."""
    for arm in found.arms:
        for name, cohort in found.cohorts.items():
            fold = {} if cohort.fold is None else {"fold": cohort.fold}
            write_predictions(path / f"predictions_{name}_{arm.file}.csv", cohort.bags, arm.scores[name], fold)
    write_results(path / "results.json", _results(found))
    _report(found, config).write(path / "report.html")


# ---------------------------------------------------------------- in words


def verdict(found: Found) -> str:
    """The result in a few sentences: the first arm, and whether another one differs."""
    arm, bags = found.arms[0], found.bags
    parts = []
    for name, cohort in found.cohorts.items():
        patients = len(np.unique(cohort.bags.patients))
        where = "by cross-validation" if name == INTERNAL else f"on {name}, which nothing was chosen on"
        parts.append(
            f"{_span(found.intervals[arm.name, name])} {where} ({len(cohort.bags)} slides, {patients} patients)"
        )
    trained = "" if INTERNAL in found.cohorts else f", trained on {len(bags)} slides"
    text = f"{arm.name}: {found.metric} {'; '.join(parts)}{trained}."
    for pair in found.pairs:
        if arm.name in (pair.a, pair.b):
            text += f" {pair_words(pair, found.metric)}"
    return text


def pair_words(pair: Any, metric: str) -> str:
    """What the comparison of two arms shows."""
    differences = list(pair.cohorts.values())
    known = [d for d in differences if not np.isnan(d.value)]
    if all(d.value == 0 for d in known):
        return f"{pair.a} and {pair.b} rank the slides alike."
    gains = ", ".join(f"{d.value:+.3f} (95 % {d.low:+.3f} to {d.high:+.3f})" for d in known)
    p = f"p = {pair.corrected:.2g} after Holm"
    better = _better(pair)
    if better:
        worse = pair.b if better == pair.a else pair.a
        size = gains if better == pair.a else ", ".join(
            f"{-d.value:+.3f} (95 % {-d.high:+.3f} to {-d.low:+.3f})" for d in known
        )  # fmt: skip
        return f"{better} is better than {worse}: {size}, {p}."
    return f"No difference between {pair.a} and {pair.b} could be shown: {gains}, {p}."


def _better(pair: Any) -> str:
    """The arm that is shown to be better; "" where neither is, or where cohorts disagree."""
    signs = {d.value > 0 for d in pair.cohorts.values() if not np.isnan(d.value) and d.value}
    if not pair.corrected < LEVEL or len(signs) != 1:
        return ""
    return pair.a if signs.pop() else pair.b


def _span(interval: Interval) -> str:
    if np.isnan(interval.low):
        return f"{interval.value:.3f} ({interval.note})" if interval.note else f"{interval.value:.3f}"
    return f"{interval.value:.3f} (95 % {interval.low:.3f} to {interval.high:.3f})"


def _results(found: Found) -> dict[str, Any]:
    bags = found.bags
    arms = []
    for arm in found.arms:
        scores = {
            name: {key: getattr(found.intervals[arm.name, name], key) for key in ("value", "low", "high", "n", "note")}
            for name in found.cohorts
        }
        chosen = [{"lr": r.lr, "weight_decay": r.weight_decay, "epochs": epochs} for r, epochs in arm.chosen]
        one = {"name": arm.name, "encoder": arm.encoder, "head": arm.head, "file": f"heads/{arm.file}.safetensors"}
        one |= {"scores": scores, "chosen": chosen, "members_mean": arm.members, "folds": arm.each}
        arms.append({**one, "models": len(arm.ensemble.members), "seconds": arm.seconds})
    pairs = [
        {
            "a": pair.a,
            "b": pair.b,
            "cohorts": {
                name: {key: getattr(d, key) for key in ("value", "low", "high", "p", "n")}
                for name, d in pair.cohorts.items()
            },
            "p": pair.p,
            "p_holm": pair.corrected,
            "verdict": pair_words(pair, found.metric),
        }
        for pair in found.pairs
    ]
    data = {"slides": len(bags), "patients": len(np.unique(bags.patients)), "tiles": int(bags.lengths.sum())}
    return {
        "verdict": verdict(found),
        "metric": found.metric,
        "classes": bags.classes,
        "arms": arms,
        "pairs": pairs,
        "development": data,
        "cautions": found.cautions,
        "environment": environment(),
    }


# ---------------------------------------------------------------- the page


def _report(found: Found, config: Config) -> Report:
    bags, method = found.bags, config.method
    names = ", ".join(found.development)
    report = Report("Slides", f"{', '.join(method.heads)} on features of {names}", kicker="vitkit slides evaluate")
    report.sentence(verdict(found))
    external = INTERNAL not in found.cohorts
    patients = len(np.unique(bags.patients))
    models = len(found.arms[0].ensemble.members)
    report.facts(
        [
            ("slides to learn from", f"{len(bags):,}", f"{patients:,} patients"),
            ("tiles a slide, median", f"{int(np.median(bags.lengths)):,}", f"{int(bags.lengths.sum()):,} in all"),
            ("models that answer together", f"{models}", f"{method.folds} folds x {method.seeds} seeds"),
        ]
    )
    report.section("Results")
    for text in found.cautions:
        report.sentence(f"Note: {text}.")
    _scores(report, found, external)
    if found.pairs:
        _pairs(report, found)
    if bags.outputs == 1 and not bags.survival:
        _roc(report, found)
    _heatmaps(report, found, config)
    report.section("How it was measured")
    report.sentence(_how(found, config, external))
    _choices(report, found, config, external)
    report.details("Settings", config.values)
    report.details("Environment", environment())
    return report


def _scores(report: Report, found: Found, external: bool) -> None:
    header = ["head"] if len(found.development) == 1 else ["features and head"]
    header += [name if external else f"{found.metric}, {name}" for name in found.cohorts]
    header += [f"single models, {name}" for name in found.cohorts] if external else ["folds, lowest to highest"]
    rows = []
    for arm in found.arms:
        row: list[Any] = [arm.name, *(found.intervals[arm.name, name] for name in found.cohorts)]
        span = [value for value in arm.each if np.isfinite(value)]
        folds = f"{min(span):.3f} to {max(span):.3f}" if span else "–"
        row += [arm.members[name] for name in found.cohorts] if external else [folds]
        rows.append(row)
    note = "Small figures: 95 %, bootstrap over patients. "
    note += "Single models: the mean score of the ensemble's members." if external else (
        "Mean over folds of the score within each: models of different folds are never ranked against each other."
    )  # fmt: skip
    report.table(f"{found.metric} of every head", header, rows, note)
    for name in found.cohorts:
        bars = []
        for arm in found.arms:
            one = found.intervals[arm.name, name]
            bars.append((arm.name, one.value, *(() if np.isnan(one.low) else (one.low, one.high))))
        report.bars(f"{found.metric}, {name}", bars, reference=("chance", 0.5))


def _pairs(report: Report, found: Found) -> None:
    header = ["first", "second", *(f"difference, {name}" for name in found.cohorts), "p", "p after Holm", "shown"]
    rows = []
    for one in found.pairs:
        differences = [replace(d, value=round(d.value, 9)) for d in one.cohorts.values()]  # no 1e-16 of a sum's order
        rows.append([one.a, one.b, *differences, one.p, one.corrected, _better(one) or "nothing"])
    note = "First minus second on the same slides; patients are redrawn, and both are scored on each draw. "
    if len(found.cohorts) > 1:
        note += "p: cohorts combined, with their directions (Stouffer). "
    report.table("Which differ?", header, rows, note + f"Holm corrects for {len(rows)} comparison(s).")


def _roc(report: Report, found: Found) -> None:
    from sklearn.metrics import roc_curve

    for name, cohort in found.cohorts.items():
        series = {}
        for arm in found.arms[:6]:
            false, true, _ = roc_curve(cohort.bags.labels, _within(arm.scores[name][:, 0], cohort.fold))
            series[arm.name] = list(zip(false.tolist(), true.tolist(), strict=True))
        note = f"'{cohort.bags.classes[1]}' is what is found."
        note += "" if cohort.fold is None else " Scores are taken as ranks within each fold."
        report.curves(f"ROC, {name}", series, "false positive rate", "true positive rate", note=note)


def _within(scores: np.ndarray, fold: np.ndarray | None) -> np.ndarray:
    """Scores whose folds can be drawn together: ranks within each fold, as shares."""
    from scipy.stats import rankdata

    if fold is None:
        return scores
    out = np.empty(len(scores))
    for one in np.unique(fold):
        rows = fold == one
        out[rows] = (rankdata(scores[rows]) - 0.5) / rows.sum()
    return out


def _how(found: Found, config: Config, external: bool) -> str:
    method, bags = config.method, found.bags
    strata = "events" if bags.survival else "classes"
    text = f"Folds keep patients whole and spread {strata} evenly. "
    if external:
        return text + (
            f"{method.folds} folds x {method.seeds} seeds: each model is that of its best epoch on its own validation fold; "
            "all answer together, their scores averaged. The external slides were scored once, after everything was chosen."
        )
    text += f"Every slide was scored by {method.seeds} models that never saw its patient. "
    if method.nested:
        return text + f"Epochs and recipe of each fold were chosen by {method.inner} inner folds of its training part."
    return text + f"Nothing was chosen: every model trained for {method.epochs} epochs."


def _choices(report: Report, found: Found, config: Config, external: bool) -> None:
    if not external and not config.method.nested:
        return
    rows = [
        [arm.name, "all" if external else fold, recipe.lr, recipe.weight_decay, epochs]
        for arm in found.arms
        for fold, (recipe, epochs) in enumerate(arm.chosen)
    ]
    curves = {
        arm.name: [(i + 1, float(v)) for i, v in enumerate(arm.curve)] for arm in found.arms if arm.curve is not None
    }
    if any(len(curve) > 1 for curve in curves.values()):
        note = "Mean over validation folds: what epochs were picked by, not a result."
        report.curves(f"{found.metric} on validation folds", curves, "epoch", found.metric, note=note)
    report.table("What was trained", ["head", "fold", "learning rate", "weight decay", "epochs"], rows)


# ---------------------------------------------------------------- heatmaps


def _heatmaps(report: Report, found: Found, config: Config) -> None:
    """Slides of every class, the surest right ones and the worst mistakes, with the tiles that counted."""
    arm = next((one for one in found.arms if one.head in LOOKS), None)
    if arm is None or not config.own.heatmaps:
        return
    name, cohort = next(iter(found.cohorts.items()))
    files = feature_files(found.folders[name][arm.encoder])
    shown, names = [], []
    for i in _some(cohort.bags, arm.scores[name], config.own.heatmaps):
        slide = read_features(files[cohort.bags.names[i]])
        if not slide.placed:
            continue
        shown += [(slide.thumbnail, f"{slide.name}, {_label(cohort.bags, i)}")]
        shown += [(heatmap(slide, _unseen(arm, i)), _said(cohort.bags, arm.scores[name][i]))]
        names += [slide.name, f"{slide.name}, attention"]
    if not shown:
        report.sentence("No heatmaps: it is not known where the tiles of these slides lie.")
        return
    note = (
        "Tiles by how much they counted, the brightest most: where the head looked, which is not proof of what it saw. "
    )
    note += "By models that never saw the patient." if arm.fold is not None else "By the whole ensemble."
    add_gallery(report, f"Where {arm.name} looked", shown, names, note, size=390)


def _unseen(arm: Arm, i: int) -> Ensemble:
    """The models that may speak of slide i: those of the fold that held it out."""
    if arm.fold is None:
        return arm.ensemble
    whole, width = arm.ensemble, len(arm.ensemble.members) // len(arm.chosen)
    part = whole.members[arm.fold[i] * width : (arm.fold[i] + 1) * width]
    return Ensemble(part, whole.dim, whole.outputs, whole.classes, whole.key)


def _some(bags: Any, scores: np.ndarray, count: int) -> list[int]:
    """Slides of every class in turn, by turns the surest right one and the worst mistake; survival: highest risks first."""
    if bags.survival:
        return np.argsort(-scores[:, 0], kind="stable")[:count].tolist()
    whole = np.concatenate([1 - scores, scores], axis=1) if scores.shape[1] == 1 else scores
    queues = []
    for c in reversed(range(len(bags.classes))):
        rows = np.flatnonzero(bags.labels == c)
        order = rows[np.argsort(-whole[rows, c], kind="stable")].tolist()
        queues.append([order.pop(0 if turn % 2 == 0 else -1) for turn in range(len(order))])
    turns = [queue[t] for t in range(max(map(len, queues))) for queue in queues if t < len(queue)]
    return turns[:count]


def _label(bags: Any, i: int) -> str:
    if bags.survival:
        return f"{abs(bags.labels[i]):g}, {'event' if bags.labels[i] > 0 else 'censored'}"
    return str(bags.classes[bags.labels[i]])


def _said(bags: Any, scores: np.ndarray) -> str:
    if bags.survival:
        return f"risk {scores[0]:.2f}"
    if len(scores) == 1:
        return f"{bags.classes[1]}: {scores[0]:.1%}"
    return f"{bags.classes[int(scores.argmax())]}: {scores.max():.1%}"


def heatmap(slide: SlideFeatures, ensemble: Ensemble) -> np.ndarray:
    """A slide's thumbnail with its tiles coloured by how much they counted. ConfigError for heads that do not say."""
    if not slide.placed or slide.size is None:
        raise ConfigError(
            f"{slide.name}: it is not known where its tiles lie", fix="embed slides, not folders of tiles"
        )
    weights, grey = ensemble.attention(slide.features), np.repeat(slide.thumbnail.mean(-1, keepdims=True), 3, axis=2)
    return pictures.heatmap(grey, slide.coords, slide.side, weights, slide.size, scale="max")
