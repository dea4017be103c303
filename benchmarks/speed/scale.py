"""Past one process: embedding by Ray Data against the local engine and a plain script, and training by DDP, on this machine.

Embedding: DeiT-Ti/16 at 96 px over `clothing` (JPEG files), into Parquet shards. The plain script is timm, torchvision and a
DataLoader that collects one array. Ray starts an actor a core, each with one thread. Its start is reported apart: the pace
is that of the shards after the first one of each actor. Rows must be equal bit for bit where threads are (one a process).

Training: masked autoencoding of the digits by a small ViT, one process with batch 64 against two with 32 each, all with one
thread, seconds of the steps alone. Losses must agree.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Result, arguments, data

ARCH = {"embed_dim": 64, "depth": 4, "num_heads": 4, "patch_size": 4}
MAE = ["--model", "VisionTransformer", "--arch_kwargs", json.dumps(ARCH), "--pretrained", "false", "--image_size", "32"]
MAE += ["--in_chans", "1", "--decoder_dim", "48", "--decoder_depth", "2", "--decoder_heads", "4", "--data", "digits"]
ROWS = 64  # images a shard: short, so that the pace can be read from the times of the files


def main() -> int:
    options = arguments(__doc__)
    claim = (
        "Ray Data on one machine writes the same rows as the local engine, bit for bit, at no less than 0.9 of its pace once "
        "it has started; two training processes reach the losses of one with the double batch, in less time a step."
    )
    result = Result("scale", "speed", claim, options.quick)
    rounds = 1 if options.quick else 3
    folder = Path(tempfile.mkdtemp())
    try:
        equal, pace = embedding(result, folder, rounds, quick=options.quick)
        alike, gain = training(result, folder, rounds, quick=options.quick)
    finally:
        shutil.rmtree(folder)
    return result.finish(options.quick or (equal and alike and pace >= 0.9 and gain > 1.0))


def embedding(result: Result, folder: Path, rounds: int, *, quick: bool) -> tuple[bool, float]:
    """(rows are equal, pace of Ray over that of the local engine)."""
    from vitkit.run import parquet

    cores = os.cpu_count() or 1
    images, size = data("clothing") / "test" if quick else data("clothing"), 96
    arms = {"plain script": None, "vitkit, local": "local", f"vitkit, Ray, {cores} actors": "ray"}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    paces: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name, engine in arms.items():
            out = folder / f"{engine}{turn}"
            began = time.perf_counter()
            paces[name].append(plain(images, size) if engine is None else embedded(images, size, engine, out))
            seconds[name].append(time.perf_counter() - began)
            print(f"  {name}, round {turn}: {seconds[name][-1]:.1f} s, {paces[name][-1]:.0f} images/s", flush=True)
    one, other = parquet.read(folder / "local0"), parquet.read(folder / "ray0")
    equal = np.array_equal(one.x, other.x) and one.names == other.names
    median = {name: statistics.median(values) for name, values in paces.items()}
    rows = [[name, round(median[name]), round(statistics.median(seconds[name]), 1)] for name in arms]
    result.table(
        f"Embedding {len(one.x):,} JPEG files, DeiT-Ti/16, {size} px",
        ["", "images/s once started", "seconds in all"],
        rows,
        f"medians of {rounds} rounds in turn, new processes each time; {cores} cores, one thread a process",
    )
    result.note(f"rows of both engines are {'equal bit for bit' if equal else 'NOT equal'}")
    return equal, median[f"vitkit, Ray, {cores} actors"] / median["vitkit, local"]


def embedded(images: Path, size: int, engine: str, out: Path) -> float:
    """Images a second of one `vitkit embed` after its first shard (of each actor)."""
    weights = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    words = ["embed", "--model", str(weights), "--image_size", str(size), "--data", str(images), "--out", str(out)]
    run([*words, "--format", "parquet", "--shard_rows", str(ROWS), "--engine", engine])
    times = sorted(file.stat().st_mtime for file in (out / "features").iterdir())
    first = (os.cpu_count() or 1) if engine == "ray" else 1
    first = min(first, len(times) - 1)
    return ROWS * (len(times) - first) / (times[-1] - times[first - 1])


def plain(images: Path, size: int) -> float:
    """Images a second of what one writes by hand, in a new process."""
    script = f"""
import time, torch, timm
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from pathlib import Path
root = Path({str(images)!r})
folders = [root / s for s in ("train", "val", "test")] if (root / "train").is_dir() else [root]
view = v2.Compose([v2.ToImage(), v2.Resize({size}, antialias=True), v2.CenterCrop({size}),
                   v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
vit = timm.create_model("deit_tiny_patch16_224", pretrained=False, num_classes=0, img_size={size}).eval()
count, found = 0, []
began = time.perf_counter()
with torch.inference_mode():
    for folder in folders:
        for x, _ in DataLoader(ImageFolder(folder, view), batch_size=64, num_workers={max(1, (os.cpu_count() or 2) - 1)}):
            found.append(vit(x))
            count += len(x)
print(count / (time.perf_counter() - began))
"""
    return float(run([], command=[sys.executable, "-c", script]).split()[-1])


def training(result: Result, folder: Path, rounds: int, *, quick: bool) -> tuple[bool, float]:
    """(losses agree, seconds of one process over those of two)."""
    epochs = "2" if quick else "12"
    arms = {"1 process": ["--batch_size", "64"], "2 processes": ["--batch_size", "32", "--devices", "2"]}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name, more in arms.items():
            out = folder / f"mae{len(more)}-{turn}"
            run(["pretrain", "mae", *MAE, *more, "--epochs", epochs, "--eval_every", epochs, "--out", str(out)])
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            trained = [one for one in records if one.get("loss") is not None]
            seconds[name].append(trained[-1]["seconds"])
            losses[name] = [one["loss"] for one in trained]
            print(f"  training, {name}, round {turn}: {seconds[name][-1]:.1f} s", flush=True)
    gap = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows: list[list[Any]] = [[name, round(value, 2)] for name, value in medians.items()]
    result.table(
        f"Training: {epochs} epochs of MAE on the digits",
        ["", "seconds of the steps"],
        rows,
        f"medians of {rounds} rounds in turn; batch 64 in all, one thread a process; the start of processes is not counted",
    )
    result.note(f"losses differ by at most {gap:.1e} (relative)")
    return gap < 1e-3, medians["1 process"] / medians["2 processes"]


def run(words: list[str], command: list[str] | None = None) -> str:
    """The output of a vitkit command (or another one) in a new process with one thread."""
    command = command or [sys.executable, "-m", "vitkit", *words, "--quiet", "true"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
