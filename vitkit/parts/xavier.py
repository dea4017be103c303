"""The start of masked autoencoders: xavier-uniform linear layers without biases of their own."""

from __future__ import annotations

from torch import nn


def xavier_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero bias of a linear layer, for `Module.apply`; other modules are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def xavier_blocks(vit: nn.Module) -> None:
    """Every linear layer of a ViT but its head."""
    for name, module in vit.named_modules():
        if not name.startswith("head"):
            xavier_linear(module)


def xavier_encoder(vit: nn.Module) -> None:
    """MAE's start of an encoder, in 2-D and 3-D: linear layers, the patch projection as one of them, and prefix tokens
    normal(0, 0.02) (models_mae.py, initialize_weights; Hi-End-MAE alike)."""
    xavier_blocks(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
