"""Students of PH-Reg's authors (`distilled_dinov2_weights_*.pth`) among Hugging Face's Dinov2Model files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

REGISTERS = "registers"  # (1, m, D), beside a Dinov2Model called `model`
_TWICE = ("embed.", "encoder.layer.", "layernorm.")  # other names of tensors under `model.`


def is_student(names: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether registers stand beside the Dinov2Model under `prefix`."""
    return prefix == "model." and REGISTERS in names and names[REGISTERS].ndim == 3


def once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor once, the registers by DINOv2's name: `register_tokens`, without positions of their own."""
    named = {name: value for name, value in tensors.items() if not name.startswith(_TWICE)}
    named["model.embeddings.register_tokens"] = named.pop(REGISTERS)
    return named
