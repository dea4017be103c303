"""`vitkit compare A B --data D`: did it help? Before and after a change of backbone or weights, on the user's own images.

With labels: kNN and a linear probe on frozen features, scored on the same test images; each image counts for both models,
so what is hard for both cancels. The linear probe decides, kNN stands beside it. Without labels: whether a picture is
found again in another view, rank and spread of the features, found near-duplicates; the first decides, as a hint. Either
way: how far the two models agree, and whether B forgot what A knew of a general set.

Nothing is chosen on scored images; `helped_gain` says when a difference counts. More than two models, or more than one data
set, are ranked by `helped_ranks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.errors import ConfigError, DataError
from vitkit.run import config as configs
from vitkit.settings import Inputs, Machine

if TYPE_CHECKING:
    from vitkit.data.images import Images
    from vitkit.run.helped_models import Side

LEAST = 20
GENERAL = "digits"


@dataclass(frozen=True)
class Helped:
    """What is compared beside the two models and the data, and where it goes."""

    general: str = GENERAL
    """images of another kind, on which B may have forgotten something; "none" = not asked"""
    out: str = "compare"
    """folder for compare.html, results.json and cached features, or the page's own name (.html)"""
    general_images: int = 1000
    """use at most this many of the general images, drawn with `seed`"""
    view_images: int = 400
    """use at most this many images for what needs no labels, drawn with `seed`"""
    hflip: bool = True
    """views may be mirrored; switch off where left and right matter"""
    shots: int = 5
    """random draws of the training images for each point of the few-shot curve; 0 = no curve"""
    margin: float = 2.0
    """points that may be lost on the general set before it is called forgetting"""

    def __post_init__(self) -> None:
        if self.margin <= 0:
            raise ConfigError(f"margin is {self.margin:g}", fix="points of accuracy above 0, e.g. 2")
        for name in ("general_images", "view_images"):
            if getattr(self, name) < LEAST:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"at least {LEAST} images")
        if self.shots < 0:
            raise ConfigError(f"shots is {self.shots}", fix="0 for no few-shot curve, or a number of draws such as 5")


def settings_for(given: Mapping[str, Any] | Sequence[str], own: type = Helped) -> configs.Config:
    """Resolved settings of `vitkit compare A B --data D` from keywords or command-line words."""
    from vitkit.run.verbs import verb_doc

    config = configs.build(
        {"own": own, "inputs": Inputs, "machine": Machine},
        given,
        prog="vitkit compare A B",
        description=verb_doc("compare"),
        required=("data",),
    )
    if config.inputs.model:
        raise ConfigError(f"model is {config.inputs.model}, but compare takes two", fix="vitkit compare A B --data D")
    return config


def compare_models(models: Sequence[Any], given: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Two models on one data set: did it help? More of either: which is best?"""
    from vitkit.run import helped_ranks

    if len(models) == 2 and len(helped_ranks.data_sets(given)) < 2:
        return helped_job(models[0], models[1], settings_for(given))
    return helped_ranks.ranks_job(models, helped_ranks.settings_for(given))


def helped_job(a: Any, b: Any, config: configs.Config) -> dict[str, Any]:
    """Compare models `a` and `b` (timm name, hub id, weights file, run folder, "random"; in Python also a ViT or a
    `vitkit.Model`).

    Returns {"verdict", "outcome": "better", "worse", "unclear" or "same", "forgot": True, False or None, "rows", "report",
    "results", ...}. Raises DataError on too few images.
    """
    import torch

    from vitkit.run import helped_page
    from vitkit.run.batches import open_data, speaker
    from vitkit.run.helped_measure import Bench, measure_two
    from vitkit.run.helped_models import cautions, open_sides
    from vitkit.run.measure import device_of

    own, machine = config.own, config.machine
    device, say = device_of(machine, "compare"), speaker(machine.quiet)
    page, cache = places(own.out)
    with torch.random.fork_rng(devices=[]):
        images = open_data(config.inputs, say)
        sides = open_sides((a, b), config.inputs, machine.seed, say)
        general = _general(config, images, sides[0], say)
        said = cautions(sides, images)
        for text in said:
            say(f"note: {text}")
        bench = Bench(sides, config.inputs, machine, device, cache, say, own.view_images, own.hflip)
        found = measure_two(bench, images, "your", full=True, shots=own.shots)
        kept = None
        if general is not None:
            try:
                kept = measure_two(bench, general, "general", full=False, shots=0)
            except DataError as error:  # what was measured on the data themselves is not lost for that
                said.append(f"forgetting could not be asked: {error.what}")
                say(f"note: {said[-1]}")
    result = helped_page.write(page, sides, found, kept, said, config)
    say(f"report: {result['report']}")
    return result


def places(out: str) -> tuple[Path, Path | None]:
    """The page, and the folder of cached features: none beside a page that was named."""
    if not out:
        raise ConfigError("out is empty, and the comparison is a page", fix="--out compare")
    path = Path(out)
    if path.suffix.lower() in (".html", ".htm"):
        return path, None
    if path.is_file():
        raise ConfigError(f"{out} is a file", fix="give a folder, or a page that ends in .html")
    return path / "compare.html", path / "cache"


def _general(config: configs.Config, images: Images, a: Side, say: Callable[[str], None]) -> Images | None:
    """The general set, at most `general_images` of it; None where it is not asked for, is the data itself, or A has
    learnt nothing that could be forgotten."""
    import numpy as np

    from vitkit.data import read

    name = config.own.general
    if name.lower() in ("none", ""):
        return None
    if name == config.inputs.data:
        say(f"forgetting is not asked: the general set {name} is what is compared on (--general FOLDER names another)")
        return None
    if a.random:
        say("forgetting is not asked: A has random weights and knows nothing to forget")
        return None
    general = read(name, split_seed=config.inputs.split_seed)
    if name == GENERAL:
        say(
            "general set for forgetting: digits, bundled handwriting, a narrow check; --general FOLDER names a better one"
        )
    if len(general) > config.own.general_images:
        rng = np.random.default_rng(config.machine.seed)
        general = general.subset(np.sort(rng.permutation(len(general))[: config.own.general_images]))
    return general
