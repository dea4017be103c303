"""`vitkit slides`: whole-slide images to tile features, small heads on them to a slide's label, and new slides.

    vitkit slides embed --model M --data SLIDES/ --out FEATS/
    vitkit slides evaluate --features FEATS/ --labels labels.csv --out R
    vitkit slides predict R FEATS/ --out predictions.csv --heatmaps maps/

In Python these are `vitkit.slides.embed`, `evaluate` and `predict`. Standard library only until something is to be done:
`--help` needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vitkit.errors import ConfigError, nearest
from vitkit.run import config as configs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Embed:
    """Slides to features."""

    model: str = ""
    """timm name, hf-hub:org/name, weights file, or run folder"""
    data: str = ""
    """folder of slides (SVS, NDPI, MRXS, SCN, BIF, TIFF, DICOM, PNG, JPEG), also in subfolders; of folders of tiles"""
    out: str = ""
    """folder of features: one file a slide, slides.html, slides.csv; the same command resumes"""
    mpp: float | None = 0.5
    """micrometres a pixel that the encoder was trained for (0.5 = 20x); null = the stored pixels as they are"""
    size: int | Literal["auto"] = "auto"
    """pixels of a tile; auto = the model's own"""
    min_tissue: float = 0.6
    """share of a tile that must be tissue; 0 keeps every tile and looks for no tissue"""
    slide_mpp: float | None = None
    """micrometres a pixel of slides whose file does not say it"""
    on_bad: Literal["skip", "raise"] = "skip"
    """slides that cannot be read, have no resolution or no tissue: list them and go on, or stop"""
    replace: bool = False
    """let features of another model or tiling in `out` be made anew"""
    arch: str | None = None
    """timm architecture of a weights file that does not say so itself"""
    arch_kwargs: dict[str, Any] | None = None
    """keywords of the architecture that differ from its name"""
    pretrained: bool = True
    """load the released weights of a timm name; false starts from random ones, a baseline"""
    patch_size: int | None = None
    """pixels of a patch; by default the model's own"""
    seed: int = 0
    """seed of random weights"""
    batch_size: int = 64
    """tiles at once, across slides"""
    workers: int | Literal["auto"] = "auto"
    """threads that read tiles ahead; auto = cores - 1, at least 1"""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to run"""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """arithmetic of the encoder; auto = fp16 on a GPU, else float32"""
    quiet: bool = False
    """no progress on the terminal"""


@dataclass(frozen=True)
class Tables:
    """Features and labels of slides, and where the results go."""

    features: tuple[str, ...] = ()
    """folder that `vitkit slides embed` wrote; several, of as many encoders for the same slides, are compared"""
    labels: str = ""
    """CSV or Parquet with a row a slide: columns slide, label and, where there are several slides of one, patient"""
    out: str = ""
    """run folder to write: report.html, results.json, predictions, the trained heads; the same command resumes"""
    external: tuple[str, ...] | None = None
    """tables of cohorts that nothing is chosen on: models are trained on `labels`, tested on these"""
    external_features: tuple[str, ...] | None = None
    """folders of the external slides' features, one an encoder; by default those of `features`"""
    slide: str = "slide"
    """column of slide names, with or without ending"""
    label: str = "label"
    """column of classes; of times with --event"""
    patient: str = "patient"
    """column of patients, who never straddle folds; without such a column every slide is a patient of its own"""
    event: str | None = None
    """column of 1 (event) and 0 (censored): survival, scored by Harrell's C-index"""
    positive: str | None = None
    """of two classes the one whose probability is given; by default the last in order"""
    missing: Literal["raise", "skip"] = "raise"
    """labels of slides that have no features: stop, or leave them out"""
    max_tiles: int | None = None
    """keep so many random tiles of a slide in memory; by default all"""
    heatmaps: int = 6
    """slides shown with the tiles that counted"""
    seed: int = 0
    """of folds, initial weights and order"""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to train the heads"""
    quiet: bool = False
    """no progress on the terminal"""

    def __post_init__(self) -> None:
        if self.external_features and not self.external:
            raise ConfigError("external_features without external", fix="--external labels2.csv names their labels")
        if self.external_features and len(self.external_features) != len(self.features):
            raise ConfigError(
                f"{len(self.external_features)} folders of external features for {len(self.features)} encoders",
                fix="one for each folder of --features, in that order",
            )
        if self.heatmaps < 0:
            raise ConfigError(f"heatmaps is {self.heatmaps}", fix="0 for none, or a number of slides")


def embed(*, model: Any = None, data: Any = None, out: Any = None, **settings: Any) -> Any:
    """Cut slides into tiles where there is tissue, run each through a frozen encoder, write one file of features a slide.

    Tiles stream across slides; a stopped run goes on where it was; slides.html shows every slide and the tiles that were
    kept, slides.csv lists them with the reasons of those that could not be used. `model` may also be a ViT that
    `vitkit.weights.load` gave. Returns what became of the slides: `done`, `skipped` (finished before), `bad` with reasons.
    """
    from vitkit.run.slides_embed import embed_job

    vit = None if model is None or isinstance(model, str) or hasattr(model, "__fspath__") else model
    name = model if vit is None else str(vit.passport.base.get("ref") or vit.passport.arch)
    return embed_job(settings_for("embed", {**_without_none(model=name, data=data, out=out), **settings}), vit)


def evaluate(*, features: Any = None, labels: Any = None, out: Any = None, **settings: Any) -> dict[str, Any]:
    """Train small heads on tile features, test them on slides of other patients, compare them, keep the ensemble.

    Tested on `external` cohorts where they are given, else by cross-validation, nested with `nested`. AUC or C-index with
    intervals that redraw patients; paired differences of heads and of encoders (several folders in `features`), corrected
    for their number; heatmaps; one page. Returns {"verdict", "arms", "pairs", "report", ...}.
    """
    from vitkit.run.slides_evaluate import evaluate_job

    given = {**_without_none(features=features, labels=labels, out=out), **settings}
    return evaluate_job(settings_for("evaluate", given))


def predict(
    run: Any, features: Any, *, out: Any = None, heatmaps: Any = None, head: str | None = None, quiet: bool = True
) -> pd.DataFrame:
    """Scores of new slides by the ensemble that `vitkit slides evaluate` kept: a table with a row a slide.

    `features`: what `vitkit slides embed` wrote with the same model and tiling. `out` writes the table as CSV, `heatmaps` a
    picture a slide into that folder. head: another than the first of the evaluated ones.
    """
    from vitkit.run.slides_predict import predict_job

    return predict_job(run, features, out=out, heatmaps=heatmaps, head=head, quiet=quiet)


def _without_none(**given: Any) -> dict[str, Any]:
    """Required values that were given; other settings may be None on purpose (mpp: stored pixels)."""
    return {key: value for key, value in given.items() if value is not None}


WORDS = {"embed": embed, "evaluate": evaluate, "predict": predict}
PREDICT = "vitkit slides predict RUN FEATURES [--out predictions.csv] [--heatmaps DIR] [--head NAME]"
HELP = f"""vitkit slides: from whole-slide images to a label per slide

  vitkit slides embed --model hf-hub:owkin/phikon-v2 --data slides/ --out features/
  vitkit slides evaluate --features features/ --labels labels.csv --out runs/slides
  {PREDICT}

embed      tiles of every slide through a frozen encoder, one file of features a slide
evaluate   small heads on them: AUC or C-index with intervals, by patients, heads and encoders compared
predict    new slides, with the ensemble that evaluate kept

`vitkit slides embed --help` and `vitkit slides evaluate --help` list every setting."""


def settings_for(word: str, given: Mapping[str, Any] | Sequence[str]) -> configs.Config:
    """Resolved settings of `vitkit slides <word>` from keywords or command-line words."""
    from inspect import cleandoc

    from vitkit.run import discover

    if isinstance(given, Mapping):
        paths = ("data", "out", "labels")
        one = {k: [str(v) if hasattr(v, "__fspath__") else v] for k, v in given.items() if not isinstance(v, str)}
        lists = ("lr", "weight_decay", "features", "external", "external_features")  # a single value will do
        given = {
            k: one[k] if k in lists and k in one and not isinstance(v, list | tuple | None) else v
            for k, v in given.items()
        }
        given = {k: str(v) if k in paths and v is not None else v for k, v in given.items()}
    groups: dict[str, type] = {"own": Embed if word == "embed" else Tables}
    if word == "evaluate":
        groups["method"] = discover.light("evaluate", "phikon_v2")[0]
    required = ("model", "data", "out") if word == "embed" else ("labels", "out")
    config = configs.build(
        groups,
        given,
        prog=f"vitkit slides {word}",
        description=cleandoc(WORDS[word].__doc__ or ""),
        required=required,
    )
    if word == "evaluate" and not config.own.features:
        raise ConfigError("vitkit slides evaluate needs features", fix="give --features FOLDER")
    return config


def command(words: Sequence[str]) -> int:
    """`vitkit slides ...` from the command line."""
    words = list(words)
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    word, rest = words[0], words[1:]
    if word not in WORDS:
        close = nearest(word, WORDS)
        raise ConfigError(
            f"vitkit slides has no word '{word}'",
            fix=f"did you mean {close[0]}?" if close else "embed, evaluate or predict",
        )
    return {"embed": _embed, "evaluate": _evaluate, "predict": _predict}[word](rest)


def _embed(words: list[str]) -> int:
    from vitkit.run.slides_embed import embed_job

    config = settings_for("embed", words)
    found = embed_job(config)
    print(
        f"{len(found.done)} slides embedded, {len(found.skipped)} finished before, {len(found.bad)} could not be used"
    )
    print(f"{config.own.out}/slides.html")
    return 0


def _evaluate(words: list[str]) -> int:
    from vitkit.run.slides_evaluate import evaluate_job

    found = evaluate_job(settings_for("evaluate", words))
    print(found["verdict"])
    print(found["report"])
    return 0


def _predict(words: list[str]) -> int:
    from inspect import cleandoc

    if any(word in ("-h", "--help") for word in words):
        print(f"{PREDICT}\n\n{cleandoc(predict.__doc__ or '')}")
        return 0
    names, options = _split(words)
    if len(names) != 2:
        raise ConfigError(
            f"vitkit slides predict takes a run and a folder of features, got {len(names)} names", fix=PREDICT
        )
    found = predict(names[0], names[1], quiet=False, **options)
    if "out" not in options:
        print(found.to_csv(index=False), end="")
    else:
        print(f"{len(found)} slides: {options['out']}")
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names, and options with their values."""
    names, options, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            names.append(word)
            continue
        name, equal, value = word[2:].partition("=")
        if name not in ("out", "heatmaps", "head"):
            close = nearest(name, ("out", "heatmaps", "head"))
            raise ConfigError(
                f"vitkit slides predict has no option --{name}", fix=f"did you mean --{close[0]}?" if close else PREDICT
            )
        if not equal and not rest:
            raise ConfigError(f"--{name} needs a value", fix=PREDICT)
        options[name] = value if equal else rest.pop(0)
    return names, options
