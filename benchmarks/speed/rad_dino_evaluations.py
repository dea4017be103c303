"""Metadata probes against scikit-learn: ridge regression for 17 penalties and 201 targets, chosen on validation data.

The targets are a column and its 200 shuffles, as `vitkit evaluate --protocols metadata` fits them. Both standardise by the
training images, fit every penalty, choose one for each target by validation error, and predict the test images; predictions
agree before the race. scikit-learn's Ridge is given all targets at once (its Cholesky solver, one penalty a call), which is
its best case here, and one target a call, which is how it is usually written. One thread, float64.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.common import Result, arguments, race
from vitkit.evaluate.metadata import Settings
from vitkit.evaluate.ridge import ridge

SHAPES = {
    "582 x 192 (DeiT-Ti, ChestX-ray14 here)": (582, 192),
    "2,000 x 768 (ViT-B)": (2000, 768),
    "300 x 768": (300, 768),
}
PENALTIES = Settings().penalties
FEW = 3  # targets that are fitted a call each


def theirs(x, y, vx, vy, tx) -> np.ndarray:
    """All targets a call."""
    scale = StandardScaler().fit(x)
    x, vx, tx = scale.transform(x), scale.transform(vx), scale.transform(tx)
    errors, said = [], []
    for penalty in PENALTIES:
        model = Ridge(alpha=penalty * len(x), solver="cholesky").fit(x, y)
        errors.append(np.square(model.predict(vx).reshape(vy.shape) - vy).mean(0))
        said.append(model.predict(tx).reshape(len(tx), -1))
    best = len(PENALTIES) - 1 - np.stack(errors)[::-1].argmin(0)
    return np.stack(said)[best, :, np.arange(y.shape[1])].T


def one_by_one(x, y, vx, vy, tx, targets: int) -> np.ndarray:
    """Some targets, a call each."""
    return np.concatenate([theirs(x, y[:, i : i + 1], vx, vy[:, i : i + 1], tx) for i in range(targets)], 1)


def main() -> int:
    options = arguments(__doc__)
    claim = "All penalties and shuffles of a number are fitted at least twice as fast as by scikit-learn, all targets at once."
    result = Result("rad_dino_evaluations", "speed", claim, options.quick)
    torch.set_num_threads(1)
    rows, ratios = [], []
    with threadpool_limits(1):
        for name, (n, d) in list(SHAPES.items())[: 1 if options.quick else None]:
            rng = np.random.default_rng(0)
            x, vx, tx = (rng.normal(size=(m, d)) for m in (n, 70, 280))
            y, vy = rng.normal(size=(n, 201)), rng.normal(size=(70, 201))
            ours = lambda x=x, y=y, vx=vx, vy=vy, tx=tx: ridge(x, y, vx, vy, tx, PENALTIES)[0]  # noqa: E731
            other = lambda x=x, y=y, vx=vx, vy=vy, tx=tx: theirs(x, y, vx, vy, tx)  # noqa: E731
            single = lambda x=x, y=y, vx=vx, vy=vy, tx=tx: one_by_one(x, y, vx, vy, tx, FEW)  # noqa: E731
            gap = float(np.abs(ours() - other()).max())
            assert gap < 1e-6, gap
            medians, spread = race({"vitkit": ours, "all": other, "single": single}, rounds=5 if options.quick else 15)
            low, high = spread["all"]
            ratio = medians["all"] / medians["vitkit"]
            each = medians["single"] / FEW * 201 / medians["vitkit"]
            rows.append(
                [name, 1000 * medians["vitkit"], 1000 * medians["all"], ratio, f"{low:.2f} to {high:.2f}", each, gap]
            )
            ratios.append(ratio)
    columns = [
        "images x width",
        "vitkit, ms",
        "scikit-learn, ms",
        "ratio",
        "quartiles",
        "ratio, a call a target",
        "largest gap",
    ]
    note = "A call a target: measured on 3 targets, scaled to 201."
    result.table("Ridge regression, 17 penalties, 201 targets", columns, rows, note)
    return result.finish(options.quick or min(ratios) >= 2)


if __name__ == "__main__":
    sys.exit(main())
