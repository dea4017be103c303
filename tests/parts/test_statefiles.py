"""Weight files: read without running anything, written in one step, hashed by content. Every refusal says why."""

import argparse
import os
import pathlib
import pickle
import struct
import warnings
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vitkit.errors import WeightsError
from vitkit.parts.statefiles import read_state, save_state, sha256_of

RAN = []


class Hostile:
    """Runs a command when it is unpickled the ordinary way."""

    def __reduce__(self):
        return os.system, (f"touch {RAN[0]}",)


@pytest.fixture
def marker(tmp_path):
    RAN[:] = [tmp_path / "ran"]
    yield RAN[0]
    assert not RAN[0].exists(), "the hostile file was executed"


def tensors():
    return {"a": torch.arange(600.0).reshape(2, 300), "b": torch.ones(3, dtype=torch.int64)}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path, legacy):
    path = tmp_path / "x.weights"  # the name says nothing
    args = argparse.Namespace(model="mae_vit_small_patch16_dec512d2b", lr=1e-3)
    content = {"model": tensors(), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 7, "args": args}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found, meta = read_state(path)
    assert same(found, tensors())
    assert meta["container"] == "model" and meta["left"] == [] and meta["epoch"] == 7 and meta["format"] == "torch"
    assert meta["args"] == {"model": "mae_vit_small_patch16_dec512d2b", "lr": 1e-3}


def test_safetensors_files_and_their_metadata(tmp_path):
    path = tmp_path / "x.bin"
    save_state(path, tensors(), {"vitkit": "full", "config": '{"num_heads": 3}'})
    found, meta = read_state(path)
    assert same(found, tensors()) and meta["format"] == "safetensors"
    assert meta["vitkit"] == "full" and meta["config"] == {"num_heads": 3}


@pytest.mark.parametrize(
    ("content", "container", "left"),
    [
        (lambda t: t, None, []),
        (lambda t: {"state_dict": t}, "state_dict", []),
        (lambda t: {"model": {"state_dict": t}}, "model.state_dict", []),
        (lambda t: {"student": {"z": torch.ones(1)}, "teacher": t}, "teacher", ["student"]),
        (lambda t: {"model": t, "model_ema": t}, "model", ["model_ema"]),
        (lambda t: {"step": torch.tensor(3), "module": t}, "module", []),
    ],
)
def test_containers(tmp_path, content, container, left):
    torch.save(content(tensors()), tmp_path / "x.pth")
    found, meta = read_state(tmp_path / "x.pth")
    assert same(found, tensors()) and meta["container"] == container and meta["left"] == left


def test_unknown_container_lists_its_keys(tmp_path):
    torch.save({"blob": tensors(), "epoch": 1}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="its keys are: blob, epoch"):
        read_state(tmp_path / "x.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_checkpoint_is_refused_by_name(tmp_path, marker, legacy):
    path = tmp_path / "evil.pth"
    torch.save({"model": tensors(), "x": Hostile()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"evil\.pth is refused: .*(posix|nt|os)\.system") as caught:
        read_state(path)
    assert "fix: convert it where you trust it" in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_hostile_raw_pickle_is_refused_by_name(tmp_path, marker, protocol):
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps({"model": Hostile()}, protocol=protocol))
    with pytest.raises(WeightsError, match=r"is refused: .*(posix|nt|os)\.system"):
        read_state(path)


def test_harmless_but_unlisted_objects_are_named_too(tmp_path):
    torch.save({"model": tensors(), "out": pathlib.PurePosixPath("/x")}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"asks to import and call pathlib\.PurePosixPath"):
        read_state(tmp_path / "x.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_state(tmp_path / "module.pt")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "clip.pt"))
    with pytest.raises(WeightsError, match="is a TorchScript program"):
        read_state(tmp_path / "clip.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.02])
def test_truncated_torch_files(tmp_path, legacy, share):
    path = tmp_path / "x.pth"
    torch.save({"model": tensors()}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match=rf"x\.pth .*{path.stat().st_size} bytes"):
        read_state(path)


def test_truncated_safetensors_names_both_sizes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=f"is truncated: {len(whole) - 100} bytes, its header promises {len(whole)}"):
        read_state(path)
    for cut in (5, 8, 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=f"is truncated: {cut} bytes, its header is cut"):
            read_state(path)


def test_broken_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    header = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(WeightsError, match="broken safetensors file"):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Google Drive can't scan this file", "is a saved web page"),
        (b"not found, sorry\nreally", "is a text file .*'not found, sorry'"),
        (b"\x93NUMPY\x01\x00v\x00", "is a NumPy array"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "is a compressed archive"),
        (b"\x01\x02\x03\x04\x05\x06\x07\x08\x09\x00\xff", "neither a safetensors nor a torch file"),
        (b"PK\x03\x04 and then nothing", "truncated or corrupt"),
    ],
)
def test_foreign_files_are_told_what_they_are(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        read_state(path)
    assert "weights.pth" in str(caught.value) and "fix:" in str(caught.value)


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    with pytest.raises(WeightsError, match="zip archive that torch did not write"):
        read_state(tmp_path / "x.pth")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        read_state(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="is a folder"):
        read_state(tmp_path)


def test_not_a_state_dict(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="holds a list, not a state dict"):
        read_state(tmp_path / "x.pth")


def test_save_takes_tied_views_and_transposed_tensors(tmp_path):
    big = torch.arange(12.0).reshape(3, 4)
    state = {
        "whole": big,
        "tied": big,
        "view": big[1:],
        "turned": big.t(),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    save_state(tmp_path / "x.safetensors", state)
    found, _ = read_state(tmp_path / "x.safetensors")
    assert same(found, {name: value.detach() for name, value in state.items()})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() in (None, {})


def test_save_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_state(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_state(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_hash_is_of_content_only(tmp_path):
    state = {"a": torch.randn(3, 4), "b": torch.ones((), dtype=torch.int64), "c": torch.randn(5).bfloat16()}
    digest = sha256_of(state)
    assert digest == sha256_of(dict(reversed(state.items()))) and len(digest) == 64
    assert digest == sha256_of({**state, "a": state["a"].t().contiguous().t()})  # strides do not matter
    save_state(tmp_path / "x.safetensors", state)
    torch.save(state, tmp_path / "x.pth")
    assert (
        digest == sha256_of(read_state(tmp_path / "x.safetensors")[0]) == sha256_of(read_state(tmp_path / "x.pth")[0])
    )
    for other in (
        {**state, "a": state["a"] + 1e-6},
        {**state, "a": state["a"].reshape(4, 3)},
        {**state, "c": state["c"].float()},
        {"A": state["a"], "b": state["b"], "c": state["c"]},
    ):
        assert sha256_of(other) != digest
    assert sha256_of({"e": torch.empty(0)}) != sha256_of({})
