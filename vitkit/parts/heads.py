"""Classifier heads on a timm ViT, and how its tokens are pooled for them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vitkit.errors import ConfigError
from vitkit.parts.blocks import mix_into

Kind = Literal["linear", "bn_linear"]


class FeatureNorm(nn.BatchNorm1d):
    """BatchNorm without affine parameters in front of a linear head: MAE's linear-probe trick, kept by AdaptFormer.

    Across processes it uses the statistics of the whole batch, on CPU too (torch's SyncBatchNorm is CUDA only), so that
    two processes train as one with the double batch. Buffers and state dict are `BatchNorm1d`'s.
    """

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6, momentum=0.1, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if not self.training or world == 1:
            if self.training and len(x) < 2:
                raise ConfigError(
                    "the head's batch normalisation needs at least 2 images a batch",
                    fix="a larger batch_size, or head=linear",
                )
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        sums = all_reduce(torch.cat([x.sum(0), (x * x).sum(0), x.new_full((1,), len(x))]))
        dim, count = x.shape[1], sums[-1]
        mean = sums[:dim] / count
        var = sums[dim:-1] / count - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * torch.rsqrt(var.clamp_min(0) + self.eps)


class OneHead:
    """Mixin of DeiT's distilled ViT: one head on the mean of its class and distillation tokens, in place of two."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = super().forward_head(x, pre_logits=True)  # type: ignore[misc]  # of the ViT that this is mixed into
        return x if pre_logits else self.head(self.head_drop(x))


def install_head(vit: nn.Module, kind: Kind, num_classes: int, *, std: float | None = None) -> nn.Module:
    """Replace `vit.head` by a new one for `num_classes` and return it. The pooled feature and trunk stay as they are.

    "bn_linear": FeatureNorm + Linear, weight ~ truncated normal (std 0.01), bias torch's default (AdaptFormer,
        main_image.py). "linear": weight ~ truncated normal (std 2e-5), bias 0 (MAE fine-tuning, main_finetune.py).
    """
    if hasattr(vit, "release_head"):  # a head that reads something else than the pooled feature gives way
        vit.release_head()
    dim = vit.num_features if not hasattr(vit, "head_hidden_size") else vit.head_hidden_size
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=std if std is not None else (0.01 if kind == "bn_linear" else 2e-5))
    if kind == "linear":
        nn.init.zeros_(linear.bias)
    head: nn.Module = nn.Sequential(FeatureNorm(dim), linear) if kind == "bn_linear" else linear
    vit.head = head.to(next(vit.parameters()).device)
    vit.num_classes = num_classes
    if isinstance(vit, VisionTransformerDistilled):
        mix_into(vit, OneHead)
        vit.head_dist = nn.Identity()
    return vit.head


def remove_head(vit: nn.Module) -> None:
    """Leave the pooled feature as the model's output."""
    vit.head = nn.Identity()
    vit.num_classes = 0
    if isinstance(vit, VisionTransformerDistilled):
        vit.head_dist = nn.Identity()


def set_pooling(vit: nn.Module, pool: Literal["token", "avg"]) -> None:
    """Change which tokens a ViT pools, as MAE's fine-tuning does for "avg": the mean of the patch tokens, then a new
    `fc_norm`, while the final `norm` is dropped. "token" reads the class token after `norm`."""
    if vit.global_pool == pool and not (pool == "avg" and _norms_tokens(vit)):
        return
    if isinstance(vit, VisionTransformerDistilled):
        raise ConfigError("a distilled DeiT always pools its class and distillation tokens", fix="pool=keep")
    if getattr(vit, "attn_pool", None) is not None:
        raise ConfigError("this ViT pools by attention", fix="pool=keep")
    if pool == "token":
        if vit.num_prefix_tokens == 0:
            raise ConfigError("this ViT has no class token to pool", fix="pool=avg or pool=keep")
        if isinstance(vit.norm, nn.Identity):
            vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()
    elif isinstance(vit.norm, nn.LayerNorm):
        old = vit.norm
        vit.fc_norm = nn.LayerNorm(old.normalized_shape, eps=old.eps).to(old.weight.device)
        vit.norm = nn.Identity()
    vit.global_pool = pool
    passport = getattr(vit, "passport", None)
    if passport is not None:  # so that the saved model is rebuilt with the same pooling
        passport.arch_kwargs = {**passport.arch_kwargs, "global_pool": pool, "fc_norm": pool == "avg"}


def _norms_tokens(vit: nn.Module) -> bool:
    """Whether a ViT of videos norms its tokens before they are averaged, as it is pre-trained."""
    return getattr(vit.patch_embed, "kind", "") == "video" and isinstance(vit.norm, nn.LayerNorm)


def class_loss(scores: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean loss of class `scores` (B, C): cross-entropy for int64 (B,) or, for floating (B, C), binary cross-entropy
    with logits over the known (not nan) labels; soft single-label targets go through `soft_cross_entropy`."""
    if not target.is_floating_point():
        return F.cross_entropy(scores, target, label_smoothing=smoothing)
    known = ~target.isnan()
    each = F.binary_cross_entropy_with_logits(scores, target.nan_to_num(), reduction="none")
    return (each * known).sum() / known.sum().clamp_min(1)


def soft_cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of `scores` (B, C) against distributions `target` (B, C), as mixup gives them."""
    return -(target * scores.log_softmax(-1)).sum(-1).mean()
