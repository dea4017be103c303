"""EAR at work: images a second and memory against a plain reference, RIAD's many passes and anomalib's DRAEM.

Pictures in, anomaly maps and scores out, masks included. The plain reference computes the same numbers (checked first) as one
would write it down: attention of every token, one convolution a gradient direction, roots before squares. RIAD-like inference
restores the picture with the same U-Net in 12 passes (4 cell sizes, 3 disjoint masks). DRAEM is anomalib's reconstruction
model (69 M weights restore, 28 M compare) where anomalib is installed. Random weights: speed does not depend on them. One
thread, float32, CPU, calls in turn; memory is that of torch tensors newly held in one call.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Result, arguments, peak_memory, race
from vitkit import tokens, weights
from vitkit.anomaly.ear import EAR, Settings

SIZES = {
    # name: (ViT, pixels, batch, widths of the U-Net)
    "256 px, ViT-S/16, U-Net 64-512 (the paper's)": ("vit_small_patch16_224", 256, 1, (64, 128, 256, 512, 512)),
    "128 px, ViT-Ti/16, U-Net 32-256": ("vit_tiny_patch16_224", 128, 4, (32, 64, 128, 256)),
}


class Plain(nn.Module):
    """The same method, written down directly."""

    def __init__(self, ours: EAR):
        super().__init__()
        self.ours, self.scale = ours, ours.scale

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        vit, size = self.ours.vit, images.shape[2:]
        attention = tokens.attention_maps(vit, images)[0][:, :, 0, vit.num_prefix_tokens :].mean(1)
        mean, sigma = attention.mean(1, keepdim=True), attention.std(1, keepdim=True, correction=0)
        mask = (attention > mean + 0.674 * sigma).float().unflatten(1, tokens.grid_of(vit, size)).unsqueeze(1)
        mask = F.interpolate(mask, size=size, mode="nearest")
        x = self.ours.preprocess.denormalise(images)
        coarse = F.interpolate(F.avg_pool2d(x, self.scale), size=size, mode="nearest")
        restored = self.ours.unet((1 - mask) * x + mask * coarse)
        found = self.msgms(x, restored)
        return {"map": found, "score": found.flatten(1).amax(1)}

    def msgms(self, a: Tensor, b: Tensor) -> Tensor:
        size, maps = a.shape[2:], []
        for scale in range(3):
            if scale:
                a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
            ga, gb = self.gradient(a), self.gradient(b)
            gms = (2 * ga * gb + 0.0026) / (ga**2 + gb**2 + 0.0026 + 1e-12)
            maps.append(F.interpolate(gms, size=size, mode="bilinear", align_corners=False))
        return (1 - torch.stack(maps).mean(0)).mean(1, keepdim=True)

    @staticmethod
    def gradient(x: Tensor) -> Tensor:
        row = torch.tensor([[1.0, 0.0, -1.0]] * 3) / 3
        parts = []
        for kernel in (row, row.T):
            one = torch.cat(
                [F.conv2d(x[:, c : c + 1], kernel.view(1, 1, 3, 3), padding=1) for c in range(x.shape[1])], 1
            )
            parts.append(one)
        return (parts[0] ** 2 + parts[1] ** 2 + 1e-12).sqrt()


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "EAR takes at most 1.05 times the plain reference's time at the same numbers, and at least 6 times as many images a "
        "second as the same U-Net with RIAD's 12 passes."
    )
    result = Result("ear", "speed", claim, options.quick)
    draem = load_draem()
    rows, holds = [], True
    sizes = list(SIZES.items())[1:] if options.quick else list(SIZES.items())
    for name, size in sizes:
        row, fine = contest(name, *size, draem=draem, rounds=3 if options.quick else 7)
        rows.append(row)
        holds &= fine
    columns = ["size", "images a second", "plain / ours", "quartiles", "RIAD-like / ours", "quartiles", "DRAEM / ours",
               "quartiles", "MiB", "RIAD-like MiB", "DRAEM MiB", "scores, max difference"]  # fmt: skip
    result.table(
        "Inference, one CPU thread, float32", columns, rows, "ratios above 1: ours is faster; memory of one call"
    )
    if draem is None:
        result.note("anomalib is not installed (pip install --no-deps anomalib and what it imports): no DRAEM column.")
    else:
        own = {
            name: sum(p.numel() for p in build(*size[:2], size[3]).parameters()) / 1e6 for name, size in SIZES.items()
        }
        result.note(
            "Weights: DRAEM 97 M; EAR with its ViT " + ", ".join(f"{count:.0f} M ({name})" for name, count in own.items())
            + ". DRAEM has no smaller form: it is not of similar size to the second row."
        )  # fmt: skip
    return result.finish(options.quick or holds)


def load_draem() -> nn.Module | None:
    if importlib.util.find_spec("anomalib") is None:
        return None
    from anomalib.models.image.draem.torch_model import DraemModel

    return DraemModel().eval()


def build(arch: str, pixels: int, filters: tuple[int, ...]) -> EAR:
    torch.manual_seed(0)
    vit = weights.load(arch, pretrained=False, image_size=pixels, say=None).eval()
    method = EAR(vit, Settings(filters=filters, scale=8)).eval()
    for module in method.unet.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of a trained network, so that pictures are not all black
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.constant_(method.unet.out.bias, 0.5)
    return method


def contest(
    name: str, arch: str, pixels: int, batch: int, filters: Any, *, draem: nn.Module | None, rounds: int
) -> tuple:
    ours = build(arch, pixels, filters)
    plain, many = Plain(ours), EAR(ours.vit, Settings(filters=filters, mask="random")).eval()
    many.unet.load_state_dict(ours.unet.state_dict())
    images = torch.randn(batch, 3, pixels, pixels)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.inspect(images),
        "plain": lambda: plain(images),
        "riad": lambda: many.inspect(images),
    }
    if draem is not None:
        calls["draem"] = lambda: draem(images)
    with torch.inference_mode():
        a, b = ours.inspect(images)["score"], plain(images)["score"]
        apart = float((a - b).abs().max() / b.abs().max())
        assert apart < 1e-4, f"{name}: the scores differ: {a} and {b}"
        medians, spread = race(calls, rounds=rounds, warmup=1)
        memory = {key: round(peak_memory(call) / 2**20) for key, call in calls.items() if key != "plain"}
    ratios = {key: round(medians[key] / medians["ours"], 2) for key in calls if key != "ours"}
    print(f"  {name}: {ratios}", flush=True)
    row: list[Any] = [name, round(batch / medians["ours"], 2)]
    for key in ("plain", "riad", "draem"):
        low, high = spread.get(key, (0.0, 0.0))
        row += [ratios.get(key), f"{low:.2f} to {high:.2f}" if key in spread else ""]
    row += [memory["ours"], memory["riad"], memory.get("draem"), f"{apart:.0e}"]
    return row, ratios["plain"] >= 1 / 1.05 and ratios["riad"] >= 6


if __name__ == "__main__":
    sys.exit(main())
