"""Encoders of frames for probes: opening one from settings, and its features of every moment of streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from vitkit import tokens, weights
from vitkit.data.frame_views import Observe
from vitkit.data.images import Images
from vitkit.errors import ConfigError, DataError


def open_encoder(settings: Any, say: Callable[[str], None]) -> nn.Module:
    """The ViT that `settings` (model, pretrained, arch_kwargs, image_size, patch_size, seed, frames) name, in eval mode."""
    vit = weights.load(
        settings.model,
        pretrained=settings.pretrained,
        arch_kwargs=settings.arch_kwargs,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        seed=settings.seed,
        say=say,
    )
    vit = tokens.require_vit(vit)
    channels = vit.passport.preprocess.in_chans
    if channels not in (settings.frames, 3 * settings.frames):
        raise ConfigError(
            f"the encoder takes {channels} channels, an observation has {settings.frames} grey frames",
            fix=f"frames={channels}, as it was pre-trained with",
        )
    return vit.eval()


def view_of(vit: nn.Module, frames: int) -> Observe:
    """One observation as `vit` takes it; in colour where it has three channels a frame."""
    prepared = vit.passport.preprocess
    colour = prepared.in_chans == 3 * frames
    return Observe(tuple(prepared.image_size), tuple(vit.patch_embed.patch_size), frames, colour)


def features_of(vit: nn.Module, images: Images, frames: int, batch_size: int) -> np.ndarray:
    """Pooled features (N, D) of all moments."""
    from vitkit.evaluate.representation import outputs_of

    x = outputs_of(vit, images, view_of(vit, frames), batch_size=batch_size)
    if not np.isfinite(x).all():
        raise DataError(f"{images.name}: the encoder gives NaN or infinite features", fix="use an intact checkpoint")
    return x
