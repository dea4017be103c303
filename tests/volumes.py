"""A ViT of volumes, for tests."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from vitkit.backbones.embed3d import VolumeEmbed


def volume_vit() -> VisionTransformer:
    """Takes (B, 1, 8, 16, 16); 2 x 2 x 2 patches."""
    sizes = {"img_size": (8, 16, 16), "patch_size": (4, 8, 8), "in_chans": 1}
    return VisionTransformer(**sizes, embed_dim=48, depth=2, num_heads=4, embed_layer=VolumeEmbed).eval()
