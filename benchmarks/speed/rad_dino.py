"""A DINOv2 step (2 large and 8 small crops) against lightly's head and losses and against a plain loop over crops.

All three run the same backbone, masks and crops, and compute the same loss from the same weights (checked before the race,
gradients included). lightly gets our batching of crops by size, so that the race with it is about head and losses; the
plain loop runs crop after crop and pair after pair, as DINO's first code did. Whole training steps (forward, backward,
fused AdamW) in turn A B C A B C, one thread, float32, CPU; ratios of medians. Memory is that of torch tensors newly held
during one step.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import Result, arguments, peak_memory, race
from vitkit import tokens
from vitkit.parts import dino_losses
from vitkit.parts.dino_batch import Masks, draw_masks, split
from vitkit.pretrain.dinov2 import DINOv2, Settings

HIDDEN, BOTTLENECK, LOCAL = 512, 256, 8
SIZES = {
    # name: (timm model, large crop, small crop, images, prototypes)
    "ViT-Ti/16, 64 and 32 px, 16 images, K 4,096": ("vit_tiny_patch16_224", 64, 32, 16, 4096),
    "ViT-Ti/16, 96 and 48 px, 8 images, K 65,536": ("vit_tiny_patch16_224", 96, 48, 8, 65536),
    "ViT-S/16, 224 and 96 px, 4 images, K 65,536": ("vit_small_patch16_224", 224, 96, 4, 65536),
}


class Lightly(nn.Module):
    """lightly's DINO head, DINOLoss, IBOTPatchLoss and KoLeoLoss, put together as its DINOv2 example does."""

    def __init__(self, ours: DINOv2):
        super().__init__()
        from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
        from lightly.models.modules.heads import DINOProjectionHead

        count, width = ours.settings.prototypes, ours.vit.embed_dim
        self.vit, self.teacher = deepcopy(ours.vit), deepcopy(ours.teacher)
        self.mask_token = nn.Parameter(ours.mask_token.detach().clone())
        heads = []
        for source in (ours.dino_head, ours.teacher_dino_head):
            head = DINOProjectionHead(width, HIDDEN, BOTTLENECK, count, norm_last_layer=False)
            state = {name.replace("mlp.", "layers."): value for name, value in source.state_dict().items()}
            head.load_state_dict(state)
            heads.append(head)
        self.head, self.teacher_head = heads[0], heads[1].requires_grad_(False)
        temp = ours.temperature
        self.dino = DINOLoss(count, temp, temp)
        self.ibot, self.koleo = IBOTPatchLoss(count, temp), KoLeoLoss()

    def forward(self, batch: dict[str, Tensor], masks: Masks) -> Tensor:
        crops = split(batch)
        with torch.no_grad():
            seen = tokens.encode(self.teacher, crops.large)
            asked = self.teacher_head(seen.prefix[:, 0]).chunk(2)
            asked_patches = self.teacher_head(seen.patches.flatten(0, 1)[masks.index])
        seen = tokens.encode(self.vit, crops.large, mask=masks.hidden, mask_token=self.mask_token)
        small = tokens.encode(self.vit, crops.small).prefix[:, 0]
        image = seen.prefix[:, 0]
        answered = [*self.head(image).chunk(2), *self.head(small).chunk(crops.local)]
        patches = self.head(seen.patches.flatten(0, 1)[masks.index])
        loss = self.dino(list(asked), answered)
        loss = loss + self.ibot(asked_patches, patches, masks.hidden.unflatten(1, seen.grid))
        return loss + 0.1 * sum(self.koleo(view) for view in image.chunk(2))


class Plain(nn.Module):
    """Written straight down from the papers: crop after crop, pair after pair."""

    def __init__(self, ours: DINOv2):
        super().__init__()
        self.ours = deepcopy(ours)

    def forward(self, batch: dict[str, Tensor], masks: Masks) -> Tensor:
        m, temp = self.ours, self.ours.temperature
        views, count = (batch["image"], batch["image_2"]), len(batch["image"])
        with torch.no_grad():
            seen = [tokens.encode(m.teacher, view) for view in views]
            asked = [((m.teacher_dino_head(s.prefix[:, 0]) - 0) / temp).softmax(-1) for s in seen]
        hidden, answered, loss = masks.hidden.chunk(2), [], torch.zeros(())
        for v, view in enumerate(views):
            found = tokens.encode(m.vit, view, mask=hidden[v], mask_token=m.mask_token)
            answered.append((m.dino_head(found.prefix[:, 0]) / 0.1).log_softmax(-1))
            loss = loss + 0.1 * dino_losses.koleo(found.prefix[:, 0])
            with torch.no_grad():
                target = (m.teacher_dino_head(seen[v].patches[hidden[v]]) / temp).softmax(-1)
            weight = (1 / hidden[v].sum(1, keepdim=True).clamp_min(1)).expand_as(hidden[v])[hidden[v]]
            answer = (m.dino_head(found.patches[hidden[v]]) / 0.1).log_softmax(-1)
            loss = loss - ((target * answer).sum(-1) * weight).sum() / (2 * count)
        for i in range(batch["image_local"].shape[1]):
            small = tokens.encode(m.vit, batch["image_local"][:, i]).prefix[:, 0]
            answered.append((m.dino_head(small) / 0.1).log_softmax(-1))
        pairs = [(t, s) for t in range(2) for s in range(len(answered)) if t != s]
        return loss - sum((asked[t] * answered[s]).sum(-1).mean() for t, s in pairs) / len(pairs)


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "A DINOv2 step with the same loss and gradients is not slower than with lightly's head and losses, faster than a "
        "plain loop over crops, and holds less memory than both."
    )
    result = Result("rad_dino", "speed", claim, options.quick)
    rows, holds = [], True
    for name, size in SIZES.items():
        row, fine = contest(name, *size, rounds=3 if options.quick else 7)
        rows.append(row)
        holds &= fine
        if options.quick and len(rows) == 2:
            break
    columns = ["size", "ms a step", "lightly / ours", "quartiles", "plain / ours", "quartiles", "largest difference",
               "MiB", "lightly MiB", "plain MiB"]  # fmt: skip
    note = (
        "ratios above 1: ours is faster; difference of loss and gradients, relative; memory of one step without AdamW's"
    )
    result.table("Training step, one CPU thread, float32", columns, rows, note)
    return result.finish(holds)


def contest(name: str, arch: str, large: int, small: int, count: int, prototypes: int, *, rounds: int) -> tuple:
    torch.manual_seed(0)
    vit = timm.create_model(arch, img_size=large, num_classes=0, dynamic_img_size=True)
    sizes = {"prototypes": prototypes, "head_hidden": HIDDEN, "bottleneck_dim": BOTTLENECK}
    ours = DINOv2(vit, Settings(**sizes, local_crops=LOCAL, guard=False)).train()
    batch = {"image": torch.randn(count, 3, large, large), "image_2": torch.randn(count, 3, large, large)}
    batch |= {"image_local": torch.randn(count, LOCAL, 3, small, small), "seed": torch.arange(count)}
    masks = draw_masks(batch, split(batch), tokens.grid_of(vit, (large, large)), 0.5, (0.1, 0.5))
    models: dict[str, Any] = {"ours": ours, "lightly": Lightly(ours), "plain": Plain(ours)}
    fixed = {**batch, "masks": masks.hidden}
    calls = {
        "ours": lambda: ours(fixed)["loss"],
        "lightly": lambda: models["lightly"](batch, masks),
        "plain": lambda: models["plain"](batch, masks),
    }
    apart = difference(ours, models, calls)
    assert apart < 1e-4, f"{name}: losses or gradients differ by {apart:.1e}"
    memory = {key: peak_memory(lambda key=key: calls[key]().backward()) / 2**20 for key in models}
    steps = {key: stepper(models[key], call) for key, call in calls.items()}
    medians, spread = race(steps, rounds=rounds, warmup=1)
    ratios = {key: medians[key] / medians["ours"] for key in ("lightly", "plain")}
    print(f"  {name}: lightly {ratios['lightly']:.2f}, plain {ratios['plain']:.2f}", flush=True)
    row = [name, round(1000 * medians["ours"], 1)]
    for key in ("lightly", "plain"):
        row += [round(ratios[key], 2), f"{spread[key][0]:.2f} to {spread[key][1]:.2f}"]
    fine = ratios["lightly"] >= 0.97 and ratios["plain"] >= 1.0
    fine &= memory["ours"] < min(memory["lightly"], memory["plain"])
    return [*row, f"{apart:.0e}", *(round(memory[key]) for key in models)], fine


def difference(ours: DINOv2, models: dict[str, Any], calls: dict[str, Any]) -> float:
    """Largest relative difference of losses, and of gradients of a first and a last weight; centres are put back."""
    found = {}
    for key, model in models.items():
        loss = calls[key]()
        loss.backward()
        inner = model.ours if key == "plain" else model
        head = inner.head if key == "lightly" else inner.dino_head
        found[key] = [loss.detach(), inner.vit.patch_embed.proj.weight.grad, head.last_layer.weight_v.grad]
        found[key] = [value.clone() for value in found[key]]
        model.zero_grad(set_to_none=True)
    for center in (ours.dino_center, ours.ibot_center):
        center.zero_()
    pairs = [(a, b) for key in ("lightly", "plain") for a, b in zip(found["ours"], found[key], strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def stepper(model: nn.Module, call: Any) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step() -> None:
        call().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(main())
