"""A DVPT training step against a straightforward one of the released forward, and against full fine-tuning.

Same weights, images and labels; losses and gradients are compared before the race. The straightforward step is the
released forward written down: prompts copied for every image, cross-attention computed in every block and not used, every
row of every block computed, the gain of the bottleneck added; trunk frozen. Ours leaves the unused attention out and, in
the last block, the rows that the head does not read. The floor by counting, against full fine-tuning of the same ViT
without prompts: forward and backward to activations without weight gradients is 2/3 of the work, times (T + n) / T tokens.
"""

from __future__ import annotations

import copy
import sys

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import Result, arguments, peak_memory, race
from vitkit.adapt.dvpt import DVPT, Settings
from vitkit.adapt.full import Full
from vitkit.settings import Classify, Task

SIZES = {
    "ViT-S/16, 224 px, batch 4, n = 50": ("vit_small_patch16_224", 224, 4, 50),
    "ViT-Ti/16, 224 px, batch 8, n = 50": ("vit_tiny_patch16_224", 224, 8, 50),
    "ViT-Ti/16, 96 px, batch 50, n = 10": ("vit_tiny_patch16_224", 96, 50, 10),
}
TASK = Task("single", tuple(str(i) for i in range(5)))


class Straightforward(nn.Module):
    """The released forward, step by step, on the modules of a `DVPT`."""

    def __init__(self, method: DVPT):
        super().__init__()
        self.vit = method.vit

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        vit, images = self.vit, batch["image"]
        count = vit.prompt_token.shape[1]
        x = vit.plain_pos_embed(vit.patch_embed(images))
        prompts = vit.prompt_token.repeat(len(images), 1, 1) + vit.prompt_positional_embedding
        x = vit.norm_pre(torch.cat([prompts, x], dim=1))
        for block in vit.blocks:
            x = x + block.attn(block.norm1(x))
            rows, others = x[:, :count], x[:, count:]
            _unused = (rows @ others.transpose(1, 2) * x.shape[-1] ** -0.5).softmax(-1) @ others
            bottleneck = block.dvpt[0]
            z = bottleneck.prompt_key_proj_d(x)
            z = bottleneck.prompt_key_proj_u(z * torch.sigmoid(1.702 * z))
            x = x + block.mlp(block.norm2(x)) + bottleneck.prompt_gate * z
        scores = vit.head(vit.norm(x)[:, : count + 1].mean(1))
        return {"loss": nn.functional.cross_entropy(scores, batch["label"]), "logits": scores}


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "A step of the released variant is cheaper than the straightforward one at equal losses and gradients; the dynamic "
        "one costs at most 10 % more than the released; both are cheaper than full fine-tuning without prompts."
    )
    result = Result("dvpt", "speed", claim, options.quick)
    rows, holds = [], True
    for name, size in SIZES.items():
        row = contest(name, *size, rounds=3 if options.quick else 9)
        rows.append(row)
        holds &= row[2] < 1 and row[4] <= 1.1 and row[6] < 1
        if options.quick:
            break
    columns = ["size", "ms a step", "of straightforward", "quartiles", "dynamic / released", "quartiles"]
    columns += ["of full fine-tuning", "quartiles", "floor", "MiB", "straightforward MiB", "full MiB"]
    result.table(
        "Training step of the released variant, one CPU thread, float32, r = 20",
        columns,
        rows,
        "ratios below 1: DVPT is cheaper; the floor is that of full fine-tuning's column",
    )
    return result.finish(options.quick or holds)


def contest(name: str, arch: str, size: int, batch: int, count: int, *, rounds: int) -> list:
    torch.manual_seed(0)
    vit = timm.create_model(arch, img_size=size, num_classes=0, dynamic_img_size=True)
    data = {"image": torch.randn(batch, 3, size, size), "label": torch.arange(batch) % 5}
    options = {"prompts": count, "gate_init": 0.1}
    released = DVPT(copy.deepcopy(vit), Settings(variant="released", **options), task=TASK).train()
    nn.init.normal_(released.vit.head.weight, std=0.1)
    plain = Straightforward(copy.deepcopy(released))
    same(name, released, plain, data)
    dynamic = DVPT(copy.deepcopy(vit), Settings(**options), task=TASK).train()
    full = Full(copy.deepcopy(vit), task=TASK, classify=Classify(head="linear")).train()
    methods = {"released": released, "straightforward": plain, "dynamic": dynamic, "full": full}
    steps = {key: stepper(method, data) for key, method in methods.items()}
    medians, spread = race(steps, rounds=rounds)
    row: list = [name, round(1000 * medians["released"], 1)]
    for key, upside_down in (("straightforward", True), ("dynamic", False), ("full", True)):
        low, high = (1 / edge for edge in reversed(spread[key])) if upside_down else spread[key]
        ratio = medians["released"] / medians[key] if upside_down else medians[key] / medians["released"]
        row += [round(ratio, 3), f"{low:.2f} to {high:.2f}"]
    tokens = (size // 16) ** 2 + 1
    row.append(round(2 / 3 * (tokens + count) / tokens, 2))
    print(f"  {name}: {row[2]} of straightforward, dynamic {row[4]}, {row[6]} of full (floor {row[8]})", flush=True)
    return row + [round(peak_memory(steps[key]) / 2**20) for key in ("released", "straightforward", "full")]


def same(name: str, ours: nn.Module, other: nn.Module, data: dict[str, Tensor]) -> None:
    """Losses and every gradient agree; the trunk gets none in either."""
    losses = [method(data)["loss"] for method in (ours, other)]
    for loss in losses:
        loss.backward()
    a, b = (float(loss.detach()) for loss in losses)
    assert abs(a - b) <= 1e-5 * abs(b), f"{name}: the losses differ: {a} and {b}"
    theirs = {key: p.grad for key, p in other.vit.named_parameters() if p.grad is not None}
    mine = {key: p.grad for key, p in ours.vit.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys(), f"{name}: gradients of other tensors"
    for key, grad in mine.items():
        error = float((grad - theirs[key]).abs().max() / theirs[key].abs().max())
        assert error <= 1e-4, f"{name}: gradient of {key} differs by {error:.1e}"
    ours.zero_grad()
    other.zero_grad()


def stepper(method, data):
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step() -> None:
        method(data)["loss"].backward()
        optimizer.step()
        method.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(main())
