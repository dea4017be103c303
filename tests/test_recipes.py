"""Every recipe is accepted by the command that it is written for, so that no key can rot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from vitkit.errors import ConfigError
from vitkit.parts.schedules import scaled_lr
from vitkit.run import discover, verbs

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SMALL = [path for path in RECIPES if path.parent.name == "small"]
FULL = [path for path in RECIPES if path not in SMALL]
FROM_THE_COMMAND_LINE = ("model", "data", "out")
TRAINING = [path for path in FULL if yaml.safe_load(path.read_text(encoding="utf-8"))["verb"] != "rl"]


def settings(path: Path) -> tuple[dict, dict]:
    """(the recipe as written, the settings that its command makes of it)."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    needed = ("env", "model", "out") if written["verb"] == "rl" else FROM_THE_COMMAND_LINE
    given = {key: "x" for key in needed if key not in written}
    config = verbs.settings_for(written["verb"], written["method"], {"config": str(path), **given})
    return written, config.values


def name(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").with_suffix("").as_posix()


def test_there_are_recipes_at_both_scales():
    assert len(SMALL) >= 3 and len(FULL) >= 6


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_key_is_a_setting_and_every_value_arrives(path):
    written, values = settings(path)
    assert discover.find(written.pop("verb"), written.pop("method"))
    for key, value in written.items():
        arrived = list(values[key]) if isinstance(values[key], tuple) else values[key]
        assert arrived == value, f"{key}: {value} in the file, {arrived} in the run"


@pytest.mark.parametrize("path", FULL, ids=name)
def test_full_scale_recipes_cite_a_source_for_every_value(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"arXiv \d{4}\.\d{5}", text) and "commit" in text
    for line in text.splitlines():
        if not line.startswith(("#", "verb:", "method:")):
            assert re.search(r"\S +# \S", line), f"no source: {line}"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_command_in_the_header_is_the_recipes_own(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    command = f"vitkit {written['verb']} {written['method']} --config recipes/{name(path)}.yaml"
    assert command in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_learning_rate_and_batch_are_the_papers(path):
    """The rate at full scale follows from the recipe alone: blr x images a step / 256, or its square-root rule."""
    expected = {  # images a step, learning rate
        "thorax_mae_pretrain_vit_s": (2048, 1.2e-3),
        "thorax_mae_pretrain_vit_b": (2048, 1.2e-3),
        "thorax_mae_finetune_nih": (1024, 1e-3),
        "mae_pretrain_vit_b": (4096, 2.4e-3),
        "adaptformer_cifar100_vit_b": (1024, 0.4),
        "vpt_cifar100_vit_b": (1024, 0.4),
        "linear_cifar100_vit_b": (1024, 0.4),
        "ear_mvtec_vit_s8": (16, 1e-3),
        "dvpt_ddr_vit_b": (50, 5e-4),
        "prompt_cam_cub_vit_b": (16, 0.005),
        "ph_reg_dinov2_vit_b": (8, 1e-4),
        "dvt_dinov2_vit_b": (128, 2e-4 * 0.5**0.5),
        "rad_dino_vit_b": (2560, 0.001 * 2.5**0.5),
        "phikon_v2_vit_l": (4096, 4e-3),
        "tov_vicreg_ten_games_vit_ti": (512, 1.2),
        "hi_end_mae_pretrain_large_p12": (24, 1e-4),
        "hi_end_mae_unetr_btcv": (1, 1e-4),
        "videomae_v2_pretrain_vit_g": (2048, 4.8e-3),
        "videomae_v2_pretrain_vit_b": (2048, 8e-3),
        "videomae_v2_k710_vit_g": (96, 3.75e-4),
        "videomae_v2_finetune_k400_vit_g": (96, 3.75e-6),
        "videomae_v2_distil_vit_b": (512, 1.4e-3),
    }
    _, values = settings(path)
    images = values["batch_size"] * values["devices"] * values["accumulate"]
    assert values["lr"] == "auto"
    rate = scaled_lr(values["blr"], images, values["lr_rule"])
    assert (images, pytest.approx(rate)) == expected[path.stem]


def test_a_wrong_key_is_refused(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("verb: adapt\nmethod: adaptformer\nbottelneck: 8\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bottelneck.*\n.*bottleneck"):
        settings(path)


@pytest.mark.parametrize("path", SMALL, ids=name)
def test_small_recipes_need_no_download(path):
    _, values = settings(path)
    data = values.get("data", "digits")  # an agent has an environment instead
    assert data == "digits" or data.startswith("runs/")  # made by the command above it
    assert values["pretrained"] is False or str(values["model"]).startswith("runs/")
