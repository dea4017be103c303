"""One config, three spellings; strict, with errors in plain words."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from vitkit.errors import ConfigError
from vitkit.run import cli, config, discover, starting, verbs

NEEDED = {"model": "m", "data": "d", "out": "o"}
WORDS = ["--model", "m", "--data", "d", "--out", "o"]


def build(given):
    return verbs.settings_for("adapt", "adaptformer", given)


def test_keywords_flags_and_yaml_mean_the_same(tmp_path):
    wanted = {"scale": "learnable", "layers": [1, -1], "crop_scale": [0.3, 1.0], "epochs": 7, "quiet": True, "lr": 1e-4}
    python = build({**NEEDED, **wanted, "layers": (1, -1)})
    line = build(
        [
            *WORDS,
            "--scale",
            "learnable",
            "--layers",
            "1,-1",
            "--crop-scale",
            "0.3,1.0",
            "--epochs=7",
            "--quiet",
            "--lr",
            "1e-4",
        ]
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"verb": "adapt", "method": "adaptformer", **NEEDED, **wanted}))
    from_file, from_flag = build({"config": file}), build(["--config", str(file)])
    assert python.values == line.values == from_file.values == from_flag.values
    assert python.method.layers == (1, -1) and python.train.crop_scale == (0.3, 1.0)
    assert build(["--config", str(file), "--epochs", "9"]).values["epochs"] == 9
    assert build({"config": file, "epochs": 9}).values["epochs"] == 9


def test_what_a_run_wrote_is_read_back(tmp_path):
    import vitkit

    settings = {"pretrained": False, "patch_size": 8, "image_size": 32, "in_chans": 1, "workers": 0, "quiet": True}
    arch = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    run = vitkit.adapt(
        "linear",
        model="vit_tiny_patch16_224",
        data="digits",
        out=tmp_path / "a",
        arch_kwargs=arch,
        max_steps=1,
        **settings,
    )
    again = starting.resolve(verbs.settings_for("adapt", "linear", ["--config", str(run.path / "config.yaml")]))
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    values = config.plain(again.values)
    assert {key: values[key] for key in written if key in values} == {k: v for k, v in written.items() if k in values}


@pytest.mark.parametrize(
    "given,text",
    [
        ({"mask_rato": 1}, "there is no setting mask_rato"),
        (["--bottlneck", "3"], "did you mean --bottleneck?"),
        (["--batch_size", "abc"], "batch_size: expected a whole number, got abc"),
        (["--scale", "abc"], "scale: expected a number or learnable, got abc"),
        (["--option", "both"], "option: expected parallel or sequential, got both"),
        (["--crop_scale", "3"], "crop_scale: expected 2 numbers with commas between, got [3]"),
        (["--bottleneck", "0"], "bottleneck is 0"),
        ({"epochs": 3.5}, "epochs: expected a whole number, got 3.5"),
        (["--config", "nowhere.yaml"], "there is no config file nowhere.yaml"),
    ],
)
def test_errors_name_the_setting_the_value_and_the_fix(given, text):
    given = {**NEEDED, **given} if isinstance(given, dict) else [*WORDS, *given]
    with pytest.raises(ConfigError) as error:
        build(given)
    assert text in str(error.value)


def test_an_unknown_key_in_yaml_names_the_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: m\nbottlneck: 3\n")
    for given in ({"config": file}, ["--config", str(file)]):
        with pytest.raises(
            ConfigError, match=r"no setting bottlneck in .*settings.yaml\n  fix: did you mean bottleneck"
        ):
            build(given)


def test_missing_names_are_asked_for():
    with pytest.raises(ConfigError, match=r"needs data, out\n  fix: give --data"):
        build(["--model", "m"])


@pytest.mark.parametrize(
    "words", [["adpt"], ["adapt", "adaptfrmer"], ["adapt", "mae"], ["adapt", "--model", "m"], ["methods", "x"]]
)
def test_the_command_line_explains_itself(words, capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("vitkit: ") and "fix: " in said and "Traceback" not in said


def test_help_and_methods_need_no_torch():
    code = (
        "import sys; from vitkit.run.cli import main; main(['methods']); main(['adapt']); main(['--help'])\n"
        "try: main(['adapt', 'adaptformer', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for method in discover.methods():
        assert method.name in done.stdout
    assert "--bottleneck" in done.stdout and "ffn_num" in done.stdout


def test_every_method_is_documented_as_promised():
    for method in discover.methods():
        assert method.summary.endswith("."), method.name
        if method.verb != "evaluate":
            assert method.paper, f"{method.module} cites no paper"
            # What trains nothing is part of `vitkit explain MODEL DATA`, or is the attack of `vitkit attack MODEL`.
            line = f"vitkit {method.verb} {method.name} " if method.trains else f"vitkit {method.verb} "
            for part in ("What happens, and where:", "Differs from the paper:", "Cost:", line):
                assert part in method.doc, f"{method.module} lacks '{part}'"
            call = f'vitkit.{method.verb}("{method.name}", ' if method.trains else f"vitkit.{method.verb}"
            assert call in method.doc


def test_a_verb_is_a_package_and_a_function():
    import vitkit
    from vitkit.adapt.adaptformer import AdaptFormer

    assert callable(vitkit.adapt) and AdaptFormer.__module__ == "vitkit.adapt.adaptformer"
    with pytest.raises(ConfigError, match="needs data, out"):
        vitkit.adapt("linear", model="x")
    assert set(vitkit.VERBS) <= set(dir(vitkit))


def test_fractions_are_numbers_in_all_three_spellings(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\nweight_decay: 1/20\ncrop_scale: [1/4, 1]\nout: a/b\n")
    words = ["--model", "m", "--data", "d", "--out", "a/b", "--weight_decay", "1/20", "--crop_scale=1/4,1"]
    for given in (
        words,
        ["--config", str(file)],
        {"config": file},
        {**NEEDED, "out": "a/b", "weight_decay": "1/20", "crop_scale": "1/4,1"},
        {**NEEDED, "out": "a/b", "weight_decay": "1/20", "crop_scale": ("1/4", 1.0)},
    ):
        found = build(given)
        assert found.train.weight_decay == 0.05 and found.train.crop_scale == (0.25, 1.0) and found.train.out == "a/b"
    for wrong in ("1/0", "a/b", "1/2/3"):
        with pytest.raises(ConfigError, match="weight_decay: expected a number"):
            build([*WORDS, "--weight_decay", wrong])


@pytest.mark.parametrize("written", ["3,5", "yes,no", "1e5", "007", "null,~", "no: finding, it's", "#1,[b]", "größer,"])
def test_words_stay_words_whatever_yaml_makes_of_them(written, tmp_path):
    """Classes are often called 0, 1, 2 or yes and no."""
    wanted = tuple(part.strip() for part in written.split(",") if part)
    by_flag = verbs.settings_for("explain", None, ["--model", "m", "--data", "d", "--classes", written])
    assert by_flag.own.classes == wanted
    assert verbs.settings_for("explain", None, ["--model=m", "--data=d", f"--classes={written}"]).own.classes == wanted
    for given in (written, wanted, list(wanted)):
        found = verbs.settings_for("explain", None, {"model": "m", "data": "d", "classes": given})
        assert found.own.classes == wanted
    assert verbs.settings_for("attack", None, ["--model=m", "--data=d", "--baselines", ""]).own.baselines == ()
    assert verbs.settings_for("attack", None, ["--model=m", "--data=d", "--layer", "1,2"]).method.layer == (1, 2)


def test_verbs_that_explain_and_attack_take_their_first_words_without_flags(monkeypatch, capsys):
    seen = {}

    def job(config):
        seen.update(config.values)
        return {"verdict": "seen", "report": "page.html"}

    from vitkit.run import attacking, explaining

    monkeypatch.setattr(explaining, "explain_job", job)
    monkeypatch.setattr(attacking, "attack_job", job)
    assert cli.main(["explain", "runs/a", "photos", "--classes", "cat,dog"]) == 0
    assert (seen["model"], seen["data"], seen["classes"]) == ("runs/a", "photos", ("cat", "dog"))
    assert cli.main(["attack", "runs/a", "--data", "photos", "--eps", "8/255"]) == 0
    assert seen["eps"] == 8 / 255
    assert cli.main(["attack", "dta", "runs/a", "photos"]) == 0 and seen["data"] == "photos"
    assert capsys.readouterr().out.count("seen\npage.html") == 3
    assert cli.main(["explain", "runs/a", "photos", "more"]) == 2
    assert "takes 2 names, and 'more' is one more" in capsys.readouterr().err
    assert cli.main(["explain", "runs/a"]) == 2
    assert "needs data" in capsys.readouterr().err
    assert verbs.explain("runs/b", "x")["verdict"] == "seen" and seen["model"] == "runs/b"
    assert verbs.attack("dta", model="runs/b", data="x")["verdict"] == "seen"


@pytest.mark.parametrize("verb", ["explain", "attack"])
def test_help_of_a_verb_with_and_without_methods(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    shown = capsys.readouterr().out
    assert f"vitkit {verb} MODEL IMAGES" in shown and "--out OUT" in shown
    trained = {"explain": "prompt_cam", "attack": "harden"}[verb]
    assert trained in shown
    with pytest.raises(SystemExit):
        cli.main([verb, trained, "--help"])
    assert "--epochs" in capsys.readouterr().out
