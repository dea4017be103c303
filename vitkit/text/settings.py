"""Settings and recipe of the report writer. Standard library only, so that `vitkit caption --help` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RECIPE = {
    "epochs": 30,  # ours, for a few hundred texts; MAIRA-1: 3 passes over 145,000
    "batch_size": 16,  # ours; MAIRA-1: 128
    "blr": 1e-2,  # ours: 6e-4 a step at batches of 16; LLaVA's projector 1e-3 at 256
    "weight_decay": 0.01,
    "warmup_epochs": 1.0,
    "clip_grad": 1.0,
    "augment": False,  # mirrored or cropped, an image no longer fits "in the right upper lobe"
}


@dataclass(frozen=True)
class Settings:
    """What writes, and how it is tuned."""

    text_column: str = ""
    """column of the table that holds the text of each image (several rows an image: several references)"""
    lm: str = "tiny"
    """folder or hub id of a causal language model of transformers, or tiny: a small GPT-2 from nothing, with a tokenizer
    made from the training texts"""
    projector_layers: int = 2
    """linear layers, GELU between, from patch tokens to the language model (LLaVA-1.5: 2; MAIRA-1: 4)"""
    projector_epochs: float | Literal["auto"] = "auto"
    """passes that train the projector alone; auto = 1 before a pre-trained language model, 0 before a new one"""
    lm_scale: float | Literal["auto"] = "auto"
    """learning rate of the language model over the projector's; auto = 0.02 (LLaVA: 2e-5 after 1e-3), 1 for a new one"""
    prompt: str = ""
    """words between image and text, e.g. "Findings:" """
    max_words: int = 120
    """words of a text that are learnt, and written; the rest is cut off and counted aloud"""
    beams: int = 1
    """beams of the search while writing; 1 = greedy"""
    lm_layers: int = 4
    """tiny: blocks"""
    lm_width: int = 192
    """tiny: width"""
    lm_vocabulary: int = 2000
    """tiny: most tokens of its byte-pair encoding"""
    dropout: float = 0.1
    """tiny: dropout"""

    def __post_init__(self) -> None:
        from vitkit.errors import ConfigError

        least = (
            ("projector_layers", 1),
            ("max_words", 1),
            ("beams", 1),
            ("lm_layers", 1),
            ("lm_width", 8),
            ("lm_vocabulary", 260),
        )
        for name, bound in least:
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix=f"at least {bound}")
        for name in ("projector_epochs", "lm_scale"):
            value = getattr(self, name)
            if value != "auto" and (isinstance(value, str) or value < 0):
                raise ConfigError(f"{name} is {value!r}", fix="auto, or a number of at least 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}", fix="from 0 to below 1")
