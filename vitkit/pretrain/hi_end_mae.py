"""Hi-End-MAE: pre-train a 3-D ViT on unlabelled volumes by reconstructing hidden patches from several encoder layers.

Paper: Tang et al., "Hi-End-MAE: Hierarchical encoder-driven masked autoencoders are stronger vision learners for medical
image segmentation", Medical Image Analysis 2025 (arXiv 2502.08347). Official code: FengheTan9/Hi-End-MAE.

What happens, and where: the encoder runs on visible patches alone, and the outputs of blocks 4, 7, 10 and of the final norm
go through one linear layer each (`HiEndMAE.bridge`). Queries are the last of these and one learned token for each hidden
patch; two ordinary blocks, then three blocks with cross attention in which the queries read block 10, 7, 4, deep to shallow
(`Decoder`). Keys and values are visible tokens and the class token, not normalised, so that what is hidden must come from
the encoder. Loss: mean squared error to hidden patches, (t - mean) / sqrt(var + 1e-6) with the biased variance (`target`).

Differs from the paper: nothing in the numbers. Visible patches are gathered before they are embedded, three hidden states
are kept instead of all, the last block and the predictions are computed for hidden patches only, and mask tokens are
projected once a grid in the first block. Weight decay spares biases, norms and tokens, as the paper says; the released code
decays everything (`decay_all`). Any size, patch, channel count and depth work; `layers` names blocks for shallower models.

Cost: the encoder sees 1 - mask_ratio of the patches; the decoder runs self attention over all of them five times, so that it
should stay narrow. `crops` volumes of `image_size` come from one file that is read.

    vitkit pretrain hi_end_mae --model volume_vit_base_patch16_96 --pretrained false --data scans/ --out runs/hi
    vitkit.pretrain("hi_end_mae", model="volume_vit_base_patch16_96", pretrained=False, data="scans/", out="runs/hi")
"""

from __future__ import annotations

import math
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
from vitkit.parts.cross_attention import CrossBlock, first_block
from vitkit.parts.masking import RandomMask, random_mask, sample_noise
from vitkit.parts.patches3d import patchify_3d, unpatchify_3d
from vitkit.parts.sincos3d import sincos_3d
from vitkit.parts.xavier import xavier_encoder, xavier_linear

RECIPE = {
    "epochs": 1000,  # official main.py
    "warmup_epochs": 10.0,
    "optimizer": "adamw",
    "lr": 1e-4,  # absolute: not scaled by the batch
    "betas": (0.9, 0.95),
    "weight_decay": 0.05,
    "batch_size": 24,  # volumes a GPU, 8 crops of each
}


@dataclass(frozen=True)
class Settings:
    """Hierarchical encoder-driven masked autoencoder."""

    mask_ratio: float = 0.75
    """share of patches hidden (official main.py)"""
    layers: tuple[int, ...] = (3, 6, 9)
    """blocks whose outputs the decoder reads, counted from 0, shallow to deep: the 4th, 7th and 10th (hi_end_mae.py)"""
    decoder_dim: int = 528
    """width of the decoder: 528 beside the large encoder, 384 beside the base one"""
    decoder_heads: int = 16
    """attention heads of the decoder: 16, or 12 beside the base encoder"""
    decoder_depth: int = 2
    """ordinary blocks before the cross-attention blocks, of which there is one for each of `layers`"""
    decoder_mlp_ratio: float = 4.0
    """hidden width of the decoder's MLPs over `decoder_dim`"""
    positions: Literal["auto", "sincos", "keep"] = "auto"
    """encoder positions: fixed sine-cosine, or the model's table; auto = sincos for a fresh model whose width 6 divides"""
    decay_all: bool = False
    """weight decay also on biases, norms and tokens, as the released code does"""
    crops: int = 8
    """random crops of `image_size` from each volume that is read (official data/ loader)"""
    foreground: float = 0.75
    """share of crops centred on a voxel above 0 (6 : 2 in the official loader)"""
    rotate90: float = 0.3
    """probability of quarter turns (official loader); 0 where the pose is the same in all volumes and should stay so"""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio is {self.mask_ratio}", fix="a share between 0 and 1, e.g. 0.75")
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 6:
            raise ConfigError(
                f"decoder_dim {self.decoder_dim} with decoder_heads {self.decoder_heads}",
                fix="decoder_dim must be a multiple of decoder_heads and of 6",
            )
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ConfigError(f"layers is {self.layers}", fix="block numbers from 0, rising, e.g. (3, 6, 9)")
        if self.decoder_depth < 1 or self.crops < 1:
            raise ConfigError(f"decoder_depth {self.decoder_depth}, crops {self.crops}", fix="at least 1 of each")
        for name in ("foreground", "rotate90"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="a share from 0 to 1")


class HiEndMAE(nn.Module):
    """`forward({"image": (B, C, a, b, c) normalised})` -> loss; crops of one volume may stand in an axis of their own,
    (B, K, C, a, b, c). `finish()` gives back the encoder.

    Modules beside `vit` have their official names: `encoder_to_decoder`, `decoder`, `mask_token`, `decoder_pos_embed`.
    """

    needs_labels = False
    shards = True
    kinds = ("volume",)

    def __init__(self, vit: nn.Module, settings: Settings = Settings()):
        super().__init__()
        self.vit, self.settings = tokens.require_vit(vit), settings
        if len(vit.patch_embed.patch_size) != 3:
            raise ConfigError(
                "Hi-End-MAE trains ViTs of volumes", fix="a volume_vit_* model, e.g. volume_vit_base_patch16_96"
            )
        depth = len(vit.blocks)
        if settings.layers[-1] >= depth:
            some = tuple(sorted({max(0, round((i + 1) * depth / 4) - 1) for i in range(3)}))
            raise ConfigError(
                f"layers {settings.layers} of a ViT with {depth} blocks: the decoder reads blocks that are not there",
                fix=f"a ViT with at least {settings.layers[-1] + 1} blocks, or layers={some}",
            )
        passport = getattr(vit, "passport", None)
        fresh = passport is None or passport.base.get("kind") == "random"
        if settings.positions == "sincos" or (settings.positions == "auto" and fresh and vit.embed_dim % 6 == 0):
            fix_positions(vit)
        if passport is not None and fresh and not passport.lineage:
            xavier_encoder(vit)
        dim, patch = settings.decoder_dim, vit.patch_embed.patch_size
        self.encoder_to_decoder = nn.ModuleList(nn.Linear(vit.embed_dim, dim) for _ in range(len(settings.layers) + 1))
        for layer in self.encoder_to_decoder:
            nn.init.xavier_uniform_(layer.weight)
        out_dim = math.prod(patch) * vit.patch_embed.proj.in_channels
        self.decoder = Decoder(
            dim,
            settings.decoder_heads,
            settings.decoder_depth,
            len(settings.layers),
            out_dim,
            settings.decoder_mlp_ratio,
        )
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.register_buffer("decoder_pos_embed", sincos_3d(dim, vit.patch_embed.grid_size).unsqueeze(0))
        self._tables: dict[tuple, Tensor] = {}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch["seed"]` (B,) makes masks a function of the sample; `batch["noise"]` (B, N) fixes them."""
        batch = one_axis(batch)
        volumes, mask = batch["image"], self.mask(batch)
        latent, hidden = self.encode(volumes, mask.keep)
        memory = self.bridge(hidden)
        table = self.table(volumes)
        visible = self.query(latent, table, mask.keep)
        prediction = self.decoder(visible, self.mask_token[0] + table, mask.masked, memory)
        return {"loss": F.mse_loss(prediction, self.target(volumes, mask.masked))}

    def mask(self, batch: dict[str, Tensor]) -> RandomMask:
        volumes, noise = batch["image"], batch.get("noise")
        if noise is None:
            count = math.prod(tokens.grid_of(self.vit, volumes.shape[2:]))
            noise = sample_noise(batch.get("seed"), count, len(volumes), volumes.device)
        return random_mask(noise, self.settings.mask_ratio)

    def encode(self, volumes: Tensor, keep: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised output (B, P + K, D) and the raw outputs of `layers`, all with the class token, of visible patches."""
        stream, start, hidden = tokens.embed(self.vit, volumes, keep=keep), 0, []
        for layer in self.settings.layers:
            stream, start = tokens.run(self.vit, stream, start, layer + 1), layer + 1
            hidden.append(stream.x)
        return tokens.finish(self.vit, tokens.run(self.vit, stream, start)).all, hidden

    def bridge(self, hidden: list[Tensor]) -> list[Tensor]:
        """Keys and values (B, P + K, Dd) of each of `layers`."""
        return [layer(x) for layer, x in zip(self.encoder_to_decoder, hidden, strict=False)]

    def query(self, latent: Tensor, table: Tensor, keep: Tensor) -> Tensor:
        """Visible queries (B, P + K, Dd): patches with their positions, prefix tokens without."""
        x = self.encoder_to_decoder[-1](latent)
        prefix = x.shape[1] - keep.shape[1]
        return torch.cat([x[:, :prefix], x[:, prefix:] + F.embedding(keep, table.to(x.dtype))], dim=1)

    def target(self, volumes: Tensor, patches: Tensor) -> Tensor:
        """Voxels (B, M, P) of `patches` (B, M), each patch normalised by its mean and biased variance; no gradient."""
        raw = patchify_3d(volumes.detach(), self.vit.patch_embed.patch_size, patches)
        return F.layer_norm(raw, raw.shape[-1:], eps=1e-6)

    def table(self, volumes: Tensor) -> Tensor:
        """Decoder positions (N, Dd) of the grid of `volumes`."""
        grid = tokens.grid_of(self.vit, volumes.shape[2:])
        if grid == tuple(self.vit.patch_embed.grid_size):
            return self.decoder_pos_embed[0]
        key = (grid, volumes.device)
        if key not in self._tables:
            self._tables[key] = sincos_3d(self.settings.decoder_dim, grid).to(volumes.device)
        return self._tables[key]

    @torch.no_grad()
    def predict_all(self, batch: dict[str, Tensor], memory: list[Tensor] | None = None) -> Tensor:
        """Predictions (B, P + N, patch voxels) for prefix, visible and hidden patches in shuffled order, as the official
        decoder gives them; `memory` replaces the keys and values."""
        volumes, mask = batch["image"], self.mask(batch)
        latent, hidden = self.encode(volumes, mask.keep)
        table = self.table(volumes)
        visible = self.query(latent, table, mask.keep)
        return self.decoder(
            visible, self.mask_token[0] + table, mask.masked, memory or self.bridge(hidden), everything=True
        )

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Volumes (B, C, a, b, c) in the input's units: "original", "masked" (hidden patches 0), "reconstructed" (every patch
        predicted, visible ones too, scaled by its own deviation and mean) and "mask" (B, N), 1 = hidden."""
        batch = one_axis(batch)
        volumes, mask = batch["image"], self.mask(batch)
        size, grid = self.vit.patch_embed.patch_size, tokens.grid_of(self.vit, volumes.shape[2:])
        own = patchify_3d(volumes, size)
        predicted = self.predict_all(batch)[:, -own.shape[1] :]
        predicted = predicted.gather(1, mask.restore.unsqueeze(-1).expand_as(predicted))
        # The display of the official code: unbiased deviation plus 1e-6, where the target had the biased variance.
        predicted = predicted * (own.std(-1, keepdim=True) + 1e-6) + own.mean(-1, keepdim=True)
        shown = own * (1 - mask.binary.unsqueeze(-1))
        return {
            "original": volumes,
            "masked": unpatchify_3d(shown, size, grid),
            "reconstructed": unpatchify_3d(predicted, size, grid),
            "mask": mask.binary,
        }

    def show_hidden(self, mask: Tensor, volumes: Tensor) -> Tensor:
        """Volumes (B, C, a, b, c) in [0, 1] with the hidden patches of `mask` (N,) painted grey."""
        grid = tokens.grid_of(self.vit, volumes.shape[2:])
        hidden = F.interpolate(mask.view(1, 1, *grid), size=volumes.shape[2:], mode="nearest")
        return torch.where(hidden > 0, torch.full_like(volumes, 0.5), volumes)

    @torch.no_grad()
    def baselines(self, train: Iterable[Tensor], test: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """The same loss on batches `test` for a prediction without understanding: zero, each patch's own mean. It is 1 where
        no patch is constant, and less on data with blank patches."""
        total, count = 0.0, 0
        for batch in test:
            batch = one_axis(batch)
            volumes = batch["image"]
            total += float(self.target(volumes, self.mask(batch).masked).square().mean()) * len(volumes)
            count += len(volumes)
        return {"predicting zero": total / max(count, 1)}

    def views(self, preprocess: Any, train: Any) -> tuple[Any, Any]:
        """Several augmented crops of a volume for training, its centre for evaluation."""
        from vitkit.data.volume_views import eval_view, pretrain_view

        if not train.augment:
            return eval_view(preprocess), eval_view(preprocess)
        own = self.settings
        view = pretrain_view(
            preprocess, crops=own.crops, foreground=own.foreground, rotate90=own.rotate90, hflip=train.hflip
        )
        return view, eval_view(preprocess)

    def param_groups(self, weight_decay: float) -> list[dict]:
        from vitkit.parts.optim import weight_decay_groups

        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        if self.settings.decay_all:
            return [{"params": [p for _, p in named], "weight_decay": weight_decay}]
        one_dimensional = ("cls_token", "reg_token", "mask_token", "pos_embed")  # (1, 1, D) in shape, vectors by nature
        tokens_ = [p for n, p in named if n.endswith(one_dimensional)]
        groups = weight_decay_groups([(n, p) for n, p in named if not n.endswith(one_dimensional)], weight_decay)
        return [*groups, {"params": tokens_, "weight_decay": 0.0}]

    def finish(self) -> nn.Module:
        """The pre-trained encoder, a timm ViT of volumes."""
        return self.vit

    def extras(self) -> dict[str, Tensor]:
        """Everything beside the encoder under its official name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("vit.")}

    def load_extras(self, extras: Mapping[str, Tensor]) -> None:
        """Take a decoder in the official layout, e.g. `vit.extras` of a loaded checkpoint; every tensor must fit."""
        own = self.extras()
        odd = [name for name, value in own.items() if name not in extras or extras[name].shape != value.shape]
        if odd:
            raise WeightsError(
                f"{len(odd)} of {len(own)} decoder tensors are missing in the checkpoint or have another shape, e.g. {odd[0]}",
                fix="the complete Hi-End-MAE checkpoint, with its decoder_dim and decoder_depth",
            )
        self.load_state_dict({name: extras[name] for name in own}, strict=False)

    def adopt(self, extras: Mapping[str, Tensor]) -> str:
        """Go on with the decoder of a loaded checkpoint where it has these settings' shape; says in words what was done."""
        own = self.extras()
        if all(name in extras and extras[name].shape == value.shape for name, value in own.items()):
            self.load_extras(extras)
            return f"the decoder goes on from the checkpoint ({len(own)} of {len(own)} tensors)"
        width = extras["mask_token"].shape[-1]
        fix = f"decoder_dim={width} would go on with it"
        return f"the checkpoint's decoder ({width} wide) does not fit and a new one starts: {fix}"


class Decoder(nn.Module):
    """Queries to voxels of hidden patches: `depth` ordinary blocks, then a cross-attention block a memory, deep to shallow."""

    def __init__(self, dim: int, heads: int, depth: int, cross: int, out_dim: int, mlp_ratio: float = 4.0):
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.cross_attention_blocks = nn.ModuleList(CrossBlock(dim, heads, mlp_ratio=mlp_ratio) for _ in range(cross))
        self.norm, self.head = norm(dim), nn.Linear(dim, out_dim)
        self.apply(xavier_linear)

    def forward(
        self, visible: Tensor, table: Tensor, masked: Tensor, memory: list[Tensor], *, everything: bool = False
    ) -> Tensor:
        """visible (B, P + K, Dd), mask tokens of every position `table` (N, Dd), indices `masked` (B, M), `memory` shallow to
        deep: (B, M, out_dim) for the hidden patches, or (B, P + K + M, out_dim) when `everything` is asked for."""
        start = 0 if everything else visible.shape[1]
        x = first_block(self.blocks[0], visible, table.to(visible.dtype), masked)
        for block in self.blocks[1:]:
            x = block(x)
        last = len(memory) - 1
        for i, (block, kv) in enumerate(zip(self.cross_attention_blocks, reversed(memory), strict=True)):
            x = block(x, kv, start if i == last else 0)
        return self.head(self.norm(x))


def one_axis(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose crops (B, K, C, a, b, c) stand in one axis (B K, C, a, b, c), with a seed each."""
    volumes = batch["image"]
    if volumes.ndim == 5:
        return batch
    count, found = volumes.shape[1], {**batch, "image": volumes.flatten(0, 1)}
    if "seed" in batch:  # seeds of samples are well mixed 63-bit numbers: the next ones belong to nobody else
        step = torch.arange(count, device=batch["seed"].device)
        found["seed"] = (batch["seed"].unsqueeze(1) % (2**62) + step).flatten()
    return found


def fix_positions(vit: nn.Module) -> None:
    """Fixed sine-cosine positions in a ViT's own table, prefix rows zero; a ViT without a table is left alone."""
    if vit.pos_embed is None:
        return
    rows = vit.pos_embed.shape[1] - math.prod(vit.patch_embed.grid_size)
    with torch.no_grad():
        vit.pos_embed.copy_(sincos_3d(vit.embed_dim, vit.patch_embed.grid_size, prefix=rows))
    vit.pos_embed.requires_grad_(False)
