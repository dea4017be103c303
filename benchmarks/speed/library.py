"""vitkit itself: `embed` end to end against a straightforward timm script, the linear probe against scikit-learn, start-up.

Embedding: the real DeiT-Ti/16 on the photographs of `clothing` at 96 px, files to features. The script is what its users
write: ImageFolder-like loading, timm's own transform, a DataLoader, `forward_features` and `forward_head` under no_grad; both
get one thread and no workers, and their features must agree. Probe: the same features, a grid of penalties, equal accuracy.
Start-up: whole processes, in turn.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings

import numpy as np
import torch
from PIL import Image

from benchmarks.common import Result, arguments, data, race
from vitkit import weights
from vitkit.data import read
from vitkit.evaluate import linear
from vitkit.evaluate.features import features


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "embed is not slower than the script (equal features), the probe is at least 5 times faster than scikit-learn on the "
        "same grid at equal accuracy, `import vitkit` and `vitkit --help` take under 0.3 s."
    )
    result = Result("library", "speed", claim, options.quick)
    holds = embedding(result, 100 if options.quick else 600, 2 if options.quick else 5)
    holds &= probing(result, options.quick)
    holds &= starting(result, 3 if options.quick else 11)
    return result.finish(options.quick or holds)


def embedding(result: Result, count: int, rounds: int) -> bool:
    import timm
    from torch.utils.data import DataLoader, Dataset

    model = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    vit = weights.load(str(model), image_size=96, say=None).eval()
    images = read(data("clothing"), say=None).subset(np.arange(count))
    pixels = vit.passport.preprocess
    transform = timm.data.create_transform(
        (3, 96, 96), interpolation=pixels.interpolation, mean=pixels.mean, std=pixels.std, crop_pct=pixels.crop_pct
    )

    class Files(Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(images.path(index)).convert("RGB"))

    def script() -> np.ndarray:
        with torch.no_grad():
            rows = [
                vit.forward_head(vit.forward_features(x), pre_logits=True) for x in DataLoader(Files(), batch_size=64)
            ]
        return torch.cat(rows).numpy()

    ours, theirs = features(vit, images), script()
    cosine = float((ours * theirs).sum(1).min() / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)).max())
    apart = np.abs(ours - theirs).max() / np.abs(theirs).max()
    medians, spread = race({"ours": lambda: features(vit, images), "script": script}, rounds=rounds, warmup=1)
    ratio = medians["script"] / medians["ours"]
    low, high = spread["script"]
    result.table(
        "Embedding files, DeiT-Ti/16 at 96 px, one thread",
        ["images", "ours, img/s", "script, img/s", "script / ours", "quartiles", "largest difference"],
        [[count, round(count / medians["ours"]), round(count / medians["script"]), round(ratio, 2), f"{low:.2f} to {high:.2f}",
          f"{apart:.1e}"]],
        "difference: resizing uint8 tensors against PIL, relative to the largest feature",
    )  # fmt: skip
    return ratio >= 0.97 and cosine > 0.95


def probing(result: Result, quick: bool) -> bool:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from vitkit.evaluate import metrics

    model = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    images = read(data("clothing"), say=None)
    vit = weights.load(str(model), image_size=96, say=None).eval()
    x, y, split = features(vit, images), images.labels, images.split
    parts = {name: np.flatnonzero(split == name) for name in ("train", "val", "test")}
    if quick:
        parts["train"] = parts["train"][::4]
    penalties = linear.Settings().penalties
    start = time.perf_counter()
    probe = linear.fit(x[parts["train"]], y[parts["train"]], x[parts["val"]], y[parts["val"]])
    ours = time.perf_counter() - start
    start = time.perf_counter()
    scaler = StandardScaler().fit(x[parts["train"]])
    best = (-1.0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for penalty in penalties:
            model_ = LogisticRegression(C=1 / (penalty * len(parts["train"])), max_iter=1000)
            model_.fit(scaler.transform(x[parts["train"]]), y[parts["train"]])
            score = model_.score(scaler.transform(x[parts["val"]]), y[parts["val"]])
            best = max(best, (score, model_), key=lambda pair: pair[0])
    theirs = time.perf_counter() - start
    a = metrics.accuracy(y[parts["test"]], probe.scores(x[parts["test"]]))
    b = best[1].score(scaler.transform(x[parts["test"]]), y[parts["test"]])
    result.table(
        f"Linear probe over {len(penalties)} penalties, {len(parts['train'])} x {x.shape[1]} features, one thread",
        ["", "seconds", "test accuracy"],
        [
            ["ours", round(ours, 2), a],
            ["scikit-learn", round(theirs, 2), b],
            ["scikit-learn / ours", round(theirs / ours, 1), ""],
        ],
    )
    return abs(a - b) < 0.02 and theirs / ours >= 5


def starting(result: Result, rounds: int) -> bool:
    commands = {
        "python -c pass": ["-c", "pass"],
        "import vitkit": ["-c", "import vitkit"],
        "vitkit --help": ["-m", "vitkit", "--help"],
        "vitkit methods": ["-m", "vitkit", "methods"],
        "vitkit adapt adaptformer --help": ["-m", "vitkit", "adapt", "adaptformer", "--help"],
        "import timm": ["-c", "import timm"],
    }
    calls = {
        name: (lambda words=words: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL))
        for name, words in commands.items()
    }
    medians, _ = race(calls, rounds=rounds, warmup=1)
    result.table(
        "Start-up of a process", ["command", "seconds"], [[name, round(value, 3)] for name, value in medians.items()]
    )
    return medians["import vitkit"] < 0.3 and medians["vitkit --help"] < 0.3


if __name__ == "__main__":
    sys.exit(main())
