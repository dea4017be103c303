"""Fixtures recorded from the authors' code: official weights, inputs, outputs and gradients, config in the metadata.

The folder is $VITKIT_PARITY, by default the copy beside these tests. Every file of a system's part is tested (also ones
with other configs put there later): `<system>.<part>.safetensors` and `<system>.<part>.<anything>.safetensors`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = Path(os.environ.get("VITKIT_PARITY", Path(__file__).parent / "fixtures"))
TOLERANCE = 2e-5  # max |a - b| / max |b| in float32


@dataclass
class Fixture:
    path: Path
    config: dict
    tensors: dict[str, torch.Tensor]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def checkpoint(self, folder: Path, config: dict, *, wrapped: bool = True) -> Path:
        """The official weights as the authors save them ({"model": ...} in a torch file) with a config.json beside it."""
        path = folder / "checkpoint.pth"
        state = self.group("weights.")
        torch.save({"model": state} if wrapped else state, path)
        (folder / "config.json").write_text(json.dumps(config))
        return path


def files(part: str) -> list[Path]:
    found = sorted(FOLDER.glob(f"{part}*.safetensors"))
    assert found, f"no parity fixture {part} in {FOLDER}"
    return found


def read(path: Path) -> Fixture:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Fixture(path, json.loads(file.metadata()["config"]), tensors)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    return float((ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))


class Compared:
    """Collects which recorded tensors were compared, so that none is forgotten."""

    def __init__(self, fixture: Fixture):
        self.left = {key for key in fixture.tensors if key.startswith(("out.", "grad."))}
        self.fixture = fixture

    def same(self, key: str, ours: torch.Tensor, tolerance: float = TOLERANCE) -> None:
        theirs = self.fixture[key]
        ours = ours.reshape(theirs.shape) if ours.numel() == theirs.numel() and ours.ndim <= 1 else ours
        error = relative(ours, theirs)
        assert error <= tolerance, f"{key}: relative error {error:.2e}"
        self.left.discard(key)

    def done(self) -> None:
        assert not self.left, f"never compared: {sorted(self.left)}"


@pytest.fixture
def resave(tmp_path):
    """Write tensors as safetensors into the test's folder."""

    def save(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        path = tmp_path / name
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        return path

    return save
