"""Excision and Recovery: find defects by hiding what a frozen ViT finds salient and inpainting it, trained on good parts only.

Paper: Park et al., "Visual Defect Obfuscation Based Self-Supervised Anomaly Detection", Scientific Reports 14:18872, 2024
(arXiv 2310.04010 v2; its v1 describes another method). No official code; the U-Net and the losses are those of the first
author's re-implementation of RIAD, YeongHyeon/RIAD-PyTorch, and the attention is that of facebookresearch/dino.

What happens, and where: the last block's attention A of the class token to the patches, mean over heads, is what counts as
salient (`explain.attention`); hidden is where A > mu + 0.674 sigma of its own map, about a quarter of the picture
(`obfuscation.salient`); what is hidden is replaced by a mosaic of s x s cells, x_in = (1 - m) x + m mosaic(x, s)
(`obfuscation.obfuscate`); a U-Net restores the picture from that in one pass (`unet`); its loss on the whole picture is
l2 + ssim + msgms (`EAR.losses`). A picture's score is the maximum of the MSGMS map between it and what was restored
(`EAR.inspect`, `scores`). The scale s is chosen before training, from good parts alone (`obfuscation.choose_scale`).

Differs from the paper: no code of it is public, and what its text leaves open is our reading, each an argument: last block
and mean of heads (`layer`, `heads`), nearest upsampling (`upsample`), the criterion for s (`scale`), three MSGMS scales
(`num_scales`), no edge term (`edge`). The epoch is chosen by validation loss on good parts, never by test scores; the rate
follows a cosine without restarts.

Cost: one ViT and one U-Net pass an image. Masks are computed once before training. What is not salient is never hidden, and
what is not hidden is hardly ever wrong: a defect that attention passes by cannot be found (the report says how many are).

    vitkit anomaly ear --model vit_small_patch8_224.dino --data bottle/ --out runs/bottle --image_size 256
    vitkit.anomaly("ear", model="vit_small_patch8_224.dino", data="bottle/", out="runs/bottle", image_size=256)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.anomaly import obfuscation, scores
from vitkit.anomaly.unet import UNet
from vitkit.errors import ConfigError, WeightsError
from vitkit.passport import Preprocess
from vitkit.settings import check_choices

RECIPE = {
    "epochs": 300,  # RIAD-PyTorch, run.py; the paper's are not known
    "batch_size": 16,  # RIAD-PyTorch, run.py
    "optimizer": "adamw",  # with weight_decay 0 it is Adam, the author's choice
    "blr": 1.6e-2,  # 1e-3 at 16 images, RIAD-PyTorch, source/agent.py
    "weight_decay": 0.0,  # none there
    "augment": False,  # masks are computed once, on the picture as it is at test time
    "hflip": False,  # products have a left and a right
    "crop_scale": (0.9, 1.0),  # where augment is asked for; the mask moves with the picture
}


@dataclass(frozen=True)
class Settings:
    """Excision and Recovery."""

    mask: Literal["attention", "random", "none"] = "attention"
    """what is hidden: what the ViT attends to; random cells in several passes (RIAD); nothing (an autoencoder)"""
    layer: int = -1
    """block whose attention is read; negative counts from the last (DINO: the last)"""
    heads: Literal["mean", "any"] = "mean"
    """one mask from the mean of the heads, or hidden is what the mask of any head hides (uncertain in the paper)"""
    rule: Literal["sigma", "percentile", "mass"] = "sigma"
    """A > mu + amount sigma (the first author's later paper); the share `amount` of patches; the share `amount` of attention
    (DINO's visualize_attention.py)"""
    amount: float = 0.674
    """of the rule; 0.674 deviations are a normal distribution's third quartile"""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """masks from patches to pixels: whole patches, or attention interpolated before the rule (uncertain in the paper)"""
    hint: bool = True
    """false: what is hidden is emptied instead of shown as a mosaic (the paper's ablation)"""
    scale: int | Literal["auto"] = "auto"
    """pixels of a mosaic cell; auto = the one of 2, 4, 8, 16, 32 from which pasted patches stand out most in good parts"""
    filters: tuple[int, ...] = (64, 128, 256, 512, 512)
    """widths of the U-Net, the last in its middle: five blocks (first author's later paper; RIAD-PyTorch: 64,128,256,512)"""
    ksize: int = 3
    """U-Net kernels (RIAD-PyTorch)"""
    num_scales: int = 3
    """picture sizes of MSGMS, each half the one before (RIAD-PyTorch: 3, RIAD: 4)"""
    l2: float = 1.0
    """weight of the squared error (RIAD-PyTorch)"""
    ssim: float = 1.0
    """weight of (1 - SSIM) / 2 (RIAD-PyTorch)"""
    msgms: float = 1.0
    """weight of 1 - MSGMS (RIAD-PyTorch)"""
    edge: float = 0.0
    """weight of the difference of gradient magnitudes (some descriptions of the method list one: uncertain)"""
    smooth: float = 0.0
    """pixels of a Gaussian over the anomaly map before its maximum is taken (public variants: 7; the author: none)"""
    cells: tuple[int, ...] = (2, 4, 8, 16)
    """random masks: pixels of the cells (RIAD)"""
    parts: int = 3
    """random masks: disjoint sets the cells are dealt into, one pass each (RIAD)"""
    false_alarms: float = 0.05
    """share of good parts that may be called defective: the threshold is set for it on good validation parts"""
    baselines: tuple[str, ...] = ("no_hint", "random", "memory")
    """trained and measured beside it: no_hint, random, identity (nothing hidden), memory (patch features of the same ViT);
    "none" for none"""
    coreset: float = 0.1
    """memory: share of patches that is kept (PatchCore: 0.01 to 0.25)"""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.scale != "auto" and self.scale < 1:
            raise ConfigError(f"scale is {self.scale}", fix="pixels of a mosaic cell, e.g. 8, or auto")
        for name, low, high in (("false_alarms", 0, 1), ("coreset", 0, 1.000001)):
            if not low < getattr(self, name) < high:
                raise ConfigError(f"{name} is {getattr(self, name):g}", fix="a share above 0 and below 1, e.g. 0.05")
        if self.rule != "sigma" and not 0 < self.amount < 1:
            raise ConfigError(
                f"amount is {self.amount:g} with rule {self.rule}", fix="a share between 0 and 1, e.g. 0.25"
            )
        if min(self.l2, self.ssim, self.msgms, self.edge) < 0 or not self.l2 + self.ssim + self.msgms + self.edge:
            raise ConfigError("the weights l2, ssim, msgms and edge", fix="none below 0, and not all 0")
        if self.num_scales < 1 or self.parts < 2 or not self.cells or min(self.cells) < 1 or self.smooth < 0:
            raise ConfigError(
                f"num_scales {self.num_scales}, parts {self.parts}, cells {self.cells}, smooth {self.smooth:g}",
                fix="num_scales 1 or more, parts 2 or more, cells of 1 pixel or more, smooth 0 or more",
            )
        known = ("no_hint", "random", "identity", "memory", "none")
        unknown = [name for name in self.baselines if name not in known]
        if unknown or ("none" in self.baselines and len(self.baselines) > 1):
            what = f"there is no baseline '{unknown[0]}'" if unknown else "baselines are none and others"
            raise ConfigError(what, fix=f"some of {', '.join(known[:-1])}, or none alone")


class EAR(nn.Module):
    """`forward({"image": (B, C, H, W) normalised})` -> loss. The ViT stays as it is; the U-Net trains.

    `batch["hidden"]` (B, 1, H, W) bool gives masks that were computed before; `batch["seed"]` (B,) makes random ones a
    function of the picture.
    """

    needs_labels = False
    job = "vitkit.run.anomaly_jobs:anomaly_job"

    def __init__(self, vit: nn.Module, settings: Settings = Settings()):
        super().__init__()
        self.vit, self.settings = tokens.require_vit(vit), settings
        vit.requires_grad_(False)
        passport = getattr(vit, "passport", None)
        self.preprocess = passport.preprocess if passport is not None else Preprocess()
        self.unet = UNet(self.preprocess.in_chans, settings.filters, settings.ksize)
        self.scale: int | None = (
            None if settings.scale == "auto" else settings.scale
        )  # of the mosaic, once it is chosen
        self.passes = 0  # pictures through the U-Net by `inspect`

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.preprocess.denormalise(batch["image"])
        hidden = batch.get("hidden")
        if self.settings.mask == "random":
            hidden = self._random(batch, x)[:, :1]
        elif hidden is None:
            hidden = self.hide(batch["image"])
        return self.losses(x, self.unet(self._obfuscate(x, hidden)))

    def losses(self, x: Tensor, restored: Tensor) -> dict[str, Tensor]:
        """Weighted sum of the terms on whole pictures, and each term that counts."""
        s = self.settings
        terms = {}
        if s.l2:
            terms["l2"] = s.l2 * (x - restored).square().mean()
        if s.ssim:
            terms["ssim"] = s.ssim * scores.ssim_map(x, restored).mean()
        if s.msgms:
            terms["msgms"] = s.msgms * scores.msgms_loss(x, restored, s.num_scales)
        if s.edge:
            terms["edge"] = s.edge * scores.edge_loss(x, restored)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    @torch.no_grad()
    def hide(self, images: Tensor) -> Tensor:
        """What is hidden of normalised images, (B, 1, H, W) bool: a function of the picture alone."""
        size, s = images.shape[2:], self.settings
        if s.mask != "attention":
            return images.new_zeros((len(images), 1, *size), dtype=torch.bool)
        from vitkit.explain import attention

        found = attention.by_head(self.vit, images, attention.Settings(layer=s.layer))  # (B, heads, h, w)
        found = found.mean(1, keepdim=True) if s.heads == "mean" else found
        if s.upsample == "bilinear":
            mask = obfuscation.salient(obfuscation.enlarge(found, size, "bilinear"), s.rule, s.amount)
        else:
            mask = obfuscation.salient(found, s.rule, s.amount)
            mask = obfuscation.enlarge(mask.float(), size).bool()
        return mask.any(1, keepdim=True)

    @torch.inference_mode()
    def inspect(self, images: Tensor, hidden: Tensor | None = None) -> dict[str, Tensor]:
        """Normalised images to "map" (B, 1, H, W) and "score" (B,), with "hidden" (B, 1, H, W) and the pictures "input" and
        "restored" (B, C, H, W) in [0, 1].

        One U-Net pass an image; random masks take parts x cells.
        """
        x = self.preprocess.denormalise(images)
        if self.settings.mask == "random":
            return self._inspect_random(images, x)
        hidden = self.hide(images) if hidden is None else hidden
        shown = self._obfuscate(x, hidden)
        restored = self._restore(shown)
        found = scores.anomaly_map(x, restored, self.settings.num_scales, self.settings.smooth)
        return {
            "map": found,
            "score": scores.image_score(found),
            "hidden": hidden,
            "input": shown,
            "restored": restored,
        }

    def _inspect_random(self, images: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Each disjoint set of cells emptied and restored in a pass of its own, put together; the mean over cell sizes."""
        s, maps = self.settings, []
        same = torch.zeros(len(x), dtype=torch.int64)  # the same masks for every picture and call
        for cell in s.cells:
            masks = obfuscation.random_cells(same, x.shape[2:], cell, s.parts).to(x.device)
            restored = torch.zeros_like(x)
            for part in masks.split(1, dim=1):
                restored = torch.where(part, self._restore(obfuscation.obfuscate(x, part, None)), restored)
            maps.append(scores.anomaly_map(x, restored, s.num_scales, s.smooth))
        found = torch.stack(maps).mean(0)
        shown = obfuscation.obfuscate(x, masks[:, :1], None)
        every = torch.ones_like(masks[:, :1])
        return {"map": found, "score": scores.image_score(found), "hidden": every, "input": shown, "restored": restored}

    def choose_scale(self, images: Tensor, hidden: Tensor, seed: int = 0) -> list[dict[str, float]]:
        """Set the mosaic's scale from normalised good images where the settings leave it open; the figures behind it."""
        if self.scale is not None:
            return []
        self.scale, rows = obfuscation.choose_scale(self.preprocess.denormalise(images), hidden, seed)
        return rows

    def _obfuscate(self, x: Tensor, hidden: Tensor) -> Tensor:
        if self.settings.mask == "none":
            return x
        if not self.settings.hint or self.settings.mask == "random":
            return obfuscation.obfuscate(x, hidden, None)
        return obfuscation.obfuscate(x, hidden, self.scale or obfuscation.usual_scale(x.shape[2:]))

    def _restore(self, shown: Tensor) -> Tensor:
        self.passes += len(shown)
        return self.unet(shown)

    def _random(self, batch: dict[str, Tensor], x: Tensor) -> Tensor:
        seeds = batch.get("seed")
        if seeds is None:
            seeds = torch.randint(2**31, (len(x),))
        cell = self.settings.cells[int(seeds[0]) % len(self.settings.cells)]
        return obfuscation.random_cells(seeds, x.shape[2:], cell, self.settings.parts).to(x.device)

    def param_groups(self, weight_decay: float) -> list[dict]:
        from vitkit.parts.optim import weight_decay_groups

        return weight_decay_groups(self.named_parameters(), weight_decay)

    def finish(self) -> nn.Module:
        """The ViT that makes the masks, unchanged."""
        return self.vit

    def extras(self) -> dict[str, Tensor]:
        """The U-Net and the mosaic's scale, saved beside the ViT's passport."""
        state = {f"ear.unet.{name}": value.contiguous() for name, value in self.unet.state_dict().items()}
        return {**state, "ear.scale": torch.tensor(self.scale or 0)}

    def load_extras(self, extras: Mapping[str, Tensor]) -> None:
        """Take what `extras` gave."""
        state = {key.removeprefix("ear.unet."): value for key, value in extras.items() if key.startswith("ear.unet.")}
        own = self.unet.state_dict()
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if wrong or "ear.scale" not in extras:
            raise WeightsError(
                f"these weights hold no U-Net of filters {self.settings.filters}, e.g. {(wrong or ['ear.scale'])[0]}",
                fix="name a run of vitkit anomaly ear, with the settings that it was made with",
            )
        self.unet.load_state_dict(state)
        self.scale = int(extras["ear.scale"]) or None
