"""VideoMAE V2: pre-train a video ViT on unlabelled clips; the encoder sees a tenth of the tubes, the decoder half the rest.

Paper: Wang et al., "VideoMAE V2: Scaling Video Masked Autoencoders with Dual Masking", CVPR 2023 (arXiv 2303.16727).
Official code: OpenGVLab/VideoMAEv2.

What happens, and where: one random set of places is hidden in every time step and the encoder runs on the tubes that are
left (`parts.tube_masks`, `tokens.encode(keep=...)`); a narrow decoder sees their projections and a learned token for each
place of the running cell, both with fixed sinusoids over the flat token index (`Decoder`); the loss is the squared error to
each tube's pixels, every colour channel of a tube normalised by its own mean and deviation, averaged over tubes that the
decoder predicts and the encoder did not see (`VideoMAEv2.target`). Supervised training on mixed labels, fine-tuning and
distillation are `vitkit adapt full` (docs/systems/videomae_v2.md).

Differs from the paper: nothing in the numbers. Only visible tubes are embedded and only predicted tubes are made targets;
the last decoder block computes no visible tokens; masks are functions of the clip's seed. An odd patch grid, for which the
official running cell silently loses tubes, is refused.

Cost: the encoder sees (1 - mask_ratio) of the tubes, the decoder these and half of all; without decoder masking it sees all.

    vitkit pretrain videomae_v2 --model video_vit_small_patch16_224 --pretrained false --data videos/ --out runs/video
    vitkit.pretrain("videomae_v2", model="video_vit_small_patch16_224", pretrained=False, data="videos/", out="runs/video")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, WeightsError
from vitkit.parts.configs import mlp_ratio
from vitkit.parts.cosine_attention import CosineAttention
from vitkit.parts.sinusoid import sinusoid
from vitkit.parts.tube_masks import DualMask, draw, dual_mask
from vitkit.parts.video_names import to_official, to_timm
from vitkit.parts.xavier import xavier_blocks, xavier_linear
from vitkit.passport import IMAGENET_MEAN, IMAGENET_STD

RECIPE = {
    "epochs": 800,  # scripts/pretrain, ViT-B: 200 epochs of 4 clips a video
    "warmup_epochs": 20.0,
    "optimizer": "adamw",
    "blr": 6e-4,  # vit_g_hybrid_pt.sh, x batch / 256; num_sample does not count; ViT-B's script says 1e-3
    "betas": (0.9, 0.95),
    "weight_decay": 0.05,
    "clip_grad": 0.02,  # vit_g_hybrid_pt.sh; the scripts of smaller models do not clip
    "batch_size": 32,
    "hflip": False,  # pre-training does not flip
}


@dataclass(frozen=True)
class Settings:
    """VideoMAE V2."""

    mask_ratio: float = 0.9
    """share of each frame's patches hidden from the encoder, the same places in every frame (paper, section 4.1)"""
    decoder_mask_ratio: float = 0.5
    """share of tubes that the decoder leaves out: 0.25, 0.5 or 0.75 by the running cell; 0 predicts all hidden ones (V1)"""
    norm_pix_loss: bool = True
    """normalise each colour channel of each target tube by its own mean and deviation (normlize_target)"""
    decoder_dim: int | Literal["auto"] = "auto"
    """width of the decoder; auto = half of the encoder's, at most 512 (modeling_pretrain.py)"""
    decoder_depth: int = 4
    """blocks of the decoder"""
    decoder_heads: int | Literal["auto"] = "auto"
    """attention heads of the decoder; auto = one for 64 channels"""
    decoder_init_values: float = 0.0
    """start of the decoder's layer scale; 0 = none, as in every recipe"""
    num_sample: int = 4
    """clips taken from each decoded video, each with its own crop and masks; the learning rate does not count them"""
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """sides of the random crop as shares of the short side (GroupMultiScaleCrop)"""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio is {self.mask_ratio}", fix="a share between 0 and 1, e.g. 0.9")
        if self.decoder_mask_ratio and not 0 < int(4 * self.decoder_mask_ratio) < 4:
            raise ConfigError(f"decoder_mask_ratio is {self.decoder_mask_ratio}", fix="0, 0.25, 0.5 or 0.75")
        if self.num_sample < 1:
            raise ConfigError(f"num_sample is {self.num_sample}", fix="1 clip a video or more")
        if not self.crop_scales or not all(0 < scale <= 1 for scale in self.crop_scales):
            raise ConfigError(f"crop_scales is {self.crop_scales}", fix="shares above 0 and at most 1, e.g. 1,0.875")
        if self.decoder_depth < 1:
            raise ConfigError(f"decoder_depth is {self.decoder_depth}", fix="1 block or more")

    def decoder(self, width: int) -> tuple[int, int]:
        """(width, heads) of the decoder of an encoder `width` wide."""
        dim = min(512, width // 2) if self.decoder_dim == "auto" else self.decoder_dim
        heads = max(1, dim // 64) if self.decoder_heads == "auto" else self.decoder_heads
        if dim < 2 or dim % 2 or dim % heads:
            raise ConfigError(
                f"decoder_dim {dim} with decoder_heads {heads}", fix="an even width that is a multiple of the heads"
            )
        return dim, heads


class VideoMAEv2(nn.Module):
    """`forward({"image": (B, C, T, H, W) normalised, or (B, clips, C, T, H, W)})` -> loss. Needs no labels."""

    needs_labels = False
    shards = True
    kinds = ("video",)

    def __init__(self, vit: nn.Module, settings: Settings = Settings()):
        super().__init__()
        self.vit, self.settings = tokens.require_vit(vit), settings
        if len(vit.patch_embed.patch_size) != 3:
            raise ConfigError("VideoMAE V2 needs a ViT of videos", fix="e.g. --model video_vit_small_patch16_224")
        norm_every_token(vit)
        passport = getattr(vit, "passport", None)
        if passport is not None and passport.base.get("kind") == "random" and not passport.lineage:
            init_weights(vit)
        vit.pos_embed.requires_grad_(False)  # fixed sinusoids
        mean, std = pixel_statistics(vit)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        dim, heads = settings.decoder(vit.embed_dim)
        block = vit.blocks[0]
        self.decoder = Decoder(
            in_dim=vit.embed_dim,
            dim=dim,
            depth=settings.decoder_depth,
            heads=heads,
            mlp_ratio=mlp_ratio(block.mlp.fc1.out_features, vit.embed_dim),
            out_dim=math.prod(vit.patch_embed.patch_size) * vit.patch_embed.proj.in_channels,
            init_values=settings.decoder_init_values,
            attention=type(block.attn),
            qkv_bias=getattr(block.attn.qkv, "bias", None) is not None or hasattr(block.attn.qkv, "q_bias"),
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch["seed"]` (B,) makes masks a function of the video; `encoder_mask`, `decoder_mask` (B, N) fix them."""
        video = _clips(batch)
        mask = self.mask(batch)
        prediction = self.decode(self.encode(video, mask), mask)  # (B, M, 2 p p C)
        error = (prediction.float() - self.target(video, mask.decode)).square().mean(-1)
        return {"loss": (error * mask.hidden).sum() / mask.hidden.sum()}

    def mask(self, batch: dict[str, Tensor]) -> DualMask:
        video = _clips(batch)
        if "encoder_mask" in batch:
            return dual_mask(batch["encoder_mask"], batch.get("decoder_mask"))
        seeds = batch.get("seed")
        if seeds is not None and len(seeds) < len(video):  # several clips of one video: neighbouring streams
            clips = torch.arange(len(video) // len(seeds), device=seeds.device)
            seeds = ((seeds.unsqueeze(1) >> 8) * 256 + clips).flatten()
        s = self.settings
        grid = self.grid(video)
        ratios = {"mask_ratio": s.mask_ratio, "decoder_mask_ratio": s.decoder_mask_ratio}
        return draw(seeds, len(video), grid, **ratios, device=video.device)

    def encode(self, video: Tensor, mask: DualMask) -> tokens.Tokens:
        """Visible tubes (B, K, D) after the final norm."""
        return tokens.encode(self.vit, video, keep=mask.keep)

    def decode(self, latent: tokens.Tokens, mask: DualMask) -> Tensor:
        """Predictions (B, M, 2 p p C) of the tubes `mask.decode`."""
        return self.decoder(latent, mask)

    @torch.no_grad()
    def target(self, video: Tensor, tubes: Tensor) -> Tensor:
        """Pixels (B, M, 2 p p C) of `tubes` (B, M) in [0, 1], colour fastest; normalised when the settings say so."""
        chans = video.shape[1]
        size = self.vit.patch_embed.patch_size
        pixels = tokens.patch_pixels(video.float(), size, tubes).unflatten(-1, (chans, -1)).transpose(-1, -2)
        pixels = pixels * self.std + self.mean  # (B, M, 2 p p, C)
        if self.settings.norm_pix_loss:
            pixels = normalise_tubes(pixels)
        return pixels.flatten(-2)

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clips (B, C, T, H, W) in normalised units: "original", "masked" (hidden tubes 0) and "reconstructed" (hidden ones
        predicted, with the mean and deviation of the true pixels where the loss normalised them), and "mask" (B, N)."""
        video = _clips(batch)
        mask = self.mask({**batch, "image": video})
        hidden = torch.ones(len(video), math.prod(self.grid(video)), device=video.device).scatter_(1, mask.keep, 0.0)
        every = dual_mask(hidden)
        prediction = self.decode(self.encode(video, every), every).float().unflatten(-1, (-1, video.shape[1]))
        size = self.vit.patch_embed.patch_size
        pixels = tokens.patch_pixels(video.float(), size, torch.arange(hidden.shape[1]).expand(len(video), -1))
        pixels = pixels.unflatten(-1, (video.shape[1], -1)).transpose(-1, -2)  # (B, N, voxels, C)
        where = every.decode[..., None, None].expand(-1, -1, *pixels.shape[2:])
        if self.settings.norm_pix_loss:
            true = pixels.gather(1, where)
            prediction = prediction * true.std(-2, keepdim=True) + true.mean(-2, keepdim=True)
        else:
            prediction = (prediction - self.mean) / self.std
        clips = {"masked": pixels.scatter(1, where, 0.0), "reconstructed": pixels.scatter(1, where, prediction)}
        return {"original": video, "mask": hidden} | {k: untube(v, size, self.grid(video)) for k, v in clips.items()}

    def show_hidden(self, mask: Tensor, video: Tensor) -> Tensor:
        """Clips (B, C, T, H, W) in [0, 1] with the hidden tubes of `mask` (N,) painted grey."""
        hidden = mask.view(1, 1, *self.grid(video))
        for axis, step in enumerate(self.vit.patch_embed.patch_size):
            hidden = hidden.repeat_interleave(step, 2 + axis)
        return torch.where(hidden > 0, torch.full_like(video, 0.5), video)

    def grid(self, video: Tensor) -> tuple[int, ...]:
        """(time, rows, columns) of the tubes of `video`."""
        return tokens.grid_of(self.vit, video.shape[2:])

    def views(self, preprocess: Any, train: Any) -> tuple[Callable, Callable]:
        """Several random clips a video to train on; the middle clip to measure the loss on."""
        from vitkit.data.video_views import eval_view, pretrain_view

        s = self.settings
        if not train.augment:
            return eval_view(preprocess), eval_view(preprocess)
        view = pretrain_view(preprocess, scales=s.crop_scales, clips=s.num_sample, hflip=train.hflip)
        return view, eval_view(preprocess)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Neither biases, norms and scales nor the mask token are decayed."""
        from vitkit.parts.optim import weight_decay_groups

        token = self.decoder.mask_token
        others = [(name, p) for name, p in self.named_parameters() if p is not token]
        return [*weight_decay_groups(others, weight_decay), {"params": [token], "weight_decay": 0.0}]

    def finish(self) -> nn.Module:
        """The pre-trained encoder, a timm ViT of videos."""
        return self.vit

    def extras(self) -> dict[str, Tensor]:
        """The decoder under its official names, saved beside the encoder: going on with pre-training needs it."""
        return self.decoder.official_state()

    def adopt(self, extras: Mapping[str, Tensor]) -> str:
        """Go on with the decoder of a loaded checkpoint where it has these settings' shape; says in words what was done."""
        own = self.decoder.official_state()
        if all(name in extras and extras[name].shape == value.shape for name, value in own.items()):
            self.load_extras(extras)
            return f"the decoder goes on from the checkpoint ({len(own)} tensors)"
        width = extras["mask_token"].shape[-1]
        depth = len({name.split(".")[2] for name in extras if name.startswith("decoder.blocks.")})
        return (
            f"the checkpoint's decoder ({width} wide, {depth} blocks) does not fit and a new one starts: "
            f"decoder_dim={width} and decoder_depth={depth} would go on with it"
        )

    def load_extras(self, extras: Mapping[str, Tensor]) -> None:
        """Take a decoder in the official layout (`vit.extras` of a loaded checkpoint)."""
        self.decoder.load_official(extras)


class Decoder(nn.Module):
    """Visible tokens (B, K, D) and a mask in, predictions (B, M, out_dim) of the tubes that it names out.

    Nothing is put back in order: attention does not mind, and every token carries its position. A tube that is both seen
    and predicted stands there twice.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        out_dim: int,
        init_values: float = 0.0,
        attention: type[nn.Module] | None = None,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.dim = dim
        self.embed = nn.Linear(in_dim, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        kwargs: dict[str, Any] = {"attn_layer": CosineAttention} if attention is CosineAttention else {}
        kwargs |= {"init_values": init_values or None, "qkv_bias": qkv_bias, "mlp_ratio": mlp_ratio}
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(dim, heads, norm_layer=norm, **kwargs) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)
        self._tables: dict[tuple, Tensor] = {}
        self.apply(xavier_linear)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, latent: tokens.Tokens, mask: DualMask) -> Tensor:
        table = self.table(latent.grid, latent.patches)
        seen = self.embed(latent.patches)
        seen = seen + table[mask.keep].to(seen.dtype)
        hidden = (self.mask_token + table[mask.decode]).to(seen.dtype)
        # What is predicted stands first: the last block computes these rows only.
        x = torch.cat([hidden, seen], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        x = tokens.transform(last, tokens.attend(last, x, queries=hidden.shape[1]))
        return self.head(self.norm(x))

    def table(self, grid: tuple[int, ...], like: Tensor) -> Tensor:
        """Fixed positions (N, dim) of a grid, made once a grid and device."""
        key = (grid, like.device)
        if key not in self._tables:
            self._tables[key] = sinusoid(math.prod(grid), self.dim).to(like.device)
        return self._tables[key]

    def official_state(self) -> dict[str, Tensor]:
        """Every tensor under its authors' name; biases of queries and values apart."""
        return to_official({_OUTSIDE.get(name, f"decoder.{name}"): value for name, value in self.state_dict().items()})

    def load_official(self, extras: Mapping[str, Tensor]) -> None:
        own = self.official_state()
        odd = [name for name, value in own.items() if name not in extras or extras[name].shape != value.shape]
        if odd:
            raise WeightsError(
                f"the checkpoint has no decoder for this model: {len(odd)} tensors are missing or of another shape, "
                f"e.g. {odd[0]}",
                fix="a pre-training file (vit_*_pt*.pth), with its decoder_dim, decoder_depth and decoder_init_values",
            )
        state = to_timm({name: extras[name] for name in own})
        inside = {official: name for name, official in _OUTSIDE.items()}
        self.load_state_dict({inside.get(name, name.removeprefix("decoder.")): v for name, v in state.items()})


_OUTSIDE = {"embed.weight": "encoder_to_decoder.weight", "mask_token": "mask_token"}  # of what is not under `decoder.`


def _clips(batch: dict[str, Tensor]) -> Tensor:
    """(B, C, T, H, W), or several clips a video (B, clips, C, T, H, W), as (B clips, C, T, H, W)."""
    video = batch["image"]
    return video.flatten(0, 1) if video.ndim == 6 else video


def normalise_tubes(pixels: Tensor) -> Tensor:
    """(..., voxels, C): each channel less its mean, divided by its unbiased deviation + 1e-6 (engine_for_pretraining.py)."""
    mean = pixels.mean(-2, keepdim=True)
    return (pixels - mean) / (pixels.var(-2, keepdim=True).sqrt() + 1e-6)


def untube(pixels: Tensor, size: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """(B, N, voxels, C) of all tubes back to clips (B, C, T, H, W)."""
    x = pixels.unflatten(2, size).unflatten(1, grid).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def norm_every_token(vit: nn.Module) -> None:
    """The final norm on tokens instead of on their mean: what is pre-trained. `pool=avg` puts a fresh one behind the mean
    again, as the authors fine-tune."""
    if isinstance(vit.norm, nn.Identity):
        vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()
        passport = getattr(vit, "passport", None)
        if passport is not None:  # so that the saved model is rebuilt so
            passport.arch_kwargs = {**passport.arch_kwargs, "global_pool": "avg", "fc_norm": False}


def pixel_statistics(vit: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) that clips were normalised with: targets are made of pixels in [0, 1]."""
    passport = getattr(vit, "passport", None)
    mean, std = (
        (IMAGENET_MEAN, IMAGENET_STD) if passport is None else (passport.preprocess.mean, passport.preprocess.std)
    )
    return torch.tensor(mean), torch.tensor(std)


def init_weights(vit: nn.Module) -> None:
    """The authors' start of an encoder without weights: xavier-uniform linear layers, torch's own patch projection."""
    xavier_blocks(vit)
    vit.patch_embed.proj.reset_parameters()
