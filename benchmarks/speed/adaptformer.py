"""An AdaptFormer step against full fine-tuning, and against the same adapters with everything in the autograd graph.

Same weights, images and labels; the losses are compared before the race. The floor by counting: a forward pass and the
backward pass to activations, without weight gradients, are two thirds of full fine-tuning's work. The straightforward way
(adapters added, whole model left in the graph, optimiser given the adapters only) computes weight gradients for nothing.
"""

from __future__ import annotations

import copy
import sys

import timm
import torch

from benchmarks.common import Result, arguments, peak_memory, race
from vitkit.adapt.adaptformer import AdaptFormer, Settings
from vitkit.adapt.full import Full
from vitkit.settings import Classify, Task

SIZES = {
    "ViT-S/16, 224 px, batch 4": ("vit_small_patch16_224", 224, 4),
    "ViT-Ti/16, 224 px, batch 8": ("vit_tiny_patch16_224", 224, 8),
    "ViT-Ti/16, 96 px, batch 50": ("vit_tiny_patch16_224", 96, 50),
}
TASK = Task("single", tuple(str(i) for i in range(10)))


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = "A step costs at most 0.8 of full fine-tuning's (floor 2/3) and less than the same adapters with all in the graph."
    result = Result("adaptformer", "speed", claim, options.quick)
    rows, holds = [], True
    for name, (arch, size, batch) in SIZES.items():
        row = contest(name, arch, size, batch, 3 if options.quick else 7)
        rows.append(row)
        holds &= row[2] <= 0.8 and row[4] <= 1.0
        if options.quick:
            break
    columns = [
        "size",
        "ms a step",
        "of full fine-tuning",
        "quartiles",
        "of all in the graph",
        "quartiles",
        "MiB",
        "full MiB",
        "graph MiB",
    ]
    result.table(
        "Training step, one CPU thread, float32, r = 64", columns, rows, "ratios below 1: AdaptFormer is cheaper"
    )
    return result.finish(options.quick or holds)


def contest(name: str, arch: str, size: int, batch: int, rounds: int) -> list:
    torch.manual_seed(0)
    vit = timm.create_model(arch, img_size=size, num_classes=0, dynamic_img_size=True)
    data = {"image": torch.randn(batch, 3, size, size), "label": torch.arange(batch) % 10}
    classify = Classify(head="linear")
    ours = AdaptFormer(copy.deepcopy(vit), Settings(dropout=0.0), task=TASK, classify=classify).train()
    graph = copy.deepcopy(ours)
    wanted = [p for p in graph.parameters() if p.requires_grad]
    for parameter in graph.parameters():
        parameter.requires_grad_(True)
    full = Full(copy.deepcopy(vit), task=TASK, classify=classify).train()
    with torch.no_grad():
        a, b = float(ours(data)["loss"]), float(graph(data)["loss"])
    assert abs(a - b) <= 1e-6 * abs(a), f"{name}: the losses differ: {a} and {b}"
    steps = {
        "ours": stepper(ours, data, [p for p in ours.parameters() if p.requires_grad]),
        "full": stepper(full, data, list(full.parameters())),
        "graph": stepper(graph, data, wanted),
    }
    medians, spread = race(steps, rounds=rounds)
    memory = {key: round(peak_memory(step) / 2**20) for key, step in steps.items()}
    row = [name, round(1000 * medians["ours"], 1)]
    for key in ("full", "graph"):
        low, high = spread[key]
        row += [round(medians["ours"] / medians[key], 2), f"{1 / high:.2f} to {1 / low:.2f}"]
    print(f"  {name}: {row[2]} of full, {row[4]} of all in the graph", flush=True)
    return [*row, *memory.values()]


def stepper(method, data, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step() -> None:
        method(data)["loss"].backward()
        optimizer.step()
        method.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(main())
