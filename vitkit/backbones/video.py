"""ViTs of videos: timm's `VisionTransformer` with tubes of two frames as patches, input (B, 3, T, H, W); no class token, the
feature is the normalised mean of all tokens (VideoMAE V2, modeling_finetune.py).

Positions are one fixed sinusoid over the flat token index, kept as a buffer so that nothing trains it. `attn_layer="cosine"`
builds the authors' other attention (vitkit.parts.cosine_attention).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from timm.models.vision_transformer import ATTN_LAYERS, VisionTransformer

from vitkit.backbones.embed3d import VideoEmbed
from vitkit.parts.cosine_attention import CosineAttention
from vitkit.parts.sinusoid import sinusoid

__all__ = ["fix_positions"]
ATTN_LAYERS["cosine"] = CosineAttention


def fix_positions(vit: VisionTransformer) -> None:
    """Make the position table of a video ViT the fixed one of its grid, which no training changes."""
    embed = vit.patch_embed
    table = sinusoid(embed.num_patches, vit.embed_dim)
    rows = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table = torch.cat([torch.zeros(rows, vit.embed_dim, device="cpu"), table])[None]
    del vit.pos_embed
    vit.register_buffer("pos_embed", table)


def _video_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    from vitkit.backbones.embed3d import build

    defaults = {"img_size": (16, 224, 224), "in_chans": 3, "class_token": False, "global_pool": "avg", "fc_norm": True}
    vit = build(VideoEmbed, kwargs, pretrained=pretrained, defaults=defaults)
    fix_positions(vit)
    return vit


@register_model
def video_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """192 wide, 12 blocks, 3 heads; 16 frames of 224 x 224 in tubes of 2 x 16 x 16."""
    own = {"patch_size": (2, 16, 16), "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _video_vit(pretrained, **{**own, **kwargs})


@register_model
def video_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """384 wide, 12 blocks, 6 heads."""
    own = {"patch_size": (2, 16, 16), "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _video_vit(pretrained, **{**own, **kwargs})


@register_model
def video_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """768 wide, 12 blocks, 12 heads."""
    own = {"patch_size": (2, 16, 16), "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _video_vit(pretrained, **{**own, **kwargs})


@register_model
def video_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """1024 wide, 24 blocks, 16 heads."""
    own = {"patch_size": (2, 16, 16), "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _video_vit(pretrained, **{**own, **kwargs})


@register_model
def video_vit_huge_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """1280 wide, 32 blocks, 16 heads."""
    own = {"patch_size": (2, 16, 16), "embed_dim": 1280, "depth": 32, "num_heads": 16}
    return _video_vit(pretrained, **{**own, **kwargs})


@register_model
def video_vit_giant_patch14_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """1408 wide, 40 blocks, 16 heads, MLPs of 6144."""
    own = {"patch_size": (2, 14, 14), "embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11}
    return _video_vit(pretrained, **{**own, **kwargs})
