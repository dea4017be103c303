"""Prompt-CAM against a straightforward implementation: forward, ranking of the heads, training step; one CPU thread.

The straightforward way, after the method's description: in every block all prompts are full tokens (with queries, projection
and MLP), the attention matrix is written out, and one ranking is a full forward for each of the R (R + 1) / 2 trials. The
floor of the forward is the plain ViT's. By counting at ViT-B and 200 classes: 17.4 billion multiplications for the plain ViT,
36.6 straightforward, 21 to 22 lean for one image (the prompts' keys and values are a fifth of that) and 19 an image in a
larger batch, which shares them. Same weights and images; logits and ranks are compared before any race. Weights are
random: the work does not depend on them.
"""

from __future__ import annotations

import statistics
import sys
import time

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import Result, arguments, peak_memory, race
from vitkit import tokens
from vitkit.explain import class_heads
from vitkit.explain.prompt_cam import PromptCAM, Settings
from vitkit.settings import Task

FORWARD = ("ViT-B/16, 224 px, 200 classes", "vit_base_patch16_224", 224, 200)
BATCHES = (1, 4)
RANKED = (
    ("ViT-Ti/16, 96 px, 10 classes", "vit_tiny_patch16_224", 96, 10),
    ("ViT-S/16, 96 px, 50 classes", "vit_small_patch16_224", 96, 50),
    ("ViT-B/16, 96 px, 50 classes", "vit_base_patch16_224", 96, 50),
)
STEP = ("ViT-S/16, 224 px, 100 classes, batch 2", "vit_small_patch16_224", 224, 100)


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "The scores and ranks of the straightforward implementation; at ViT-B and 200 classes it takes at least 1.4 times as "
        "long for a forward, which costs at most 1.4 of the plain ViT's; a ranking at least 20 times; a training step longer."
    )
    result = Result("prompt_cam", "speed", claim, options.quick)
    measured = [forwards(result, options.quick, batch) for batch in BATCHES]
    holds = all(measured)
    holds &= rankings(result, options.quick)
    holds &= steps(result, options.quick)
    return result.finish(options.quick or holds)


def build(arch: str, size: int, classes: int, *, batch: int = 1) -> tuple[PromptCAM, Tensor, nn.Module]:
    """The method with every weight random enough that heads differ, images, and the plain ViT."""
    torch.manual_seed(0)
    vit = timm.create_model(arch, img_size=size, num_classes=0, dynamic_img_size=True).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    plain = timm.create_model(arch, img_size=size, num_classes=0, dynamic_img_size=True).eval()
    plain.load_state_dict(vit.state_dict())
    task = Task("single", tuple(str(i) for i in range(classes)))
    method = PromptCAM(vit, Settings(prompt_dropout=0.0), task=task).eval()
    with torch.no_grad():
        for block in vit.blocks:
            (block.class_prompts if hasattr(block, "class_prompts") else block.helper_prompts).normal_(std=0.5)
    return method, torch.randn(batch, 3, size, size), plain


def straightforward(vit: nn.Module, x: Tensor, blurred: tuple[int, list[int]] | None = None) -> Tensor:
    """Scores (B, C); `blurred` = (class, heads) whose last attention logits are zeroed."""
    count = len(vit.class_prompts)
    x = tokens.embed(vit, x).x
    for index, block in enumerate(vit.blocks):
        prompts = block.class_prompts if hasattr(block, "class_prompts") else block.helper_prompts
        x = torch.cat([prompts.expand(len(x), -1, -1), x], dim=1)
        attn, (batch, length, dim) = block.attn, x.shape
        qkv = attn.qkv(block.norm1(x)).reshape(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * attn.scale) @ k.transpose(-2, -1)
        last = index == len(vit.blocks) - 1
        if last and blurred is not None:
            weights[:, blurred[1], blurred[0]] = 0
        x = x + attn.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim))
        x = x + block.mlp(block.norm2(x))
        x = x if last else x[:, count:]
    return vit.head(vit.norm(x)[:, :count]).squeeze(-1)


def trial_by_trial(vit: nn.Module, x: Tensor, target: int) -> list[int]:
    """Greedy ranking of one image, a full forward a trial."""
    left, removed = list(range(vit.blocks[-1].attn.num_heads)), []
    while left:
        scores = [float(straightforward(vit, x, (target, [*removed, head]))[0, target]) for head in left]
        removed.append(left.pop(scores.index(max(scores))))
    return removed[::-1]


@torch.no_grad()
def forwards(result: Result, quick: bool, batch: int) -> bool:
    name, arch, size, classes = RANKED[0] if quick else FORWARD
    method, x, plain = build(arch, size, classes, batch=batch)
    vit = method.vit
    scores, theirs = tokens.logits(vit, x), straightforward(vit, x)
    error = float((scores - theirs).abs().max() / theirs.abs().max())
    contestants = {
        "Prompt-CAM (ours)": lambda: tokens.logits(vit, x),
        "straightforward": lambda: straightforward(vit, x),
        "plain ViT, no prompts": lambda: plain(x),
        "all rows of the last block": lambda: vit(x),
    }
    medians, spread = race(contestants, rounds=3 if quick else 9 if batch == 1 else 5)
    ours = medians["Prompt-CAM (ours)"]
    rows = []
    for key, seconds in medians.items():
        low, high = spread.get(key, (1.0, 1.0))
        rows.append([key, round(1000 * seconds, 1), round(seconds / ours, 2), f"{low:.2f} to {high:.2f}"])
    result.table(
        f"Forward: {name}, batch {batch}",
        ["", "ms", "times ours", "quartiles"],
        rows,
        f"float32; scores differ by {error:.1e} of the largest",
    )
    assert error <= 2e-5, f"the scores differ: {error:.1e}"
    return medians["straightforward"] >= 1.4 * ours and ours <= 1.4 * medians["plain ViT, no prompts"]


@torch.no_grad()
def rankings(result: Result, quick: bool) -> bool:
    rows, holds = [], True
    for name, arch, size, classes in RANKED[:1] if quick else RANKED:
        method, x, _ = build(arch, size, classes)
        vit, target = method.vit, classes // 2
        same = class_heads.rank_heads(vit, x, target)[0].tolist() == trial_by_trial(vit, x, target)
        assert same, f"{name}: the ranks differ"
        contestants = {
            "ours": lambda vit=vit, x=x, target=target: class_heads.rank_heads(vit, x, target),
            "trials": lambda vit=vit, x=x, target=target: trial_by_trial(vit, x, target),
        }
        medians, spread = race(contestants, rounds=3 if quick else 5, warmup=1)
        low, high = spread["trials"]
        ratio = medians["trials"] / medians["ours"]
        heads = vit.blocks[-1].attn.num_heads
        rows.append([name, heads * (heads + 1) // 2, *(round(1000 * medians[k], 1) for k in ("ours", "trials"))])
        rows[-1] += [round(ratio, 1), f"{low:.1f} to {high:.1f}"]
        holds &= ratio >= (20 if heads == 12 else 1)  # 3 heads are only 6 trials
    result.table(
        "Ranking of one image and class, the forward included",
        ["size", "trials", "ours, ms", "a forward a trial, ms", "ratio", "quartiles"],
        rows,
        "identical ranks",
    )
    if not quick:
        beyond(result)
    return holds


def beyond(result: Result) -> None:
    """What a ranking adds to the forward at full size; the straightforward one would be 78 of the forwards above."""
    name, arch, size, classes = FORWARD
    method, x, _ = build(arch, size, classes)
    vit, whole, ranked = method.vit, [], []
    for _ in range(4):
        start = time.perf_counter()
        found = class_heads.evidence(vit, x, 3)
        middle = time.perf_counter()
        class_heads._greedy(found)
        whole.append(middle - start)
        ranked.append(time.perf_counter() - middle)
    rows = [[name, round(1000 * statistics.median(whole[1:]), 1), round(1000 * statistics.median(ranked[1:]), 1)]]
    result.table("Ranking at full size (ours alone)", ["size", "forward, ms", "ranking on top, ms"], rows)


def steps(result: Result, quick: bool) -> bool:
    name, arch, size, classes = RANKED[0] if quick else STEP
    method, x, _ = build(arch, size, classes, batch=2)
    labels = torch.arange(2)
    trained = [p for p in method.parameters() if p.requires_grad]

    def ours() -> Tensor:
        return method({"image": x, "label": labels})["loss"]

    def theirs() -> Tensor:
        return nn.functional.cross_entropy(straightforward(method.vit, x), labels)

    def stepper(loss):
        optimizer = torch.optim.SGD(trained, lr=1e-9, momentum=0.9)

        def step() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    a, b = float(ours().detach()), float(theirs().detach())
    assert abs(a - b) <= 1e-5 * abs(b), f"the losses differ: {a} and {b}"
    contestants = {"ours": stepper(ours), "straightforward": stepper(theirs)}
    medians, spread = race(contestants, rounds=3 if quick else 7)
    memory = {key: round(peak_memory(step) / 2**20) for key, step in contestants.items()}
    ratio = medians["straightforward"] / medians["ours"]
    low, high = spread["straightforward"]
    row = [
        name,
        *(round(1000 * seconds, 1) for seconds in medians.values()),
        round(ratio, 2),
        f"{low:.2f} to {high:.2f}",
    ]
    result.table(
        "Training step (prompts and scorer; trunk frozen in both)",
        ["size", "ours, ms", "straightforward, ms", "ratio", "quartiles", "ours, MiB", "straightforward, MiB"],
        [[*row, *memory.values()]],
    )
    return ratio > 1


if __name__ == "__main__":
    sys.exit(main())
