"""`vitkit embed --format parquet`: an archive of any size, shard by shard, here or (`--engine ray`) on many machines.

Both engines compute a shard by `compute`, in the same batches, so that they write the same rows. A killed job goes on at
the first missing shard, with either engine. A file that cannot be read is left out, named in the manifest, counted,
and tried again by the next run; where most of a shard cannot be read (a disk that is not mounted, say) nothing is written
and the job stops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError, WeightsError
from vitkit.run import parquet
from vitkit.run.batches import open_data, open_model, speaker, worker_count
from vitkit.run.folder import RunFolder
from vitkit.run.parquet import Plan, Shard

if TYPE_CHECKING:
    from vitkit.run.config import Config

Step = Callable[[int], None]  # called with the number of images done in the shard
FEW = 10  # unreadable files that never stop a job, so that a short last shard does not
FREE = frozenset({"engine", "actors", "max_bad"})  # beside measure.FREE: these change nothing that is written


@dataclass(frozen=True)
class Sharded:
    """A finished `vitkit embed` in Parquet: where it is, and how many images it holds and left out."""

    out: Path
    rows: int
    dim: int
    shards: int
    skipped: list[tuple[str, str]]

    def read(self) -> parquet.Embedded:
        """All of it in memory; `vitkit.run.parquet.tables` goes shard by shard."""
        return parquet.read(self.out)


@dataclass
class Work:
    """What an engine needs to compute any shard."""

    vit: Any
    plan: Plan
    out: Path
    batch_size: int
    workers: int
    max_bad: float


def asked(config: Config) -> bool:
    """Whether these settings ask for shards; "auto" goes on with what is in the folder."""
    own = config.own
    if own.engine == "ray" and own.format == "npy":
        raise ConfigError("engine is ray, which writes Parquet, and format is npy", fix="leave format out")
    if own.format == "npy":
        _refuse_shard_settings(own)
    if own.engine == "ray" or own.format != "auto":
        return own.engine == "ray" or own.format == "parquet"
    begun = RunFolder(own.out or ".")
    goes_on = bool(own.out) and begun.is_run() and begun.read_config().get("format") == "parquet"
    if not goes_on:
        _refuse_shard_settings(own)
    return goes_on


def _refuse_shard_settings(own: Any) -> None:
    """ConfigError where a setting of shards was given and one array is to be written."""
    for one in fields(own):
        if one.name in ("shard_rows", "actors", "max_bad") and getattr(own, one.name) != one.default:
            raise ConfigError(
                f"{one.name} is {getattr(own, one.name)}, and that is for shards",
                fix="--format parquet, or leave it out",
            )


def embed_sharded(config: Config) -> Sharded:
    """Write the features of every image as Parquet shards; shards that are there already are kept."""
    from vitkit.evaluate.features import cache_key
    from vitkit.run.measure import Counter, device_of

    own, machine = config.own, config.machine
    if not own.out:
        raise ConfigError("out is empty, and vitkit embed writes its features", fix="--out embeddings")
    if not 0 <= own.max_bad <= 1:
        raise ConfigError(f"max_bad is {own.max_bad:g}", fix="a share of files between 0 and 1")
    remote = own.engine == "ray"
    device = device_of(replace(machine, accelerator="cpu") if remote else machine, "embed")
    say = speaker(machine.quiet)
    with torch.random.fork_rng(devices=[]), RunFolder(own.out) as folder:
        finished = _claim(folder, config)
        images = open_data(config.inputs, say)
        vit: Any = open_model(config.inputs, seed=machine.seed, say=say).eval().to(device)
        plan = Plan(images, own.shard_rows, feature_dim(vit), cache_key(vit, images.subset([])))
        there = (parquet.written(folder.path, plan, n) for n in range(plan.shards))
        done = [one for one in there if one is not None and not _mended(plan, one, vit)]
        missing = sorted(set(range(plan.shards)) - {one.number for one in done})
        if finished and not missing and (folder.path / parquet.MANIFEST).is_file():
            say(f"{folder.path} is finished; nothing to do")
            return _result(folder.path, parquet.read_manifest(folder.path))
        if finished:  # files or weights changed since
            why = "are of other files or weights, lack files that can be read now, or were removed"
            say(f"{folder.path}: {len(missing)} of {plan.shards} shards {why}")
            (folder.path / "summary.json").unlink()
            _claim(folder, config)
        (folder.path / parquet.MANIFEST).unlink(missing_ok=True)
        if done and not finished:
            say(f"{len(done)} of {plan.shards} shards are there already")
        work = Work(vit, plan, folder.path.absolute(), machine.batch_size, worker_count(machine, images), own.max_bad)
        left = sum(plan.size(n) for n in missing)
        with Counter(left, quiet=machine.quiet) as counter:
            step = counter.at("archive")
            for shard in _engine(work, missing, config, device, step, say):
                done.append(shard)
                for name, why in shard.skipped[:3]:
                    say(f"left out: {name}: {why.splitlines()[0]}")
        if not any(shard.rows for shard in done):
            raise DataError(
                f"{images.name}: none of {len(images)} images can be read; the first: {done[0].skipped[0][1]}",
                fix="vitkit check says what is wrong with them",
            )
        vit.passport.save(folder.path)
        about = {"model": config.inputs.model, "data": images.name, "fingerprint": images.fingerprint}
        manifest = parquet.finish(folder.path, plan, done, about)
        result = _result(folder.path, manifest)
        facts = {"images": result.rows, "skipped": len(result.skipped), "feature_dim": plan.dim, "shards": plan.shards}
        folder.finish({"verb": "embed", "metrics": [], **facts, "engine": own.engine, "img_per_s": counter.speed})
        if result.skipped:
            say(f"{len(result.skipped)} files could not be read and are left out: {folder.path / parquet.MANIFEST}")
    return result


def local(work: Work, shards: list[int], device: torch.device, step: Step) -> Iterator[Shard]:
    """One shard after the other in this process."""
    before = 0

    def within(done: int) -> None:
        step(before + done)

    for number in shards:
        yield compute(work, number, device, within)
        before += work.plan.size(number)


def compute(work: Work, number: int, device: torch.device, step: Step | None = None) -> Shard:
    """Features of one shard's images, written atomically. Both engines."""
    images = work.plan.part(number)
    x, bad = extract(work.vit, images, work.batch_size, work.workers, device, work.plan.dim, step)
    if len(bad) > max(work.max_bad * len(images), FEW):
        position, why = bad[0]
        raise DataError(
            f"shard {number}: {len(bad)} of {len(images)} files cannot be read, more than max_bad={work.max_bad:g} allows\n"
            f"  the first, {images.path(position)}: {why}",
            fix="is the disk mounted (on every node)? mend or remove the files, or allow more with --max_bad",
        )
    return parquet.write(work.out, work.plan, number, images, x, bad)


@torch.inference_mode()
def extract(
    vit: Any, images: Images, batch_size: int, workers: int, device: torch.device, dim: int, step: Step | None
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """(features (n, D) of the readable images in order, (position, reason) of the others)."""
    from vitkit import tokens
    from vitkit.data.transforms import eval_view

    preprocess = vit.passport.preprocess
    batches = DataLoader(
        _Pictures(images, eval_view(preprocess)),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_batch,
        generator=torch.Generator().manual_seed(0),  # else it would draw from the caller's
        worker_init_fn=_one_thread,
    )
    out, bad, done = [np.empty((0, dim), np.float32)], [], 0
    for pixels, count, errors in batches:
        bad += errors
        if pixels is not None:
            rows = tokens.feature(vit, preprocess.normalise(pixels.to(device, non_blocking=True))).float().cpu().numpy()
            if not np.isfinite(rows).all():
                raise WeightsError(
                    f"the model gives features that are not finite, among images {done} to {done + count} of a shard",
                    fix="the weights may be damaged; load them again in float32",
                )
            out.append(rows)
        done += count
        if step is not None:
            step(done)
    return np.concatenate(out), bad


def feature_dim(vit: Any) -> int:
    """Values in a feature, by asking the model for one of a black picture."""
    from vitkit import tokens

    preprocess, device = vit.passport.preprocess, next(vit.parameters()).device
    black = torch.zeros(1, preprocess.in_chans, *preprocess.image_size, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        found = tokens.feature(vit, preprocess.normalise(black))
    if found.ndim != 2:
        raise WeightsError(
            f"the model gives {found.ndim - 1} axes a picture instead of one pooled feature",
            fix='load it with a pooling, for example global_pool="avg"',
        )
    return found.shape[1]


class _Pictures(Dataset):
    """position -> (position, prepared picture, or None and why it cannot be read)."""

    def __init__(self, images: Images, view: Any):
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor | None, str]:
        try:
            return i, self.view(self.images.decode(i)), ""
        except DataError as error:
            return i, None, str(error)


def _mended(plan: Plan, shard: Shard, vit: Any) -> bool:
    """Whether some file that was left out of a finished shard can be read now (a right given, a disk back)."""
    from vitkit.data.transforms import eval_view

    if not shard.skipped:
        return False
    part, wrong = plan.part(shard.number), {name for name, _ in shard.skipped}
    pictures = _Pictures(part, eval_view(vit.passport.preprocess))
    return any(name in wrong and pictures[i][1] is not None for i, name in enumerate(part.names))


def _batch(samples: list) -> tuple[torch.Tensor | None, int, list[tuple[int, str]]]:
    good = [picture for _, picture, _ in samples if picture is not None]
    bad = [(i, why) for i, picture, why in samples if picture is None]
    return (torch.stack(good) if good else None), len(samples), bad


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _engine(
    work: Work, missing: list[int], config: Config, device: torch.device, step: Any, say: Callable[[str], None]
) -> Iterator[Shard]:
    total = sum(work.plan.size(n) for n in missing)
    if config.own.engine == "local" or not missing:
        yield from local(work, missing, device, lambda done: step(done, total))
        return
    from vitkit.run.ray_embed import remote

    done = 0
    for shard in remote(work, missing, config.own.actors, config.machine, say):
        done += work.plan.size(shard.number)
        step(done, total)
        yield shard


def _claim(folder: RunFolder, config: Config) -> bool:
    """Make the folder ours; whether it was finished already (it is not locked then)."""
    from vitkit.run import measure
    from vitkit.run.config import main_line

    called = sys.argv[1:2] == ["embed"] and Path(sys.argv[0]).stem in ("vitkit", "__main__")
    command = main_line() if called else "vitkit.embed(...)"
    values = {**config.values, "format": "parquet"}  # "auto" where Ray began it
    return folder.claim(values, "embed", free=measure.FREE | FREE, command=command) == "finished"


def _result(out: Path, manifest: dict[str, Any]) -> Sharded:
    skipped = [(name, why) for name, why in manifest["skipped"]]
    return Sharded(out, manifest["rows"], manifest["dim"], len(manifest["shards"]), skipped)
