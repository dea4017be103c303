"""Training on good parts, the same for a method and its baselines, and what it leaves: heatmaps, a threshold, a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkit import weights
from vitkit.anomaly.memory import PatchMemory
from vitkit.data import hidden
from vitkit.data.defects import Defects, read_defects
from vitkit.data.images import Images
from vitkit.data.transforms import eval_view
from vitkit.errors import DataError
from vitkit.evaluate.localisation import threshold
from vitkit.passport import Preprocess
from vitkit.run import discover
from vitkit.run.batches import Say, evaluation_batches, held_out_loss, open_model, speaker, worker_count
from vitkit.run.config import Config, plain
from vitkit.run.folder import RunFolder

WORDS = {
    "ear": "EAR",
    "no_hint": "no hint",
    "random": "random masks",
    "identity": "nothing hidden",
    "memory": "patch memory",
}
CHANGES: dict[str, dict[str, Any]] = {
    "no_hint": {"hint": False},
    "random": {"mask": "random"},
    "identity": {"mask": "none"},
}
USUAL = (0.1, 0.4)  # share of a picture that masks usually hide
FOR_SCALE = 128  # good pictures that the mosaic's scale is chosen by


@dataclass
class Detector:
    """Something that looks at normalised images (B, C, H, W) and gives "map" (B, 1, H, W) and "score" (B,)."""

    name: str
    look: Callable[[Tensor], dict[str, Tensor]]
    passes: Callable[[], int] = lambda: 0  # pictures that went through a U-Net so far
    seconds: float = 0.0  # of training


@dataclass
class Scored:
    """What a detector says of validation and test parts: scores (n,), maps (n, H, W), hidden bool (n, H, W) of the test."""

    name: str
    seconds: float
    val: np.ndarray
    limit: float  # scores above it are alarms
    rate: float  # share of good parts above it, at most
    scores: np.ndarray
    maps: np.ndarray
    hidden: np.ndarray | None
    ms: float  # a picture
    passes: float  # U-Net passes a picture

    @property
    def words(self) -> str:
        return WORDS[self.name]


@dataclass(frozen=True)
class Work:
    """What all steps of a run need."""

    fabric: Any
    config: Config
    defects: Defects
    folder: RunFolder
    preprocess: Preprocess
    say: Say
    readable: dict[str, Images] = field(default_factory=dict)  # splits without their damaged files

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures as the model sees them."""
        height, width = self.preprocess.image_size
        return height, width

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 pictures to normalised ones on the device."""
        return self.preprocess.normalise(pixels.to(self.fabric.device))

    def batches(self, split: str) -> Iterator[dict[str, Any]]:
        """Batches of a split as the model sees it, "image" normalised."""
        images = self.readable.get(split) or self.defects.images.part(split)
        for batch in evaluation_batches(images, eval_view(self.preprocess), self.config.machine):
            yield {**batch, "image": self.prepare(batch["image"])}


@dataclass(frozen=True)
class Facts:
    """About the good training parts: share hidden of each, how the mosaic's scale was chosen, unreadable files."""

    shares: np.ndarray
    scales: list[dict[str, float]]
    bad: list[str]


def anomaly_job(fabric: Any, verb: str, name: str, config: Config) -> None:
    """Learn good parts; choose scale, epoch and threshold on good parts alone; look at the test parts once."""
    from vitkit.run.anomaly_page import judge
    from vitkit.run.jobs import _summary
    from vitkit.run.results import finish

    work, method = begin(fabric, verb, name, config)
    detectors, facts, state = learn_all(work, method, name)
    if fabric.is_global_zero:
        found = [look(work, one) for one in detectors]
        save(work, method, f"{verb}.{name}", found, detectors)
        summary = _summary(verb, name, method, state)
        judge(work, summary, method, found, facts)
        finish(work.folder, summary, state, work.say)
        for left in work.folder.path.glob("baselines/*/last.ckpt"):
            left.unlink()
    fabric.barrier()


def begin(fabric: Any, verb: str, name: str, config: Config) -> tuple[Work, Any]:
    """Data, model and method as the settings say."""
    from vitkit.run.jobs import require_kind

    inputs, machine = config.inputs, config.machine
    say = speaker(machine.quiet or not fabric.is_global_zero)
    defects = read_defects(
        inputs.data,
        val_fraction=inputs.val_fraction,
        test_fraction=inputs.test_fraction,
        seed=inputs.split_seed,
        group_column=inputs.group_column,
        say=say,
    )
    torch.manual_seed(machine.seed)
    vit = open_model(inputs, seed=machine.seed, say=say, num_classes=0)
    kind = discover.method_class(discover.load(verb, name))
    require_kind(kind, vit, f"{verb} {name}")
    # Both sides are resized to the model's input: a centre crop would cut defects at the border off.
    vit.passport.preprocess = replace(vit.passport.preprocess, crop_pct=1.0, crop_mode="squash")
    method = kind(vit.eval(), config.method).to(fabric.device)
    return Work(fabric, config, defects, RunFolder(config.train.out), vit.passport.preprocess, say), method


def learn_all(work: Work, method: Any, name: str) -> tuple[list[Detector], Facts, Any]:
    """The method and its baselines, trained on the good parts alone."""
    parts, facts = hidden_parts(work, method)
    state = learn(work, method, parts, work.folder)
    state.bad = facts.bad
    detectors = [Detector(name, method.inspect, lambda: method.passes, state.seconds)]
    detectors += [baseline(work, other, method, parts) for other in method.settings.baselines if other != "none"]
    return detectors, facts, state


# ---- what is hidden ----------------------------------------------------------------------------------------------------


def hidden_parts(work: Work, method: Any) -> tuple[dict[str, Images], Facts]:
    """Training and validation parts with their masks; the mosaic's scale is set from the training parts."""
    machine, parts, bad = work.config.machine, {}, []
    for split in ("train", "val"):
        images = work.defects.images.part(split)
        parts[split], unread = hidden.with_hidden(
            images,
            work.preprocess,
            lambda pixels: method.hide(work.prepare(pixels)),
            batch_size=machine.batch_size,
            workers=worker_count(machine, images),
            max_bad=work.config.train.max_bad,
        )
        work.readable[split] = parts[split].store.base  # type: ignore[attr-defined]
        bad += unread
    shares = hidden.shares(parts["train"])
    for sentence in check_shares(shares, work.defects.images.name, method.settings):
        work.say(sentence)
    scales = []
    if method.settings.hint and method.settings.mask == "attention":
        few = parts["train"].subset(np.linspace(0, len(shares) - 1, min(FOR_SCALE, len(shares))).astype(int))
        entries = [few.decode(i) for i in range(len(few))]
        pixels, masks = (torch.stack([entry[key] for entry in entries]) for key in ("image", "hidden"))
        scales = method.choose_scale(work.prepare(pixels), masks.to(work.fabric.device), machine.seed)
        work.say(f"mosaic of {method.scale} x {method.scale} pixels" + (", chosen from good parts" if scales else ""))
    return parts, Facts(shares, scales, bad)


def check_shares(shares: np.ndarray, name: str, settings: Any) -> list[str]:
    """What is to be said of the share of each picture that is hidden; DataError where nothing can be learnt from it."""
    if settings.mask != "attention":
        return []
    fix = "another --rule, --amount or --layer, a larger image_size, or a model whose attention has contrast (DINO)"
    if not shares.any():
        raise DataError(f"{name}: the masks hide nothing in any of {len(shares)} good parts", fix=fix)
    if shares.mean() > 0.95:
        raise DataError(
            f"{name}: the masks hide {shares.mean():.0%} of the good parts, so nothing is left to restore from", fix=fix
        )
    said = [f"hidden: {shares.mean():.0%} of a picture on average ({shares.min():.0%} to {shares.max():.0%})"]
    if not USUAL[0] <= shares.mean() <= USUAL[1]:
        said.append("WARNING: 10 to 40 % is usual; --amount changes it")
    if (shares == 0).any():
        none = int((shares == 0).sum())
        said.append(f"WARNING: nothing is hidden in {none} good parts: their attention has no contrast")
    return said


# ---- learning ----------------------------------------------------------------------------------------------------------


def learn(work: Work, method: Any, parts: dict[str, Images], folder: RunFolder) -> Any:
    """The loop over good parts; the epoch with the lowest loss on good validation parts is kept."""
    from vitkit.run.jobs import _fit

    train, still = work.config.train, hidden.HiddenView(work.size)
    view = replace(still, scale=train.crop_scale, hflip=train.hflip) if train.augment else still

    def validate(model: nn.Module) -> tuple[float, dict[str, float]]:
        loss = held_out_loss(model, parts["val"], still, work.prepare, work.config.machine)
        return -loss, {"val_loss": loss}

    state = _fit(
        work.fabric,
        method,
        parts["train"],
        view,
        work.prepare,
        work.config,
        folder,
        validate=validate,
        keep_best=True,
    )
    method.eval()
    return state


def baseline(work: Work, name: str, method: Any, parts: dict[str, Images]) -> Detector:
    """The same network, data, epochs and seed with something else hidden; or a memory of the ViT's own patch features."""
    seed, start = work.config.machine.seed, time.perf_counter()
    work.say(f"baseline: {WORDS[name]}")
    if name == "memory":
        batches = (batch["image"] for batch in work.batches("train"))
        memory = PatchMemory.of(method.vit, batches, share=method.settings.coreset, seed=seed)
        return Detector(name, memory.inspect, seconds=time.perf_counter() - start)
    torch.manual_seed(seed)
    twin = type(method)(method.vit, replace(method.settings, **CHANGES[name])).to(work.fabric.device)
    twin.scale = method.scale
    folder = RunFolder(work.folder.path / "baselines" / name)
    folder.path.mkdir(parents=True, exist_ok=True)
    state = learn(work, twin, parts, folder)
    return Detector(name, twin.inspect, lambda: twin.passes, state.seconds)


# ---- looking -----------------------------------------------------------------------------------------------------------


def look(work: Work, detector: Detector) -> Scored:
    """Validation and test parts through `detector`; the threshold is set on the good validation parts."""
    val = np.concatenate([detector.look(batch["image"])["score"].cpu().numpy() for batch in work.batches("val")])
    limit, rate = threshold(val, work.config.method.false_alarms)
    scores, maps, masks = [], [], []
    before, spent = detector.passes(), 0.0
    for batch in work.batches("test"):
        start = time.perf_counter()
        out = detector.look(batch["image"])
        scores.append(out["score"].cpu().numpy())  # waits for the device
        spent += time.perf_counter() - start
        maps.append(out["map"][:, 0].cpu().numpy())
        if "hidden" in out:
            masks.append(out["hidden"][:, 0].cpu().numpy())
    count = max(1, sum(map(len, scores)))
    return Scored(
        detector.name,
        detector.seconds,
        val,
        limit,
        rate,
        np.concatenate(scores) if scores else np.zeros(0, np.float32),
        np.concatenate(maps) if maps else np.zeros((0, *work.size), np.float32),
        np.concatenate(masks) if masks else None,
        1000 * spent / count,
        (detector.passes() - before) / count,
    )


def save(work: Work, method: Any, name: str, found: list[Scored], detectors: list[Detector]) -> None:
    """The U-Net, thresholds and the memory beside the passport of the ViT, which is stored only where it cannot be loaded
    again from where it came."""
    from vitkit.data.splits import save as save_splits

    vit, config, images = method.vit, work.config, work.defects.images
    record = {
        "method": name,
        "settings": {key: value for key, value in config.values.items() if value is not None},
        "data": {"name": images.name, "fingerprint": images.fingerprint, "counts": images.counts},
        "sha256": weights.sha256_of(weights.trunk_state(vit)),
    }
    vit.passport.lineage = [*vit.passport.lineage, plain(record)]
    extras = method.extras()
    for one in found:
        extras[f"anomaly.{one.name}.limit"] = torch.tensor([one.limit, one.rate], dtype=torch.float64)
        extras[f"anomaly.{one.name}.val"] = torch.from_numpy(one.val.copy())
    for detector in detectors:
        if detector.name == "memory":
            extras["memory.bank"] = detector.look.__self__.bank.cpu().contiguous()  # type: ignore[attr-defined]
    again = vit.passport.base.get("kind") in ("timm", "file", "run")
    weights.save_run(work.folder.path, vit, trained=[] if again else None, extras=extras)
    save_splits(images, work.folder.path / "splits.csv")
