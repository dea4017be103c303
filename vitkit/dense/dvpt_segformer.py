"""DVPT for segmentation: a frozen SegFormer whose blocks carry prompts that look at the feature map, for masks.

Paper: He et al., "DVPT: Dynamic Visual Prompt Tuning of Large Pre-trained Models for Medical Image Analysis", Neural
Networks 185, 2025 (arXiv 2307.09787). Official code: NKUhealong/DVPT. Trunk: Xie et al., "SegFormer", NeurIPS 2021
(arXiv 2105.15203).

What happens, and where: after a block's attention, with Y (B, N, D) the stream, its 10 prompts collect E =
softmax(P Y^T / sqrt(D)) Y, and gate2 * E is added to the first 10 tokens of Y, row by row from the top left
(`Block`). Then x = Y + MLP(LN Y) + G(Y) with the gated bottleneck G of vitkit.parts.bottleneck, one for `share_every`
blocks of a stage. In the decoder every stage's linear layer has a G of its own beside it (`DecoderLinear`); the
concatenated maps (deepest first) go straight to a trainable 1x1 convolution, without SegFormer's fusion layer. Loss: half
cross-entropy, half Dice (`mask_loss`).

Differs from the code: softmax is applied once in the Dice loss (`mask_loss(double_softmax=True)` is theirs); any (H, W)
instead of squares; pixels are normalised as SegFormer was trained (the script feeds 0..255); training batches are
shuffled; the model is chosen on validation images, not on the test images.

Cost: SegFormer-B4 trains 1.0 M of 65 M weights; the bottlenecks add less than 1 % to a forward pass.

    method = DVPTSegmentation(DVPTSegFormer(Settings(size="b4"), classes=2))
    load_official(method.model, "segformerb4_512x512ade160k.pth")
    vitkit.dense.training.fit_masks(method, vitkit.data.read("scans/"), image_size=512, epochs=80)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitkit.errors import ConfigError, WeightsError
from vitkit.parts.bottleneck import Bottleneck
from vitkit.settings import check_choices

HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)


@dataclass(frozen=True)
class Size:
    """A SegFormer: widths and blocks of its four stages, and the width of its decoder."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    decoder_dim: int
    heads: tuple[int, ...] = HEADS
    reductions: tuple[int, ...] = REDUCTIONS

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.heads) == len(self.reductions) == 4:
            raise ConfigError("a SegFormer has four stages", fix="four widths, depths, heads and reductions")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ConfigError(f"{heads} heads do not divide a width of {width}", fix="other heads or widths")


_WIDE = (64, 128, 320, 512)
SIZES = {
    "b0": Size((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "b1": Size(_WIDE, (2, 2, 2, 2), 256),
    "b2": Size(_WIDE, (3, 4, 6, 3), 768),
    "b3": Size(_WIDE, (3, 4, 18, 3), 768),
    "b4": Size(_WIDE, (3, 8, 27, 3), 768),
    "b5": Size(_WIDE, (3, 6, 40, 3), 768),
}


@dataclass(frozen=True)
class Settings:
    """Dynamic visual prompt tuning of SegFormer."""

    size: Literal["b0", "b1", "b2", "b3", "b4", "b5"] = "b4"
    """SegFormer's size (b4 in the paper's code)"""
    prompts: int = 10
    """prompts of a block (official constant)"""
    bottleneck: int = 10
    """width of the bottlenecks (official constant)"""
    share_every: int = 2
    """blocks in a row, within a stage, that use one bottleneck (official constant)"""
    gate_init: float = 0.0
    """start of every gate"""
    drop_path: float = 0.1
    """stochastic depth of the trunk, linear over its blocks"""
    train_trunk: bool = False
    """train the trunk as well, as one must without released weights"""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("prompts", "bottleneck", "share_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="at least 1")


class Attention(nn.Module):
    """Attention whose keys and values come from a map reduced by a strided convolution."""

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, H W, D) -> (B, H W, D)."""
        seen = x
        if self.reduction > 1:
            if min(hw) < self.reduction:
                raise ConfigError(
                    f"a feature map of {hw[0]} x {hw[1]} is smaller than its reduction {self.reduction}",
                    fix="images of at least 32 px a side",
                )
            seen = self.norm(self.sr(_map(x, hw)).flatten(2).transpose(1, 2))
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DWConv(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class Mlp(nn.Module):
    """Linear, depth-wise 3x3 convolution on the map, GELU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.dwconv, self.fc2 = nn.Linear(dim, hidden), DWConv(hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        x = self.dwconv.dwconv(_map(self.fc1(x), hw)).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """SegFormer's block with prompts. `shared`: the bottleneck of the first block of its group, which alone owns it."""

    def __init__(
        self,
        dim: int,
        heads: int,
        reduction: int,
        *,
        prompts: int = 10,
        bottleneck: int = 10,
        gate_init: float = 0.0,
        shared: Bottleneck | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, reduction)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        self.prompt = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, prompts, dim), std=0.02))
        self.prompt_gate2 = nn.Parameter(torch.full((1,), float(gate_init)))
        if shared is None:
            self.prompt_proj = shared = Bottleneck(dim, bottleneck, gate_init=gate_init)
        self.shared = (shared,)  # in a tuple: a reference, not a child; state dicts hold the bottleneck once

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, H W, D) -> (B, H W, D)."""
        y = x + self.drop_path(self.attn(self.norm1(x), hw))
        count = min(self.prompt.shape[1], y.shape[1])  # a map may have fewer tokens than there are prompts
        weights = (self.prompt[:, :count] @ y.transpose(1, 2) * y.shape[-1] ** -0.5).softmax(-1)
        first = y[:, :count] + self.prompt_gate2 * (weights @ y)
        y = torch.cat([first, y[:, count:]], dim=1)
        return y + self.drop_path(self.mlp(self.norm2(y), hw)) + self.shared[0](y)


class DecoderLinear(Bottleneck):
    """A stage's linear layer in the decoder, with its own gated bottleneck in parallel: (B, N, D) -> (B, N, `out`)."""

    def __init__(self, dim: int, out: int, *, bottleneck: int = 10, gate_init: float = 0.0):
        super().__init__(dim, bottleneck, out=out, gate_init=gate_init)
        self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + super().forward(x)


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then LayerNorm."""

    def __init__(self, chans: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(chans, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class DVPTSegFormer(nn.Module):
    """Images (B, C, H, W) -> class scores of every pixel (B, classes, H, W). Names are the official ones, without the
    prefixes `backbone.` and `decode_head.`."""

    def __init__(self, settings: Settings = Settings(), *, classes: int, in_chans: int = 3, size: Size | None = None):
        super().__init__()
        if classes < 2:
            raise ConfigError(f"classes is {classes}", fix="at least 2: background counts as one")
        self.settings, self.classes = settings, classes
        size = SIZES[settings.size] if size is None else size
        total = sum(size.depths)
        rates = [settings.drop_path * index / max(total - 1, 1) for index in range(total)]
        options = {key: getattr(settings, key) for key in ("prompts", "bottleneck", "gate_init")}
        chans = in_chans
        for stage in range(4):
            dim, kernel, stride = size.widths[stage], 3 if stage else 7, 2 if stage else 4
            blocks = nn.ModuleList()
            for index in range(size.depths[stage]):
                owner = blocks[index - index % settings.share_every] if index % settings.share_every else None
                shared = None if owner is None else owner.prompt_proj
                where = dim, size.heads[stage], size.reductions[stage]
                blocks.append(Block(*where, shared=shared, drop_path=rates.pop(0), **options))
            setattr(self, f"patch_embed{stage + 1}", PatchEmbed(chans, dim, kernel, stride))
            setattr(self, f"block{stage + 1}", blocks)
            setattr(self, f"norm{stage + 1}", nn.LayerNorm(dim, eps=1e-6))
            beside = DecoderLinear(dim, size.decoder_dim, bottleneck=settings.bottleneck, gate_init=settings.gate_init)
            setattr(self, f"linear_c{stage + 1}", beside)
            chans = dim
        self.linear_pred = nn.Conv2d(4 * size.decoder_dim, classes, 1)
        self.apply(_initialise)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Normed feature maps (B, D, h, w) of the four stages, at 1/4, 1/8, 1/16 and 1/32 of the image."""
        found, x = [], images
        for stage in range(1, 5):
            x, hw = getattr(self, f"patch_embed{stage}")(x)
            for block in getattr(self, f"block{stage}"):
                x = block(x, hw)
            x = _map(getattr(self, f"norm{stage}")(x), hw)
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        full, parts = maps[0].shape[2:], []
        for stage in (4, 3, 2, 1):
            x = maps[stage - 1]
            out = getattr(self, f"linear_c{stage}")(x.flatten(2).transpose(1, 2))
            out = _map(out, x.shape[2:])
            parts.append(out if stage == 1 else F.interpolate(out, full, mode="bilinear", align_corners=False))
        scores = self.linear_pred(torch.cat(parts, dim=1))
        return F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)


def trains(name: str) -> bool:
    """Prompts, gates, bottlenecks and the last convolution train; SegFormer does not."""
    return "prompt" in name or name.startswith("linear_pred.")


class DVPTSegmentation(nn.Module):
    """`forward({"image": (B, C, H, W) normalised, "mask": (B, H, W) int64, 255 = unknown})` -> {"loss", "logits"}."""

    def __init__(self, model: DVPTSegFormer):
        super().__init__()
        self.model = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.settings.train_trunk or trains(name))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = self.model(batch["image"])
        return {"loss": mask_loss(scores, batch["mask"]), "logits": scores}

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities of every pixel (B, classes, H, W)."""
        return self.model(images).float().softmax(1)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """All trained tensors decay alike (DVPT_seg_train.py)."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]


def mask_loss(scores: Tensor, masks: Tensor, *, double_softmax: bool = False) -> Tensor:
    """Half cross-entropy, half Dice of class `scores` (B, C, H, W) against `masks` (B, H, W); pixels of 255 are left out.

    double_softmax: hand probabilities to the Dice loss, which applies its softmax again, as the authors' script does.
    """
    entropy = F.cross_entropy(scores, masks, ignore_index=255)
    return 0.5 * entropy + 0.5 * dice_loss(scores.softmax(1) if double_softmax else scores, masks)


def dice_loss(scores: Tensor, masks: Tensor, *, softmax: bool = True, smooth: float = 1e-5) -> Tensor:
    """Mean over classes of 1 - (2 sum(p g) + e) / (sum(p^2) + sum(g^2) + e), sums over the whole batch."""
    known = (masks != 255).unsqueeze(1)
    p = (scores.softmax(1) if softmax else scores) * known
    g = F.one_hot(masks.where(masks != 255, 0), scores.shape[1]).movedim(-1, 1).to(p.dtype) * known
    axes = (0, 2, 3)
    overlap, sizes = (p * g).sum(axes), (p * p).sum(axes) + (g * g).sum(axes)
    return (1 - (2 * overlap + smooth) / (sizes + smooth)).mean()


def load_official(model: DVPTSegFormer, path: str | Path) -> list[str]:
    """Load a SegFormer or DVPT checkpoint in the authors' layout into `model`; what was done, in sentences.

    Names may start with `backbone.` and `decode_head.`. SegFormer's fusion layer, its unused classifier and an output
    layer of other classes are left out and named. Raises WeightsError when a tensor of the trunk is missing or misshapen.
    """
    from vitkit.parts.statefiles import read_state

    tensors, _ = read_state(path)
    return load_tensors(model, tensors, where=str(path))


_PREFIX = re.compile(r"^(?:module\.)?(?:backbone\.|decode_head\.)?")
_COPY = re.compile(r"(block\d)\.(\d+)\.(prompt_proj\..+)")


def load_tensors(model: DVPTSegFormer, tensors: Mapping[str, Tensor], *, where: str = "the checkpoint") -> list[str]:
    """`load_official` from tensors."""
    own, left = model.state_dict(), []
    given: dict[str, Tensor] = {}
    for name, value in tensors.items():
        name = _PREFIX.sub("", name)
        copy = _COPY.fullmatch(name)
        if copy:  # a shared bottleneck may be stored under every block that uses it
            every = model.settings.share_every
            name = f"{copy[1]}.{int(copy[2]) // every * every}.{copy[3]}"
            if name in given and not torch.equal(given[name], value.float()):
                raise WeightsError(
                    f"{where}: {name} differs in blocks that would share it", fix="a smaller share_every"
                )
        if name not in own or (name.startswith("linear_pred.") and own[name].shape != value.shape):
            left.append(name)
        else:
            given[name] = value.float()
    missing = [n for n in own if n not in given and not trains(n)]
    odd = [n for n, value in given.items() if own[n].shape != value.shape]
    if missing or odd:
        first = missing[0] if missing else f"{odd[0]} {tuple(given[odd[0]].shape)} for {tuple(own[odd[0]].shape)}"
        raise WeightsError(
            f"{where} does not fit this SegFormer: {len(missing)} tensors are missing and {len(odd)} of another shape, "
            f"e.g. {first}",
            fix=f"one of the sizes {', '.join(SIZES)}, in the layout of NVlabs/SegFormer",
        )
    model.load_state_dict(given, strict=False)
    prompts = sum("prompt" in name for name in given)
    said = [f"{len(given)} tensors loaded, {prompts} of them prompts and bottlenecks"]
    return said + ([f"left out: {', '.join(sorted(left))}"] if left else [])


def _map(x: Tensor, hw: tuple[int, ...] | torch.Size) -> Tensor:
    """(B, H W, D) -> (B, D, H, W)."""
    return x.transpose(1, 2).unflatten(2, tuple(hw))


def _initialise(module: nn.Module) -> None:
    """SegFormer's: truncated normal for linear layers, fan-out normal for convolutions, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
