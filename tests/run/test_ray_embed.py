"""`vitkit embed --engine ray` on a Ray of its own: the same shards as here, bit for bit, and nothing sent anywhere."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

import vitkit
from tests.run.test_sharded import SHARDS, folder_of
from vitkit.errors import ConfigError, DataError, MissingExtra
from vitkit.run import parquet, ray_embed
from vitkit.settings import Machine


def test_ray_completes_what_was_begun_here_with_equal_rows(tmp_path, monkeypatch, capsys):
    """One start of Ray, as that takes seconds: an interrupted local job, finished by Ray, against one done here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder_of(tmp_path / "data", broken=(12,))
    monkeypatch.chdir(tmp_path)  # images and output by relative paths
    here = vitkit.embed(**SHARDS, data="data", out="here")
    real = parquet.write

    def stops(out, plan, number, *more):
        if number == 1:
            raise KeyboardInterrupt
        return real(out, plan, number, *more)

    monkeypatch.setattr(parquet, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        vitkit.embed(**SHARDS, data="data", out="there")
    monkeypatch.setattr(parquet, "write", real)
    began = (tmp_path / "there/features/part-00000.parquet").stat().st_mtime_ns
    addresses, pool = [], ray_embed._pool  # Ray is not imported here: when it is, its addresses are settled

    def seen(ray, *more):
        addresses.append(ray.util.get_node_ip_address())
        return pool(ray, *more)

    monkeypatch.setattr(ray_embed, "_pool", seen)

    settings = {**SHARDS, "format": "auto", "engine": "ray", "actors": 1, "quiet": False}
    there = vitkit.embed(**settings, data="data", out="there")

    torch.set_num_threads(before)
    assert "ray: 1 actor with 1 core each, 3 shards" in capsys.readouterr().err
    assert (tmp_path / "there/features/part-00000.parquet").stat().st_mtime_ns == began
    assert there.rows == 29 and there.skipped == here.skipped and len(here.skipped) == 1
    one, other = here.read(), there.read()
    np.testing.assert_array_equal(one.x, other.x)
    assert one.names == other.names
    for a, b in zip(one[2:5], other[2:5], strict=True):
        assert a.tolist() == b.tolist()
    assert addresses == ["127.0.0.1"]  # nobody else can reach it
    assert not sys.modules["ray"].is_initialized() and "RAY_USAGE_STATS_ENABLED" not in os.environ


class Fake:
    """A cluster of 8 cores and so many GPUs."""

    def __init__(self, gpus: int = 0):
        self.gpus = gpus

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, "GPU": float(self.gpus)}


@pytest.mark.parametrize(
    ("gpus", "actors", "machine", "pool"),
    [
        (0, "auto", Machine(), (8, 1, 0)),
        (0, "auto", Machine(workers=1), (4, 2, 0)),
        (0, 3, Machine(), (3, 1, 0)),
        (2, "auto", Machine(), (2, 4, 1)),
        (2, 1, Machine(workers=2), (1, 3, 1)),
        (2, "auto", Machine(accelerator="cpu"), (8, 1, 0)),
    ],
)
def test_one_actor_a_gpu_or_a_core(gpus, actors, machine, pool):
    assert ray_embed._pool(Fake(gpus), actors, machine, 100) == pool
    assert ray_embed._pool(Fake(gpus), actors, machine, 1)[0] == 1


def test_what_the_cluster_cannot_give_is_refused():
    with pytest.raises(
        ConfigError, match=r"actors is 9, each with 1 cores, and Ray has 8 cores and 0 GPUs\n  fix: --actors 8"
    ):
        ray_embed._pool(Fake(), 9, Machine(), 100)
    with pytest.raises(ConfigError, match=r"fix: --workers 7 or less"):
        ray_embed._pool(Fake(), "auto", Machine(workers=8), 100)
    with pytest.raises(ConfigError, match="accelerator is cuda, and Ray finds no GPU"):
        ray_embed._pool(Fake(), "auto", Machine(accelerator="cuda"), 100)


def test_errors_of_an_actor_come_back_as_they_are(monkeypatch):
    def broken(work, number, device):
        raise DataError(f"shard {number}: 15 of 15 files cannot be read", fix="is the disk mounted")

    monkeypatch.setattr(ray_embed, "compute", broken)
    actor = ray_embed._Actor.__new__(ray_embed._Actor)
    actor.work, actor.device = None, torch.device("cpu")
    import pickle

    (found,) = pickle.loads(pickle.dumps(actor({"shard": np.array([3])})))["found"]
    assert isinstance(found, DataError) and str(found).startswith("shard 3: 15 of 15") and found.fix


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"(?s)'ray\[data\]'.*pip install 'vitkit\[ray\]'"), ray_embed._ray():
        pass
