"""The loop's promises: a bare loop gives the same losses, a kill at any step resumes bit for bit, two processes equal
one with the double batch, accumulation equals the larger batch, nothing steps on a NaN."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import vitkit
from vitkit import weights
from vitkit.data import read
from vitkit.data.loader import loader
from vitkit.data.transforms import finetune_view, pretrain_view
from vitkit.errors import ConfigError, TrainingError
from vitkit.parts.optim import build_optimizer, set_lr
from vitkit.parts.schedules import warmup_cosine
from vitkit.run import discover
from vitkit.run.folder import RunFolder
from vitkit.run.loop import step_seed
from vitkit.settings import Classify, Task

MODEL = {
    "model": "vit_tiny_patch16_224",
    "pretrained": False,
    "patch_size": 8,
    "image_size": 32,
    "in_chans": 1,
    "arch_kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2},
}
COMMON = {**MODEL, "data": "digits", "workers": 0, "accelerator": "cpu", "quiet": True, "warmup_epochs": 0.5}
MAE = {"decoder_dim": 16, "decoder_heads": 2, "mask_ratio": 0.5, "batch_size": 64, "lr": 1e-3}
ADAPT = {"labels_per_class": 12, "batch_size": 24, "bottleneck": 4, "lr": 1e-2, "optimizer": "adamw"}


def losses(path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in RunFolder(path).records() if "loss" in r]


def state(path) -> dict[str, torch.Tensor]:
    return weights.read_state(path / "model.safetensors")[0]


def same(a, b) -> bool:
    a, b = state(a), state(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_bare_loop_gives_the_same_losses_and_weights(tmp_path):
    settings = {**COMMON, **ADAPT, "epochs": 3, "seed": 3, "dropout": 0.1, "select": "last"}
    vitkit.adapt("adaptformer", **settings, out=str(tmp_path / "run"))
    # The same by hand: about twenty lines.
    images = read("digits", say=lambda text: None)
    train = images.part("train").few(12, 3)
    torch.manual_seed(3)
    keys = ("pretrained", "patch_size", "image_size", "in_chans", "arch_kwargs")
    vit = weights.load(MODEL["model"], seed=3, say=None, **{key: MODEL[key] for key in keys})
    module = discover.load("adapt", "adaptformer")
    task, classify = Task("single", tuple(images.classes)), Classify(head="bn_linear")
    method = module.AdaptFormer(vit, module.Settings(bottleneck=4, dropout=0.1), task=task, classify=classify).train()
    optimizer = build_optimizer(method.param_groups(0.0), name="adamw", lr=1e-2)
    view, steps, seen = finetune_view(vit.passport.preprocess, randaug=None), len(train) // 24, []
    for epoch in range(3):
        for t, batch in enumerate(loader(train, view, batch_size=24, seed=3, epoch=epoch, drop_last=True)):
            set_lr(optimizer, warmup_cosine(epoch + t / steps, lr=1e-2, min_lr=0.0, warmup=0.5, epochs=3))
            batch["image"] = vit.passport.preprocess.normalise(batch["image"])
            torch.manual_seed(step_seed(3, epoch * steps + t))
            loss = method(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
    assert [value for _, value in losses(tmp_path / "run")] == pytest.approx(seen, abs=0)
    trained = {name: p for name, p in vit.state_dict().items() if name in state(tmp_path / "run")}
    assert all(torch.equal(trained[key], value) for key, value in state(tmp_path / "run").items())


@pytest.mark.parametrize("workers,kills", [(0, (20,)), (2, (3, 20))])
def test_stopped_anywhere_resumes_bit_for_bit(tmp_path, workers, kills):
    settings = {**COMMON, **MAE, "epochs": 2, "save_every": 1, "ema": 0.9, "clip_grad": 1.0}
    vitkit.pretrain("mae", **settings, out=str(tmp_path / "whole"))
    command = [sys.executable, "-c", CHILD, json.dumps({**settings, "workers": workers, "out": str(tmp_path / "cut")})]
    for wanted in kills:  # in the first epoch; in the second, after a first resume
        child = subprocess.Popen([*command, str(wanted)], env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert child.wait(timeout=400) == -signal.SIGKILL
    vitkit.pretrain("mae", **{**settings, "workers": workers}, out=str(tmp_path / "cut"))
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


# Runs the settings in argv[1] and kills itself with SIGKILL right after step argv[2] was made, before anything is saved.
CHILD = """
import json, os, signal, sys
import torch; torch.set_num_threads(1)
import vitkit
from vitkit.run import loop
real = loop._Fit._after_step
def after(self):
    if self.state.step == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
    real(self)
loop._Fit._after_step = after
vitkit.pretrain("mae", **json.loads(sys.argv[1]))
"""


def test_sigterm_saves_at_a_step_boundary_and_resumes(tmp_path):
    settings = {**COMMON, **MAE, "epochs": 60}
    out = tmp_path / "run"
    code = (
        "import json,sys,torch; torch.set_num_threads(1); from vitkit.run.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["pretrain", "mae", *(f"--{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in settings.items())]
    child = subprocess.Popen([sys.executable, "-c", code, *words, f"--out={out}"], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 400
    while time.time() < deadline and not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 130 and "the same command resumes" in said
    saved = RunFolder(out).load_checkpoint()
    assert saved["state"]["step"] > 0 and not (out / "summary.json").exists()
    names, sums, count = saved["loss"]
    folder = RunFolder(out)
    folder.save_checkpoint({**saved, "loss": (names, sums * 2, count)})  # as if two processes had begun it
    with pytest.raises(ConfigError, match=r"begun by 2 processes, and now there is 1: .*\n  fix: 2 as before"):
        vitkit.pretrain("mae", **settings, out=str(out))
    assert len(folder.load_checkpoint()["loss"][1]) == 2


def test_accumulation_equals_the_larger_batch(tmp_path):
    """Where the loss is a mean over samples; the masks are a function of the sample, so they agree too."""
    base = {**COMMON, **MAE, "epochs": 1, "lr": 1e-3}
    vitkit.pretrain("mae", **{**base, "batch_size": 64}, max_steps=4, out=str(tmp_path / "large"))
    vitkit.pretrain("mae", **{**base, "batch_size": 32, "accumulate": 2}, max_steps=4, out=str(tmp_path / "small"))
    large, small = state(tmp_path / "large"), state(tmp_path / "small")
    # The schedules differ by the odd batch at an epoch's end; losses agree to rounding at the first step.
    assert losses(tmp_path / "large")[0][1] == pytest.approx(losses(tmp_path / "small")[0][1], rel=1e-5)
    for key, value in large.items():
        assert torch.allclose(value, small[key], atol=2e-4), key


@pytest.mark.parametrize(
    "verb,name,own", [("pretrain", "mae", MAE), ("adapt", "adaptformer", {**ADAPT, "dropout": 0.0})]
)
def test_two_processes_equal_one_with_the_double_batch(tmp_path, verb, name, own):
    base = {**COMMON, **own, "epochs": 2, "max_steps": 4}
    if verb == "adapt":
        base |= {"select": "last", "head": "bn_linear"}
    half = {**base, "batch_size": own["batch_size"] // 2, "devices": 2}
    getattr(vitkit, verb)(name, **base, out=str(tmp_path / "one"))
    getattr(vitkit, verb)(name, **half, out=str(tmp_path / "two"))
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value.float(), two[key].float(), atol=5e-5), key
    for (step, a), (again, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert step == again and a == pytest.approx(b, rel=1e-4)


def test_torchrun_starts_the_processes_and_its_numbers_count(tmp_path):
    own = {**COMMON, **MAE, "epochs": 1, "max_steps": 2}
    vitkit.pretrain("mae", **own, out=str(tmp_path / "one"))
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps({**own, "batch_size": own["batch_size"] // 2, "out": str(tmp_path / "two")}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "vitkit", "pretrain", "mae", "--config", str(path)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    for (step, a), (again, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert step == again and a == pytest.approx(b, rel=1e-4)


def test_a_nan_stops_before_the_step_and_keeps_the_batch(tmp_path, monkeypatch):
    from vitkit.pretrain.mae import MAE as Method

    real, calls = Method.forward, []

    def broken(self, batch):
        calls.append(1)
        out = real(self, batch)
        return {"loss": out["loss"] * float("nan")} if len(calls) == 3 else out

    monkeypatch.setattr(Method, "forward", broken)
    with pytest.raises(TrainingError, match="non-finite loss at step 2, before the optimiser step") as error:
        vitkit.pretrain("mae", **COMMON, **MAE, epochs=1, save_every=1, out=str(tmp_path))
    saved = next(tmp_path.glob("bad_batch_step2*.pt"))
    assert saved.name in str(error.value) and "lower lr" in str(error.value)
    assert torch.load(saved, weights_only=True)["image"].dtype == torch.uint8
    assert all(v.isfinite().all() for v in RunFolder(tmp_path).load_checkpoint()["method"].values())


def test_no_memory_names_the_batch_size(tmp_path, monkeypatch):
    from vitkit.pretrain.mae import MAE as Method

    def greedy(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Method, "forward", greedy)
    with pytest.raises(
        TrainingError, match="no memory for a batch of 64 images\n  fix: --batch_size 32 --accumulate 2"
    ):
        vitkit.pretrain("mae", **COMMON, **MAE, epochs=1, out=str(tmp_path))


def test_the_same_command_twice_does_nothing_and_another_is_refused(tmp_path):
    settings = {**COMMON, **MAE, "epochs": 1, "max_steps": 2, "out": str(tmp_path)}
    vitkit.pretrain("mae", **settings)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    vitkit.pretrain("mae", **{**settings, "workers": 1})
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"mask_ratio: 0.5 -> 0.75"):
        vitkit.pretrain("mae", **{**settings, "mask_ratio": 0.75})
    with pytest.raises(ConfigError, match=r"pretrain.mae -> adapt.linear"):
        vitkit.adapt("linear", **COMMON, out=str(tmp_path))


def test_the_callers_random_numbers_stay_as_they_were(tmp_path):
    torch.manual_seed(11)
    want = torch.rand(3)
    torch.manual_seed(11)
    vitkit.pretrain("mae", **COMMON, **MAE, epochs=1, max_steps=1, out=str(tmp_path))
    assert torch.equal(torch.rand(3), want)


def test_masks_belong_to_samples_not_to_batches():
    images = read("digits", say=lambda text: None).part("val")
    vit = weights.load(MODEL["model"], say=None, **{k: v for k, v in MODEL.items() if k != "model"})
    module = discover.load("pretrain", "mae")
    method = module.MAE(vit, module.Settings(decoder_dim=16, decoder_heads=2, mask_ratio=0.5))
    view = pretrain_view(vit.passport.preprocess)
    masks = {}
    for size in (8, 20):
        for batch in loader(images, view, batch_size=size, seed=1, epoch=2):
            for index, mask in zip(batch["index"].tolist(), method.mask(batch).binary, strict=True):
                masks.setdefault(index, []).append(mask)
    assert all(torch.equal(*pair) for pair in masks.values())
    assert len({tuple(pair[0].tolist()) for pair in masks.values()}) > 100
