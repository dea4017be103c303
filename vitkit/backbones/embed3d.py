"""Patch embedding with three axes: makes a timm `VisionTransformer` one of volumes or videos (`embed_layer=`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitkit.errors import WeightsError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class PatchEmbed3d(nn.Module):
    """(B, C, a, b, c) to (B, N, D), tokens row-major over (a, b, c): one convolution, its kernel and stride are the patch.

    `kind` is "volume" or "video" (then the first axis is time and `patch_size[0]` the tubelet). A multiple of the patch
    other than `img_size` is accepted at call time.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int = 1,
        embed_dim: int = 768,
        bias: bool = True,
        norm_layer: Callable | None = None,
        *,
        kind: str = "volume",
        **_: object,  # what timm passes for images only: flatten, strict_img_size, output_fmt, dynamic_img_pad
    ):
        super().__init__()
        self.img_size, self.patch_size = _three("img_size", img_size), _three("patch_size", patch_size)
        for pixels, step in zip(self.img_size, self.patch_size, strict=True):
            if pixels % step:
                near = max(step, round(pixels / step) * step)
                raise WeightsError(
                    f"input {self.img_size} is not a multiple of the patch {self.patch_size}",
                    fix=f"use a multiple, e.g. {near} instead of {pixels}",
                )
        self.kind = kind
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = math.prod(self.grid_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, ...]:
        """Voxels of a patch along an axis: of the largest one, or of all three."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The grid of patches of an input of `size`."""
        return tuple(pixels // step for pixels, step in zip(size, self.patch_size, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


VolumeEmbed = partial(PatchEmbed3d, kind="volume")
VideoEmbed = partial(PatchEmbed3d, kind="video")


def _three(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    sides = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise WeightsError(f"{name} is {value!r}", fix="one number, or one for each of the three axes")
    return sides


def build(embed: Callable, kwargs: dict[str, Any], *, pretrained: bool, defaults: dict[str, Any]) -> VisionTransformer:
    """A `VisionTransformer` of volumes or videos from what timm's `create_model` passes on, over `defaults`."""
    from timm.models.vision_transformer import VisionTransformer

    if pretrained:
        raise WeightsError("there are no released weights under this name", fix="pretrained=False, or a weight file")
    named = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "dynamic_img_size", "kind")
    own = {key: value for key, value in kwargs.items() if key not in named}
    return VisionTransformer(**{**defaults, **own, "embed_layer": embed, "dynamic_img_size": False})
