"""Settings that methods share. One dataclass field is a Python keyword, a command-line flag and a YAML key at once.

Standard library only: `vitkit <verb> <method> --help` reads these without importing torch. A value "auto" is resolved
when the run starts, then printed and saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(settings: Any) -> None:
    """Raise ConfigError where a dataclass' field holds a word that its `Literal` annotation does not list.

    The command line checks types by itself; this is for settings made in Python, where a wrong word would otherwise be taken
    for whichever choice is not asked about by name.
    """
    from vitkit.errors import ConfigError

    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        parts = (hint,) if get_origin(hint) is Literal else get_args(hint)
        words = [str(word) for part in parts if get_origin(part) is Literal for word in get_args(part)]
        if words and isinstance(value, str) and str not in parts and value not in words:
            others = {int: "a whole number", float: "a number"}
            words += [others.get(part, "several") for part in parts if part in others or get_origin(part) is tuple]
            raise ConfigError(f"{name} is {value!r}", fix=f"one of: {', '.join(words)}")


@dataclass(frozen=True)
class Inputs:
    """A model and images."""

    model: str = ""
    """timm name, hf-hub:org/name, weights file (.safetensors, .pth), or run folder"""
    data: str = ""
    """folder of class folders, folder of images, CSV/Parquet, images + masks, .npz, or "digits" """
    arch: str | None = None
    """timm architecture of a weights file that does not say so itself"""
    arch_kwargs: dict[str, Any] | None = None
    """keywords of the architecture that differ from its name, e.g. {embed_dim: 64, depth: 4, num_heads: 4}"""
    pretrained: bool = True
    """load the released weights of a timm name; false starts from random ones"""
    patch_size: int | tuple[int, ...] | None = None
    """pixels of a patch; by default the model's own (released patch projections are resampled)"""
    image_size: int | tuple[int, ...] | None = None
    """pixels of the crop that the model sees; three sides for volumes (a,b,c) and videos (frames,height,width); by default
    the model's own"""
    frame_stride: int | None = None
    """videos: every so many frames of a file is one of a clip; by default the model's own (4 where nothing is recorded)"""
    in_chans: int | None = None
    """1 for grey, 3 for colour, any number for volumes; by default the model's own"""
    mean: tuple[float, ...] | None = None
    """channel means in [0, 1] to subtract, for a model trained from nothing; by default the model's own"""
    std: tuple[float, ...] | None = None
    """channel deviations to divide by, for a model trained from nothing; by default the model's own"""
    window: tuple[float, float] | None = None
    """volumes: (low, high) in the files' units that become 0 and 1, e.g. -175,250 for CT; by default the model's own, or
    percentiles of each volume"""
    spacing: tuple[float, float, float] | None = None
    """volumes: millimetres of a voxel along right, anterior, superior; by default the model's own or the file's"""
    label_columns: tuple[str, ...] | None = None
    """columns of a table that hold labels; by default recognised and said aloud"""
    image_column: str | None = None
    """column of a table that holds image paths"""
    group_column: str | None = None
    """column whose values (patients, slides) must never straddle splits"""
    split_seed: int = 0
    """seed of the splits made where the data brings none"""
    val_fraction: float = 0.15
    """share cut for validation where the data brings none (of all labelled images, or of a given training split)"""
    test_fraction: float = 0.2
    """share of all images held out for the test where the data brings no test split"""
    labels_per_class: int | None = None
    """use this many labelled training images a class, drawn with `seed`"""


@dataclass(frozen=True)
class Machine:
    """How and where it runs."""

    batch_size: int = 64
    """images a step and process"""
    seed: int = 0
    """seed of new weights, order, augmentation and masks"""
    workers: int | Literal["auto"] = "auto"
    """processes that decode images; auto = 0 for images in memory, else cores - 1"""
    devices: int = 1
    """processes (GPUs, or CPU processes)"""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to run"""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """arithmetic; auto = bf16 where the device computes it natively, else 32"""
    quiet: bool = False
    """no progress on the terminal"""

    def __post_init__(self) -> None:
        from vitkit.errors import ConfigError

        for name, least in (("batch_size", 1), ("devices", 1), ("workers", 0)):
            value = getattr(self, name)
            if value != "auto" and value < least:
                raise ConfigError(f"{name} is {value}", fix=f"{least} or more")


@dataclass(frozen=True)
class Train:
    """The loop."""

    out: str = ""
    """run folder to write; the same command resumes it"""
    epochs: int = 20
    """passes over the training images"""
    max_steps: int | None = None
    """stop after this many optimiser steps (the schedule still spans `epochs`)"""
    accumulate: int = 1
    """batches whose gradients are averaged for one optimiser step"""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """optimiser"""
    lr: float | Literal["auto"] = "auto"
    """peak learning rate; auto = blr scaled to the effective batch by lr_rule"""
    blr: float = 1e-3
    """base learning rate for 256 images a step (1024 with lr_rule sqrt)"""
    lr_rule: Literal["linear", "sqrt"] = "linear"
    """how the rate grows with the effective batch: blr x batch / 256, or blr x sqrt(batch / 1024)"""
    min_lr: float = 0.0
    """learning rate at the end of the cosine"""
    warmup_epochs: float = 0.0
    """epochs of linear warm-up from 0, at most a fifth of `epochs`"""
    weight_decay: float = 0.05
    """weight decay of matrices (never of biases and norms)"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas"""
    momentum: float = 0.9
    """momentum of SGD and LARS"""
    layer_decay: float = 1.0
    """learning-rate factor from one block to the one below it"""
    clip_grad: float | None = None
    """largest gradient norm"""
    ema: float = 0.0
    """decay of the averaged weights used for evaluation and saving; 0 = none"""
    drop_path: float = 0.0
    """stochastic depth, linear from 0 to this rate over the blocks"""
    augment: bool = True
    """false: train on the evaluation view"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """area range of the random crop"""
    hflip: bool = True
    """mirror images at random; switch off where left and right matter"""
    randaug: str | None = None
    """RandAugment in timm's words, e.g. rand-m6-mstd0.5-inc1"""
    compile: bool = False
    """torch.compile every transformer block"""
    shard: bool = False
    """FSDP: each of several processes holds only its share of weights, gradients and optimiser state"""
    eval_every: int = 1
    """epochs between validations"""
    save_every: int | None = None
    """optimiser steps between checkpoints; by default one an epoch"""
    max_bad: float = 0.01
    """share of unreadable files above which training stops"""


@dataclass(frozen=True)
class Classify:
    """Labelled images to classes."""

    head: Literal["linear", "bn_linear"] = "linear"
    """classifier on the pooled feature: linear, or batch normalisation without affine parameters and linear"""
    pool: Literal["keep", "token", "avg"] = "keep"
    """pooled tokens: the model's own choice, class token, or mean of patches with a new norm"""
    mixup: float = 0.0
    """alpha of mixup; 0 = off"""
    cutmix: float = 0.0
    """alpha of cutmix; 0 = off"""
    smoothing: float = 0.0
    """label smoothing of single-label cross-entropy"""
    test_clips: int = 1
    """videos: clips of each test video whose probabilities are averaged; published: 5 for Kinetics, 2 for SSv2, 16 at most"""
    test_crops: int = 1
    """videos: crops along the long side of each of these clips; published: 3"""
    select: Literal["best", "last"] = "best"
    """weights kept: of the epoch with the best validation score, or of the last; the test split is read once, after"""
    metric: Literal[
        "auto",
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "quadratic_kappa",
        "cohen_kappa",
        "mean_auc",
        "mean_average_precision",
    ] = "auto"
    """score that picks the epoch and leads the report; auto = accuracy, or mean AUC for many labels an image;
    quadratic_kappa is for ordered classes, such as grades"""


@dataclass(frozen=True)
class Task:
    """What is predicted: exactly one of `classes` ("single") or any number of them ("multi")."""

    kind: Literal["single", "multi"]
    classes: tuple[str, ...]


# What `vitkit evaluate --protocols` takes: heads on cached features, methods of `vitkit adapt`, decoders for masks.
FROZEN = ("knn", "linear", "mlknn", "linear_grid", "few_shot")
TRAINED = ("full", "lora", "bitfit", "adaptformer", "dvpt", "vpt")
SEGMENTING = ("segment_linear", "segment_unet", "segment_light", "segment_upernet", "segment_pyramid")

METADATA = "metadata"
CLEANLINESS = "cleanliness"


@dataclass(frozen=True)
class Evaluate:
    """Which protocols, what each may choose from, and where results go."""

    protocols: tuple[str, ...] | Literal["auto"] = "auto"
    """knn, linear, mlknn, linear_grid, few_shot on cached features; full, lora, bitfit, adaptformer, dvpt, vpt train;
    segment_linear, segment_unet, segment_light, segment_upernet, segment_pyramid for masks; metadata for other columns of
    a table; cleanliness of patch features; auto = knn,linear, or segment_linear,segment_unet for masks"""
    out: str | None = None
    """folder for the report, predictions and cached features; by default nothing is written (trained protocols need it)"""
    k: int | Literal["auto"] = "auto"
    """neighbours of knn and mlknn; auto = chosen on validation"""
    refit: bool = False
    """train the chosen head again on train + validation, as the radiology benchmark does; trained protocols never do"""
    shots: tuple[int, ...] = (1, 2, 5, 10, 20)
    """few_shot: labelled images a class"""
    draws: int = 20
    """few_shot: random draws for each number of shots"""
    grid_rates: tuple[float, ...] = (1e-3, 5e-3, 1e-2, 5e-2)
    """linear_grid: learning rates, as published; each with class tokens of 1 and of 4 blocks, with and without patches"""
    grid_epochs: int = 10
    """linear_grid: passes over the cached features"""
    epochs: int = 20
    """trained protocols: passes over the training images, the same for all"""
    training: dict[str, Any] | None = None
    """trained protocols: settings of vitkit adapt for all or by name, e.g. {hflip: false, lora: {rank: 16, blr: 1e-3}}"""
    mask_rates: tuple[float, ...] = (1e-2, 5e-2, 1e-1)
    """segment_*: learning rates tried (published: 1e-4,5e-4,1e-3,5e-3,1e-2,5e-2,1e-1)"""
    mask_epochs: int = 30
    """segment_*: passes over the cached feature maps for each rate"""
    mask_width: int = 128
    """segment_upernet, segment_pyramid: channels of the decoder (published: 512 and 256; the work grows with its square)"""
    mask_loss: Literal["dice", "dice_ce"] = "dice"
    """segment_*: soft Dice, or Dice + cross-entropy"""
    before: str | None = None
    """cleanliness: another model (name, file, run) to measure on the same images, such as the one that was cleaned"""
    metadata_columns: tuple[str, ...] | None = None
    """metadata: columns of the table to predict, numbers or classes by what they hold, or as said: age,sex,grade:class"""
    metadata_folds: int = 0
    """metadata: 0 = the data's splits; 3 or more = every image scored by a model of the other folds, patients whole"""
    permutations: int = 200
    """metadata: fits to shuffled values behind the chance level; 0 = none"""
    rescale: bool = False
    """segment_*: stretch each channel of each picture to [0, 1] first, as the radiology benchmark does"""

    def __post_init__(self) -> None:
        from vitkit.errors import ConfigError

        for name, least in (("grid_epochs", 1), ("epochs", 1), ("mask_epochs", 1), ("mask_width", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"at least {least}")


@dataclass(frozen=True)
class Explain:
    """What is drawn, and where it goes."""

    out: str = "explanations"
    """folder to write: explain.html, maps.npz, results.json"""
    maps: tuple[str, ...] | Literal["auto"] = "auto"
    """attention, rollout, grad_cam, prompt_cam; auto = all that this model can give"""
    classes: tuple[str, ...] | None = None
    """class names to ask about beside the predicted one; by default the true one"""
    images: int = 24
    """pictures shown, drawn evenly from the labels"""
    native: bool = False
    """keep each picture's own size, cropped to whole patches; by default the model's preprocessing resizes them"""
    sanity: Literal["quick", "full", "off"] = "quick"
    """deletion and insertion in 14 steps, in one step a pixel row as published (about 16 times as long), or no figures"""
    layer: int = -1
    """block that attention, Grad-CAM and patch features are taken from; negative counts from the last"""
    head: int | None = None
    """attention head shown; by default the mean of all"""
    fusion: Literal["mean", "max", "min"] = "mean"
    """how rollout fuses the heads of a block"""
    discard: float = 0.0
    """lowest share of each block's attention to patches that rollout ignores"""


@dataclass(frozen=True)
class Attack:
    """What is attacked and compared, and where the report goes."""

    out: str = "attack"
    """folder to write: report.html, results.json, adversarial.npz"""
    encoder: tuple[str, ...] | None = None
    """public pre-trained trunk that the attacker has, or several; by default the base that the run was adapted from"""
    baselines: tuple[str, ...] = ("l4a", "ssp")
    """other attacks beside random noise: l4a, ssp, std, fff on the trunk; pgd, mifgsm on the model itself (torchattacks)"""
    curve: tuple[float, ...] = (2.0, 4.0, 8.0, 10.0)
    """further budgets for the curve of success by budget, in 255ths"""
    max_images: int = 1000
    """attack at most this many of the test images, drawn with `seed`"""


@dataclass(frozen=True)
class Embedding:
    """Where features go."""

    out: str = "embeddings"
    """folder to write: features.npy (N, D), images.csv, gallery.html; or Parquet shards and manifest.json"""
    format: Literal["auto", "npy", "parquet"] = "auto"
    """one array with a gallery, or shards for an archive that memory or one day cannot hold; auto = npy, parquet with ray"""
    shard_rows: int = 10_000
    """parquet: images a shard; a killed job loses at most the shards it was at"""
    engine: Literal["local", "ray"] = "local"
    """this process, or Ray Data: every core, every GPU, or the cluster that RAY_ADDRESS names; both write the same"""
    actors: int | Literal["auto"] = "auto"
    """ray: copies of the model at work; auto = one a GPU, or where there is none, one a core"""
    window_stride: int | None = None
    """videos: a feature of every window of the model's frames that starts at each so-many-th frame, one file a video, for
    temporal action detection; published: 4 for THUMOS14, 16 for FineAction"""
    window_normalise: bool = True
    """window_stride: false feeds frames without mean and deviation, as the published features were made"""
    max_bad: float = 0.5
    """parquet: share of unreadable files of a shard above which it stops; fewer are left out and named in the manifest"""
