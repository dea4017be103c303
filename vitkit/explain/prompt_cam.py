"""Prompt-CAM: one learned prompt a class, whose attention heads show which parts of an image speak for that class.

Paper: Chowdhury et al., "Prompt-CAM: Making Vision Transformers Interpretable for Fine-Grained Analysis", CVPR 2025
(arXiv 2501.09333). Official code: Imageomics/Prompt_CAM.

What happens, and where: before block k (`start`) C class prompts are put in front of [class token, patches] and run to
the end (`ClassPrompts`); blocks below k get C class-agnostic prompts each, which are only looked at (`HelperPrompts`).
After the final norm s[c] = w z_c + b with one scorer for all classes (`ReadsPrompts.forward_head`), so that class c must
find its evidence with its own attention. The loss is cross-entropy over s (binary cross-entropy for several labels an
image). k = depth - 1 is the paper's deep variant, k = 0 the shallow one. `vitkit.explain.class_heads` reads the maps and
ranks the heads; `vitkit.explain.traits` draws them.

Differs from the paper: attention is over all tokens and divided by sqrt(d), as the authors' code does (eq. 5 has patches
only, and d). Shallow and in-between k, which the code cannot run, are as the paper describes them. The trunk's own mean
and std are used (`normalise="half"`: 0.5, as the code). The code's rate lags an epoch behind its schedule (`lagging_lr`);
the loop's does not. Accuracy lies below a linear probe's by design.

Cost: prompts below block k are keys and values, computed once a batch; in the last block only the C class rows ask. At
ViT-B, 224 px and 200 classes a forward costs 1.1 (large batch) to 1.3 (one image) of the plain ViT's, a ranking a few per
cent more. (k + 1) C D + D + 1 floats are trained and saved.

    vitkit explain prompt_cam --model vit_base_patch16_224.dino --data birds/ --out runs/cam
    vitkit.explain("prompt_cam", model="vit_base_patch16_224.dino", data="birds/", out="runs/cam")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, WeightsError
from vitkit.explain.class_heads import class_attention, class_maps, rank_heads, saliency
from vitkit.parts.adaptation import Adaptation
from vitkit.parts.blocks import Steps, add_prefix_tokens, extend, join_keys, mix_into
from vitkit.settings import Classify, Task, check_choices

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer as ViTBase
else:
    ViTBase = object  # the mixin stands on top of whatever ViT it is given

__all__ = ["PromptCAM", "Settings", "class_attention", "class_maps", "inject", "lagging_lr", "load_official"]
__all__ += ["rank_heads", "saliency", "trains"]

RECIPE = {
    "epochs": 100,  # README and experiment files: DINO ViT-B/16 (CUB 130)
    "warmup_epochs": 20.0,
    "optimizer": "sgd",  # momentum 0.9
    "lr": 0.005,  # cub, dog, pet; 0.01 for cars and birds_525; not scaled with the batch
    "min_lr": 1e-6,
    "weight_decay": 0.001,
    "batch_size": 16,
    "drop_path": 0.1,  # 0 for DINOv2
    "crop_scale": (0.87, 1.0),  # a crop of 224 from 240 pixels
}


@dataclass(frozen=True)
class Settings:
    """Prompt-CAM."""

    start: int | Literal["last"] = "last"
    """block at which the class prompts enter: 0 = shallow, the last = deep (paper section 3.2, `vpt_mode`)"""
    prompts: int | Literal["auto"] = "auto"
    """class prompts; auto = one for every class of the data"""
    prompt_dropout: float = 0.1
    """dropout of prompts in training, one mask a step and block for the whole batch (0.1 for DINO, 0 for DINOv2)"""
    normalise: Literal["trunk", "half"] = "trunk"
    """trunk = the model's own mean and std; half = 0.5 for both, as the official code does for every trunk"""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.prompts != "auto" and self.prompts < 1:
            raise ConfigError(f"prompts is {self.prompts}", fix="auto, or the number of classes")
        if not 0 <= self.prompt_dropout < 1:
            raise ConfigError(f"prompt_dropout is {self.prompt_dropout}", fix="a rate from 0 to below 1, e.g. 0.1")


class HelperPrompts(Steps):
    """Block below `start`: prompts that its attention looks at, and whose outputs nobody reads."""

    helper_prompts: nn.Parameter  # (C, D)
    prompt_dropout: float
    training: bool

    def extra_keys(self) -> Tensor:
        return join_keys(super().extra_keys(), F.dropout(self.helper_prompts, self.prompt_dropout, self.training))


class ClassPrompts(Steps):
    """Block `start`: prompts, one a class, that enter here in front of everything and run to the end."""

    class_prompts: nn.Parameter  # (C, D)
    prompt_dropout: float
    training: bool

    def entering(self, x: Tensor) -> Tensor:
        prompts = F.dropout(self.class_prompts, self.prompt_dropout, self.training)
        return torch.cat([prompts.expand(x.shape[0], -1, -1), super().entering(x)], dim=1)


class Scorer(nn.Linear):
    """D -> 1, shared by all classes. A class of its own, so that no ordinary head of one class is taken for it."""

    def __init__(self, dim: int):
        super().__init__(dim, 1)


class ReadsPrompts(ViTBase):
    """ViT whose head scores class c from class prompt c. Another head on top makes it an ordinary classifier again, of
    timm's pooled feature of the tokens behind the prompts; that feature is `forward_head(..., pre_logits=True)` always."""

    class_block: int  # where the class prompts enter

    @property
    def class_prompts(self) -> Tensor:
        """(C, D)."""
        return self.blocks[self.class_block].class_prompts

    @property
    def reads_prompts(self) -> bool:
        return isinstance(self.head, Scorer)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        count = len(self.class_prompts)
        if pre_logits or not self.reads_prompts:
            return super().forward_head(x[:, count:], pre_logits=pre_logits)
        return self.score(x[:, :count])

    def score(self, prompts: Tensor) -> Tensor:
        """Scores (B, n) of prompt tokens (B, n, D) after `norm`."""
        return self.head(self.head_drop(self.fc_norm(prompts))).squeeze(-1)

    def before_last(self, images: Tensor) -> tuple[Tensor, dict[str, Any], tuple[int, ...]]:
        """What the last block's attention gets, (B, C + T, D) with the class prompts first, its keywords, and the grid."""
        index = len(self.blocks) - 1
        stream = tokens.run(self, tokens.embed(self, images), 0, index)
        last = self.blocks[index]
        x = last.entering(stream.x) if hasattr(last, "entering") else stream.x
        return x, tokens.rope_for(self, stream.rope, index), stream.grid

    def class_scores(self, images: Tensor) -> Tensor:
        """`forward_head` on all tokens, (B, C), without what it does not read: in the last block only the class prompts
        ask and are transformed."""
        if not self.reads_prompts:
            return self.forward_head(tokens.encode(self, images).all)
        x, rope, _ = self.before_last(images)
        last, count = self.blocks[-1], len(self.class_prompts)
        alone = getattr(last, "tokenwise", True)  # an MLP half that mixes tokens needs them all
        z = tokens.transform(last, tokens.attend(last, x, queries=count if alone else None, **rope))
        return self.score(self.norm(z[:, :count]))

    def release_head(self) -> None:
        """Give up the scorer; whoever calls this installs another head. The prompts stay part of the trunk."""
        self.head, self.num_classes = nn.Identity(), 0

    def restore_head(self, head: Mapping[str, Tensor], num_classes: int | None) -> int:
        """Take a saved scorer {"head.weight" (1, D), "head.bias"}: the number of classes, or 0 when this is none."""
        passport = getattr(self, "passport", None)
        ours = passport is None or not passport.steps or passport.steps[-1]["method"] == "explain.prompt_cam"
        count = len(self.class_prompts)
        if not ours or num_classes not in (None, count) or set(head) != {"head.weight", "head.bias"}:
            return 0
        if head["head.weight"].shape != (1, self.embed_dim):
            return 0
        install_scorer(self)
        self.load_state_dict(dict(head), strict=False)
        return count


def install_scorer(vit: Any) -> None:
    """A fresh scorer (torch's default initialisation) as the head of a ViT with class prompts."""
    vit.head = Scorer(vit.embed_dim).to(vit.class_prompts.device)
    vit.num_classes = len(vit.class_prompts)
    if hasattr(vit, "head_dist"):
        vit.head_dist = nn.Identity()


def inject(vit: Any, settings: Settings) -> nn.Module:
    """Add prompts to `vit` in place and return it; its head stays as it is until `install_scorer`."""
    vit = tokens.require_vit(vit)
    if isinstance(vit, ReadsPrompts):
        raise ConfigError(
            "this ViT already carries the class prompts of a Prompt-CAM run", fix="start from the model that run used"
        )
    if settings.prompts == "auto":
        raise ConfigError("prompts is 'auto', but there are no labels to count", fix="prompts=<number of classes>")
    depth = len(vit.blocks)
    start = depth - 1 if settings.start == "last" else settings.start
    if not -depth <= start < depth:
        raise ConfigError(f"start names block {start}", fix=f"the ViT has blocks 0..{depth - 1}, or 'last'")
    mix_into(vit, ReadsPrompts)
    vit.class_block = start % depth
    # VPT's rule, from the fan of a patch projection: sqrt(6 / (3 ph pw + D)).
    bound = math.sqrt(6 / (3 * math.prod(vit.patch_embed.patch_size) + vit.embed_dim))
    for index, block in enumerate(vit.blocks):
        if index <= vit.class_block:
            own = index == vit.class_block
            extend(block, ClassPrompts if own else HelperPrompts)
            block.prompt_dropout = settings.prompt_dropout
            prompts = torch.empty(settings.prompts, vit.embed_dim).uniform_(-bound, bound).to(block.norm1.weight.device)
            setattr(block, "class_prompts" if own else "helper_prompts", nn.Parameter(prompts))
        if index >= vit.class_block:
            add_prefix_tokens(vit, block, settings.prompts)
            block.learned_before = getattr(block, "learned_before", 0) + settings.prompts
    if settings.normalise == "half":
        _normalise_half(vit)
    return vit


def trains(name: str) -> bool:
    """Prompts train; the trunk does not."""
    return name.endswith((".helper_prompts", ".class_prompts"))


def load_official(vit: Any, extras: Mapping[str, Tensor]) -> nn.Module:
    """Take a checkpoint of the authors: `vpt.prompt_embeddings` (N, C, D), row i for block i, with `head.weight` (1, D)
    and `head.bias` from `extras`, or from `vit.head` as `weights.load(path, num_classes=None)` gives it.

    A ViT without class prompts gets them first. Its passport then prescribes mean and std 0.5, as the authors trained.
    """
    table = extras.get("vpt.prompt_embeddings")
    if table is None or table.ndim != 3:
        raise WeightsError("there are no prompts of Prompt-CAM (vpt.prompt_embeddings) in this checkpoint")
    weight, bias = (extras.get(f"head.{key}", getattr(vit.head, key, None)) for key in ("weight", "bias"))
    if weight is None or bias is None or weight.shape != (1, vit.embed_dim):
        raise WeightsError("the checkpoint's scorer is missing", fix="load it with num_classes=None")
    head = {"weight": weight.detach().clone(), "bias": bias.detach().clone()}
    if not isinstance(vit, ReadsPrompts):
        inject(vit, Settings(start=len(table) - 1, prompts=table.shape[1], prompt_dropout=0.0))
    if table.shape != (vit.class_block + 1, *vit.class_prompts.shape):
        raise WeightsError(
            f"vpt.prompt_embeddings is {tuple(table.shape)}: blocks, classes, width",
            fix=f"start={len(table) - 1}, prompts={table.shape[1]}",
        )
    install_scorer(vit)
    with torch.no_grad():
        for block, rows in zip(vit.blocks, table, strict=False):
            (block.class_prompts if isinstance(block, ClassPrompts) else block.helper_prompts).copy_(rows)
    vit.head.load_state_dict(head)
    _normalise_half(vit)
    return vit


def _normalise_half(vit: Any) -> None:
    passport = getattr(vit, "passport", None)
    if passport is not None:
        half = (0.5,) * passport.preprocess.in_chans
        passport.preprocess = replace(passport.preprocess, mean=half, std=half)


def lagging_lr(*, lr: float, lr_min: float, warmup: int, warmup_lr: float, epochs: int) -> list[float]:
    """The rate of each epoch in the authors' loop, which asks its schedule after an epoch instead of before.

    Schedule: linear from `warmup_lr` over `warmup` epochs, then half a cosine over all `epochs`, not shifted (timm's
    CosineLRScheduler). Epoch e >= 1 runs with the value for e - 1, and epoch 0 with that for 0.
    """

    def schedule(epoch: int) -> float:
        if epoch < warmup:
            return warmup_lr + epoch * (lr - warmup_lr) / warmup
        return lr_min + 0.5 * (lr - lr_min) * (1 + math.cos(math.pi * epoch / epochs))

    return [schedule(max(epoch - 1, 0)) for epoch in range(epochs)]


class PromptCAM(Adaptation):
    """A frozen ViT, class prompts and their scorer for `task`. `predict` and the loss read the class prompts."""

    def __init__(self, vit: nn.Module, settings: Settings = Settings(), *, task: Task, classify: Classify = Classify()):
        count = len(task.classes)
        if settings.prompts not in ("auto", count):
            raise ConfigError(f"prompts is {settings.prompts} for {count} classes", fix="prompts=auto")
        if classify.head != "linear" or classify.pool != "keep":
            raise ConfigError(
                f"head={classify.head}, pool={classify.pool}: Prompt-CAM reads each class from its own prompt",
                fix="leave out head and pool",
            )
        super().__init__(
            vit, replace(settings, prompts=count), task=task, classify=classify, inject=inject, trains=trains
        )

    def make_head(self) -> None:
        install_scorer(self.vit)

    def param_groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
        """All that trains is decayed, the scorer's bias included, as the authors do."""
        if layer_decay != 1.0:
            return super().param_groups(weight_decay, layer_decay)
        return [{"params": [p for p in self.vit.parameters() if p.requires_grad], "weight_decay": weight_decay}]
