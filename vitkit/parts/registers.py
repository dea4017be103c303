"""Register tokens added to a pre-trained ViT, which stays a timm model: `reg_token` behind the class token, no positions.

A position table that has rows for class tokens gives them to these tokens, as DINOv2 with registers has it
(`no_embed_class`): the same numbers, and timm's own layout.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vitkit.errors import ConfigError
from vitkit.parts.blocks import add_prefix_tokens, mix_into

TOKENS = ("cls_token", "dist_token")


def registers_of(vit: nn.Module) -> int:
    """How many registers a ViT has."""
    token = getattr(vit, "reg_token", None)
    return 0 if token is None else int(token.shape[1])


def add_registers(vit: Any, count: int) -> list[nn.Parameter]:
    """Put `count` registers, N(0, 1) / sqrt(width), into `vit` in place; the rows (1, 1, D) of the position table that its
    class tokens had, now parameters of their own, added to the tokens until `merge_rows`."""
    own = registers_of(vit)
    if own:
        raise ConfigError(
            f"this ViT already has {own} registers",
            fix="--registers 0 (or auto) trains with those it has, and adds none",
        )
    if hasattr(vit, "dist_token"):
        mix_into(vit, DistilledRegisters)
    rows = split_rows(vit)
    like = vit.patch_embed.proj.weight
    width = int(vit.embed_dim)
    vit.reg_token = nn.Parameter((torch.randn(1, count, width) / width**0.5).to(like.device))
    if hasattr(vit, "num_reg_tokens") or not isinstance(vit, Eva):
        vit.num_reg_tokens = count
    if hasattr(vit, "cls_embed"):
        vit.cls_embed = False
    add_prefix_tokens(vit, None, count)
    return rows


def split_rows(vit: Any) -> list[nn.Parameter]:
    """Take the rows of the class tokens out of the position table; they go on as `Row`s of these tokens."""
    names = [name for name in TOKENS if getattr(vit, name, None) is not None]
    table = vit.pos_embed
    if table is None or vit.no_embed_class:
        return []
    vit.no_embed_class = True
    vit.pos_embed = nn.Parameter(table.detach()[:, len(names) :].clone(), requires_grad=table.requires_grad)
    found = []
    for index, name in enumerate(names):
        row = nn.Parameter(table.detach()[:, index : index + 1].clone())
        parametrize.register_parametrization(vit, name, Row(row))
        found.append(row)
    return found


def merge_rows(vit: nn.Module) -> nn.Module:
    """Add the rows of `split_rows` to their tokens for good: a plain timm model."""
    for name in TOKENS:
        if parametrize.is_parametrized(vit, name):
            parametrize.remove_parametrizations(vit, name, leave_parametrized=True)
    return vit


def keywords(vit: nn.Module) -> dict[str, Any]:
    """Architecture keywords with which timm builds a ViT with the registers of this one; empty where it has no such ViT."""
    if hasattr(vit, "dist_token") or not registers_of(vit):
        return {}
    return {"reg_tokens": registers_of(vit), "no_embed_class": bool(vit.no_embed_class)}


class Row(nn.Module):
    """A token with its position: what is added to it has a gradient, the token itself may stay frozen."""

    def __init__(self, row: nn.Parameter):
        super().__init__()
        self.row = row

    def forward(self, token: Tensor) -> Tensor:
        return token + self.row


class DistilledRegisters:
    """A ViT with a distillation token, for which timm has no registers: they stand behind its two class tokens."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = super()._pos_embed(x)  # type: ignore[misc]
        registers = self.reg_token.expand(len(x), -1, -1)  # type: ignore[attr-defined]
        return torch.cat([x[:, :2], registers, x[:, 2:]], dim=1)
