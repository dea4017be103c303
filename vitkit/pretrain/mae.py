"""Masked autoencoding: pre-train a ViT on unlabelled images by reconstructing hidden patches from the few it sees.

Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv 2111.06377), and its chest X-ray
recipe: Xiao et al., "Delving into Masked Autoencoders for Multi-Label Thorax Disease Classification", WACV 2023
(arXiv 2210.12843). Official code: facebookresearch/mae, lambert-x/medical_mae.

What happens, and where: noise ~ U[0,1) per patch, the smallest are kept (`parts.masking.random_mask`); the encoder runs
on kept patches alone (`tokens.encode(keep=...)`); the decoder sees their projections plus one learned token for each
hidden patch, all with fixed sine-cosine positions (`Decoder`); loss = mean over hidden patches of the squared error to
their pixels, raw or normalised per patch: (t - mean) / sqrt(var + 1e-6) with the unbiased variance (`MAE.target`).

Differs from the paper: nothing in the numbers. Tokens stay in shuffled order in the decoder (attention does not mind)
with positions gathered to match; queries, MLP and predictions of the last decoder block are computed for hidden patches
only, because the loss reads no others; the first block's projections of mask tokens, equal for all images but for the
position, are computed once a batch. Any image size, patch size, channel count and prefix tokens work.

Cost: the encoder sees (1 - mask_ratio) of the patches; the decoder dominates for small encoders (`decoder_depth=2` is
the thorax paper's choice for ViT-S and nearly halves the step).

    vitkit pretrain mae --model vit_small_patch16_224 --data xrays/ --out runs/mae --mask_ratio 0.9
    vitkit.pretrain("mae", model="vit_small_patch16_224", data="xrays/", out="runs/mae", mask_ratio=0.9)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitkit import tokens
from vitkit.errors import ConfigError, WeightsError
from vitkit.parts.masking import RandomMask, random_mask, sample_noise
from vitkit.parts.patches import patch_pixels
from vitkit.parts.positions import sincos_2d
from vitkit.parts.xavier import xavier_encoder, xavier_linear

RECIPE = {
    "epochs": 800,  # medical_mae PRETRAIN.md; MAE 800 to 1600
    "warmup_epochs": 40.0,
    "optimizer": "adamw",
    "blr": 1.5e-4,  # x effective batch / 256
    "betas": (0.9, 0.95),
    "weight_decay": 0.05,
    "batch_size": 256,
    "crop_scale": (0.5, 1.0),  # medical_mae PRETRAIN.md; MAE uses (0.2, 1.0)
}


@dataclass(frozen=True)
class Settings:
    """Masked autoencoder."""

    mask_ratio: float = 0.9
    """share of patches hidden; 0.9 is the thorax paper's best on X-rays, 0.75 MAE's on photographs"""
    norm_pix_loss: bool = False
    """normalise each target patch by its own mean and deviation (MAE's recipe: true; thorax: false)"""
    decoder_dim: int = 512
    """width of the decoder (mae_vit_small_patch16_dec512d2b)"""
    decoder_depth: int = 2
    """blocks of the decoder: 2 in the thorax ViT-S recipe, 8 in MAE and the thorax ViT-B"""
    decoder_heads: int = 16
    """attention heads of the decoder"""
    decoder_mlp_ratio: float = 4.0
    """hidden width of the decoder's MLPs over `decoder_dim`"""
    positions: Literal["auto", "sincos", "keep"] = "auto"
    """encoder positions: fixed sine-cosine tables, or those of the model; auto = sincos only for a model without weights"""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio is {self.mask_ratio}", fix="a share between 0 and 1, e.g. 0.75")
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ConfigError(
                f"decoder_dim {self.decoder_dim} with decoder_heads {self.decoder_heads}",
                fix="decoder_dim must be a multiple of decoder_heads and of 4",
            )


class MAE(nn.Module):
    """`forward({"image": (B, C, H, W) normalised})` -> loss. Needs no labels; `finish()` gives back the encoder."""

    needs_labels = False
    shards = True

    def __init__(self, vit: nn.Module, settings: Settings = Settings()):
        super().__init__()
        self.vit, self.settings = tokens.require_vit(vit), settings
        patch = vit.patch_embed.patch_size
        chans = vit.patch_embed.proj.in_channels
        passport = getattr(vit, "passport", None)
        fresh = passport is None or passport.base.get("kind") == "random"
        if settings.positions == "sincos" or (settings.positions == "auto" and fresh):
            fix_positions(vit)
        if passport is not None and fresh and not passport.lineage:
            xavier_encoder(vit)
        self.decoder = Decoder(
            in_dim=vit.embed_dim,
            dim=settings.decoder_dim,
            depth=settings.decoder_depth,
            heads=settings.decoder_heads,
            mlp_ratio=settings.decoder_mlp_ratio,
            out_dim=patch[0] * patch[1] * chans,
            prefix=vit.num_prefix_tokens,
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch["seed"]` (B,) makes masks a function of the sample; `batch["noise"]` (B, N) fixes them."""
        images = batch["image"]
        mask = self.mask(batch)
        latent = tokens.encode(self.vit, images, keep=mask.keep)
        prediction = self.decoder(latent, mask)  # (B, M, p p C)
        return {"loss": (prediction - self.target(images, mask.masked)).square().mean()}

    def mask(self, batch: dict[str, Tensor]) -> RandomMask:
        images = batch["image"]
        count = _product(tokens.grid_of(self.vit, images.shape[2:]))
        noise = batch.get("noise")
        if noise is None:
            noise = sample_noise(batch.get("seed"), count, len(images), images.device)
        return random_mask(noise, self.settings.mask_ratio)

    def target(self, images: Tensor, patches: Tensor) -> Tensor:
        """Pixels (B, M, p p C) of `patches` (B, M), channel fastest, normalised per patch when the settings say so."""
        target = patchify(images, self.vit.patch_embed.patch_size, patches)
        return normalise_patches(target) if self.settings.norm_pix_loss else target

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images (B, C, H, W) in normalised units: "original", "masked" (hidden patches 0) and "reconstructed" (kept
        patches from the image; hidden ones predicted, de-normalised by the target's own statistics where the loss
        normalised them), and "mask" (B, N), 1 = hidden."""
        images, mask = batch["image"], self.mask(batch)
        prediction = self.decoder(tokens.encode(self.vit, images, keep=mask.keep), mask)
        size = self.vit.patch_embed.patch_size
        pixels = patchify(images, size)
        hidden = mask.masked.unsqueeze(-1).expand(-1, -1, pixels.shape[-1])
        if self.settings.norm_pix_loss:
            target = pixels.gather(1, hidden)
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            prediction = prediction * (var + 1e-6).sqrt() + mean
        grid = tokens.grid_of(self.vit, images.shape[2:])
        return {
            "original": images,
            "masked": unpatchify(pixels.scatter(1, hidden, 0.0), size, grid),
            "reconstructed": unpatchify(pixels.scatter(1, hidden, prediction.to(pixels.dtype)), size, grid),
            "mask": mask.binary,
        }

    def show_hidden(self, mask: Tensor, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [0, 1] with the hidden patches of `mask` (N,) painted grey."""
        grid = tokens.grid_of(self.vit, images.shape[2:])
        hidden = F.interpolate(mask.view(1, 1, *grid), size=images.shape[2:], mode="nearest")
        return torch.where(hidden > 0, torch.full_like(images, 0.5), images)

    @torch.no_grad()
    def baselines(self, train: Iterable[Tensor], test: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """The same loss on batches `test` for two predictions without understanding: the per-position mean over images
        `train` (normalised, one size) and, for each image, the mean of its visible patches."""
        size, count = self.vit.patch_embed.patch_size, 0
        total = torch.zeros(())
        for images in train:
            everything = torch.arange(_product(tokens.grid_of(self.vit, images.shape[2:])), device=images.device)
            total = total.to(images.device) + self.target(images, everything.expand(len(images), -1)).sum(0)
            count += len(images)
        position_mean, sums, n = total / count, [0.0, 0.0], 0
        for batch in test:
            images, mask = batch["image"], self.mask(batch)
            target = self.target(images, mask.masked)
            visible = patchify(images, size, mask.keep)
            visible = normalise_patches(visible) if self.settings.norm_pix_loss else visible
            sums[0] += float((position_mean[mask.masked] - target).square().mean()) * len(images)
            sums[1] += float((visible.mean(1, keepdim=True) - target).square().mean()) * len(images)
            n += len(images)
        names = ("per-position mean of training images", "mean of the visible patches")
        return {name: value / n for name, value in zip(names, sums, strict=True)}

    def param_groups(self, weight_decay: float) -> list[dict]:
        from vitkit.parts.optim import weight_decay_groups

        return weight_decay_groups(self.named_parameters(), weight_decay)

    def finish(self) -> nn.Module:
        """The pre-trained encoder, a timm ViT."""
        return self.vit

    def extras(self) -> dict[str, Tensor]:
        """The decoder under its official names, saved beside the encoder: visualising and G2SD need it."""
        return self.decoder.official_state()

    def adopt(self, extras: Mapping[str, Tensor]) -> str:
        """Go on with the decoder of a loaded checkpoint where it has these settings' shape; says in words what was done."""
        own = self.decoder.official_state()
        if all(name in extras and extras[name].shape == value.shape for name, value in own.items()):
            self.decoder.load_official(dict(extras))
            return f"the decoder goes on from the checkpoint ({len(own)} tensors)"
        width = extras["mask_token"].shape[-1]
        depth = len({name.split(".")[1] for name in extras if name.startswith("decoder_blocks.")})
        return (
            f"the checkpoint's decoder ({width} wide, {depth} blocks) does not fit and a new one starts: "
            f"decoder_dim={width} and decoder_depth={depth} would go on with it"
        )

    def load_extras(self, extras: dict[str, Tensor]) -> None:
        """Take a decoder in the official layout (`decoder_*`, `mask_token`), e.g. `vit.extras` of a loaded checkpoint."""
        self.decoder.load_official(extras)


class Decoder(nn.Module):
    """Lightweight transformer from visible latents to the pixels of hidden patches.

    Visible (B, P + K, D) and indices of kept and hidden patches in; (B, M, out_dim) for the hidden patches out.
    """

    def __init__(self, *, in_dim: int, dim: int, depth: int, heads: int, mlp_ratio: float, out_dim: int, prefix: int):
        super().__init__()
        self.prefix, self.dim = prefix, dim
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim)
        self._tables: dict[tuple, Tensor] = {}
        self.apply(xavier_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: tokens.Tokens, mask: RandomMask) -> Tensor:
        table = self.table(latent.grid, latent.patches)  # (1, N, dim)
        visible = self.embed(latent.all)
        shown = _rows(table[0], mask.keep).to(visible.dtype)
        # Prefix tokens have zero positions, kept patches their own.
        visible = torch.cat([visible[:, : self.prefix], visible[:, self.prefix :] + shown], dim=1)
        x = self._first(visible, (self.mask_token + table)[0].to(visible.dtype), mask.masked)
        for block in self.blocks[1:-1]:
            x = block(x)
        if len(self.blocks) > 1:
            x = self._last(x, visible.shape[1])
        else:
            x = x[:, visible.shape[1] :]
        return self.pred(self.norm(x))

    def all_patches(self, latent: tokens.Tokens, mask: RandomMask) -> Tensor:
        """Predictions (B, N, out_dim) of every patch in original order, the official decoder's output."""
        table = self.table(latent.grid, latent.patches)
        visible = self.embed(latent.all)
        count = mask.masked.shape[1]
        x = torch.cat([visible[:, self.prefix :], self.mask_token.expand(len(visible), count, -1)], dim=1)
        x = x.gather(1, mask.restore.unsqueeze(-1).expand(-1, -1, self.dim)) + table
        x = torch.cat([visible[:, : self.prefix], x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x))[:, self.prefix :]

    def _first(self, visible: Tensor, hidden: Tensor, masked: Tensor) -> Tensor:
        """First block. `hidden` (N, dim) is the mask token at each position: the same for every image, so its norm and
        projections are computed once and looked up (B, M)."""
        block = self.blocks[0]
        attn = block.attn
        qkv = torch.cat([attn.qkv(block.norm1(visible)), _rows(attn.qkv(block.norm1(hidden)), masked)], dim=1)
        x = torch.cat([visible, _rows(hidden, masked)], dim=1)
        q, k, v = _heads(attn, qkv)
        x = x + attn.proj(_merge(F.scaled_dot_product_attention(q, k, v)))
        return x + block.mlp(block.norm2(x))

    def _last(self, x: Tensor, visible: int) -> Tensor:
        """Last block, for the hidden patches only: they attend to every token, but nobody reads the others."""
        block = self.blocks[-1]
        attn = block.attn
        q, k, v = _heads(attn, attn.qkv(block.norm1(x)))
        x = x[:, visible:] + attn.proj(_merge(F.scaled_dot_product_attention(q[:, :, visible:], k, v)))
        return x + block.mlp(block.norm2(x))

    def table(self, grid: tuple[int, ...], like: Tensor) -> Tensor:
        """Fixed sine-cosine positions (1, N, dim) of a grid, made once a grid and device."""
        key = (grid, like.device)
        if key not in self._tables:
            self._tables[key] = sincos_2d(self.dim, grid).unsqueeze(0).to(like.device)
        return self._tables[key]

    def official_state(self) -> dict[str, Tensor]:
        return {_official_name(name): value for name, value in self.state_dict().items()}

    def load_official(self, extras: dict[str, Tensor]) -> None:
        names = {_official_name(name): name for name in self.state_dict()}
        missing = [name for name in names if name not in extras]
        if missing:
            raise WeightsError(
                f"the checkpoint has no decoder for this model: {len(missing)} tensors missing, e.g. {missing[0]}",
                fix="use a file with the decoder (MAE's *_full or *_visualize files) and its decoder_dim/decoder_depth",
            )
        self.load_state_dict({name: extras[official] for official, name in names.items()})


def patchify(images: Tensor, patch_size: tuple[int, int], patches: Tensor | None = None) -> Tensor:
    """Pixels (B, N, ph * pw * C), channel fastest (MAE's order), of every patch or only of `patches` (B, M)."""
    batch, chans, height, width = images.shape
    ph, pw = patch_size
    if patches is None:
        count = (height // ph) * (width // pw)
        patches = torch.arange(count, device=images.device).expand(batch, -1)
    pixels = patch_pixels(images, patch_size, patches).unflatten(-1, (chans, ph * pw))
    return pixels.transpose(-1, -2).flatten(-2)


def unpatchify(pixels: Tensor, patch_size: tuple[int, int], grid: tuple[int, ...]) -> Tensor:
    """Inverse of `patchify`: (B, N, ph * pw * C) back to images (B, C, H, W)."""
    (ph, pw), (rows, columns) = patch_size, grid
    x = pixels.reshape(len(pixels), rows, columns, ph, pw, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(pixels), -1, rows * ph, columns * pw)


def normalise_patches(target: Tensor) -> Tensor:
    """(t - mean) / sqrt(var + 1e-6) per patch (last axis), unbiased variance (models_mae.py, forward_loss)."""
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


def fix_positions(vit: nn.Module) -> None:
    """Fixed sine-cosine positions in a ViT's own table, prefix rows zero; a ViT without a table is left alone."""
    if vit.pos_embed is None:
        return
    rows = vit.pos_embed.shape[1] - _product(vit.patch_embed.grid_size)
    table = sincos_2d(vit.embed_dim, tuple(vit.patch_embed.grid_size))
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, rows:] = table
    vit.pos_embed.requires_grad_(False)


def _official_name(name: str) -> str:
    return name if name == "mask_token" else f"decoder_{name}"


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """`table` (N, D) looked up by `index` (B, M); as an embedding, whose gradient is one dense sum."""
    return F.embedding(index, table)


def _heads(attn: nn.Module, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _product(grid: tuple[int, ...]) -> int:
    count = 1
    for n in grid:
        count *= n
    return count
