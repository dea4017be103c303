"""What a person gets for bad input: one clear message that names the thing and the fix, and no half-written run."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import vitkit
from vitkit.errors import ConfigError
from vitkit.run import cli

TINY = ["--pretrained", "false", "--image_size", "32", "--patch_size", "16", "--workers", "0", "--quiet", "--max_steps", "1",
        "--arch_kwargs", "{embed_dim: 24, depth: 1, num_heads: 2}"]  # fmt: skip


def folder(path, classes: dict[str, int]):
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path / name / f"{i}.png")
    return path


def adapt(capsys, data, out, *more, model="vit_tiny_patch16_224"):
    status = cli.main(["adapt", "linear", "--model", str(model), "--data", str(data), "--out", str(out), *TINY, *more])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "classes,text",
    [
        ({"a": 0}, "the folder is empty"),
        ({"only": 12}, "no labels were found"),
    ],
)
def test_data_that_cannot_be_learnt_from(tmp_path, capsys, classes, text):
    status, said = adapt(capsys, folder(tmp_path / "data", classes), tmp_path / "run")
    assert status == 2 and text in said and "fix: " in said
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "train,test,text",
    [
        ({"a": 2, "b": 2}, dict.fromkeys("abcdefg", 1), "7 classes, but only 4 training images"),
        ({"a": 9}, {"a": 2, "b": 2}, "all 9 training images are of one class"),
    ],
)
def test_given_splits_that_cannot_be_learnt_from(tmp_path, capsys, train, test, text):
    data = tmp_path / "data"
    for split, classes in (("train", train), ("val", test), ("test", test)):
        folder(data / split, classes)
    status, said = adapt(capsys, data, tmp_path / "run")
    assert status == 2 and text in said and "fix: " in said


def test_a_missing_folder_is_named(tmp_path, capsys):
    status, said = adapt(capsys, tmp_path / "nowhere", tmp_path / "run")
    assert status == 2 and "nowhere" in said and "fix: " in said


def test_labels_are_asked_for_where_there_are_none(tmp_path, capsys):
    flat = folder(tmp_path / "x", {"flat": 8}) / "flat"
    status, said = adapt(capsys, flat, tmp_path / "run")
    assert status == 2 and "no labels were found" in said and "vitkit pretrain mae needs none" in said


@pytest.mark.parametrize(
    "model,more,text",
    [
        ("vit_tny_patch16_224", [], "vit_tiny_patch16_224"),
        ("resnet18", [], "VisionTransformer"),
        ("vit_tiny_patch16_224", ["--image_size", "40"], "multiple"),
        ("missing.safetensors", [], "missing.safetensors"),
    ],
)
def test_models_that_cannot_be_used(tmp_path, capsys, model, more, text):
    data = folder(tmp_path / "data", {"a": 8, "b": 8})
    status, said = adapt(capsys, data, tmp_path / "run", *more, model=model)
    assert status == 2 and text in said and "fix: " in said, said


def test_unreadable_images_are_named_counted_and_limited(tmp_path, capsys):
    data = folder(tmp_path / "data", {"a": 20, "b": 20})
    for i in (3, 4, 5):
        (data / "a" / f"{i}.png").write_bytes((data / "a" / f"{i}.png").read_bytes()[:200])
    status, said = adapt(
        capsys, data, tmp_path / "run", "--val_fraction", "0.1", "--test_fraction", "0.1", "--max_steps", "9"
    )
    assert (status == 2 and "cannot be read" in said) or "truncated" in said
    assert "fix: " in said


def test_a_rare_class_is_said_aloud_and_predictions_round_trip(tmp_path, capsys):
    data = folder(tmp_path / "data", {"a": 12, "b": 12, "c": 1})
    status, said = adapt(capsys, data, tmp_path / "run")
    assert status == 0, said
    new = folder(tmp_path / "new", {"x": 3})
    assert cli.main(["predict", str(tmp_path / "run"), str(new), "--out", str(tmp_path / "p.csv")]) == 0
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0] == "image,predicted,p(a),p(b),p(c)" and len(lines) == 4


@pytest.mark.parametrize("flag,value,text", [
    ("batch_size", 0, "batch_size is 0"), ("batch_size", -2, "batch_size is -2"),
    ("workers", -1, "workers is -1"), ("devices", 0, "devices is 0"),
])  # fmt: skip
def test_machines_that_cannot_be(tmp_path, capsys, flag, value, text):
    data = folder(tmp_path / "data", {"a": 8, "b": 8})
    status, said = adapt(capsys, data, tmp_path / "run", f"--{flag}", str(value))
    assert status == 2 and text in said and "or more" in said
    assert not (tmp_path / "run").exists()


def test_the_corrected_command_may_use_the_same_folder(tmp_path, capsys):
    data, run = folder(tmp_path / "data", {"a": 8, "b": 8}), tmp_path / "run"
    status, _ = adapt(capsys, data, run, "--image_size", "40")
    assert status == 2 and not run.exists()
    status, _ = adapt(capsys, data, run)
    assert status == 0 and (run / "summary.json").is_file()


def test_a_mistyped_method_is_not_taken_for_a_model_in_silence(tmp_path, capsys):
    data = folder(tmp_path / "data", {"a": 4, "b": 4})
    for verb, word, named in (("explain", "prompt-cm", "prompt_cam"), ("attack", "hardn", "harden")):
        words = [verb, word, "--model", "vit_tiny_patch16_224", "--data", str(data), "--out", str(tmp_path / "o")]
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert f"'{word}' is read as --model, which is given again" in said and f"did you mean {named}?" in said
        with pytest.raises(
            ConfigError, match=f"got '{word}' and model='vit_tiny_patch16_224'\n  fix: did you mean {named}"
        ):
            getattr(vitkit, verb)(word, model="vit_tiny_patch16_224", data=str(data), out=str(tmp_path / "o"))
    assert cli.main(["explain", "vit_tiny_patch16_224", str(data), f"--data={data}"]) == 2
    assert "is read as --data, which is given again" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
