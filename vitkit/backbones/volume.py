"""ViTs of volumes: timm's `VisionTransformer` with a patch embedding of three axes, input (B, C, a, b, c)."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from vitkit.backbones.embed3d import VolumeEmbed

__all__: list[str] = []


def _volume_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    from vitkit.backbones.embed3d import build

    return build(VolumeEmbed, kwargs, pretrained=pretrained, defaults={"img_size": 96, "in_chans": 1})


@register_model
def volume_vit_tiny_patch16_96(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """192 wide, 12 blocks, 3 heads; 96 x 96 x 96 voxels of one channel in patches of 16."""
    return _volume_vit(pretrained, **{"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


@register_model
def volume_vit_small_patch16_96(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """384 wide, 12 blocks, 6 heads."""
    return _volume_vit(pretrained, **{"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


@register_model
def volume_vit_base_patch16_96(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """768 wide, 12 blocks, 12 heads: Hi-End-MAE's base encoder."""
    return _volume_vit(pretrained, **{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


@register_model
def volume_vit_large_patch16_96(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """1536 wide, 12 blocks, 16 heads: Hi-End-MAE's large encoder, patches of 16."""
    return _volume_vit(pretrained, **{"patch_size": 16, "embed_dim": 1536, "depth": 12, "num_heads": 16, **kwargs})


@register_model
def volume_vit_large_patch12_96(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """1536 wide, 12 blocks, 16 heads: the released Hi-End-MAE encoder, patches of 12."""
    return _volume_vit(pretrained, **{"patch_size": 12, "embed_dim": 1536, "depth": 12, "num_heads": 16, **kwargs})
