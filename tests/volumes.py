"""A ViT of volumes, for tests: timm's own with a patch embedding of three axes."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn


class Embed3d(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True, **_):
        super().__init__()
        self.img_size, self.patch_size = tuple(img_size), tuple(patch_size)
        self.grid_size = tuple(s // p for s, p in zip(img_size, patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1] * self.grid_size[2]
        self.proj = nn.Conv3d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)

    def feat_ratio(self, as_scalar=True):
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, size):
        return tuple(s // p for s, p in zip(size, self.patch_size, strict=True))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def volume_vit() -> VisionTransformer:
    """Takes (B, 1, 8, 16, 16); 2 x 2 x 2 patches."""
    return VisionTransformer(
        img_size=(8, 16, 16), patch_size=(4, 8, 8), in_chans=1, embed_dim=48, depth=2, num_heads=4, embed_layer=Embed3d
    ).eval()
