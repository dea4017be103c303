"""Exports give the run's own numbers in plain timm and in onnxruntime, and refuse what they cannot keep."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vitkit
from vitkit import tokens, weights
from vitkit.errors import ConfigError, MissingExtra, WeightsError
from vitkit.passport import Passport
from vitkit.run import exporting, onnx_export
from vitkit.run.exporting import export_onnx, export_safetensors
from vitkit.settings import Classify, Task

PLAIN = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
EVA = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def save_adapted(
    folder: Path, method: str, *, arch: str = "VisionTransformer", kwargs: dict = PLAIN, size: int = 16, head="linear",
    pool="keep", rope=None, **settings,
) -> Path:  # fmt: skip
    """A run folder as `vitkit adapt` leaves one, with every trained tensor and running statistic moved from its start."""
    vit = weights.load(arch, pretrained=False, image_size=size, arch_kwargs=kwargs, rope=rope, seed=1, say=None)
    module = importlib.import_module(f"vitkit.adapt.{method}")
    task, chosen = Task("single", ("a", "b", "c")), module.Settings(**settings)
    names = {"lora": "LoRA", "vpt": "VPT", "adaptformer": "AdaptFormer", "bitfit": "BitFit"}
    kind = getattr(module, names.get(method, method.capitalize()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(vit, chosen, task=task, classify=Classify(head=head, pool=pool)).finish().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                skip = method != "bitfit" and name.endswith("k_bias")
                if parameter.requires_grad and not skip:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(torch.randn_like(buffer))
                elif name.endswith("running_var"):
                    buffer.mul_(0.2 + torch.rand_like(buffer))
    step = {"method": f"adapt.{method}", "settings": json.loads(json.dumps(dataclasses.asdict(chosen)))}
    record = {"method": f"adapt.{method}", "settings": {"data": str(folder.absolute() / "photos"), "epochs": 1}}
    model.passport = dataclasses.replace(
        model.passport, classes=["a", "b", "c"], task="single", steps=[step], lineage=[record]
    )
    weights.save_run(folder, model)
    return folder


def logits_of(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tokens.logits(weights.load(folder, num_classes=None, say=None).eval(), pixels)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A real, tiny adaptation of handwriting with LoRA and the batch-normalised head."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    vitkit.adapt(
        "lora", model="VisionTransformer", arch_kwargs=PLAIN, pretrained=False, image_size=16, data="digits",
        out=str(out), labels_per_class=5, epochs=1, max_steps=2, batch_size=25, blr=0.05, warmup_epochs=0,
        head="bn_linear", augment=False, accelerator="cpu", quiet=True,
    )  # fmt: skip
    return out


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))


# ---------------------------------------------------------------- plain timm


def test_a_lora_run_becomes_plain_timm_weights(run, pixels, capsys):
    wanted = logits_of(run, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)))
    path = export_safetensors(run)
    assert path == run / "export" / "model.safetensors"
    said = capsys.readouterr().err
    assert "timm.create_model(" in said and "load_file" in said and "read back, its logits agree" in said
    config = json.loads((path.parent / "config.json").read_text())
    alone = timm.create_model(config["architecture"], num_classes=10, **config["model_args"]).eval()
    alone.load_state_dict(load_file(path), strict=True)
    assert type(alone.head) is nn.Linear and not any("lora" in name or ".0." in name[:7] for name in load_file(path))
    with torch.no_grad():
        found = alone(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)))
    assert torch.allclose(found, wanted, atol=1e-5 * max(1, wanted.abs().max()), rtol=0)


def test_timm_loads_the_folder_by_itself_and_vitkit_predicts_from_it(run, pixels):
    path = export_safetensors(run)
    wanted = logits_of(run, pixels)
    with torch.no_grad():
        local = timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()
        assert torch.allclose(local(pixels), wanted, atol=1e-5 * max(1, wanted.abs().max()), rtol=0)
    again = vitkit.load(path.parent, say=None)
    assert again.classes == [str(i) for i in range(10)] and again.passport.steps == []
    assert torch.allclose(logits_of(path.parent, pixels), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"head": "bn_linear"}),
        ("bitfit", {}),
        ("full", {"pool": "avg"}),
        ("lora", {"arch": "vit_small_patch16_dinov3_qkvb", "kwargs": EVA}),
        ("linear", {"arch": "deit_tiny_distilled_patch16_224", "kwargs": {"embed_dim": 24, "depth": 1}, "head": "bn_linear"}),
    ],
)  # fmt: skip
def test_plain_runs_load_strictly_into_timm_with_the_same_logits(tmp_path, pixels, method, options):
    folder = save_adapted(tmp_path / "run", method, **options)
    path = export_safetensors(folder)
    config = json.loads((path.parent / "config.json").read_text())
    alone = timm.create_model(config["architecture"], num_classes=3, **config["model_args"]).eval()
    alone.load_state_dict(load_file(path), strict=True)
    wanted = logits_of(folder, pixels)
    with torch.no_grad():
        assert torch.allclose(alone(pixels), wanted, atol=1e-5 * max(1, float(wanted.abs().max())), rtol=0)


def test_evas_biases_are_under_timms_names_again(tmp_path):
    folder = save_adapted(tmp_path / "run", "lora", arch="vit_small_patch16_dinov3_qkvb", kwargs=EVA)
    names = load_file(export_safetensors(folder))
    assert "blocks.0.attn.q_bias" in names and "blocks.0.attn.qkv.bias" not in names


def test_a_trained_key_bias_is_kept_in_the_layer():
    from vitkit.parts.blocks import ensure_qkv_layer, restore_qkv_biases

    vit = weights.load("vit_small_patch16_dinov3_qkvb", pretrained=False, arch_kwargs=EVA, image_size=16, say=None)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    ensure_qkv_layer(vit)
    restore_qkv_biases(vit)
    assert vit.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    ensure_qkv_layer(vit)
    with torch.no_grad():
        vit.blocks[0].attn.qkv.bias[24:48] = 1.0
    restore_qkv_biases(vit)
    names = vit.state_dict().keys()
    assert "blocks.0.attn.qkv.bias" in names and "blocks.1.attn.q_bias" in names


def test_rounded_rotary_periods_are_not_passed_off_as_timms(tmp_path, capsys):
    kwargs = {"arch": "vit_small_patch16_dinov3", "kwargs": EVA, "rope": "bfloat16"}
    export_safetensors(save_adapted(tmp_path / "run", "linear", **kwargs))
    said = capsys.readouterr().err
    assert "trained with bfloat16" in said and "vitkit.load(" in said and "timm.create_model" not in said


# ---------------------------------------------------------------- adapters that stay


@pytest.mark.parametrize("method", ["adaptformer", "vpt"])
def test_adapters_stay_and_that_is_said(tmp_path, pixels, capsys, method):
    folder = save_adapted(tmp_path / "run", method, head="bn_linear")
    path = export_safetensors(folder)
    said = capsys.readouterr().err
    assert f"{method} cannot be merged" in said and f'vitkit.load("{path.parent}")' in said
    assert torch.equal(logits_of(path.parent, pixels), logits_of(folder, pixels))
    assert vitkit.load(path, say=None).passport.steps[0]["method"] == f"adapt.{method}"


def test_adapters_need_a_file_that_the_passport_belongs_to(tmp_path):
    folder = save_adapted(tmp_path / "run", "adaptformer")
    with pytest.raises(ConfigError, match=r"adaptformer cannot be merged.*\n  fix: --out .*model.safetensors"):
        export_safetensors(folder, str(tmp_path / "other.safetensors"))


def test_a_pretrained_trunk_without_a_head_is_exported(tmp_path, pixels):
    vit = weights.load("VisionTransformer", pretrained=False, arch_kwargs=PLAIN, image_size=16, say=None)
    weights.save_run(tmp_path / "run", vit)
    path = export_safetensors(tmp_path / "run", str(tmp_path / "trunk.safetensors"))
    assert path.name == "trunk.safetensors" and not (tmp_path / "passport.json").exists()
    again = vitkit.load(path, say=None)
    assert torch.allclose(again(pixels.sigmoid()), vitkit.load(tmp_path / "run", say=None)(pixels.sigmoid()), atol=1e-6)


# ---------------------------------------------------------------- what travels, and what is refused


def test_no_folder_of_this_machine_is_in_the_export(tmp_path):
    folder = save_adapted(tmp_path / "run", "bitfit")
    path = export_safetensors(folder)
    for name in ("passport.json", "config.json"):
        assert str(tmp_path) not in (path.parent / name).read_text()
    assert str(tmp_path).encode() not in path.read_bytes()
    passport = Passport.read(path.parent)
    assert passport.lineage[0]["settings"]["data"] == "photos" and passport.lineage[-1]["method"] == "export"


def test_an_export_may_be_repeated(tmp_path):
    folder = save_adapted(tmp_path / "run", "linear")
    first = load_file(export_safetensors(folder))
    again = load_file(export_safetensors(folder, str(folder / "export")))
    assert first.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in first.items())
    assert sorted(one.name for one in (folder / "export").iterdir()) == [
        "config.json", "model.safetensors", "passport.json",
    ]  # fmt: skip


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing is not a run folder"):
        export_safetensors(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("vitkit: 0.1.0\nverb: adapt\n")
    with pytest.raises(ConfigError, match=r"has no model yet\n  fix: finish it"):
        export_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("{run}/other.safetensors", "is a run folder; its own files would be replaced"),
        ("{run}/model.pth", "does not end in .safetensors"),
        ("{run}/../foreign", "config.json belongs to another model"),
    ],
)
def test_nothing_foreign_is_replaced(run, out, message):
    foreign = run.parent / "foreign"
    foreign.mkdir(exist_ok=True)
    (foreign / "config.json").write_text("{}")
    before = (run / "passport.json").read_bytes()
    with pytest.raises(ConfigError, match=message):
        export_safetensors(run, out.format(run=run))
    assert (run / "passport.json").read_bytes() == before and (foreign / "config.json").read_text() == "{}"


def test_a_file_with_other_logits_is_refused(tmp_path, monkeypatch):
    folder = save_adapted(tmp_path / "run", "bitfit")
    real = weights.save_state

    def wrong(path, tensors, meta):
        real(path, {**tensors, "head.bias": tensors["head.bias"] + 1e-3}, meta)

    monkeypatch.setattr(exporting.weights, "save_state", wrong)
    with pytest.raises(WeightsError, match=r"was not written: read back it gives logits that differ by \d"):
        export_safetensors(folder)
    assert list((folder / "export").iterdir()) == []


# ---------------------------------------------------------------- ONNX


def test_onnx_takes_pixels_and_gives_probabilities(run, capsys):
    import onnxruntime

    path = export_onnx(run)
    assert path == run / "export" / "model.onnx"
    assert "at most" in capsys.readouterr().err
    certificate = json.loads(Path(f"{path}.json").read_text())
    assert certificate["input"]["pixels"] == ["batch", 3, 16, 16] and certificate["input"]["range"] == [0, 1]
    assert certificate["outputs"] == {"probabilities": ["batch", 10], "feature": ["batch", 24]}
    assert certificate["max_difference"]["images"] == "16 test images of the run"
    assert certificate["max_difference"]["probabilities"] <= 1e-4
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = vitkit.load(run, say=None)
    for count in (1, 5):  # neither is the batch that was traced
        images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
        found, feature = session.run(None, {"pixels": images.numpy().astype(np.float32) / 255})
        assert np.allclose(found, model(images).softmax(1).numpy(), atol=1e-5)
        assert np.allclose(
            feature, tokens.feature(model.vit, model.passport.preprocess.normalise(images)).detach(), atol=1e-4
        )


def test_a_graph_with_other_numbers_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_trace", lambda model, images, path: path.write_bytes(b""))
    wrong = onnx_export._Checked(2e-3, 1e-6, "16 test images of the run")
    monkeypatch.setattr(onnx_export, "_check_onnx", lambda *args: wrong)
    with pytest.raises(WeightsError, match=r"differ from the model's by 2.0e-03 \(allowed 1e-04\) on 16 test images"):
        export_onnx(run, str(tmp_path / "a.onnx"))
    wrong.feature = float("nan")
    with pytest.raises(WeightsError, match="by nan"):
        export_onnx(run, str(tmp_path / "a.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_extra_names_the_command(run, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else real(name, *a))
    with pytest.raises(
        MissingExtra, match=r"'onnxruntime', which is not installed\n  fix: pip install 'vitkit\[export\]'"
    ):
        export_onnx(run)


def test_noise_stands_in_where_the_data_is_gone(tmp_path, capsys):
    folder = save_adapted(tmp_path / "run", "linear")
    (folder / "config.yaml").write_text(f"vitkit: 0.1.0\nverb: adapt\ndata: {tmp_path / 'moved'}\n")
    images, where = onnx_export.check_images(folder, Passport.read(folder))
    assert images.shape == (16, 3, 16, 16) and where == "16 images of seeded noise"
    assert "checking on seeded noise" in capsys.readouterr().err
    again, _ = onnx_export.check_images(folder, Passport.read(folder))
    assert torch.equal(images, again)
