"""Slide-level evaluation: which encoder and which small head predict a slide's label, by Phikon-v2's protocol.

Paper: Filiot et al., "Phikon-v2, A large and public feature extractor for biomarker prediction", 2024 (arXiv 2409.09173).
The code of its benchmark is not public; details are those of the same team's owkin/HistoSSLscaling.

What happens, and where: slides are cut in tiles of 224 px at 0.5 um/px where there is tissue (`vitkit.data.slide`), every
tile goes once through a frozen ViT (`vitkit.evaluate.mil.store`), and a head of about 164,000 weights learns a slide's label
from the bag of its tile features (`mil.heads`, `mil.train`): gated attention (ABMIL), Chowder, DSMIL, TransMIL, HIPT's head,
mean or maximum. Folds keep patients whole; folds x seeds models answer together (`mil.protocols`, `mil.ensemble`). Tested on
an external cohort, or on the outer folds of a (nested) cross-validation. Intervals and paired differences redraw patients;
p-values are corrected for the number of pairs (Holm).

Differs from the paper: tissue is found by saturation (Otsu), not by a U-Net. Nested cross-validation retrains e + 1 epochs
for the best epoch index e (the published code trains e). p-values of several cohorts are combined with their directions
(Stouffer); `mil.compare_encoders` does it by Fisher's method, as the paper. Scores of different folds are never ranked
against each other. The default is 3 seeds instead of 5. TransMIL runs every bag at its own length, as its original ignores
the padding.

Cost: the encoder, once: about 123 GFLOP a tile for ViT-L/16. Heads: seconds to minutes on a CPU for a hundred slides of a
few hundred tiles; features take 2 kB a tile (1,024 values in float16).

    vitkit slides embed --model hf-hub:owkin/phikon-v2 --data slides/ --out features/
    vitkit slides evaluate --features features/ --labels labels.csv --out runs/slides --heads abmil,mean
    vitkit.slides.evaluate(features="features/", labels="labels.csv", out="runs/slides", heads="abmil,mean")
"""

from __future__ import annotations

from dataclasses import dataclass

from vitkit.errors import ConfigError, nearest


@dataclass(frozen=True)
class Settings:
    """Heads and how they are trained and tested."""

    heads: tuple[str, ...] = ("abmil", "mean")
    """abmil, chowder, dsmil, hipt, max, mean, transmil; the first is the one that predicts, the others are compared"""
    folds: int = 5
    """parts of the (outer) cross-validation; patients stay whole"""
    seeds: int = 3
    """models a fold; all folds x seeds answer together (paper: 5)"""
    nested: bool = False
    """choose epochs, lr and weight_decay by inner folds; otherwise nothing is chosen"""
    inner: int = 5
    """inner folds of --nested"""
    epochs: int = 100
    """passes over the slides (paper: 100); with --nested or --external the most that may be chosen"""
    lr: tuple[float, ...] = (1e-3,)
    """Adam's learning rate; several with --nested (HistoSSLscaling: 1e-3, 1e-4)"""
    weight_decay: tuple[float, ...] = (0.0,)
    """Adam's weight decay; several with --nested (HistoSSLscaling: 0, 1e-4)"""
    batch_size: int = 16
    """slides a step"""
    n_tiles: int | None = 5000
    """at most so many random tiles of a slide at each visit (paper: 5000); all are seen when scoring"""

    def __post_init__(self) -> None:
        known = ("abmil", "chowder", "dsmil", "hipt", "max", "mean", "transmil")
        for name in self.heads:
            if name not in known:
                close = nearest(name, known) or known
                raise ConfigError(f"there is no slide head '{name}'", fix=f"did you mean {' or '.join(close)}?")
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ConfigError(f"heads are {', '.join(self.heads) or 'none'}", fix="each once, e.g. abmil,mean")
        for name, least in (("folds", 2), ("inner", 2), ("seeds", 1), ("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"at least {least}")
        if not self.lr or min(self.lr) <= 0 or not self.weight_decay or min(self.weight_decay) < 0:
            raise ConfigError(f"lr is {self.lr}, weight_decay {self.weight_decay}", fix="rates above 0, decay from 0")
        if self.n_tiles is not None and self.n_tiles < 1:
            raise ConfigError(f"n_tiles is {self.n_tiles}", fix="at least 1, or null for all tiles")
        if len(self.lr) * len(self.weight_decay) > 1 and not self.nested:
            raise ConfigError(
                f"{len(self.lr) * len(self.weight_decay)} recipes to choose from, and nothing to choose them by",
                fix="--nested chooses by inner folds; or give one lr and one weight_decay",
            )
