"""DVPT: adapt a frozen ViT by prompts that look at the image through a small bottleneck shared by several blocks.

Paper: He et al., "DVPT: Dynamic Visual Prompt Tuning of Large Pre-trained Models for Medical Image Analysis", Neural
Networks 185, 2025 (arXiv 2307.09787). Official code: NKUhealong/DVPT.

What happens, and where: n prompts with positions of their own stand in front of the class token from before `norm_pre`
and run through every block (`PromptedViT`); each block gains gate * U(B(x)) beside its MLP, x being the stream after
attention (`SharedBottleneck`, `DynamicBottleneck`), where Dn: D -> r, U: r -> D and the gate are one module for
`share_every` blocks in a row. `variant="dynamic"`: B(x) = act(Dn(x)), its prompt rows replaced by what they find in the
patch rows, softmax(q k^T / sqrt(D)) v. `variant="released"`: B(x) = act(Dn(x)) alone, which is what the authors' ViT
computes: its cross-attention is evaluated and then not used. The head reads the mean of all prompts and the feature that
the ViT pools by itself.

Differs from the paper: its text describes the dynamic variant, its code runs the released one; details of the dynamic one
are our reading. Prompts start at the size of the ViT's own tokens where no `norm_pre` follows them; the warm-up rises
in order; images are normalised as the trunk expects. Masks: vitkit.dense.dvpt_segformer.

Cost: n more tokens and 2 r / (12 D) more work a token; n D for prompts, as much for positions, and 2 D r + r + D + 1 for
every `share_every` blocks are trained and saved. ViT-B: 0.2 M.

    vitkit adapt dvpt --model vit_base_patch16_clip_quickgelu_224.openai --data scans/ --out runs/dvpt --image_size 288
    vitkit.adapt("dvpt", model="vit_base_patch16_clip_quickgelu_224.openai", data="scans/", out="runs/dvpt", image_size=288)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.parts.adaptation import Adaptation
from vitkit.parts.blocks import Steps, add_prefix_tokens, extend, mix_into
from vitkit.parts.bottleneck import Bottleneck
from vitkit.parts.schedules import warmup_cosine
from vitkit.settings import Classify, Task, check_choices

RECIPE = {
    "epochs": 60,  # DVPT_vit_train.py
    "warmup_epochs": 5.0,
    "optimizer": "adamw",
    "lr": 5e-4,  # the script overrides its own default of 2e-5
    "weight_decay": 1e-4,
    "clip_grad": 1.0,
    "batch_size": 50,
    "crop_scale": (0.87, 1.0),  # theirs reaches 1.15 by padding
}


@dataclass(frozen=True)
class Settings:
    """Dynamic visual prompt tuning."""

    variant: Literal["dynamic", "released"] = "dynamic"
    """prompts that look at the patches in the bottleneck (the paper's text), or the bottleneck alone (its code)"""
    prompts: int = 50
    """prompt tokens n (official constant)"""
    bottleneck: int = 20
    """width r of the bottleneck (official constant)"""
    share_every: int = 3
    """blocks in a row that use one bottleneck (official constant)"""
    gate_init: float = 0.0
    """the gate's start; at 0 the first step trains only gates, prompts and head"""
    activation: Literal["quick_gelu", "gelu", "relu"] = "quick_gelu"
    """nonlinearity in the bottleneck (CLIP's x sigmoid(1.702 x) in the code)"""
    prompt_std: float | Literal["auto"] = "auto"
    """deviation of new prompts; auto = 1 in front of a norm (CLIP; the official value), else that of the ViT's tokens"""

    def __post_init__(self) -> None:
        check_choices(self)
        for name, fix in (("prompts", "50"), ("bottleneck", "20"), ("share_every", "3")):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"at least 1, e.g. {fix}")
        if self.prompt_std != "auto" and self.prompt_std < 0:
            raise ConfigError(f"prompt_std is {self.prompt_std}", fix="auto, or a deviation of at least 0")


class SharedBottleneck(Steps):
    """Block whose output gains G(x), x being the stream after attention (all tokens)."""

    # (G, prompts, prefix tokens). In a tuple, so that the module stays the ViT's: the block holds a reference to it, and
    # state dicts, parameter lists and files contain it once. deepcopy of the ViT keeps the sharing.
    dvpt: tuple[Bottleneck, int, int]

    def transform(self, x: Tensor) -> Tensor:
        return super().transform(x) + self.gain(x)

    def gain(self, x: Tensor) -> Tensor:
        return self.dvpt[0](x)

    def first(self, x: Tensor, rows: int, **kwargs: Any) -> Tensor:
        """The first `rows` tokens of the block's output, without work on the others where they do not matter."""
        x = self.attend(self.entering(x), rows if self.tokenwise else None, **kwargs)
        return self.transform(x)[:, :rows]


class DynamicBottleneck(SharedBottleneck):
    """Block whose prompts read the patches inside the bottleneck."""

    tokenwise = False

    def first(self, x: Tensor, rows: int, **kwargs: Any) -> Tensor:
        below: Any = super(SharedBottleneck, self)
        if (
            not below.tokenwise or type(self).transform is not SharedBottleneck.transform
        ):  # others extend this block too
            return super().first(x, rows, **kwargs)
        x = self.attend(self.entering(x), **kwargs)  # all rows are read, the MLP runs on few
        return below.transform(x[:, :rows]) + self.gain(x)[:, :rows]

    def gain(self, x: Tensor) -> Tensor:
        bottleneck, count, prefix = self.dvpt
        z = bottleneck.down(x)  # (B, n + P + N, r)
        start = self.learned_before  # prompts of other methods may run in front of these
        front, own, rest = z[:, :start], z[:, start : start + count].unsqueeze(1), z[:, start + count :]
        patches = rest[:, prefix:].unsqueeze(1)
        found = F.scaled_dot_product_attention(own, patches, patches, scale=x.shape[-1] ** -0.5).squeeze(1)
        return bottleneck.up(torch.cat([front, found, rest], dim=1))


class PromptedViT:
    """ViT with learned tokens in front of its sequence, read by the head together with its own pooled feature."""

    prompt_token: nn.Parameter  # (1, n, D)
    prompt_positional_embedding: nn.Parameter  # (n, D)
    prompt_proj: nn.ModuleList  # one Bottleneck for `share_every` blocks
    foreign: int  # learned tokens of methods below this one that reach the head in front of these

    def front_prompts(self) -> Tensor:
        """(1, n, D): the same for every image, so positions are added once a batch."""
        return self.prompt_token + self.prompt_positional_embedding

    def plain_pos_embed(self, x: Tensor) -> Any:
        """timm's own."""
        return super()._pos_embed(x)  # type: ignore[misc]

    def _pos_embed(self, x: Tensor) -> Any:
        out = self.plain_pos_embed(x)
        x, *rope = out if isinstance(out, tuple) else (out,)
        x = torch.cat([self.front_prompts().expand(len(x), -1, -1), x], dim=1)
        return (x, *rope) if rope else x

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """(sum of prompts + what the ViT pools from the rest) / (n + 1): with a class token, the mean of n + 1 tokens.
        Prompts of other methods in front of these have been taken off by their own `forward_head`."""
        count = self.prompt_token.shape[1]
        return (x[:, :count].sum(dim=1) + super().pool(x[:, count:], pool_type)) / (count + 1)  # type: ignore[misc]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not isinstance(self, VisionTransformerDistilled):
            return super().forward_head(x, pre_logits)  # type: ignore[misc]
        count = self.prompt_token.shape[1]  # its head does not pool: the mean of two tokens is the feature
        x = x[:, self.foreign :]
        feature = (x[:, :count].sum(dim=1) + x[:, count : count + 2].mean(dim=1)) / (count + 1)
        return feature if pre_logits else self.head(self.head_drop(feature))  # as timm: dropout behind the feature

    def class_scores(self, images: Tensor) -> Tensor:
        """(B, C): the head's scores, without the patch rows of the last block where the head reads none of them."""
        vit: Any = self
        if vit.global_pool != "token" or vit.attn_pool is not None or vit.grad_checkpointing:
            return self.forward_head(tokens.encode(vit, images).all)
        last, rows = len(vit.blocks) - 1, self.foreign + self.prompt_token.shape[1] + vit.num_prefix_tokens
        stream = tokens.run(vit, tokens.embed(vit, images), 0, last)
        x = vit.blocks[last].first(stream.x, rows, **tokens.rope_for(vit, stream.rope, last))
        return self.forward_head(vit.norm(x))


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Add prompts and shared bottlenecks to `vit` in place and return it. Its head reads the prompts from now on."""
    if isinstance(vit, PromptedViT):
        raise ConfigError("this ViT already carries DVPT's prompts", fix="start from a ViT without them")
    if getattr(vit, "attn_pool", None) is None and not vit.global_pool:
        raise ConfigError("this ViT pools nothing, so there is no feature to join to the prompts", fix="pool=avg")
    like, dim, count = vit.blocks[0].norm1.weight, vit.embed_dim, settings.prompts
    std = prompt_std(vit) if settings.prompt_std == "auto" else settings.prompt_std
    positions = std * dim**-0.5 * torch.randn(count, dim)
    vit.foreign = getattr(vit.blocks[-1], "learned_before", 0)  # type: ignore[arg-type,assignment]
    mix_into(vit, PromptedViT)
    vit.prompt_token = nn.Parameter((std * torch.randn(1, count, dim)).to(like.device))
    vit.prompt_positional_embedding = nn.Parameter(positions.to(like.device))
    groups = math.ceil(len(vit.blocks) / settings.share_every)
    rank, gate, activation = settings.bottleneck, settings.gate_init, settings.activation
    vit.prompt_proj = nn.ModuleList(
        Bottleneck(dim, rank, gate_init=gate, activation=activation).to(like.device) for _ in range(groups)
    )
    for index, block in enumerate(vit.blocks):
        extend(block, DynamicBottleneck if settings.variant == "dynamic" else SharedBottleneck)
        block.dvpt = (vit.prompt_proj[index // settings.share_every], count, vit.num_prefix_tokens)
        add_prefix_tokens(vit, block, count)  # rotary attention leaves prompts unrotated
    return vit


def prompt_std(vit: nn.Module) -> float:
    """Deviation of new prompts: the official 1 where a norm follows; else of the ViT's own first tokens, as far as their
    parameters tell, since a prompt of a hundred times their size would drown what blocks write to it."""
    if not isinstance(vit.norm_pre, nn.Identity):
        return 1.0
    tables = [t for t in (vit.pos_embed, vit.cls_token) if t is not None]
    size = max((float(t.detach().std()) for t in tables), default=0.0)
    return size or 0.02  # timm's initialisation of tokens


def trains(name: str) -> bool:
    """Prompts, their positions and the bottlenecks train; the trunk does not."""
    return name.startswith(("prompt_token", "prompt_positional_embedding", "prompt_proj."))


class ProjectedHead(nn.Linear):
    """Bias-free classifier on CLIP's frozen projection of the feature: logits = W (P f). Only W trains."""

    def __init__(self, projection: Tensor, num_classes: int):
        super().__init__(projection.shape[0], num_classes, bias=False)
        self.register_buffer("projection", projection.clone())  # (out, D)

    def project(self, feature: Tensor) -> Tensor:
        return F.linear(feature, self.projection)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.project(x))

    def folded(self) -> nn.Linear:
        """The same map as one plain layer D -> classes, as other programs expect it."""
        layer = nn.Linear(self.projection.shape[1], self.out_features, bias=False)
        layer.weight = nn.Parameter((self.weight @ self.projection).detach())
        return layer


def released_rate(epoch: int, *, lr: float, warmup: float, epochs: float) -> float:
    """The rate that the authors' scripts really use in `epoch`: they set it at an epoch's end with that epoch's number,
    so epoch 0 runs at the full rate, epoch 1 at 0. The loop here warms up in order."""
    return warmup_cosine(epoch - 1, lr=lr, min_lr=0.0, warmup=warmup, epochs=epochs) if epoch else lr


_OFFICIAL = re.compile(r"transformer\.resblocks\.(\d+)\.prompt_proj\.(.+)")


def load_official(vit: nn.Module, extras: dict[str, Tensor]) -> None:
    """Take prompts, bottlenecks and (where there) `proj` and `fc_head.weight` of an official checkpoint from `vit.extras`.

    A bottleneck may be stored once or under every block that shares it; copies must agree.
    """
    given: dict[str, Tensor] = {}
    for name in ("prompt_token", "prompt_positional_embedding"):
        if name not in extras:
            raise ConfigError(f"the checkpoint has no {name}", fix="a checkpoint of NKUhealong/DVPT's ViT")
        given[name] = extras[name]
    owners = {id(module): index for index, module in enumerate(vit.prompt_proj)}
    for name, value in extras.items():
        found = _OFFICIAL.fullmatch(name)
        if found is None:
            continue
        if int(found[1]) >= len(vit.blocks):
            raise ConfigError(f"{name} belongs to a block that this ViT has not", fix="load the trunk of the same file")
        own = f"prompt_proj.{owners[id(vit.blocks[int(found[1])].dvpt[0])]}.{found[2]}"
        if own in given and not torch.equal(given[own], value):
            raise ConfigError(f"{name} differs in blocks that would share it", fix="a smaller share_every")
        given[own] = value
    expected = {name: value for name, value in vit.state_dict().items() if trains(name)}
    odd = sorted(n for n in given.keys() | expected.keys() if _shape(given, n) != _shape(expected, n))
    if odd:
        raise ConfigError(
            f"the checkpoint does not fit these settings: {odd[0]} is {_shape(given, odd[0])} in the file and "
            f"{_shape(expected, odd[0])} here",
            fix="the prompts, bottleneck and share_every that it was trained with",
        )
    vit.load_state_dict(given, strict=False)
    if "proj" in extras and "fc_head.weight" in extras:
        head = ProjectedHead(extras["proj"].T, len(extras["fc_head.weight"]))
        head.weight = nn.Parameter(extras["fc_head.weight"].clone())
        vit.head = head.to(vit.prompt_token.device)
        vit.num_classes = head.out_features  # type: ignore[assignment]


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


class DVPT(Adaptation):
    """A frozen ViT, its dynamic prompts and a new head for `task`."""

    def __init__(self, vit: nn.Module, settings: Settings = Settings(), *, task: Task, classify: Classify = Classify()):
        super().__init__(vit, settings, task=task, classify=classify, inject=inject, trains=trains)

    def param_groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
        """All trained tensors decay alike, gates and biases included (DVPT_vit_train.py)."""
        if layer_decay != 1.0:
            return super().param_groups(weight_decay, layer_decay)
        return [{"params": [p for p in self.vit.parameters() if p.requires_grad], "weight_decay": weight_decay}]
