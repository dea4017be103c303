"""What `vitkit caption` does: patch tokens once, the loop, texts of the scored images beside those of three baselines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitkit import weights
from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError
from vitkit.run.batches import evaluation_batches, open_data, open_model, speaker
from vitkit.run.config import Config
from vitkit.run.files import atomic, atomic_write
from vitkit.run.folder import RunFolder
from vitkit.settings import Machine
from vitkit.text import language, scores
from vitkit.text.settings import Settings
from vitkit.text.writer import ReportWriter, batches_of, patch_tokens, texts_of

ROWS = ("written", "other image", "nearest image", "most frequent")


@dataclass
class Part:
    """Images of one split with their patch tokens (N, T, D) and texts."""

    images: Images
    patches: np.ndarray
    texts: list[list[str]]

    def __len__(self) -> int:
        return len(self.texts)


def caption_job(config: Config, folder: RunFolder) -> None:
    """Train, score, write the run."""
    from vitkit.run import captioning_page

    with torch.random.fork_rng(devices=[]):
        language.require_transformers()
        scores._rouge(), scores._bleu()  # before hours of training, not after
        say = speaker(config.machine.quiet)
        images, texts = _texts(config, say)
        vit: Any = open_model(config.inputs, seed=config.machine.seed, say=say, num_classes=0).eval()
        parts = _parts(config, vit, images, texts, folder, say)
        settings, seed = config.method, config.machine.seed
        lm, tokenizer, new = language.open_language(
            settings, [t for cell in parts["train"].texts for t in cell], seed=seed
        )
        torch.manual_seed(seed)
        writer = ReportWriter(lm, tokenizer, parts["train"].patches.shape[2], settings, new=new)
        longest = max(writer.ids(cell).shape[1] for part in parts.values() for cell in part.texts)
        writer.require_room(parts["train"].patches.shape[1], longest)
        size = sum(p.numel() for p in writer.parameters())
        say(f"{size:,} weights train: projector, and {'a new language model' if new else settings.lm}")
        state = _fit(config, writer, parts, folder)
        writer.eval()
        room = max(writer.ids(cell).shape[1] for cell in parts["train"].texts)  # as long as what it learnt from
        _save(folder, writer, vit, room)
        judged = judge(writer, parts, room, config.machine)
        captioning_page.finish(folder, config, vit, images, parts, judged, state, size, say)


# ---------------------------------------------------------------- data


def _texts(config: Config, say: Callable) -> tuple[Images, list[list[str]]]:
    column, words = config.method.text_column, config.method.max_words
    images = open_data(replace(config.inputs, label_columns=()), say, keep=(column,))
    texts = texts_of(images, column, words)
    known = np.array([bool(cell) for cell in texts])
    if not known.any():
        raise DataError(f"{images.name}: column {column!r} holds no text", fix="name another text_column")
    cut = sum(len(text.split()) > words for cell in images.columns[column] for text in cell)
    if cut:
        say(f"{cut:,} texts are cut off after {words} words (max_words)")
    images, texts = images.subset(known), [cell for cell in texts if cell]
    said = f"{len(texts):,} images with {sum(map(len, texts)):,} texts from column {column!r}"
    say(said + (f"; {int((~known).sum()):,} without one are left out" if not known.all() else ""))
    return images, texts


def _parts(
    config: Config, vit: Any, images: Images, texts: list[list[str]], folder: RunFolder, say: Callable
) -> dict[str, Part]:
    """train (unlabelled images too), val and test; the scored one is test, else val."""
    where = {
        "train": np.isin(images.split, ("train", "unlabelled")),
        "val": images.split == "val",
        "test": images.split == "test",
    }
    if not where["train"].any() or not (where["test"].any() or where["val"].any()):
        missing = "to train on" if not where["train"].any() else "in a test or validation split to score"
        raise DataError(f"{images.name}: no images with text {missing}", fix="vitkit check --data ... shows the splits")
    if config.inputs.labels_per_class is not None:
        raise ConfigError("labels_per_class draws by class, and texts have none", fix="leave labels_per_class out")
    found = {}
    for name, rows in where.items():
        if rows.any():
            part = images.subset(rows)
            patches = patches_of(vit, part, config.machine, folder.path / "cache", lambda text: None)
            found[name] = Part(part, patches, [cell for cell, on in zip(texts, rows, strict=True) if on])
    one = found["train"].patches
    say(f"patch tokens of {len(images):,} images: {one.shape[1]} x {one.shape[2]} each, computed once")
    return found


@torch.inference_mode()
def patches_of(vit: Any, images: Images, machine: Machine, cache: Path | None, say: Callable) -> np.ndarray:
    """(N, T, D) float16 in image order, kept in a file named by a hash of model and images."""
    from vitkit.data.transforms import eval_view
    from vitkit.evaluate.features import cache_key

    path = None if cache is None else cache / f"patches-{cache_key(vit, images, patches=True)}.npy"
    if path is not None:
        try:
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
            if stored.ndim == 3 and len(stored) == len(images):
                return stored
        except (OSError, ValueError, EOFError):
            pass  # none yet, or damaged: computed again
    preprocess, device = vit.passport.preprocess, _device(machine)
    vit.to(device)
    rows = []
    for batch in evaluation_batches(images, eval_view(preprocess), machine):
        rows.append(patch_tokens(vit, preprocess.normalise(batch["image"].to(device))).half().cpu().numpy())
    vit.to("cpu")
    found = np.concatenate(rows)
    if not np.isfinite(found).all():
        raise DataError("patch tokens pass 65,504, more than float16 holds", fix="a model with a final norm")
    if path is not None:
        with atomic(path) as file:
            np.save(file, found, allow_pickle=False)
    return found


def _device(machine: Machine) -> torch.device:
    return torch.device("cpu" if machine.accelerator == "auto" else machine.accelerator)


# ---------------------------------------------------------------- training


def _fit(config: Config, writer: ReportWriter, parts: dict[str, Part], folder: RunFolder) -> Any:
    from vitkit.run.fabric import make_fabric
    from vitkit.run.loop import fit
    from vitkit.run.progress import Progress

    train, machine = config.train, config.machine
    fabric = make_fabric(machine)
    batches, steps = batches_of(
        writer, parts["train"].patches, parts["train"].texts, batch_size=machine.batch_size, seed=machine.seed
    )
    held = parts.get("val") if "test" in parts else None

    def validate(model: Any) -> tuple[float, dict[str, float]]:
        assert held is not None
        loss = float(np.mean(losses(model, held.patches, held.texts)))
        return -loss, {"val_loss": loss}

    with Progress(steps * train.epochs, machine.batch_size, steps_per_epoch=steps, quiet=machine.quiet) as progress:
        return fit(
            writer,
            batches,
            train=train,
            machine=machine,
            fabric=fabric,
            steps_per_epoch=steps,
            prepare=lambda x: x.float(),
            folder=folder,
            validate=validate if held is not None else None,
            progress=progress,
        )


def losses(writer: ReportWriter, patches: np.ndarray, texts: list[list[str]], size: int = 32) -> np.ndarray:
    """Nats a token of the first text of each image (N,)."""
    device, training = next(writer.parameters()).device, writer.training
    writer.eval()
    out = []
    for start in range(0, len(texts), size):
        x = torch.from_numpy(np.asarray(patches[start : start + size], np.float32)).to(device)
        ids = writer.ids([cell[0] for cell in texts[start : start + size]]).to(device)
        out.append(writer.text_losses(x, ids).cpu().numpy())
    writer.train(training)
    return np.concatenate(out).astype(float)


def write_all(writer: ReportWriter, patches: np.ndarray, longest: int, size: int = 32) -> list[str]:
    """A text for each of patches (N, T, D)."""
    device, out = next(writer.parameters()).device, []
    for start in range(0, len(patches), size):
        x = torch.from_numpy(np.asarray(patches[start : start + size], np.float32)).to(device)
        out += writer.write(x, longest=longest)
    return out


# ---------------------------------------------------------------- scores


@dataclass
class Judged:
    """Texts by every row of the table for the scored images, their ROUGE-L (N,), BLEU counts, intervals, and losses."""

    split: str
    said: dict[str, list[str]]
    rouge: dict[str, Any]
    bleu: dict[str, Any]
    gain: dict[str, Any]  # written minus each baseline, ROUGE-L, paired
    loss: Any
    loss_gain: Any  # other images' loss minus own, paired


def judge(writer: ReportWriter, parts: dict[str, Part], longest: int, machine: Machine) -> Judged:
    """Write for the scored images, once, and score beside what a writer without eyes would reach."""
    from vitkit.evaluate import statistics

    split = "test" if "test" in parts else "val"
    part, train = parts[split], parts["train"]
    other = strangers(part.images, machine.seed)
    near = nearest_rows(np.asarray(part.patches), np.asarray(train.patches))
    common = scores.most_frequent(train.texts)
    patches = np.asarray(part.patches)
    said = {
        "written": write_all(writer, patches, longest),
        "nearest image": [train.texts[i][0] for i in near],
        "most frequent": [common] * len(part),
    }
    said["other image"] = [said["written"][i] for i in other]
    said = {name: said[name] for name in ROWS}
    groups = part.images.group
    each = {name: scores.rouge_l(texts, part.texts) for name, texts in said.items()}
    counts = {name: scores.bleu_counts(texts, part.texts) for name, texts in said.items()}
    zero = np.zeros(len(part))
    mean = statistics.case_mean
    own, strange = losses(writer, patches, part.texts), losses(writer, patches[other], part.texts)
    return Judged(
        split,
        said,
        {name: statistics.bootstrap(mean, zero, values, groups=groups, seed=0) for name, values in each.items()},
        {name: statistics.bootstrap(scores.bleu4, rows, groups=groups, seed=0, n=500) for name, rows in counts.items()},
        {
            name: statistics.paired_bootstrap(mean, zero, each["written"], each[name], groups=groups, seed=0)
            for name in ROWS[1:]
        },
        statistics.bootstrap(mean, zero, own, groups=groups, seed=0),
        statistics.paired_bootstrap(mean, zero, strange, own, groups=groups, seed=0),
    )


def strangers(images: Images, seed: int) -> np.ndarray:
    """(N,) for each image another one, of another group (patient) where there are two, each used about once."""
    n = len(images)
    if n < 2:
        return np.zeros(n, int)
    group = np.arange(n) if images.group is None else np.unique(images.group, return_inverse=True)[1]
    order = np.argsort(np.random.default_rng(seed).permutation(group.max() + 1)[group], kind="stable")
    shift = max(1, min(int(np.bincount(group).max()), n - 1))
    out = np.empty(n, int)
    out[order] = np.roll(order, shift)
    return out


def nearest_rows(patches: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(N,) the row of `among` whose mean patch token, centred and normalised, is most similar."""
    a, b = (np.asarray(x, np.float32).mean(1) for x in (patches, among))
    centre = b.mean(0)
    a, b = (x - centre for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-8) for x in (a, b))
    return (a @ b.T).argmax(1)


def perplexity(loss: float) -> float:
    """exp of nats a token, without overflow."""
    return math.exp(min(loss, 50.0))


# ---------------------------------------------------------------- the run folder


def _save(folder: RunFolder, writer: ReportWriter, vit: Any, longest: int) -> None:
    """The ViT as a run folder's model, the language model as transformers saves it, the projector beside."""
    from dataclasses import asdict

    from vitkit.parts.statefiles import save_state

    weights.save_run(folder.path, vit)
    writer.lm.save_pretrained(folder.path / "lm")
    writer.tokenizer.save_pretrained(folder.path / "lm")
    save_state(folder.path / "projector.safetensors", writer.projector.state_dict())
    atomic_write(
        folder.path / "writer.json",
        json.dumps({"longest": longest, "settings": asdict(writer.settings)}, indent=1) + "\n",
    )


def load_writer(run: str | Path) -> tuple[Any, ReportWriter, int]:
    """(ViT, writer, most tokens of a text) of a finished run, ready to write."""
    from safetensors.torch import load_file

    path = Path(run)
    if not (path / "writer.json").is_file():
        raise ConfigError(f"{run} is no run of vitkit caption", fix="the --out of one that has finished")
    kept = json.loads((path / "writer.json").read_text(encoding="utf-8"))
    settings = Settings(**kept["settings"])
    vit: Any = weights.load(str(path), num_classes=0, say=lambda text: None).eval()
    lm, tokenizer = language.load(path / "lm")
    state = load_file(path / "projector.safetensors")
    writer = ReportWriter(lm, tokenizer, state["0.weight"].shape[1], settings)
    writer.projector.load_state_dict(state)
    return vit, writer.eval(), int(kept["longest"])


def write_texts(run: str | Path, data: Any, *, out: str | Path | None = None, batch_size: int = 32) -> dict[str, str]:
    """{image: text} for any images; with `out` also as CSV."""
    import pandas as pd

    from vitkit.data import read

    vit, writer, longest = load_writer(run)
    images = data if isinstance(data, Images) else read(data, label_columns=[] if _table(data) else None, say=None)
    patches = patches_of(vit, images, Machine(batch_size=batch_size, workers=0), None, lambda text: None)
    found = dict(zip(images.names, write_all(writer, patches, longest), strict=True))
    if out is not None:
        atomic_write(out, pd.DataFrame({"image": list(found), "text": list(found.values())}).to_csv(index=False))
    return found


def _table(data: Any) -> bool:
    return str(data).lower().endswith((".csv", ".tsv", ".parquet"))
