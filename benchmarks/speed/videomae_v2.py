"""A step of VideoMAE V2 with and without masking the decoder, against a plain port of its official step and transformers.

Same numbers first: ours equals the plain port with the decoder masked, and transformers' VideoMAE (version 1: all hidden
tubes decoded) without. The plain port does what the official step does: all tubes embedded, boolean masks, attention written
out, targets of all tubes normalised, every token through every decoder block. Full steps (forward, backward, fused AdamW) run
in turn, one thread, float32, CPU. Then clips a second from video files, and window features for action detection.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Result, arguments, peak_memory, race
from vitkit import tokens, weights
from vitkit.evaluate.video import window_features, window_starts
from vitkit.parts.sinusoid import sinusoid
from vitkit.parts.tube_masks import running_cells, tube_mask
from vitkit.pretrain.videomae_v2 import Settings, VideoMAEv2

SIZES = {
    # name: (model, keywords, clips a step)
    "ViT-S/16, 2 clips of 16 x 224 x 224": ("video_vit_small_patch16_224", {}, 2),
    "192 x 12, decoder 96 x 4, 4 clips of 16 x 128 x 128": (
        "video_vit_tiny_patch16_224",
        {"img_size": [16, 128, 128]},
        4,
    ),
    "96 x 4, decoder 48 x 4, 16 clips of 8 x 48 x 48": (
        "video_vit_tiny_patch16_224",
        {"embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": [8, 48, 48], "patch_size": [2, 8, 8]},
        16,
    ),
}


class Plain(nn.Module):
    """The official step, written straight down."""

    def __init__(self, ours: VideoMAEv2):
        super().__init__()
        self.ours = ours

    def forward(self, video: Tensor, encoder: Tensor, decoder: Tensor | None) -> Tensor:
        vit, own = self.ours.vit, self.ours.decoder
        batch, hidden = len(video), encoder.flatten(1).bool()
        wanted = hidden if decoder is None else ~decoder.flatten(1).bool()
        x = vit.patch_embed(video)
        count, width = x.shape[1:]
        x = (x + sinusoid(count, width).clone())[~hidden].reshape(batch, -1, width)
        for block in vit.blocks:
            x = self.block(block, x)
        x = own.embed(vit.norm(x))
        table = sinusoid(count, own.dim).expand(batch, -1, -1).clone()
        shown = table[~hidden].reshape(batch, -1, own.dim)
        masked = table[wanted].reshape(batch, -1, own.dim)
        x = torch.cat([x + shown, own.mask_token + masked], dim=1)
        for block in own.blocks:
            x = self.block(block, x)
        prediction = own.head(own.norm(x[:, -masked.shape[1] :]))
        target = self.targets(video)[wanted].reshape(batch, masked.shape[1], -1)
        counts = hidden[wanted].reshape(batch, -1)
        return ((prediction - target) ** 2).mean(-1)[counts].mean()

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = (q * attn.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + attn.proj(out.transpose(1, 2).flatten(2))
        return x + block.mlp(block.norm2(x))

    @torch.no_grad()
    def targets(self, video: Tensor) -> Tensor:
        """(B, N, 2 p p C) of all tubes."""
        t, h, w = self.ours.vit.patch_embed.patch_size
        x = video * self.ours.std.view(-1, 1, 1, 1) + self.ours.mean.view(-1, 1, 1, 1)
        batch, chans = x.shape[:2]
        x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t)).permute(0, 2, 4, 6, 3, 5, 7, 1)
        x = x.reshape(batch, -1, t * h * w, chans)
        return ((x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True).sqrt() + 1e-6)).flatten(2)


def transformers_model(ours: VideoMAEv2) -> nn.Module:
    """transformers' VideoMAE with our weights."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    vit, own = ours.vit, ours.decoder
    frames, side, _ = vit.patch_embed.img_size
    config = VideoMAEConfig(
        image_size=side, patch_size=vit.patch_embed.patch_size[1], num_frames=frames, tubelet_size=2,
        hidden_size=vit.embed_dim, num_hidden_layers=len(vit.blocks), num_attention_heads=vit.blocks[0].attn.num_heads,
        intermediate_size=vit.blocks[0].mlp.fc1.out_features, decoder_hidden_size=own.dim,
        decoder_num_hidden_layers=len(own.blocks), decoder_num_attention_heads=own.blocks[0].attn.num_heads,
        decoder_intermediate_size=own.blocks[0].mlp.fc1.out_features, use_mean_pooling=False, layer_norm_eps=1e-6,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    theirs = VideoMAEForPreTraining(config)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    state = {"mask_token": own.mask_token, "encoder_to_decoder.weight": own.embed.weight}
    stem = "videomae.embeddings.patch_embeddings.projection"
    state |= {f"{stem}.{kind}": value for kind, value in vit.patch_embed.proj.named_parameters()}
    state |= {f"videomae.layernorm.{kind}": value for kind, value in vit.norm.named_parameters()}
    state |= {f"decoder.{name}": value for name, value in own.named_parameters() if name.startswith(("norm", "head"))}
    for prefix, blocks in (("videomae.encoder.layer", vit.blocks), ("decoder.decoder_layers", own.blocks)):
        for i, block in enumerate(blocks):
            state |= {f"{prefix}.{i}.{name}": value for name, value in their_block(block).items()}
    theirs.load_state_dict(state)
    return theirs


def their_block(block: nn.Module) -> dict[str, Tensor]:
    """One of timm's blocks by transformers' names."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
    found = {}
    for ours, theirs in names.items():
        module = block.get_submodule(ours)
        found |= {f"{theirs}.weight": module.weight, f"{theirs}.bias": module.bias}
    weight, bias = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
    for i, name in enumerate(("query", "key", "value")):
        found[f"attention.attention.{name}.weight"] = weight[i]
        if name != "key":
            found[f"attention.attention.{name}.bias"] = bias[i]
    return found


def main() -> int:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    claim = (
        "A step is faster than a plain port of the official one with the same loss, and without masking the decoder faster "
        "than transformers' VideoMAE; masking the decoder takes at most 0.75 of the time of decoding everything."
    )
    result = Result("videomae_v2", "speed", claim, options.quick)
    rows, holds = [], True
    for name, size in SIZES.items():
        row, good = contest(name, *size, rounds=3 if options.quick else 7)
        rows.append(row)
        holds &= good
    columns = ["size", "ms dual", "ms single", "dual / single", "plain / dual", "quartiles", "transformers / single",
               "quartiles", "loss, max difference", "MiB dual", "single", "plain", "transformers"]  # fmt: skip
    result.table("Training step, one CPU thread, float32", columns, rows, "contestant / ours above 1: ours is faster")
    loading(result, options.quick)
    holds &= windows(result, options.quick)
    return result.finish(holds)


def contest(name: str, arch: str, kwargs: dict[str, Any], batch: int, *, rounds: int) -> tuple[list, bool]:
    torch.manual_seed(0)
    vit = weights.load(arch, pretrained=False, arch_kwargs=kwargs, say=None)
    ours = VideoMAEv2(vit, Settings(decoder_heads=3 if vit.embed_dim < 384 else "auto"))
    video = torch.randn(batch, 3, *vit.patch_embed.img_size)
    grid = tokens.grid_of(vit, video.shape[2:])
    encoder = tube_mask(torch.rand(batch, math.prod(grid[1:])), grid[0], 0.9)
    decoder = running_cells(0.5, grid)[torch.randint(4, (batch,))]
    plain, theirs = Plain(ours), transformers_model(ours)
    frames, hidden = video.transpose(1, 2), encoder.flatten(1).bool()
    calls = {
        "dual": lambda: ours({"image": video, "encoder_mask": encoder, "decoder_mask": decoder})["loss"],
        "single": lambda: ours({"image": video, "encoder_mask": encoder})["loss"],
        "plain": lambda: plain(video, encoder, decoder),
        "transformers": lambda: theirs(frames, bool_masked_pos=hidden).loss,
    }
    with torch.no_grad():
        losses = {key: float(call()) for key, call in calls.items()}
    apart = max(abs(losses["plain"] / losses["dual"] - 1), abs(losses["transformers"] / losses["single"] - 1))
    assert apart < 1e-4, f"{name}: the losses differ: {losses}"
    modules = {"dual": ours, "single": ours, "plain": ours, "transformers": theirs}
    steps = {key: stepper(modules[key], call) for key, call in calls.items()}
    medians, spread = race(steps, rounds=rounds, warmup=1)
    memory = {key: peak_memory(step) / 2**20 for key, step in steps.items()}
    against = medians["transformers"] / medians["single"]
    ratios = medians["dual"] / medians["single"], medians["plain"] / medians["dual"], against
    low, high = spread["plain"]
    quarters = [medians["single"] / medians["dual"]] * 2
    theirs_spread = [value / quarters[0] for value in spread["transformers"]]
    row = [name, 1000 * medians["dual"], 1000 * medians["single"], ratios[0], ratios[1], f"{low:.2f} to {high:.2f}",
           against, f"{theirs_spread[0]:.2f} to {theirs_spread[1]:.2f}", f"{apart:.0e}",
           *(round(memory[key]) for key in calls)]  # fmt: skip
    print(f"  {name}: " + ", ".join(f"{value:.2f}" for value in ratios), flush=True)
    return row, ratios[0] <= 0.75 and min(ratios[1:]) >= 1.0


def stepper(module: nn.Module, call: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        call().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def write_videos(folder: Path, count: int, frames: int, size: tuple[int, int]) -> None:
    """Smooth moving pictures as H.264."""
    from fractions import Fraction

    import av

    rows, columns = np.mgrid[: size[0], : size[1]]
    for i in range(count):
        with av.open(str(folder / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for t in range(frames):
                wave = 127 + 120 * np.sin((rows + columns) / 23 + t / 5 + i)
                array = np.stack([wave, np.roll(wave, 9, 0), np.roll(wave, 9, 1)], -1).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts, frame.time_base = t, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def loading(result: Result, quick: bool) -> None:
    """Clips a second out of files, with one clip and four of each decoded video."""
    from vitkit.data import read
    from vitkit.data.video_views import pretrain_view
    from vitkit.passport import Preprocess

    p = Preprocess(image_size=(16, 224, 224), kind="video", frame_stride=4, interpolation="bilinear")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder), 3 if quick else 8, 250, (256, 340))
        images = read(folder, kind="video", say=None)
        for clips in (1, 4):
            view, times = pretrain_view(p, clips=clips), []
            for i in range(len(images)):
                torch.manual_seed(i)
                start = time.perf_counter()
                view(images.decode(i))
                times.append(time.perf_counter() - start)
            rows.append([clips, clips / float(np.median(times)), 1000 * float(np.median(times))])
    columns = ["clips of each decoded video", "clips a second", "ms a video"]
    note = "H.264, 250 frames of 256 x 340, clips of 16 frames at stride 4, 224 px, one process"
    result.table("From files to clips", columns, rows, note)


def windows(result: Result, quick: bool) -> bool:
    """Features of 16-frame windows every 4 frames: ours against a loop over windows, as the official script does."""
    vit: Any = weights.load("video_vit_tiny_patch16_224", pretrained=False, image_size=112, say=None).eval()
    frames = torch.randint(0, 256, (48 if quick else 80, 120, 160, 3), dtype=torch.uint8)
    starts = window_starts(len(frames), 16, 4)

    @torch.no_grad()
    def loop() -> np.ndarray:
        found = []
        for start in starts:
            clip = frames[start : start + 16].permute(0, 3, 1, 2).float() / 255
            clip = nn.functional.interpolate(clip, size=(112, 112), mode="bilinear", align_corners=False)
            found.append(tokens.feature(vit, clip.transpose(0, 1)[None]).numpy())
        return np.concatenate(found)

    def ours() -> np.ndarray:
        return window_features(vit, frames, starts, normalise=False)

    a, b = ours(), loop()
    apart = float(np.abs(a - b).max() / np.abs(b).max())
    assert apart < 1e-4, apart
    medians, spread = race({"ours": ours, "loop": loop}, rounds=3 if quick else 7, warmup=1)
    ratio = medians["loop"] / medians["ours"]
    row = [
        len(starts),
        len(starts) / medians["ours"],
        ratio,
        f"{spread['loop'][0]:.2f} to {spread['loop'][1]:.2f}",
        f"{apart:.0e}",
    ]
    columns = ["windows", "windows a second", "one at a time / ours", "quartiles", "max difference"]
    result.table("Window features for action detection (ViT-Ti/16, 112 px, decoded frames)", columns, [row])
    return ratio >= 1.0


if __name__ == "__main__":
    sys.exit(main())
