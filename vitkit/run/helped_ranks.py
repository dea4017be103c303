"""`vitkit compare A B C --data D1,D2,...`: which of several models is best, on one data set or over several.

On every data set all models are scored on the same images by one measure: a linear probe (or kNN) with labels, being found
again in another view without. Every pair is compared there as two models are (`helped_gain`), p-values corrected for the
number of pairs (Holm). Over several data sets average ranks are compared by Friedman's and Nemenyi's tests, with the
critical-difference picture (`vitkit.evaluate.ranking`); of two models the p-values are combined (Stouffer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vitkit.errors import ConfigError
from vitkit.run.helped import LEAST, Helped, places
from vitkit.run.helped import settings_for as resolved
from vitkit.run.helped_gain import LEVEL, Gain, gain, gain_of_means
from vitkit.run.helped_measure import VIEW, Bench
from vitkit.run.helped_models import Side, cautions, open_sides

if TYPE_CHECKING:
    from vitkit.data.images import Images
    from vitkit.evaluate.ranking import Ranking
    from vitkit.evaluate.statistics import Interval
    from vitkit.run.config import Config

MOST = 12  # models: 66 pairs


@dataclass(frozen=True)
class Ranked:
    """What is compared beside the models and the data, and where it goes."""

    out: str = "compare"
    """folder for compare.html, results.json and cached features, or the page's own name (.html)"""
    measure: Literal["linear", "knn"] = "linear"
    """what scores a model on labelled images: a linear probe or kNN on frozen features"""
    view_images: int = 400
    """use at most this many images of data without labels, drawn with `seed`"""
    hflip: bool = True
    """views may be mirrored; switch off where left and right matter"""

    def __post_init__(self) -> None:
        if self.view_images < LEAST:
            raise ConfigError(f"view_images is {self.view_images}", fix=f"at least {LEAST} images")


@dataclass
class Scored:
    """All models on one data set. values: one a model. gains: {(i, j): j minus i}; corrected: their p-values (Holm)."""

    name: str
    images: Images
    measure: str
    metric: str
    cases: str  # "205 test images"
    values: list[Interval]
    gains: dict[tuple[int, int], Gain]
    corrected: dict[tuple[int, int], float]
    notes: list[str]

    @property
    def best(self) -> int:
        return int(np.argmax([one.value for one in self.values]))

    def better(self, i: int, j: int) -> bool:
        """Whether model `j` is shown to be better than `i`."""
        low, high = sorted((i, j))
        d = self.gains[low, high].difference
        shown = self.corrected[low, high] < LEVEL and not d.low <= 0 <= d.high
        return shown and (d.value > 0) == (j == high)


@dataclass
class Standing:
    """Two models, or an order of more, over several data sets."""

    ranking: Ranking | None = None
    combined: float = math.nan  # p of two models

    @property
    def known(self) -> bool:
        return self.ranking is not None or not math.isnan(self.combined)


def data_sets(given: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """The data sets that `--data D1,D2` names; a path with commas in its name stays one."""
    if isinstance(given, Mapping):
        data = given.get("data", "")
        if isinstance(data, list | tuple):
            return [str(one) for one in data]
    else:
        words = [*given, ""]
        at = max((i for i, word in enumerate(words) if word == "--data" or word.startswith("--data=")), default=-1)
        data = "" if at < 0 else words[at].partition("=")[2] or words[at + 1]
    text = str(data)
    return [text] if "," not in text or Path(text).exists() else [one for one in text.split(",") if one]


def settings_for(given: Mapping[str, Any] | Sequence[str]) -> Config:
    """Resolved settings of `vitkit compare A B C --data D1,D2` from keywords or command-line words."""
    names = given if isinstance(given, Mapping) else [w.lstrip("-").partition("=")[0] for w in given if w[:2] == "--"]
    for name in names:
        if name in Helped.__dataclass_fields__ and name not in Ranked.__dataclass_fields__:
            raise ConfigError(
                f"{name} is for two models on one data set", fix=f"leave --{name} out, or compare two models"
            )
    if isinstance(given, Mapping):
        given = {**given, "data": ",".join(data_sets(given))}
    return resolved(given, Ranked)


def ranks_job(models: Sequence[Any], config: Config) -> dict[str, Any]:
    """Score every model on every data set; {"verdict", "best", "ranking", "data", "report", "results"}."""
    import torch

    from vitkit.run import helped_ranks_page
    from vitkit.run.batches import open_data, speaker
    from vitkit.run.measure import device_of

    own, machine = config.own, config.machine
    if len(models) > MOST:
        raise ConfigError(f"{len(models)} models to compare", fix=f"at most {MOST}")
    names = data_sets({"data": config.inputs.data})
    if len(set(names)) < len(names):
        raise ConfigError(f"a data set is named twice: {', '.join(names)}", fix="name different data sets")
    device, say = device_of(machine, "compare"), speaker(machine.quiet)
    page, cache = places(own.out)
    with torch.random.fork_rng(devices=[]):
        inputs = [replace(config.inputs, data=name) for name in names]
        sets = [open_data(one, say) for one in inputs]
        sides = open_sides(models, config.inputs, machine.seed, say)
        said = list(dict.fromkeys(text for images in sets for text in cautions(sides, images)))
        for text in said:
            say(f"note: {text}")
        short = [images.name for images in sets]
        titles = short if len(set(short)) == len(short) else names
        scored = []
        for one, images, title in zip(inputs, sets, titles, strict=True):
            bench = Bench(sides, one, machine, device, cache, say, own.view_images, own.hflip)
            scored.append(score(bench, images, title, own.measure))
            shown = zip(sides, scored[-1].values, strict=True)
            say(f"{title}: {', '.join(f'{side.letter} {found.value:.1%}' for side, found in shown)}")
    result = helped_ranks_page.write(page, sides, scored, standing(sides, scored), said, config)
    say(f"report: {result['report']}")
    return result


def score(bench: Bench, images: Images, name: str, protocol: str) -> Scored:
    """Every model on one data set, and every pair of them."""
    from vitkit.evaluate import metrics, statistics

    seen = bench.readable(images, name)
    gains: dict[tuple[int, int], Gain] = {}
    pairs = list(combinations(range(len(seen.xs)), 2))
    if seen.labelled:
        probed = bench.probed(seen, (protocol,))
        task, scores, y = str(images.task), probed.scores[protocol], probed.y
        measure, metric = protocol, metrics.main_metric(task)
        cases = f"{len(y):,} {probed.split} images"
        values: Any = [statistics.bootstrap(getattr(metrics, metric), y, one, groups=probed.groups) for one in scores]
        gains = {(i, j): gain(protocol, y, scores[i], scores[j], task, probed.groups) for i, j in pairs}
    else:
        viewed = bench.viewed(seen, np.ones(len(seen.images), bool), name)
        hits, groups = viewed.hits[VIEW], viewed.images.group
        measure, metric, cases = VIEW, "found again", f"{len(viewed.images):,} images without labels"
        values = [statistics.bootstrap(statistics.case_mean, one, one, groups=groups) for one in hits]
        gains = {(i, j): gain_of_means(VIEW, metric, hits[i], hits[j], groups) for i, j in pairs}
    corrected = dict(zip(pairs, statistics.holm([gains[pair].p for pair in pairs]).tolist(), strict=True))
    return Scored(name, seen.images, measure, metric, cases, values, gains, corrected, seen.notes)


def standing(sides: Sequence[Side], scored: Sequence[Scored]) -> Standing:
    """The order over all data sets, each of which counts once."""
    from vitkit.evaluate import statistics
    from vitkit.evaluate.ranking import rank

    if len(scored) < 2:
        return Standing()
    if len(sides) > 2:
        named = {str(side): [one.values[i].value for one in scored] for i, side in enumerate(sides)}
        return Standing(rank(named))
    gains = [one.gains[0, 1] for one in scored if not math.isnan(one.gains[0, 1].p)]
    if not gains:
        return Standing()
    signs = [one.difference.value for one in gains]
    return Standing(None, statistics.combine([one.p for one in gains], signs=signs))
