"""The verbs as Python functions: `vitkit.adapt("adaptformer", model=..., data=..., out=...)` is the command of those words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkit.errors import ConfigError, nearest
from vitkit.run import discover
from vitkit.run.playing import rl as rl
from vitkit.run.starting import ATTACK, REQUIRED, settings_for, train
from vitkit.settings import (
    CLEANLINESS,
    FROZEN,
    METADATA,
    SEGMENTING,
    TRAINED,
)

if TYPE_CHECKING:
    from vitkit.run.anomaly_predict import AnomalyPredictions
    from vitkit.run.model import Model, Predictions, Run
    from vitkit.run.volume_predict import VolumePredictions

PROTOCOLS = (*FROZEN, *TRAINED, *SEGMENTING, METADATA, CLEANLINESS)  # of `vitkit evaluate`


def pretrain(method: str, *, model: Any = None, data: Any = None, out: Any = None, **settings: Any) -> Run:
    """Pre-train a ViT further on images without labels; `vitkit pretrain <method> --help` lists the settings."""
    return train("pretrain", method, {"model": model, "data": data, "out": out, **settings})


def adapt(method: str, *, model: Any = None, data: Any = None, out: Any = None, **settings: Any) -> Run:
    """Adapt a ViT to labelled images; `vitkit adapt <method> --help` lists the settings."""
    return train("adapt", method, {"model": model, "data": data, "out": out, **settings})


def clean(method: str, *, model: Any = None, data: Any = None, out: Any = None, **settings: Any) -> Run:
    """Remove position-dependent artefacts from a ViT's patch features, on images without labels; `vitkit clean <method>
    --help` lists the settings."""
    return train("clean", method, {"model": model, "data": data, "out": out, **settings})


def anomaly(method: str, *, model: Any = None, data: Any = None, out: Any = None, **settings: Any) -> Run:
    """Learn from pictures of good parts to find defects in others; `vitkit anomaly <method> --help` lists the settings."""
    return train("anomaly", method, {"model": model, "data": data, "out": out, **settings})


def explain(method: Any = None, data: Any = None, *, model: Any = None, out: Any = None, **settings: Any) -> Any:
    """Show where a ViT looks: attention, rollout, Grad-CAM and Prompt-CAM maps with their faithfulness, patch PCA and
    similar patches, in one page.

    `explain("runs/a", "photos/", classes="cat,dog")` explains a model and returns its figures; `explain("prompt_cam",
    model=..., data=..., out=...)` trains one that explains itself and returns the run.
    """
    known = [one.name for one in discover.trainable("explain")]
    if isinstance(method, str) and method.replace("-", "_") in known:
        return train("explain", method, {"model": model, "data": data, "out": out, **settings})
    from vitkit.run.explaining import explain_job

    given = {"model": _named("explain", method, model), "data": data, "out": out, **settings}
    return explain_job(settings_for("explain", None, _plain(given)))


def attack(method: Any = None, *, model: Any = None, data: Any = None, out: Any = None, **settings: Any) -> Any:
    """How easily is this model fooled by someone who only has the public trunk it was adapted from?

    `attack("runs/a", data="photos/")` crafts adversarial images on that trunk (DTA), beside simpler attacks and random
    noise of the same size, and returns the success rates; `attack("harden", model="runs/a", data=..., out=...)` trains
    the model on such images and returns the run.
    """
    known = [one.name for one in discover.trainable("attack")]
    if isinstance(method, str) and method.replace("-", "_") in known:
        return train("attack", method, {"model": model, "data": data, "out": out, **settings})
    from vitkit.run.attacking import attack_job

    if method == ATTACK:
        method = None
    given = {"model": _named("attack", method, model), "data": data, "out": out, **settings}
    return attack_job(settings_for("attack", None, _plain(given)))


def _named(verb: str, first: Any, model: Any) -> Any:
    """The model, which is the first argument or `model`."""
    if first is not None and model is not None:
        raise not_a_method(verb, str(first), f"vitkit.{verb} got '{first}' and model='{model}'")
    return model if first is None else first


def not_a_method(verb: str, word: str, what: str) -> ConfigError:
    """The error for a `word` in the place of a method or model, where the model is given elsewhere."""
    known = [method.name for method in discover.trainable(verb)]
    close = nearest(word.replace("-", "_"), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(what, fix=f"{hint}a method that trains ({', '.join(known)}) with a model, or one model")


def load(model: str | Path, **settings: Any) -> Model:
    """A model ready to use: timm name, hub id, weights file or run folder, its head included.

    `load("runs/a").predict("new/")`, `.embed(...)`, `.vit` (a plain timm model), `.passport`. Further keywords are those of
    `vitkit.weights.load` (arch, pretrained, image_size, in_chans).
    """
    from vitkit import weights
    from vitkit.run.model import Model

    return Model(weights.load(str(model), **{"num_classes": None, **settings}))


def predict(
    run: str | Path,
    data: Any,
    *,
    out: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    clips: int = 1,
    crops: int = 1,
    detector: str | None = None,
) -> Predictions | VolumePredictions | AnomalyPredictions:
    """Class probabilities of a finished adaptation for new images; `out` also writes them as CSV. A run that segments volumes
    gives their masks; `out` is then the folder for NIfTI files. One that finds defects gives scores, alarms and heatmaps;
    `out` is their folder, and `detector` memory asks for its patch memory instead of its U-Net.

    Videos: the mean over `clips` clips of each, and over `crops` crops of each clip along the long side.
    """
    from vitkit.run.volume_predict import predict_volumes, segments_volumes

    if segments_volumes(run):
        return predict_volumes(run, data, out=out)
    from vitkit.run.anomaly_predict import finds_defects, predict_anomalies

    if finds_defects(run):
        more = {} if detector is None else {"detector": detector}
        return predict_anomalies(run, data, out=out, batch_size=batch_size, workers=workers, **more)
    if detector is not None:
        raise ConfigError(f"{run} is no anomaly run, and detector is for these", fix="leave detector out")
    model = load(run, say=lambda text: None)
    found = model.predict(data, batch_size=batch_size, workers=workers, clips=clips, crops=crops)
    if out:
        from vitkit.run.files import atomic_write

        atomic_write(out, found.table().to_csv(index=False))
    return found


def evaluate(*, model: Any = None, data: Any = None, **settings: Any) -> dict[str, Any]:
    """Score a backbone on your own labelled images by published protocols, with intervals and cost, in one table.

    Frozen (the trunk runs once, its features are cached): knn, linear; mlknn for several labels an image; linear_grid, the
    radiology benchmark's SGD heads; few_shot, k images a class drawn many times. Trained, each a run in OUT/PROTOCOL:
    full, lora, bitfit, adaptformer, dvpt, vpt. Masks instead of labels: segment_linear, segment_unet, segment_light,
    segment_upernet, segment_pyramid. Other columns of a table (age, sex, view): metadata, with a report of its own; so has
    cleanliness, which looks for outliers and position code in patch features, with or without labels.
    Slices of volumes (NIfTI, DICOM series) with a label a volume are pooled and scored as volumes.

    Everything is chosen on validation images; the test split is scored once. Returns {protocol: {"name" of the main metric,
    "value", "low", "high", "chosen", "seconds", "trained", other metrics}}; `out` also writes report.html and results.json.

    vitkit evaluate --model M --data photos/ --protocols knn,linear,few_shot,lora,full --epochs 20 --out runs/protocols
    """
    from vitkit.run.measure import evaluate_job

    given = {key: value for key, value in {"model": model, "data": data, **settings}.items() if value is not None}
    config = settings_for("evaluate", None, given)
    check_protocols(config.own.protocols)
    return evaluate_job(config)


def check_protocols(names: Sequence[str]) -> None:
    """Raise ConfigError on a protocol that does not exist."""
    if names == "auto":
        return
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        wrong = f"there is no protocol '{unknown[0]}'" if unknown else "no protocol was named"
        close = nearest(unknown[0], PROTOCOLS) if unknown else []
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(wrong, fix=f"{hint}protocols: {', '.join(PROTOCOLS)}")


def embed(*, model: Any = None, data: Any = None, out: Any = None, **settings: Any) -> Any:
    """Pooled features (N, D) of every image, written to `out` with a gallery of nearest neighbours; returns the array.

    With `format="parquet"` or `engine="ray"` they are written as shards, which the same call completes after a crash, and
    what is returned says where they are; its `.read()` gives the array and names back.
    """
    from vitkit.run.measure import embed_job

    given = {"model": model, "data": data, "out": out, **settings}
    return embed_job(settings_for("embed", None, {key: value for key, value in given.items() if value is not None}))


def compare(
    a: Any, b: Any, *more: Any, out: str | None = None, data: Any = None, general: Any = None, **settings: Any
) -> dict[str, Any]:
    """Compare finished runs: settings that differ, curves side by side, and the paired difference on the same test images.

    Writes an HTML report (`out`, by default compare.html beside run `a`) and returns the figures.

    With `data` two models of any kind (timm name, weights file, run folder) are compared on these images, labelled or not:
    did going from A to B help? Linear probe, kNN, few-shot and label-free measures with paired intervals, agreement of the
    two, and what B forgot of the `general` set, in one page with a verdict (`out`: its folder or name). The word "random"
    in place of a model is the other one's architecture with random weights.

    More models, or several data sets (`data="D1,D2"`, or a list): scores, every pair corrected for their number, and the
    order over the data sets with its critical difference.
    """
    if data is None:
        given = [name for name, value in {"general": general, **settings}.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]} is for comparing models on images", fix="add data (--data D)")
        from vitkit.run.measure import compare_job

        return compare_job([Path(a), Path(b), *map(Path, more)], out)
    from vitkit.run import helped

    data = [str(one) for one in data] if isinstance(data, list | tuple) else str(data)
    given_all = {"data": data, "out": out, "general": general, **settings}
    return helped.compare_models((a, b, *more), {k: v for k, v in given_all.items() if v is not None})


def scaling(*, models: Any = None, sizes: Any = None, data: Any = None, **settings: Any) -> dict[str, Any]:
    """Backbones x input sizes (x shares of the labels) on your images: what does a larger input or a larger model buy?

    Every backbone is scored frozen at every size by the protocols of `vitkit evaluate`, on the same test images; beside each
    score stand FLOPs, images a second and memory. A sentence says what scaling bought, with paired intervals; the page shows
    curves, the Pareto front and where more is worse. Data with masks: a decoder on frozen feature maps, by IoU.

    A size that a model cannot take leaves its cells empty. The same command resumes; more models or sizes are added to
    what is there. Writes scaling.html, results.json and results.csv to `out`; returns the figures.
    """
    from vitkit.run.scaling import scaling_job, settings_for

    given = {"models": models, "sizes": sizes, "data": data, **settings}
    given = {key: str(v) if key in ("data", "out") else v for key, v in given.items() if v is not None}
    if "models" in given and not isinstance(given["models"], str | Path):
        given["models"] = [str(one) for one in given["models"]]
    for key in ("sizes", "fractions"):
        if isinstance(given.get(key), int | float):
            given[key] = [given[key]]
    return scaling_job(settings_for(given))


def report(run: str | Path) -> Path:
    """Write (again) the report of a run folder and return its path."""
    from vitkit.run.folder import RunFolder
    from vitkit.run.report import run_report

    folder = RunFolder(run)
    if not folder.is_run():
        raise ConfigError(f"{run} is not a run folder", fix="give the --out of a vitkit pretrain or adapt")
    return run_report(folder)


def export(run: str | Path, *, format: str = "safetensors", out: str | None = None) -> Path:
    """One file that needs no vitkit: weights merged where the maths allows, with a passport, or an ONNX graph that takes
    pixels in [0, 1] and holds the preprocessing. Refused unless its outputs equal the model's."""
    from vitkit.run.exporting import export_onnx, export_safetensors

    makers = {"safetensors": export_safetensors, "onnx": export_onnx}
    if format not in makers:
        raise ConfigError(f"there is no export format '{format}'", fix="safetensors or onnx")
    return makers[format](Path(run), out)


def check(data: str | Path, **settings: Any) -> Any:
    """Look through images and labels before training: broken files, duplicates across splits, leaks, imbalance."""
    from vitkit.data.doctor import check as look

    return look(str(data), **settings)


def methods(verb: str | None = None) -> tuple[discover.Method, ...]:
    """Every method there is (of one verb), with its summary and paper."""
    return discover.methods(verb)


def doctor() -> list[tuple[str, str, str]]:
    """What this machine offers: rows of (what, found, advice)."""
    from vitkit.run.machine import look

    return look()


def demo(*, out: str = "runs/demo", seeds: int = 3, quick: bool = False) -> Path:
    """The main job on bundled handwriting: pre-train, adapt three ways with and without it, measure, report."""
    from vitkit.run.demo import run

    return run(Path(out), seeds=seeds, quick=quick)


def verb_doc(verb: str) -> str:
    """A verb's docstring."""
    import inspect

    return inspect.cleandoc(globals()[verb].__doc__ or "")


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords that were given, paths as text."""
    return {key: str(v) if key in REQUIRED else v for key, v in given.items() if v is not None}
