"""PH-Reg: take artefact tokens out of a ViT's patch features by registers added afterwards and self-distillation, no labels.

Paper: Chen et al., "Vision Transformers with Self-Distilled Registers", NeurIPS 2025 (arXiv 2505.21501). Official code:
0raiser0/PH-Reg, commit 5910d50 (DINOv2_full).

What happens, and where: a frozen copy of the ViT sees every image ten times, shifted by whole patches and mirrored
(vitkit.parts.shifted_views), all views in one batch; its patch features are put back to the patches that they show and
averaged, so that artefacts, which depend on the view, thin out (`PHReg.target`). The ViT gets m registers behind its class
token (vitkit.parts.registers) and learns to say the same of the plain image (`distillation`):

    L = 1 - mean over patches of cos(t, f) + mse_scale mean (t - f)^2

Registers, positions, the patch projection and the last block train; all else stays bit for bit. Where the patch embedding
is timm's plain projection, shifted images have shifted embeddings: it runs once an image and its mirror image, which is
exact to the rounding of the convolution; other stems embed every view.

Differs from the paper: the text unlocks the last attention layer, the code (and this) the whole last block. Any timm ViT: what
a dense head reads is distilled, registers stand behind the class token. Views are a function of each sample's seed. A
non-finite loss stops training, where theirs skips the batch. Their CLIP variant (last block cut short) is not here.
`keep_targets` is ours.

Cost: `views` forward passes of the teacher a step beside one pass of the student, forward and back; with `keep_targets` the
teacher runs in the first epoch only, and N D floats an image are kept. Afterwards m more tokens.

    vitkit clean ph_reg --model vit_small_patch14_dinov2.lvd142m --data photos/ --out runs/ph_reg
    vitkit.clean("ph_reg", model="vit_small_patch14_dinov2.lvd142m", data="photos/", out="runs/ph_reg")
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.settings import check_choices

RECIPE = {
    "epochs": 30,  # the checkpoint that their segmentation config reads; distill_main.py goes on to 100
    "batch_size": 8,  # distill_main.py
    "optimizer": "adamw",  # distill_main.py
    "blr": 3.2e-3,  # 1e-4 at 8 images a step, distill_main.py
    "min_lr": 1.0,  # at most the rate itself: no cosine, the rate falls by the epoch (`lr_decay`)
    "weight_decay": 0.01,  # of everything that trains, distill_main.py
    "eval_every": 5,  # ours: the teacher sees held-out images as often as others
}


@dataclass(frozen=True)
class Settings:
    """Post hoc registers."""

    registers: int | Literal["auto"] = "auto"
    """registers to add (16, distill_main.py); auto = 16, or none where the ViT has its own, which then stay as they are"""
    views: int = 10
    """shifted and mirrored copies that the teacher sees of each image, the image itself among them (`counts`, 10)"""
    shift_frac: float = 0.15
    """largest shift as a share of the patch grid (`shift_frac`, 0.15)"""
    flips: bool = True
    """mirror views at random (denoising.py); false where left and right matter"""
    mse_scale: float = 1.0
    """weight of the squared error beside the cosine (distill_main.py; the function's own default of 0.2 is not used)"""
    unlock_blocks: int = 1
    """last blocks that train (distill_main.py: 1)"""
    lr_decay: float = 0.05
    """factor by which the rate has fallen after `decay_epochs`, exponentially by the epoch (distill_main.py)"""
    decay_epochs: int = 100
    """epochs of that fall (distill_main.py)"""
    lr_floor: float = 5e-6
    """rate below which it does not fall (distill_main.py)"""
    keep_targets: bool = False
    """compute each image's target once, for its evaluation view, and keep it in memory: other epochs skip the teacher"""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.registers != "auto" and self.registers < 0:
            raise ConfigError(f"registers is {self.registers}", fix="0 or more; published 16")
        for name, least in (("views", 2), ("unlock_blocks", 0), ("decay_epochs", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"{least} or more")
        if not 0 < self.shift_frac < 1:
            raise ConfigError(f"shift_frac is {self.shift_frac}", fix="a share above 0 and below 1; published 0.15")
        if not 0 < self.lr_decay <= 1 or self.lr_floor < 0 or self.mse_scale < 0:
            what = f"lr_decay {self.lr_decay}, lr_floor {self.lr_floor}, mse_scale {self.mse_scale}"
            raise ConfigError(what, fix="a factor above 0 and at most 1, and numbers of at least 0")


class PHReg(nn.Module):
    """`forward({"image": (B, C, H, W) normalised})` -> loss. `vit` is the student, `teacher` its frozen original."""

    needs_labels = False
    job = "vitkit.run.clean_jobs:distil_job"

    def __init__(self, vit: nn.Module, settings: Settings = Settings()):
        super().__init__()
        from vitkit.parts.registers import add_registers, registers_of

        self.settings = settings
        tokens.require_vit(vit)
        own = registers_of(vit)
        wanted = settings.registers if settings.registers != "auto" else 0 if own else 16
        if settings.unlock_blocks > len(vit.blocks):
            raise ConfigError(f"unlock_blocks is {settings.unlock_blocks}", fix=f"the ViT has {len(vit.blocks)} blocks")
        self.teacher: Any = copy.deepcopy(vit).eval().requires_grad_(False)
        self.vit: Any = vit.requires_grad_(False)
        rows = add_registers(vit, wanted) if wanted else []
        self.notes = [f"the ViT has {own} registers of its own: they stay, and none are added"] if own else []
        last = [vit.blocks[-index] for index in range(1, settings.unlock_blocks + 1)]
        new = [vit.reg_token] if wanted else []
        table = [] if vit.pos_embed is None else [vit.pos_embed]
        for parameter in (*new, *rows, *table, *vit.patch_embed.proj.parameters(), *nn.ModuleList(last).parameters()):
            parameter.requires_grad_(True)
        self.register_buffer("blank", _white(vit), persistent=False)
        self.rate: float | None = None
        self._kept: dict[tuple[int, float], Tensor] = {}

    def train(self, mode: bool = True) -> PHReg:
        """The teacher never drops anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    # ------------------------------------------------------------ the loss

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch["seed"]` (B,) makes views a function of the sample; `batch["offsets"]` (B, V, 2) in patches and "flips"
        (B, V) fix them. With `keep_targets` they are a function of `batch["index"]`."""
        images = batch["image"]
        keep = self.settings.keep_targets and "index" in batch
        target = self._remembered(images, batch["index"]) if keep else self.target(images, *self.views_of(batch))
        student = tokens.dense(self.vit, tokens.encode(self.vit, images)).patches
        cosine, mse = distillation(target, student)
        found = {"loss": cosine + self.settings.mse_scale * mse, "cosine": cosine.detach(), "mse": mse.detach()}
        if self.rate is not None and self.training:
            found["rate"] = cosine.detach().new_full((), self.rate)
        return found

    def views_of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Offsets (B, V, 2) and flip bits (B, V) of a batch."""
        images = batch["image"]
        if "offsets" in batch:
            return batch["offsets"].to(images.device), batch["flips"].to(images.device)
        seeds = batch.get("seed")
        if seeds is None:
            seeds = torch.randint(2**31, (len(images),))
        return self.draw(seeds, images)

    def draw(self, seeds: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Views that belong to the seeds (B,), for images of this size."""
        from vitkit.parts.shifted_views import draw_views

        s, grid = self.settings, tokens.grid_of(self.teacher, images.shape[2:])
        drawn = draw_views(seeds.tolist(), s.views, grid, s.shift_frac, s.flips)
        offsets, flips = (torch.from_numpy(one).to(images.device, non_blocking=True) for one in drawn)
        return offsets, flips

    @torch.no_grad()
    def target(self, images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """The teacher's patch features (B, N, D) averaged over views, float32."""
        from vitkit.parts.shifted_views import put_back, view_cells

        cells = view_cells(offsets, flips, tokens.grid_of(self.teacher, images.shape[2:]))
        return put_back(self.view_tokens(images, offsets, flips, cells).patches.float(), cells)

    @torch.no_grad()
    def view_tokens(self, images: Tensor, offsets: Tensor, flips: Tensor, cells: Tensor) -> tokens.Tokens:
        """What the teacher says of every view, (B V, N, D) patches, all views in one batch."""
        from vitkit.parts import shifted_views as views

        if views.embeds_patches_alone(self.teacher):
            patches = views.view_embeddings(self.teacher, images, cells, flips, self.blank, self.settings.flips)
            stream = tokens.embed(self.teacher, images, patches=patches)
        else:
            pixels = views.view_pixels(images, offsets, flips, self.teacher.patch_embed.patch_size, self.blank)
            stream = tokens.embed(self.teacher, pixels.flatten(0, 1))
        return tokens.dense(self.teacher, tokens.finish(self.teacher, tokens.run(self.teacher, stream)))

    def _remembered(self, images: Tensor, index: Tensor) -> Tensor:
        """Targets of these images, computed where they are not known yet. The sum of its pixels belongs to an image's key:
        held-out images have numbers of their own."""
        keys = list(zip(index.tolist(), images.sum((1, 2, 3), dtype=torch.float64).tolist(), strict=True))
        new = [row for row, key in enumerate(keys) if key not in self._kept]
        if new:
            some = images[new]
            found = self.target(some, *self.draw(index[new], some)).cpu()
            self._kept |= {keys[row]: one for row, one in zip(new, found, strict=True)}
        return torch.stack([self._kept[key] for key in keys]).to(images.device)

    # ------------------------------------------------------------ the loop's hooks

    def views(self, preprocess: Any, train: Any) -> tuple[Any, Any]:
        """The short side resized and a random crop along the long one; the plain view for held-out images and kept targets."""
        from vitkit.data.transforms import eval_view
        from vitkit.parts.cover_crop import CoverCrop

        plain = eval_view(preprocess)
        return (CoverCrop(preprocess) if train.augment and not self.settings.keep_targets else plain), plain

    def require(self, images: int, batch_size: int, world: int) -> None:
        """Refuse a grid that nothing can be shifted on, and more kept targets than 16 GB."""
        from vitkit.parts.shifted_views import shift_limits

        grid = tokens.grid_of(self.vit, self.vit.passport.preprocess.image_size)
        shift_limits(grid, self.settings.shift_frac)
        size = images * grid[0] * grid[1] * self.vit.embed_dim * 4
        if self.settings.keep_targets and size > 16e9:
            raise ConfigError(
                f"keep_targets would hold {size / 1e9:.0f} GB for {images} images",
                fix="leave it out, or use fewer images",
            )

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Everything that trains, decayed alike, norms and biases too, as published."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def before_step(self, now: Any, groups: list[dict]) -> None:
        """The rate of this step: theirs is set after each step, so that an epoch's first step has the rate before it."""
        epoch = int(now.epoch + 1e-9)
        done = epoch + (now.epoch - epoch > 1e-9)
        self.rate = epoch_rate(done, now.lr, self.settings)
        for group in groups:
            group["lr"] = self.rate * group.get("lr_scale", 1.0)

    def persistent(self) -> dict[str, Tensor]:
        """For checkpoints: what trains. The teacher is the model that the run began with."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def finish(self) -> nn.Module:
        """The cleaned ViT: a plain timm model with `reg_tokens`, which its passport says."""
        from vitkit.parts.registers import keywords, merge_rows, registers_of

        merge_rows(self.vit)
        passport = getattr(self.vit, "passport", None)
        if passport is not None and registers_of(self.vit) > registers_of(self.teacher):
            passport.arch_kwargs = {**passport.arch_kwargs, **keywords(self.vit)}
            step = {"method": "clean.ph_reg", "settings": asdict(self.settings)}
            if not keywords(self.vit) and step not in passport.steps:  # timm has no such model: `inject` makes it
                passport.steps = [*passport.steps, step]
        return self.vit


def inject(vit: nn.Module, settings: Settings) -> nn.Module:
    """Registers in a ViT for which timm has none, as a saved one had them; its weights are loaded afterwards."""
    from vitkit.parts.registers import add_registers, merge_rows

    add_registers(vit, 16 if settings.registers == "auto" else settings.registers)
    return merge_rows(vit)


def distillation(target: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - mean cosine over patches, mean squared error) of (B, N, D), in float32."""
    t, f = target.detach().float(), student.float()
    norms = (t.norm(dim=-1) + 1e-8) * (f.norm(dim=-1) + 1e-8)
    return 1 - ((t * f).sum(-1) / norms).mean(), (t - f).square().mean()


def epoch_rate(epochs: int, base: float, settings: Settings = Settings()) -> float:
    """The rate that stands after so many begun epochs: `base` at 0, falling exponentially to `lr_floor`."""
    if epochs == 0:
        return base
    return min(base, max(base * settings.lr_decay ** (epochs / settings.decay_epochs), settings.lr_floor))


def _white(vit: nn.Module) -> Tensor:
    """White pixels (C,) as the model sees them, (1 - mean) / std."""
    from vitkit.parts.adapt_tensors import adapt_pixels
    from vitkit.passport import Preprocess

    passport = getattr(vit, "passport", None)
    pixels = adapt_pixels(Preprocess(), vit.patch_embed.proj.in_channels) if passport is None else passport.preprocess
    return (1 - torch.tensor(pixels.mean)) / torch.tensor(pixels.std)
