"""Explanations of the real DeiT-Ti/16: Grad-CAM against pytorch-grad-cam, rollout and insertion/deletion against what one
would write down first.

Grad-CAM: photographs of `clothing` in batches, maps enlarged to the images' size and scaled as pytorch-grad-cam does; the
maps are compared first. The floor by counting: a forward pass, and forward and backward of the last of 12 blocks without
weight gradients. Rollout: against hooks on unfused attention that keep the weights of all layers, as public
implementations do. Curves: against a loop over images and steps, one image a forward pass.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Result, arguments, data, peak_memory, race
from vitkit import weights
from vitkit.data import read
from vitkit.data.transforms import eval_view
from vitkit.explain import attention, faithfulness, grad_cam
from vitkit.explain.shared import predict

BATCH = 10


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "Grad-CAM maps equal pytorch-grad-cam's and take at most half of its time; rollout equals the straightforward one, "
        "in at most its time and half of its memory; insertion and deletion curves equal the loop's and are faster."
    )
    result = Result("explain", "speed", claim, options.quick)
    model = data("weights") / "deit_tiny_patch16_224" / "model.fp16.safetensors"
    vit = weights.load(str(model), num_classes=None, say=None).eval()
    images = photographs(vit, 20 if options.quick else 100)
    rounds = 2 if options.quick else 5
    holds = cams(result, vit, images, rounds)
    holds &= rollouts(result, vit, images[:BATCH], rounds)
    holds &= curves(result, vit, images[:1], rounds, 16 if options.quick else 4)
    return result.finish(options.quick or holds)


def photographs(vit, count: int) -> Tensor:
    """Normalised images (count, 3, 224, 224), spread over the classes."""
    images = read(data("clothing"), say=None)
    view = eval_view(vit.passport.preprocess)
    rows = np.linspace(0, len(images) - 1, count).round().astype(int)
    return vit.passport.preprocess.normalise(torch.stack([view(images.decode(int(i))) for i in rows]))


def cams(result: Result, vit, images: Tensor, rounds: int) -> bool:
    from pytorch_grad_cam import GradCAM

    side = images.shape[-1] // 16

    def patches(x: Tensor) -> Tensor:
        return x[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def ours() -> np.ndarray:
        parts = [grad_cam.saliency(vit, part) for part in images.split(BATCH)]
        maps = F.interpolate(unit(torch.cat(parts))[:, None], size=images.shape[-2:], mode="bilinear")[:, 0]
        return unit(maps).numpy()

    def theirs() -> np.ndarray:
        with GradCAM(vit, [vit.blocks[-1].norm1], reshape_transform=patches) as cam:
            return np.concatenate([cam(part, None) for part in images.split(BATCH)])

    apart = float(np.abs(ours() - theirs()).max())
    assert apart < 1e-4, f"the maps differ by {apart}"
    medians, spread = race({"ours": ours, "pytorch-grad-cam": theirs}, rounds=rounds, warmup=0)
    ratio = medians["pytorch-grad-cam"] / medians["ours"]
    low, high = spread["pytorch-grad-cam"]
    first = images[:BATCH]
    with GradCAM(vit, [vit.blocks[-1].norm1], reshape_transform=patches) as cam:
        memory = [
            round(peak_memory(call) / 2**20)
            for call in (lambda: grad_cam.saliency(vit, first), lambda: cam(first, None))
        ]
    vit.zero_grad()
    result.table(
        f"Grad-CAM of {len(images)} photographs, DeiT-Ti/16 at 224 px, batches of {BATCH}, one thread",
        ["", "seconds", "ms an image", "time / ours", "quartiles", "MiB a batch", "largest difference"],
        [
            ["ours", medians["ours"], 1000 * medians["ours"] / len(images), 1.0, "", memory[0], ""],
            [
                "pytorch-grad-cam 1.5.7",
                medians["pytorch-grad-cam"],
                1000 * medians["pytorch-grad-cam"] / len(images),
                round(ratio, 2),
                f"{low:.2f} to {high:.2f}",
                memory[1],
                f"{apart:.1e}",
            ],
        ],
        "maps of the predicted class, enlarged and scaled to [0, 1]",
    )
    return ratio >= 2


def unit(maps: Tensor) -> Tensor:
    """Each map from 0 to 1, with pytorch-grad-cam's guard against division by zero."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def rollouts(result: Result, vit, images: Tensor, rounds: int) -> bool:
    """Native size and twice as many pixels a side."""
    rows, holds = [], True
    for size in (224, 448):
        x = images if size == 224 else F.interpolate(images[:4], size=(size, size), mode="bilinear")

        def straightforward(x: Tensor = x) -> Tensor:
            return all_layers(vit, x)

        def ours(x: Tensor = x) -> Tensor:
            return attention.rollout(vit, x)

        apart = float((ours() - straightforward()).abs().max() / straightforward().abs().max())
        assert apart < 1e-4, f"rollouts differ by {apart}"
        medians, spread = race({"ours": ours, "plain": straightforward}, rounds=max(3, rounds), warmup=1)
        memory = [peak_memory(call) / 2**20 for call in (ours, straightforward)]
        low, high = spread["plain"]
        ratio = medians["plain"] / medians["ours"]
        holds &= ratio >= 1 and memory[0] <= memory[1] / 2
        name = f"{len(x)} images of {size} px, {(size // 16) ** 2 + 1} tokens"
        times = [round(1000 * medians[key], 1) for key in ("ours", "plain")]
        rows.append([name, *times, round(ratio, 2), f"{low:.2f} to {high:.2f}", *map(round, memory), f"{apart:.1e}"])
    columns = [
        "",
        "ours, ms",
        "plain, ms",
        "plain / ours",
        "quartiles",
        "ours, MiB",
        "plain, MiB",
        "largest difference",
    ]
    result.table(
        "Attention rollout, DeiT-Ti/16, one thread", columns, rows, "plain: unfused attention, all layers kept"
    )
    return holds


@torch.no_grad()
def all_layers(vit, x: Tensor) -> Tensor:
    """Hooks on the dropout after softmax of unfused attention, every layer's weights kept, then their product."""
    kept: list[Tensor] = []
    modules = [block.attn for block in vit.blocks]
    handles = [module.attn_drop.register_forward_hook(lambda _, __, out: kept.append(out)) for module in modules]
    for module in modules:
        module.fused_attn = False
    try:
        vit(x)
    finally:
        for handle, module in zip(handles, modules, strict=True):
            handle.remove()
            module.fused_attn = True
    eye = torch.eye(kept[0].shape[-1])
    total = eye
    for one in kept:
        mixed = one.mean(1) + eye
        total = mixed / mixed.sum(-1, keepdim=True) @ total
    side = x.shape[-1] // 16
    return total[:, 0, 1:].unflatten(1, (side, side))


def curves(result: Result, vit, images: Tensor, rounds: int, rows: int) -> bool:
    target = predict(vit, images).argmax(1)
    maps = grad_cam.saliency(vit, images)

    def ours() -> faithfulness.Curves:
        return faithfulness.curves(vit, images, {"map": maps}, target, rows=rows)["map"]

    def loop() -> tuple[list[float], list[float]]:
        return tuple(one_by_one(vit, images[0], maps[0], int(target), rows, kind) for kind in ("deletion", "insertion"))

    found, want = ours(), loop()
    apart = max(
        float((curve[0] - torch.tensor(other)).abs().max())
        for curve, other in zip((found.deletion, found.insertion), want, strict=True)
    )
    assert apart < 1e-4, f"the curves differ by {apart}"
    medians, spread = race({"ours": ours, "loop": loop}, rounds=max(3, rounds), warmup=0)
    low, high = spread["loop"]
    ratio = medians["loop"] / medians["ours"]
    steps = faithfulness.steps_of((224, 224), rows)
    result.table(
        f"Insertion and deletion of one map, DeiT-Ti/16 at 224 px, {steps} steps each, one thread",
        ["", "ours, s", "loop, s", "loop / ours", "quartiles", "largest difference"],
        [
            [
                "both curves",
                medians["ours"],
                medians["loop"],
                round(ratio, 2),
                f"{low:.2f} to {high:.2f}",
                f"{apart:.1e}",
            ]
        ],
        "loop: one image a forward pass",
    )
    return ratio >= 1


@torch.no_grad()
def one_by_one(vit, image: Tensor, saliency: Tensor, target: int, rows: int, kind: str) -> list[float]:
    """The definition, a step at a time."""
    _, height, width = image.shape
    pixels = F.interpolate(saliency[None, None], (height, width), mode="bilinear")[0, 0].flatten()
    order = pixels.sort(descending=True, stable=True).indices
    blurred = faithfulness.blurred(image[None])[0]
    current, end = (image, torch.zeros_like(image)) if kind == "deletion" else (blurred, image)
    current, curve = current.clone(), []
    for first in range(0, height * width + rows * width, rows * width):
        curve.append(float(predict(vit, current[None])[0, target]))
        where = order[first : first + rows * width]
        current.flatten(1)[:, where] = end.flatten(1)[:, where]
    return curve


if __name__ == "__main__":
    sys.exit(main())
