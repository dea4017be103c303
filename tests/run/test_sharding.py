"""FSDP gives the numbers of data-parallel training, in less memory a process, and resumes exactly."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import vitkit
from vitkit.errors import ConfigError
from vitkit.parts.ema import EMA
from vitkit.parts.sharded import local, whole
from vitkit.run import discover, sharding
from vitkit.run.folder import RunFolder
from vitkit.run.trained import trained_state

from .. import examples
from .test_loop import COMMON, losses, same, state

CLAIMED = [
    (m.verb, m.name, family)
    for m in discover.methods()
    if m.trains and getattr(discover.method_class(discover.load(m.verb, m.name)), "shards", False)
    for family in examples.families(m.verb, m.name)
]
DINO = {"prototypes": 64, "head_hidden": 32, "bottleneck_dim": 16, "local_crops": 2, "local_size": 16, "guard": True}
BASE = {**COMMON, "lr": 1e-3, "batch_size": 16, "epochs": 2, "max_steps": 6}
FULL = {"labels_per_class": 12, "accumulate": 2, "ema": 0.9, "select": "last", "clip_grad": 0.5}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of one process: the same code as in many, which the last test starts."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path_factory.mktemp("g") / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("verb,name,family", CLAIMED)
def test_every_method_that_says_so_can_be_sharded(group, verb, name, family):
    torch.manual_seed(0)
    method = examples.build(verb, name, examples.model(family)).train()
    sharded = sharding.shard(method, torch.device("cpu"))
    assert sum(type(p).__name__ == "DTensor" for p in sharded.state_dict().values()) > 20
    losses, gradients = [], []
    for each in (method, sharded):
        torch.manual_seed(1)
        loss = each(examples.batch(name, family))["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: whole(p.grad) for n, p in each.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1] and gradients[0].keys() <= gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], atol=1e-6), key


def test_moving_averages_and_checkpoints_of_shares_are_whole(group):
    sharded = sharding.shard(examples.build("adapt", "full", examples.model("plain")), torch.device("cpu"))
    ema, optimizer = EMA(sharded, 0.5), torch.optim.AdamW(sharded.parameters(), lr=0.1)
    before = trained_state(sharded)
    sharded(examples.batch("full"))["loss"].backward()
    optimizer.step()
    ema.update()
    after, mean = trained_state(sharded), {name: value.clone() for name, value in ema.state_dict().items()}
    for key, value in mean.items():
        assert type(value) is torch.Tensor
        assert torch.allclose(value, (before[key] + after[key]) / 2, atol=1e-6), key
    with ema.applied():
        assert all(torch.equal(whole(p), mean[n]) for n, p in sharded.named_parameters())
    saved = sharding.gathered(optimizer.state_dict(), keep=True)
    again = torch.optim.AdamW(sharded.parameters(), lr=0.1)
    again.load_state_dict(copy.deepcopy(saved))
    sharding.shared_out(again)
    for parameter, values in again.state.items():
        assert torch.equal(local(values["exp_avg"]), local(optimizer.state[parameter]["exp_avg"]))
    assert all(type(v["exp_avg"]) is torch.Tensor for v in saved["state"].values())


@pytest.mark.parametrize("verb,name,own", [("pretrain", "dinov2", DINO), ("adapt", "full", FULL)])
def test_two_processes_with_shares_equal_two_with_whole_models(tmp_path, verb, name, own):
    base = {**BASE, **own, "devices": 2}
    for kind in (False, True):
        getattr(vitkit, verb)(name, **base, shard=kind, out=tmp_path / str(kind))
    plain, shares = (state(tmp_path / kind) for kind in ("False", "True"))
    assert plain.keys() == shares.keys()
    for key, value in plain.items():
        assert torch.allclose(value.float(), shares[key].float(), atol=2e-6), key
    (steps, a), (again, b) = (zip(*losses(tmp_path / kind), strict=True) for kind in ("False", "True"))
    assert steps == again and a == pytest.approx(b, rel=1e-5) and a[0] != a[-1]


# Runs the settings in argv[1]; the processes that it starts import this, too, and kill themselves after step 3, before
# anything is saved there.
CHILD = """
import json, os, signal, sys
import vitkit
from vitkit.run import loop
real = loop._Fit._after_step
def after(self):
    if self.state.step == 3: os.kill(os.getpid(), signal.SIGKILL)
    real(self)
loop._Fit._after_step = after
if __name__ == "__main__":
    vitkit.pretrain("dinov2", **json.loads(sys.argv[1]))
"""


def test_a_sharded_run_that_is_killed_resumes_bit_for_bit(tmp_path):
    settings = {**BASE, **DINO, "devices": 2, "shard": True, "save_every": 2}
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, str(tmp_path / "child.py"), json.dumps({**settings, "out": str(tmp_path / "cut")})]
    assert subprocess.run(command, timeout=400, capture_output=True).returncode != 0
    assert RunFolder(tmp_path / "cut").load_checkpoint()["state"]["step"] == 2
    for out in ("at once", "cut"):
        vitkit.pretrain("dinov2", **settings, out=tmp_path / out)
    assert same(tmp_path / "at once", tmp_path / "cut") and losses(tmp_path / "at once") == losses(tmp_path / "cut")


def test_what_cannot_be_sharded_is_said(tmp_path):
    one = {**BASE, **DINO, "shard": True}
    with pytest.raises(ConfigError, match="there is one\n  fix: devices=2 or more"):
        vitkit.pretrain("dinov2", **one, out=tmp_path / "one")
    assert not (tmp_path / "one" / "last.ckpt").exists()
    method = discover.method_class(discover.load("adapt", "adaptformer"))
    with pytest.raises(ConfigError, match="adaptformer cannot be sharded"):
        sharding.require(method, "adaptformer", 2, False)
    with pytest.raises(ConfigError, match="shard and compile together"):
        sharding.require(method, "adaptformer", 2, True)
