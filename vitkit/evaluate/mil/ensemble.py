"""Trained slide heads that answer together, and their file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from vitkit.errors import ConfigError, WeightsError

from .bags import Bags
from .train import Recipe, Trained, module

_BYTES = 64 << 20  # of tile features looked at together


@dataclass
class Ensemble:
    """Trained heads whose answers are averaged: probabilities for classes, risks for survival."""

    members: list[Trained]
    dim: int
    outputs: int
    classes: list[str] = field(default_factory=list)
    key: str = ""  # of the features they were trained on

    @property
    def survival(self) -> bool:
        return not self.classes

    @torch.no_grad()
    def member_scores(self, bags: Bags, *, device: str | torch.device = "cpu") -> np.ndarray:
        """(M, N, C): sigmoid or softmax of each member's logits (C = 1 for two classes), or its risk; all tiles."""
        if bags.dim != self.dim:
            raise ConfigError(
                f"features of {bags.dim} dimensions for heads trained on {self.dim}", fix="embed with the same encoder"
            )
        if self.key and bags.key and self.key != bags.key:
            raise ConfigError(
                "these features are of another encoder or tiling than those the heads were trained on",
                fix="embed both with one model and one tiling",
            )
        heads = [module(self.dim, self.outputs, member).to(device) for member in self.members]
        out = np.empty((len(heads), len(bags), self.outputs), np.float32)
        for rows in _parts(bags):
            x, at = bags.flat(bags.places(rows), device)
            for i, head in enumerate(heads):
                out[i, rows] = head.flat(x, at).cpu().numpy()
        if self.survival:
            return out
        return 1 / (1 + np.exp(-out)) if self.outputs == 1 else torch.softmax(torch.from_numpy(out), -1).numpy()

    def scores(self, bags: Bags, *, device: str | torch.device = "cpu") -> np.ndarray:
        """The ensemble's scores (N, C)."""
        return self.member_scores(bags, device=device).mean(0)

    @torch.no_grad()
    def attention(self, features: torch.Tensor) -> np.ndarray:
        """How much each tile of a slide counts (T,), from its features (T, D); mean over the members, sums to 1."""
        x = features.float().unsqueeze(0)
        weights = [module(self.dim, self.outputs, member).tile_weights(x)[0] for member in self.members]
        return torch.stack(weights).mean(0).numpy()

    def save(self, path: str | Path) -> Path:
        """One safetensors file with all members; `Ensemble.load` reads it."""
        from safetensors.torch import save

        from vitkit.run.files import atomic_write

        tensors = {f"{i}.{name}": t.contiguous() for i, m in enumerate(self.members) for name, t in m.state.items()}
        members = [{"recipe": asdict(m.recipe), "epochs": m.epochs} for m in self.members]
        content = {"dim": self.dim, "outputs": self.outputs, "classes": self.classes, "key": self.key}
        atomic_write(path, save(tensors, {"vitkit.mil": json.dumps({**content, "members": members})}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Ensemble:
        """Read what `save` wrote; WeightsError where it is something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                content = json.loads((file.metadata() or {})["vitkit.mil"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise WeightsError(
                f"{path}: not a file of slide heads ({error})", fix="give what Ensemble.save wrote"
            ) from None
        members = []
        for i, member in enumerate(content.pop("members")):
            state = {k.partition(".")[2]: t for k, t in tensors.items() if k.partition(".")[0] == str(i)}
            members.append(Trained(Recipe(**member["recipe"]), state, member["epochs"], np.zeros(0)))
        return cls(members, **content)


def _parts(bags: Bags) -> Iterator[np.ndarray]:
    """Slides whose tiles fit into memory together; those of like length, so that there is little padding."""
    part: list[int] = []
    most, held = _BYTES // (4 * bags.dim), 0
    for i in np.argsort(bags.lengths, kind="stable").tolist():
        if part and held + bags.lengths[i] > most:
            yield np.array(part)
            part, held = [], 0
        part.append(i)
        held += int(bags.lengths[i])
    if part:
        yield np.array(part)


def ensemble_of(bags: Bags, members: Sequence[Trained]) -> Ensemble:
    """Heads trained on `bags`, together."""
    return Ensemble(list(members), bags.dim, bags.outputs, list(bags.classes), bags.key)
