"""DINOv2: pre-train a ViT on unlabelled images by self-distillation of whole images and of patches, or go on from released
weights without wrecking them.

Paper: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024 (arXiv 2304.07193), continued
on one domain: RAD-DINO, Perez-Garcia et al., "Exploring scalable medical image encoders beyond text supervision", Nature
Machine Intelligence 2025 (arXiv 2401.10815); Phikon-v2 (arXiv 2409.09173) on histology tiles. Official code:
facebookresearch/dinov2.

What happens, and where: of each image two large crops and `local_crops` small ones are cut (`data.multicrop`). The student
sees all, half of the large ones with blocks of patches masked (`parts.block_masks`); the teacher, its moving average, sees
the large ones whole. Teacher logits become targets by centring or Sinkhorn-Knopp, and the loss is (`parts.dino_losses`)

    CE(student small crops, both teacher views) + CE(student large crops, the other teacher view)     DINO
    + CE(student masked patches, the same patches of the teacher), mean in each image                 iBOT
    - 0.1 mean log distance of each class token to its nearest in the batch, each view by itself      KoLeo

`before_step` sets weight decay, temperatures and momentum from the step alone (`parts.dino_schedules`), `after_step` moves
the teacher. A guarded continuation (`guard`) fits new heads on frozen features first (`head_epochs`), then trains `unfreeze`
at a fraction of the rate, with a `drop_path` of at most 0.1 and an anchor to the original features; it watches held-out
images and goes back to the best state when they get worse (`run.guard`). The collapse doctor (`run.collapse`) says in words
what goes wrong.

Differs from the paper: nothing in the loss. The rate's warm-up is the loop's: base i / W in step i of W, where the official
linspace gives base i / (W - 1); the other schedules are exact. Crops of one size run together, sizes one after the other,
instead of packed by xformers; prototypes are evaluated in chunks and no logits are kept; the guard is ours (`guard=false` is
the paper's way, with fresh heads where the weights have none). A ViT without class token distils the mean of its patches.
Several processes are data-parallel or, with `shard`, FSDP, as published; KoLeo's neighbours are those of one process, as
published, everything else is over all processes.
Published models were trained with blur probabilities that the code inverts (0, 0.9, 0.5 for first, second and small crops):
so is `blur_p`.

Cost: 2 teacher and 2 student passes of large crops and `local_crops` small ones an image; prototypes x rows for the heads.
Rates above 0.1 of `drop_path` save their share of the student's work. The anchor costs 2 more passes without gradient.

    vitkit pretrain dinov2 --model vit_base_patch14_dinov2.lvd142m --data xrays/ --out runs/rad_dino
    vitkit.pretrain("dinov2", model="vit_base_patch14_dinov2.lvd142m", data="xrays/", out="runs/rad_dino")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError
from vitkit.parts import dino_losses, dino_state
from vitkit.parts.dino_batch import Crops, Masks, draw_masks, split
from vitkit.parts.dino_groups import parameter_groups
from vitkit.parts.dino_head import DINOHead
from vitkit.parts.dino_losses import Part
from vitkit.parts.dino_schedules import cosine, last_layer_lr, linear
from vitkit.parts.dino_signs import first_layer, signs
from vitkit.parts.sharded import local, whole
from vitkit.parts.subset_depth import uniform_depth
from vitkit.run.collapse import Doctor, Facts

RECIPE = {
    "epochs": 100,  # ssl_default_config.yaml, of 1250 steps each
    "warmup_epochs": 10.0,  # ssl_default_config.yaml
    "optimizer": "adamw",
    "betas": (0.9, 0.999),  # ssl_default_config.yaml
    "blr": 0.004,  # ssl_default_config.yaml, at 1024 images a step
    "lr_rule": "sqrt",  # ssl_default_config.yaml, scaling_rule sqrt_wrt_1024
    "min_lr": 1e-6,  # ssl_default_config.yaml
    "weight_decay": 0.04,  # ssl_default_config.yaml, start of its cosine
    "layer_decay": 0.9,  # ssl_default_config.yaml, layerwise_decay
    "clip_grad": 3.0,  # ssl_default_config.yaml, of backbone and heads each
    "drop_path": 0.3,  # ssl_default_config.yaml, the same in every block
    "batch_size": 64,  # ssl_default_config.yaml, a GPU
    "crop_scale": (0.32, 1.0),  # ssl_default_config.yaml, global_crops_scale
}

GUARDED_DEPTH = 0.1  # stochastic depth that released weights bear; at 0.3 the features of a small ViT are mostly noise


@dataclass(frozen=True)
class Settings:
    """DINOv2."""

    prototypes: int = 65536
    """outputs K of the head (ssl_default_config.yaml; large recipes 131072); 4096 to 16384 do for small data"""
    head_hidden: int = 2048
    """hidden width of the head (ssl_default_config.yaml)"""
    bottleneck_dim: int = 256
    """width before the prototypes (ssl_default_config.yaml; DINO head of large recipes 384)"""
    head_layers: int = 3
    """linear layers of the head before the prototypes (ssl_default_config.yaml)"""
    ibot_head: bool = False
    """a head of its own for patches (large recipes; by default the image's head serves both)"""
    ibot_prototypes: int | Literal["auto"] = "auto"
    """outputs of the patches' own head; auto = `prototypes`"""
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """how teacher logits become targets (ssl_default_config.yaml; large recipes sinkhorn_knopp)"""
    student_temp: float = 0.1
    """temperature of the student (dino_clstoken_loss.py)"""
    teacher_temp: float = 0.07
    """temperature of the teacher after its warm-up (ssl_default_config.yaml)"""
    teacher_temp_start: float = 0.04
    """temperature of the teacher at the start (ssl_default_config.yaml)"""
    teacher_temp_epochs: float = 30.0
    """epochs of that warm-up (ssl_default_config.yaml), at most 0.3 of all"""
    teacher_momentum: float = 0.992
    """momentum of the teacher at the start of its cosine to 1 (ssl_default_config.yaml)"""
    center_momentum: float = 0.9
    """momentum of the centres (dino_clstoken_loss.py)"""
    weight_decay_end: float = 0.4
    """weight decay at the end of its cosine (ssl_default_config.yaml)"""
    freeze_last_layer: float = 1.0
    """epochs in which prototypes do not move (ssl_default_config.yaml), at most 0.1 of all; 0 in a guarded continuation"""
    patch_embed_lr: float = 0.2
    """learning-rate factor of the patch projection (ssl_default_config.yaml)"""
    dino_weight: float = 1.0
    """weight of the class-token loss (ssl_default_config.yaml)"""
    ibot_weight: float = 1.0
    """weight of the masked-patch loss (ssl_default_config.yaml)"""
    koleo_weight: float = 0.1
    """weight of the loss that spreads class tokens (ssl_default_config.yaml)"""
    mask_share: float = 0.5
    """share of large crops that are masked (ssl_default_config.yaml, mask_sample_probability)"""
    mask_range: tuple[float, float] = (0.1, 0.5)
    """range of the share of patches hidden in them (ssl_default_config.yaml)"""
    local_crops: int = 8
    """small crops an image (ssl_default_config.yaml)"""
    local_size: int | Literal["auto"] = "auto"
    """pixels of a small crop; auto = 3/7 of the model's image size: 96 of 224, 98 with patches of 14"""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """area range of small crops (ssl_default_config.yaml); large ones are `crop_scale`"""
    blur_p: tuple[float, float, float] = (0.0, 0.9, 0.5)
    """blur probability of first, second and small crops, as official models were really trained"""
    colour: float = 1.0
    """strength of colour jitter, greying and solarisation (augmentations.py); 0 = none"""
    heads: str | None = None
    """file with released heads, e.g. RAD-DINO's dino_head.safetensors; its sizes replace those above"""
    guard: bool | Literal["auto"] = "auto"
    """continue carefully; auto = for released weights that come without heads"""
    head_epochs: float | Literal["auto"] = "auto"
    """guard: epochs in which only the heads train; auto = a tenth of all, at least 1"""
    unfreeze: int | Literal["all", "lora"] = "all"
    """guard: what trains after that: all, the last so many blocks, or low-rank updates of the attention"""
    lora_rank: int = 8
    """guard: rank of these updates"""
    backbone_lr: float = 0.1
    """guard: learning-rate factor of the backbone"""
    anchor: float = 1.0
    """guard: weight of 1 - cosine to the original features, of class token and patches each; 0 = none"""
    tripwire: float = 0.03
    """guard: how far the score of held-out images may fall below the original's before training stops; 0 = no watch"""

    def __post_init__(self) -> None:
        for name, least in (("prototypes", 2), ("head_hidden", 1), ("bottleneck_dim", 1), ("head_layers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"at least {least}")
        for name in ("student_temp", "teacher_temp", "teacher_temp_start"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="above 0; published 0.1, 0.07 and 0.04")
        if not 0 <= self.teacher_momentum <= 1:
            raise ConfigError(f"teacher_momentum is {self.teacher_momentum}", fix="from 0 to 1; published 0.992")
        low, high = self.mask_range
        if not 0 <= low <= high < 1 or not 0 <= self.mask_share <= 1:
            what = f"mask_share {self.mask_share} and mask_range {self.mask_range}"
            raise ConfigError(what, fix="shares from low to high, e.g. 0.5 and (0.1, 0.5)")
        if self.local_crops < 0:
            raise ConfigError(f"local_crops is {self.local_crops}", fix="0 or more")
        if self.unfreeze not in ("all", "lora") and int(self.unfreeze) < 1:
            raise ConfigError(f"unfreeze is {self.unfreeze}", fix="all, lora, or a number of last blocks from 1")


class DINOv2(nn.Module):
    """`forward(batch)` -> losses. `batch["image"]` (B, C, H, W) and "image_2" are the large crops, "image_local"
    (B, L, C, h, w) the small ones; "image" alone stands for both large ones. `finish()` gives the teacher's backbone."""

    needs_labels = False
    shards = True

    def __init__(self, vit: nn.Module, settings: Settings = Settings()):
        super().__init__()
        self.vit, self.settings = tokens.require_vit(vit), settings
        self.mask_token = nn.Parameter(torch.zeros(1, vit.embed_dim))
        found = dino_state.given(vit, settings.heads)
        self.guarded = dino_state.wants_guard(vit, settings, found)
        self.dino_head, self.ibot_head = dino_state.heads(vit, settings, found)
        self.register_buffer("dino_center", torch.zeros(1, self.dino_head.prototypes))
        patches = self.ibot_head or self.dino_head
        self.register_buffer("ibot_center", torch.zeros(1, 1, patches.prototypes))
        dino_state.fill(self, found)
        self.notes = found.notes
        self.origin = dino_state.frozen(vit) if self.guarded and settings.anchor else None
        if self.guarded:
            dino_state.unfreeze(vit, settings)
        dino_state.leave_unused_out(vit)
        self.teacher = dino_state.frozen(vit)
        self.teacher_dino_head = dino_state.frozen(self.dino_head)
        self.teacher_ibot_head = dino_state.frozen(self.ibot_head) if self.ibot_head is not None else None
        uniform_depth(vit, most=GUARDED_DEPTH if self.guarded else 1.0)
        self.temperature, self.momentum = settings.teacher_temp_start, settings.teacher_momentum
        self.heads_only = self.guarded
        self.register_buffer("teacher_step", torch.zeros(()), persistent=False)
        self.rows, self.grace = 2, 0
        self._doctor: Doctor | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def train(self, mode: bool = True) -> DINOv2:
        """The teacher and the original never drop anything."""
        super().train(mode)
        for frozen in (self.teacher, self.origin):
            if frozen is not None:
                frozen.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch["masks"]` (2B, N) fixes the masks; else they are drawn from `batch["seed"]` (B,), or at random."""
        s, crops = self.settings, split(batch)
        grid = tokens.grid_of(self.vit, crops.large.shape[2:])
        masks = draw_masks(batch, crops, grid, s.mask_share, s.mask_range, shared=self.training)
        whole = self.teacher_targets(crops, masks)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.heads_only):
            seen = self._tokens(self.vit, crops.large, masks.hidden, self.mask_token)
            small = self._tokens(self.vit, crops.small)[0] if crops.small is not None else None
        out = self.distillation(seen, small, whole, crops, masks)
        views = seen[0].chunk(2)
        out["koleo"] = s.koleo_weight * (dino_losses.koleo(views[0]) + dino_losses.koleo(views[1]))
        loss = torch.stack([out[name] for name in ("dino_global", "dino_local", "ibot", "koleo") if name in out]).sum()
        if self.origin is not None:
            with torch.no_grad():
                before = self._tokens(self.origin, crops.large)
            out["anchor"] = s.anchor * dino_losses.drift(seen, before, masks.hidden)
            loss = loss + out["anchor"]
        if self.heads_only and self.training:  # data-parallel training insists on every parameter's gradient, even zero
            loss = loss + 0.0 * sum(local(p).sum() for p in self.trunk if p.requires_grad)
        if self.training:
            out |= signs(self, views[0], whole["image"])
        return {"loss": loss, **{name: value.detach() for name, value in out.items()}}

    @torch.no_grad()
    def teacher_targets(self, crops: Crops, masks: Masks) -> dict[str, dino_losses.Targets]:
        """Targets "image" (2B, K), view-major, and "patches" (masked patches, K); centres move after they were used."""
        image, patches = self._tokens(self.teacher, crops.large)
        head = self.teacher_ibot_head or self.teacher_dino_head
        rows = {"image": self.teacher_dino_head(image), "patches": head(patches.flatten(0, 1)[masks.index])}
        found = {}
        for name, center in (("image", self.dino_center), ("patches", self.ibot_center)):
            if self.settings.centering == "sinkhorn_knopp":
                found[name] = dino_losses.sinkhorn(rows[name], self.temperature, consume=True, shared=self.training)
                continue
            before = center.clone()
            if self.training:
                dino_losses.update_center(center, rows[name], self.settings.center_momentum)
            found[name] = dino_losses.centred(rows[name], before, self.temperature, consume=True)
        return found

    def distillation(
        self, seen: tuple[Tensor, Tensor], small: Tensor | None, targets: dict[str, Any], crops: Crops, masks: Masks
    ) -> dict[str, Tensor]:
        """DINO: small crops against both teacher views, large ones against the other view of their image. iBOT: masked
        patches against the teacher's, mean in each image, summed over images, over 2B."""
        s, count, image = self.settings, crops.images, targets["image"]
        terms = 2 + max(2 * crops.local, 1)
        rows = torch.arange(2 * count, device=seen[0].device)
        each = torch.full((2 * count,), s.dino_weight / terms / count, device=rows.device)
        x, parts = [seen[0]], {"dino_global": Part(image, rows.roll(count).unsqueeze(1), each)}
        if small is not None:
            both = torch.stack([rows[:count], rows[count:]], 1).repeat(crops.local, 1)
            x.append(small)
            parts["dino_local"] = Part(image, both, each[:1].expand(len(both)))
        patches = torch.arange(len(masks.index), device=rows.device).unsqueeze(1)
        hidden = Part(targets["patches"], patches, s.ibot_weight * masks.weight / (2 * count))
        masked = seen[1].flatten(0, 1)[masks.index]
        if self.ibot_head is None:
            return self._cross_entropy(self.dino_head, [*x, masked], {**parts, "ibot": hidden})
        own = self._cross_entropy(self.ibot_head, [masked], {"ibot": hidden})
        return own | self._cross_entropy(self.dino_head, x, parts)

    def _cross_entropy(self, head: DINOHead, x: list[Tensor], parts: dict[str, Part]) -> dict[str, Tensor]:
        """Each part's loss by its name, the first with the gradient of all; and how often large crops agree."""
        last, temp = head.last_layer, self.settings.student_temp
        loss, each, agree = dino_losses.cross_entropy(
            head.bottleneck(torch.cat(x)), last.weight_v, last.scale, list(parts.values()), temp
        )
        out = dict(zip(parts, each.unbind(), strict=True))
        if "dino_global" in out:
            out["agreement"] = agree[list(parts).index("dino_global")]
        first = next(iter(parts))
        return out | {first: loss - each.sum() + out[first]}

    @staticmethod
    def _tokens(
        vit: nn.Module, x: Tensor, mask: Tensor | None = None, token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(what stands for the image (B, D), patches (B, N, D)): the class token, or the mean of patches without one."""
        found = tokens.dense(vit, tokens.encode(vit, x, mask=mask, mask_token=token))
        image = found.prefix[:, 0] if vit.cls_token is not None else found.patches.mean(1)
        return image, found.patches

    def views(self, preprocess: Any, train: Any) -> tuple[Any, Any]:
        """Multi-crop for training, the plain view for held-out images."""
        from vitkit.data.multicrop import MultiCrop, local_size_of
        from vitkit.data.transforms import eval_view

        if not train.augment:
            raise ConfigError(
                "augment is false, and DINOv2 compares different views of an image", fix="leave it at true"
            )
        s, patch = self.settings, self.vit.patch_embed.patch_size
        crops = MultiCrop(
            preprocess, global_scale=train.crop_scale, local_scale=s.local_scale, local_crops=s.local_crops,
            local_size=local_size_of(preprocess.image_size, patch, s.local_size), hflip=train.hflip, blur_p=s.blur_p,
            colour=s.colour,
        )  # fmt: skip
        return crops, eval_view(preprocess)

    def require(self, images: int, batch_size: int, world: int) -> None:
        """Refuse what cannot be learnt from; also tells the collapse doctor the size of a step."""
        dino_state.require(self.settings, images, batch_size, world)
        self.rows = 2 * min(batch_size * world, images)

    def doctor(self) -> Doctor:
        """A collapse doctor that knows this run's sizes."""
        s = self.settings
        sinkhorn = s.centering == "sinkhorn_knopp"
        sizes = (self.dino_head.prototypes, self.rows, s.local_crops)
        return Doctor(Facts(*sizes, sinkhorn, s.koleo_weight > 0, s.dino_weight, grace=self.grace))

    def watch(self, record: Mapping[str, Any]) -> list[str]:
        """What the collapse doctor newly finds in a record of the training log."""
        self._doctor = self._doctor or self.doctor()
        return [f"collapse doctor: {finding}" for finding in self._doctor.note(record)]

    @property
    def trunk(self) -> list[nn.Parameter]:
        return [*self.vit.parameters(), self.mask_token]

    def param_groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
        """DINOv2's layer-wise rates and decay; see `parts.dino_groups`."""
        factor = self.settings.backbone_lr if self.guarded else 1.0
        return parameter_groups(
            self, weight_decay, layer_decay=layer_decay, patch_embed_lr=self.settings.patch_embed_lr, backbone_lr=factor
        )

    def clip_parts(self) -> list[list[nn.Parameter]]:
        """Backbone and heads are clipped apart."""
        parts = [self.trunk, self.dino_head.parameters(), self.ibot_head.parameters() if self.ibot_head else ()]
        return [found for part in parts if (found := [p for p in part if p.requires_grad])]

    def before_step(self, now: Any, groups: list[dict]) -> None:
        """Everything that changes over training, from the position alone."""
        s, total = self.settings, now.epochs * now.steps_per_epoch
        step = now.epoch * now.steps_per_epoch
        self.grace = total // 10  # of heads that have not learnt yet the doctor says nothing
        warm = min(s.teacher_temp_epochs, 0.3 * now.epochs) * now.steps_per_epoch
        self.temperature = linear(step, start=s.teacher_temp_start, final=s.teacher_temp, warmup=warm)
        self.momentum = cosine(step, base=s.teacher_momentum, final=1.0, total=total)
        first = max(1.0, 0.1 * now.epochs) if s.head_epochs == "auto" else s.head_epochs
        self.heads_only = self.guarded and now.epoch < min(first, now.epochs)
        self.vit.train(self.training and not self.heads_only)  # heads are fitted on features without noise
        frozen = 0.0 if self.guarded else min(s.freeze_last_layer, 0.1 * now.epochs)
        for group in groups:
            decay = cosine(step, base=group["decay"], final=s.weight_decay_end, total=total) if group["decay"] else 0.0
            group["weight_decay"] = decay
            if group["last_layer"]:
                group["lr"] = last_layer_lr(now.epoch, group["lr"], frozen)
            if group["trunk"] and self.heads_only:
                group["lr"] = 0.0

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """teacher <- m teacher + (1 - m) student, of backbone and heads."""
        if self._pairs is None:
            self._pairs = dino_state.pairs(self)
        teacher, student = self._pairs
        watched = first_layer(self.teacher_dino_head)
        before = watched.clone()
        torch._foreach_lerp_(teacher, student, 1 - self.momentum)
        self.teacher_step = whole((watched - before).norm() / watched.norm())

    def persistent(self) -> dict[str, Tensor]:
        """For checkpoints: everything but the original, which is loaded again."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("origin.")}

    def finish(self) -> nn.Module:
        """The teacher's backbone, a plain timm ViT."""
        return dino_state.plain(self.teacher)

    def extras(self) -> dict[str, Tensor]:
        """The teacher's heads, the mask token and the centres under their official names, saved beside the backbone."""
        return dino_state.official_extras(self)

    def load_official(self, tensors: Mapping[str, Tensor]) -> None:
        """Student, teacher and centres of a DINOv2 training state (`student.backbone.*`, `teacher.dino_head.*`, ...)."""
        dino_state.load_official(self, tensors)
