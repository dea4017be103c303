"""Trained slide heads that answer together, and their file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call, stack_module_state, vmap

from vitkit.errors import ConfigError, WeightsError

from .bags import Bags
from .train import Recipe, Trained, module


@dataclass
class Ensemble:
    """Trained heads whose answers are averaged: probabilities for classes, risks for survival."""

    members: list[Trained]
    dim: int
    outputs: int
    classes: list[str] = field(default_factory=list)
    key: str = ""  # of the features they were trained on

    def member_scores(self, bags: Bags, *, device: str | torch.device = "cpu", slides: int = 16) -> np.ndarray:
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
        out = np.empty((len(self.members), len(bags), self.outputs), np.float32)
        order = np.argsort(bags.lengths, kind="stable")  # bags of like length together: little padding
        for together, indices in self._alike():
            for at in range(0, len(order), slides):
                rows = order[at : at + slides]
                x, mask = bags.batch(bags.places(rows), device)
                out[np.ix_(indices, rows)] = together(x, mask).cpu().numpy()
        if bags.survival:
            return out
        return 1 / (1 + np.exp(-out)) if self.outputs == 1 else torch.softmax(torch.from_numpy(out), -1).numpy()

    def _alike(self) -> Iterator[tuple[Callable, list[int]]]:
        """(function giving logits (M, B, C), members) for each kind of head; stackable ones share the pass over tiles."""
        kinds: dict[str, list[int]] = {}
        for i, member in enumerate(self.members):
            kinds.setdefault(member.recipe.head + repr(member.recipe.options), []).append(i)
        for indices in kinds.values():
            heads = [module(self.dim, self.outputs, self.members[i]) for i in indices]
            yield torch.no_grad()(_runner(heads)), indices

    def scores(self, bags: Bags, *, device: str | torch.device = "cpu") -> np.ndarray:
        """The ensemble's scores (N, C)."""
        return self.member_scores(bags, device=device).mean(0)

    @torch.no_grad()
    def attention(self, bags: Bags, i: int) -> np.ndarray:
        """How much each tile of slide i counts (T,), mean over the members; sums to 1."""
        x = bags.tiles(i).float().unsqueeze(0)
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


def _runner(heads: list) -> Callable:
    """Logits (M, B, C) of all `heads` on the same bags."""
    if len(heads) == 1 or not heads[0].stackable:
        return lambda x, mask: torch.stack([head(x, mask) for head in heads])
    parameters, _ = stack_module_state(heads)
    call = lambda p, x, mask: functional_call(heads[0], p, (x, mask))  # noqa: E731
    return lambda x, mask: vmap(call, in_dims=(0, None, None))(parameters, x, mask)


def ensemble_of(bags: Bags, members: list[Trained]) -> Ensemble:
    """Heads trained on `bags`, together."""
    return Ensemble(members, bags.dim, bags.outputs, list(bags.classes), bags.key)
