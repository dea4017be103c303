"""DTA against torchattacks' PGD at equal gradient evaluations, and what its layer search costs.

torchattacks climbs a cross-entropy. A wrapper whose two "logits" are the average token cosine similarity at the attacked
block and 0, with label 0, makes that climb a descent of the similarity: the same sign steps. From the same starts both give
the same images, which is asserted before the race. Two wrappers race: "whole" runs the model to its end and reads the block
by a hook, as is usual; "cut" stops after the attacked block like DTA. Clean features are computed once in all three. The
floor by counting: a step is a forward pass and one backward pass to activations through the blocks up to the attacked one, so
at block 7 of 12 DTA needs (8 + 8) / (12 + 8) = 0.80 of "whole"; at the last block, and against "cut", nothing can be gained.
"""

from __future__ import annotations

import sys
import time

import timm
import torch
import torchattacks
from torch import Tensor, nn

from benchmarks.common import Result, arguments, peak_memory, race
from vitkit import weights
from vitkit.attack.dta import DTA, Settings, features, similarity

EPS, STEPS = 8 / 255, 5
SIZES = {
    "ViT-S/16, 224 px, batch 4, block 7": ("vit_small_patch16_224", 224, 4, 7),
    "ViT-Ti/16, 224 px, batch 8, block 7": ("vit_tiny_patch16_224", 224, 8, 7),
    "ViT-Ti/16, 96 px, batch 32, block 7": ("vit_tiny_patch16_224", 96, 32, 7),
    "ViT-Ti/16, 96 px, batch 32, block 11": ("vit_tiny_patch16_224", 96, 32, 11),
}


class Whole(nn.Module):
    """Similarity at a block as a logit, read by a hook while the whole model runs."""

    def __init__(self, vit: nn.Module, block: int, pixels: Tensor):
        super().__init__()
        self.vit, self.block = vit, block
        self.prepare = vit.passport.preprocess.normalise
        vit.blocks[block].register_forward_hook(lambda module, inputs, out: setattr(self, "seen", out))
        with torch.no_grad():
            self.clean = self.look(pixels)

    def look(self, pixels: Tensor) -> Tensor:
        self.vit(self.prepare(pixels))
        return self.seen

    def forward(self, pixels: Tensor) -> Tensor:
        found = similarity(self.look(pixels), self.clean)
        return torch.stack([found, torch.zeros_like(found)], dim=1)


class Cut(Whole):
    """The same, stopped after the block."""

    def look(self, pixels: Tensor) -> Tensor:
        return features(self.vit, self.prepare(pixels), (self.block,))[0]


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "From equal starts DTA gives the images of torchattacks' PGD on the same loss. At block 7 of 12 it takes at most 0.9 "
        "of PGD's time (floor 0.80), and at most 1.05 of that of a PGD wrapper written to stop at the same block."
    )
    result = Result("dta", "speed", claim, options.quick)
    rows, holds = [], True
    for name, (arch, size, batch, block) in SIZES.items():
        row = contest(name, arch, size, batch, block, 3 if options.quick else 7)
        rows.append(row)
        holds &= row[5] <= 1.05 and (row[3] <= 0.9 or block == 11)
        if options.quick:
            break
    columns = [
        "size",
        "equal values",
        "ms a step",
        "of PGD, whole",
        "quartiles",
        "of PGD, cut",
        "quartiles",
        "MiB",
        "whole MiB",
    ]
    result.table(
        f"{STEPS} gradient steps, one CPU thread, float32",
        columns,
        rows,
        "ratios below 1: DTA is faster; equal values: share of pixels that agree to 1e-6 from the same starts",
    )
    search_cost(result, options.quick)
    return result.finish(options.quick or holds)


def contest(name: str, arch: str, size: int, batch: int, block: int, rounds: int) -> list:
    vit = encoder(arch, size)
    x = pictures(batch, size)
    labels = torch.zeros(batch, dtype=torch.long)
    ours = DTA(vit, Settings(eps=EPS, steps=STEPS, layer=block))
    agree = []
    for kind in (Whole, Cut):
        torch.manual_seed(1)
        theirs = torchattacks.PGD(kind(encoder(arch, size), block, x), eps=EPS, alpha=EPS / 4, steps=STEPS)(x, labels)
        torch.manual_seed(1)
        start = torch.empty_like(x).uniform_(-EPS, EPS)  # the one draw that PGD makes
        agree.append(float(((theirs - ours.crafted(x, noise=start / EPS).pixels).abs() <= 1e-6).float().mean()))
    assert min(agree) >= 0.999, f"{name}: only {min(agree):.4%} of the values agree"

    def pgd(kind: type[Whole]):
        vit = encoder(arch, size)

        def call() -> None:  # as users call it: the wrapper's clean features, then torchattacks' own forward
            torchattacks.PGD(kind(vit, block, x), eps=EPS, alpha=EPS / 4, steps=STEPS)(x, labels)
            vit.blocks[block]._forward_hooks.clear()

        return call

    contestants = {"ours": lambda: ours(x), "whole": pgd(Whole), "cut": pgd(Cut)}
    medians, spread = race(contestants, rounds=rounds, warmup=1)
    memory = {key: round(peak_memory(contestants[key]) / 2**20) for key in ("ours", "whole")}
    row = [name, round(min(agree), 5), round(1000 * medians["ours"] / STEPS, 1)]
    for key in ("whole", "cut"):
        low, high = spread[key]
        row += [round(medians["ours"] / medians[key], 2), f"{1 / high:.2f} to {1 / low:.2f}"]
    print(f"  {name}: {row[3]} of whole, {row[5]} of cut", flush=True)
    return [*row, *memory.values()]


def search_cost(result: Result, quick: bool) -> None:
    """Seconds of a search, full and coarse, beside attacking as many images once."""
    vit, x = encoder("vit_tiny_patch16_224", 96), pictures(8 if quick else 32, 96)
    rows = []
    for kind in ("full", "coarse"):
        attack = DTA(vit, Settings(eps=EPS, search=kind))
        began = time.perf_counter()
        (profile,) = attack.search(x)
        rows.append([f"{kind} search", len(profile.candidates), round(time.perf_counter() - began, 2)])
    attack = DTA(vit, Settings(eps=EPS, layer=11))
    began = time.perf_counter()
    attack(x)
    rows.append(["attack of the same images, 10 steps, block 11", 1, round(time.perf_counter() - began, 2)])
    result.table(f"Layer search on {len(x)} images, ViT-Ti/16 at 96 px", ["what", "blocks tried", "seconds"], rows)


def encoder(arch: str, size: int) -> nn.Module:
    vit = weights.load(arch, pretrained=False, image_size=size, say=None).eval()
    assert isinstance(vit, timm.models.VisionTransformer)
    return vit


def pictures(batch: int, size: int) -> Tensor:
    torch.manual_seed(0)
    return nn.functional.interpolate(torch.rand(batch, 3, 12, 12), size=size, mode="bicubic").clamp(0, 1)


if __name__ == "__main__":
    sys.exit(main())
