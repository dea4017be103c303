"""Run folders: claiming, differing settings, one writer, records and checkpoints that survive kills and full disks."""

import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vitkit.errors import ConfigError, DataError, TrainingError, VitkitError, WeightsError
from vitkit.run.folder import RunFolder
from vitkit.run.lock import Busy, Lock
from vitkit.run.values import differing, flatten, plain, shown

CONFIG = {"model": "vit_tiny_patch16_224", "lr": 1e-3, "betas": (0.9, 0.999), "mae": {"mask_ratio": 0.75}, "workers": 2}


def claimed(path, config=CONFIG, kind="pretrain.mae", **more):
    folder = RunFolder(path)
    return folder, folder.claim(config, kind, **more)


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


# ---- claiming ------------------------------------------------------------------------------------------------------------


def test_new_resume_finished(tmp_path):
    folder, state = claimed(tmp_path / "deep" / "run")
    assert state == "new"
    folder.release()
    folder, state = claimed(folder.path)
    assert state == "resume"
    folder.finish({"verb": "pretrain", "verdict": "good"})
    folder.release()
    before = tree(folder.path)
    folder, state = claimed(folder.path)
    assert state == "finished"
    assert tree(folder.path) == before, "a finished run is not written"
    assert folder.read_summary() == {"verb": "pretrain", "verdict": "good"}


def test_what_is_refused_at_once_leaves_nothing_in_the_way(tmp_path):
    """Settings that prove wrong after the folder was claimed must not hold it against the corrected command."""
    path = tmp_path / "runs" / "a"
    with pytest.raises(DataError), RunFolder(path) as folder:
        folder.claim(CONFIG, "explain")
        raise DataError("no images")
    assert not path.exists()
    path.mkdir()
    with pytest.raises(DataError), RunFolder(path) as folder:
        folder.claim(CONFIG, "explain")
        raise DataError("no images")
    assert path.is_dir() and not any(path.iterdir())
    for error, kept in ((RuntimeError, 2), (KeyboardInterrupt, 2)):  # what no setting is to blame for can be resumed
        with pytest.raises(error), RunFolder(path) as folder:
            folder.claim(CONFIG, "explain")
            raise error
        assert len(tree(path)) == kept
    with pytest.raises(DataError), RunFolder(path) as folder:  # an older run is not this one's to take away
        assert folder.claim(CONFIG, "explain") == "resume"
        raise DataError("no images")
    assert len(tree(path)) == 2
    with pytest.raises(DataError), RunFolder(tmp_path / "b") as folder:
        folder.claim(CONFIG, "explain")
        folder.log({"step": 1})
        raise DataError("no more images")
    assert set(tree(tmp_path / "b")) == {"config.yaml", "environment.json", "metrics.jsonl"}


def test_an_empty_folder_and_leftovers_of_a_killed_start_are_new(tmp_path):
    (tmp_path / ".config.yaml.a1b2c3d4.part").write_text("half")
    folder, state = claimed(tmp_path)
    assert state == "new"
    assert not list(tmp_path.glob(".*.part"))
    folder.release()
    assert not (tmp_path / ".lock").exists()


def test_other_settings_are_named_with_both_values_and_the_fix(tmp_path):
    claimed(tmp_path)[0].release()
    before = tree(tmp_path)
    other = {**CONFIG, "lr": 0.003, "betas": (0.9, 0.95), "mae": {"mask_ratio": 0.75, "decoder_depth": 4}}
    del other["model"]
    with pytest.raises(ConfigError) as error:
        RunFolder(tmp_path).claim(other, "pretrain.mae")
    text = str(error.value)
    assert f"{tmp_path} holds another run" in text
    assert "    lr: 0.001 -> 0.003\n" in text
    assert "    betas: [0.9, 0.999] -> [0.9, 0.95]\n" in text
    assert "    model: vit_tiny_patch16_224 -> (not set)\n" in text
    assert "    mae.decoder_depth: (not set) -> 4\n" in text
    assert "workers" not in text and "mask_ratio" not in text
    assert "fix: choose another --out, give the old values (--model vit_tiny_patch16_224 --lr 0.001" in text
    assert "--betas '[0.9, 0.999]'" in text and "delete the folder" in text
    assert tree(tmp_path) == before


def test_another_verb_in_the_same_folder(tmp_path):
    claimed(tmp_path)[0].release()
    with pytest.raises(ConfigError, match=r"verb: pretrain\.mae -> adapt\.lora"):
        RunFolder(tmp_path).claim(CONFIG, "adapt.lora")


def test_free_settings_may_differ_and_the_new_value_is_kept(tmp_path):
    claimed(tmp_path, command="vitkit pretrain mae")[0].release()
    changed = {**CONFIG, "workers": 8, "mae": {"mask_ratio": 0.9}}
    with pytest.raises(ConfigError, match=r"mae\.mask_ratio: 0\.75 -> 0\.9"):
        RunFolder(tmp_path).claim(changed, "pretrain.mae", free=frozenset({"workers"}))
    folder, state = claimed(
        tmp_path, changed, free=frozenset({"workers", "mae"}), command="vitkit pretrain mae --workers 8"
    )
    assert state == "resume"
    assert folder.read_config()["workers"] == 8
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# vitkit pretrain mae\n# resumed by: vitkit pretrain mae --workers 8\n")
    folder.release()


def test_free_is_a_name_not_a_beginning(tmp_path):
    claimed(tmp_path, {"workers_extra": 1})[0].release()
    with pytest.raises(ConfigError, match="workers_extra"):
        RunFolder(tmp_path).claim({"workers_extra": 2}, "pretrain.mae", free=frozenset({"workers"}))


def test_the_folder_itself_is_no_setting_that_could_differ(tmp_path):
    claimed(tmp_path / "a", {"lr": 1, "out": str(tmp_path / "a")})[0].release()
    (tmp_path / "a").rename(tmp_path / "b")
    folder, state = claimed(tmp_path / "b", {"lr": 1, "out": str(tmp_path / "b")})
    assert state == "resume" and folder.read_config()["out"] == str(tmp_path / "b")
    folder.release()


def test_records_without_a_checkpoint_start_again_with_the_run(tmp_path):
    folder, _ = claimed(tmp_path)
    folder.log({"step": 1})
    folder.release()
    again, state = claimed(tmp_path)
    assert state == "resume" and again.records() == []
    again.log({"step": 1})
    again.save_checkpoint({"step": 1})
    again.release()
    again, _ = claimed(tmp_path)
    assert again.records() == [{"step": 1}]
    again.release()


def test_a_folder_of_other_things_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.yaml").write_text("model: something of another program\n")
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as error:
        RunFolder(tmp_path).claim(CONFIG, "pretrain.mae")
    assert "holds files but no vitkit run (config.yaml, thesis.tex)" in str(error.value)
    assert "fix: choose another --out, or empty the folder; nothing in it was touched" in str(error.value)
    assert tree(tmp_path) == before
    with pytest.raises(ConfigError, match="no vitkit run"):
        RunFolder(tmp_path).read_config()


def test_a_file_in_the_way_and_broken_yaml(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a run folder"):
        RunFolder(tmp_path / "out").claim(CONFIG, "evaluate")
    folder = claimed(tmp_path / "run")[0]
    folder.release()
    (tmp_path / "run" / "config.yaml").write_text("vitkit: [1\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML"):
        folder.claim(CONFIG, "pretrain.mae")


def test_config_is_readable_and_round_trips(tmp_path):
    @dataclass
    class Group:
        rate: float = 2.5e-5

    config = {
        "data": Path("/data/röntgen"), "lr": np.float64(1.5e-4), "none": None, "on": True, "text": "1e-3", "group": Group(),
        "nan": float("nan"), "empty": {}, "words": ["a", "b"], "n": np.int64(3),
    }  # fmt: skip
    folder, _ = claimed(tmp_path, config, "adapt.lora", command="vitkit adapt lora\n--evil: 'x'")
    text = (tmp_path / "config.yaml").read_text()
    assert text.splitlines()[0] == "# vitkit adapt lora\\n--evil: 'x'"
    content = yaml.safe_load(text)
    assert content["verb"] == "adapt" and content["method"] == "lora" and content["vitkit"]
    back = folder.read_config()
    assert back["data"] == "/data/röntgen" and back["lr"] == 1.5e-4 and back["group"] == {"rate": 2.5e-5}
    assert back["text"] == "1e-3" and back["on"] is True and back["n"] == 3 and back["empty"] == {}
    assert "röntgen" in text, "people read this file"
    assert folder.kind == "adapt.lora"
    folder.release()
    assert claimed(tmp_path, config, "adapt.lora")[1] == "resume", "NaN, paths and NumPy numbers equal themselves"


def test_environment_names_versions_but_not_the_machine(tmp_path):
    import platform

    folder, _ = claimed(tmp_path)
    env = folder.read_environment()
    assert env["torch"] == torch.__version__.split("+")[0] or env["torch"] == torch.__version__
    assert {"python", "timm", "vitkit", "platform", "threads", "started"} <= env.keys()
    text = (tmp_path / "environment.json").read_text()
    assert platform.node() not in text and str(Path.home()) + "/" not in text and str(tmp_path) not in text
    folder.release()
    folder, _ = claimed(tmp_path)
    again = folder.read_environment()
    assert again["started"] == env["started"] and len(again["resumed"]) == 1
    folder.release()


def test_differences_are_strict_about_switches():
    assert differing({"a": 1}, {"a": True}) == ["a"]
    assert differing({"a": 1}, {"a": 1.0}) == []
    assert differing({"a": [1, True]}, {"a": [1, 1]}) == ["a"]
    assert flatten({"a": {"b": 1, "c": {}}}) == {"a.b": 1, "a.c": {}}
    assert shown({"a": [0.1, None, True, "x"]}, "a") == "[0.1, null, true, x]"
    assert shown({}, "a") == "(not set)"
    with pytest.raises(TypeError, match=r"a\.b\[1\] is a object"):
        plain({"a": {"b": [1, object()]}})


# ---- one writer ----------------------------------------------------------------------------------------------------------

HOLD = (
    "import sys, time, vitkit.run.lock as l; l.Lock(sys.argv[1]).acquire(); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process in the middle of writing the run in `run`."""
    claimed(tmp_path / "run", {"lr": 1}, "evaluate")[0].release()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_a_dead_one_replaced_aloud(tmp_path, holder):
    with pytest.raises(ConfigError) as error:
        RunFolder(tmp_path / "run").claim({"lr": 1}, "evaluate")
    assert f"is being written by process {holder.pid} right now" in str(error.value)
    assert "fix: wait for it, choose another --out" in str(error.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said = []
    folder = RunFolder(tmp_path / "run", say=said.append)
    assert folder.claim({"lr": 1}, "evaluate") == "resume"
    assert said == [f"{tmp_path / 'run'}: process {holder.pid} ended without closing this run; taking it over"]
    folder.release()
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_same_process_may_claim_again(tmp_path):
    """A notebook cell that failed is run again while the traceback still holds the first folder."""
    first, _ = claimed(tmp_path)
    second, state = claimed(tmp_path)
    assert state == "resume"
    first.release()
    assert (tmp_path / ".lock").exists(), "the first holder must not let go of what the second took over"
    second.release()
    assert not (tmp_path / ".lock").exists()


def test_the_lock_is_let_go_with_the_folder(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.claim(CONFIG, "evaluate")
    assert not (tmp_path / ".lock").exists()
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG, "evaluate")
    del folder
    assert not (tmp_path / ".lock").exists()


def test_without_record_locks_the_process_number_decides(tmp_path, monkeypatch):
    monkeypatch.setattr("vitkit.run.lock.fcntl", None)
    (tmp_path / "a").write_text(f"{os.getppid()}\n")
    with pytest.raises(Busy) as busy:
        Lock(tmp_path / "a").acquire()
    assert busy.value.pid == os.getppid()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "b").write_text(f"{gone.pid}\n")
    lock = Lock(tmp_path / "b")
    assert lock.acquire() == gone.pid
    assert (tmp_path / "b").read_text() == f"{os.getpid()}\n"
    lock.release()


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path):
    folder, _ = claimed(tmp_path)
    child = os.fork()
    if child == 0:
        folder.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    folder.release()


# ---- records -------------------------------------------------------------------------------------------------------------


def test_records_append_truncate_and_read(tmp_path):
    folder, _ = claimed(tmp_path)
    assert folder.records() == []
    for step in range(1, 6):
        folder.log({"step": step, "loss": torch.tensor(1.0 / step), "lr": np.float32(0.5)})
    folder.log({"step": 5, "val_auc": float("nan"), "worst": float("inf"), "name": "Müller"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[-1]) == {"step": 5, "val_auc": None, "worst": None, "name": "Müller"}
    assert "NaN" not in lines[-1] and "Infinity" not in lines[-1]
    assert folder.truncate(3) == 3
    folder.log({"step": 4, "loss": 9.0})
    assert [record["step"] for record in folder.records()] == [1, 2, 3, 4]
    assert folder.records()[-1]["loss"] == 9.0
    assert folder.truncate(10) == 0
    folder.release()


def test_a_half_written_last_line_is_passed_over_and_cut_before_appending(tmp_path):
    folder, _ = claimed(tmp_path)
    folder.log({"step": 1})
    folder.save_checkpoint({"step": 1})
    folder.release()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    again, _ = claimed(tmp_path)
    assert again.records() == [{"step": 1}]
    again.log({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    again.release()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\nnot json\n{"step": 3}\n')
    with pytest.raises(
        DataError, match=r"metrics\.jsonl, line 3 is not JSON: 'not json'\n  fix: mend or remove that line"
    ):
        RunFolder(tmp_path).records()


def test_killed_while_logging_every_whole_line_survives(tmp_path):
    code = """
    import sys
    from vitkit.run.folder import RunFolder
    folder = RunFolder(sys.argv[1])
    for step in range(10**9):
        folder.log({"step": step, "text": "x" * 300})
        if step == 20: print("go", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "go\n"
    time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    records = RunFolder(tmp_path).records()
    assert [record["step"] for record in records] == list(range(len(records))) and len(records) > 20


# ---- checkpoints ---------------------------------------------------------------------------------------------------------

STATE = {
    "step": 7,
    "weights": OrderedDict(w=torch.arange(6.0).reshape(2, 3)),
    "best": None,
    "order": [1, (2.5, "x")],
    "on": True,
}


def same_state(state):
    return (
        state["step"] == 7
        and torch.equal(state["weights"]["w"], STATE["weights"]["w"])
        and state["order"] == [1, (2.5, "x")]
    )


def test_checkpoint_round_trip(tmp_path):
    folder, _ = claimed(tmp_path)
    assert folder.load_checkpoint() is None
    folder.save_checkpoint(STATE)
    assert same_state(folder.load_checkpoint())
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2, dtype=torch.bfloat16)}
    optimizer = {
        "state": {0: moments},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0], "fused": None}],
    }
    folder.save_checkpoint(
        {"optimizer": optimizer, "rng": torch.get_rng_state(), "p": torch.nn.Parameter(torch.ones(1))}
    )
    back = folder.load_checkpoint()
    assert back["optimizer"]["param_groups"] == optimizer["param_groups"]
    assert back["optimizer"]["state"][0]["exp_avg_sq"].dtype == torch.bfloat16
    assert torch.equal(back["rng"], torch.get_rng_state())
    folder.release()


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"rng": {"numpy": np.zeros(3)}}, "rng.numpy (ndarray)"),
        ({"list": [1, np.float64(2)]}, "list[1] (float64)"),
        ({"path": Path("x")}, "path (PosixPath)"),
    ],
)
def test_what_could_not_be_read_back_safely_is_not_written(tmp_path, state, named):
    folder, _ = claimed(tmp_path)
    folder.save_checkpoint(STATE)
    with pytest.raises(TypeError, match=re.escape(named)):
        folder.save_checkpoint(state)
    assert same_state(folder.load_checkpoint())
    folder.release()


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "torch.save"])
def test_a_failing_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, where):
    folder, _ = claimed(tmp_path)
    folder.save_checkpoint(STATE)
    with monkeypatch.context() as broken:
        broken.setattr(where, full_disk)
        with pytest.raises(TrainingError) as error:
            folder.save_checkpoint({"step": 8})
    text = str(error.value)
    assert isinstance(error.value, VitkitError)
    assert re.search(
        r"last\.ckpt could not be written: No space left on device \(\d+\.\d\d GB free on its disk\)", text
    )
    assert "the previous checkpoint is intact" in text and "fix: free some space" in text
    assert same_state(folder.load_checkpoint())
    assert not list(tmp_path.glob(".*.part"))
    folder.release()


def test_a_real_write_limit_in_the_middle_of_the_tensors(tmp_path):
    """torch turns the failure of its file into a RuntimeError of its own; the reader still learns what happened."""
    folder, _ = claimed(tmp_path)
    folder.save_checkpoint(STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(TrainingError, match=r"last\.ckpt could not be written: File too large") as error:
            folder.save_checkpoint({"step": 2, "w": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the previous checkpoint is intact" in str(error.value)
    assert same_state(folder.load_checkpoint())
    assert not list(tmp_path.glob(".*.part"))
    folder.release()


def test_a_full_disk_while_logging_leaves_no_half_line(tmp_path, monkeypatch):
    folder, _ = claimed(tmp_path)
    folder.log({"step": 1})
    real = os.write

    def half(handle, data):
        if len(data) > 100:
            return real(handle, data[:50])
        full_disk()

    with monkeypatch.context() as broken:
        broken.setattr("os.write", half)
        with pytest.raises(TrainingError, match=r"metrics\.jsonl could not be written"):
            folder.log({"step": 2, "text": "x" * 80})
    folder.log({"step": 3})
    assert [record["step"] for record in folder.records()] == [1, 3]
    folder.release()


def test_a_killed_save_is_swept_at_the_next_claim(tmp_path):
    folder, _ = claimed(tmp_path)
    folder.save_checkpoint(STATE)
    folder.release()
    (tmp_path / ".last.ckpt.x1y2z3w4.part").write_bytes(b"half a checkpoint")
    (tmp_path / "model.safetensors.note").write_text("the user's own")
    again, state = claimed(tmp_path)
    assert state == "resume" and not list(tmp_path.glob(".*.part"))
    assert (tmp_path / "model.safetensors.note").exists()
    assert same_state(again.load_checkpoint())
    again.release()


def test_damaged_and_hostile_checkpoints_are_refused(tmp_path):
    folder, _ = claimed(tmp_path)
    folder.save_checkpoint(STATE)
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError) as error:
        folder.load_checkpoint()
    assert f"last.ckpt cannot be loaded: damaged ({len(content) // 2} bytes)" in str(error.value)
    assert "to start the run from its beginning" in str(error.value)

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/pwned",))

    torch.save({"x": Evil()}, tmp_path / "last.ckpt", pickle_module=pickle)
    with pytest.raises(WeightsError, match=r"it wants to run (posix|os|nt)\.system"):
        folder.load_checkpoint()
    assert not (tmp_path / "pwned").exists()
    folder.release()


# ---- summary and pictures ------------------------------------------------------------------------------------------------


def test_summary_is_strict_json(tmp_path):
    folder, _ = claimed(tmp_path)
    assert folder.read_summary() is None
    folder.finish(
        {"metrics": [{"name": "auc", "value": np.float64(0.5), "low": float("nan")}], "matrix": np.eye(2, dtype=int)}
    )
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert folder.read_summary() == {
        "metrics": [{"name": "auc", "value": 0.5, "low": None}], "matrix": [[1, 0], [0, 1]],
    }  # fmt: skip
    folder.release()


def test_pictures(tmp_path):
    from PIL import Image

    folder, _ = claimed(tmp_path)
    assert folder.read_pictures() == []
    grey, colour = np.arange(64, dtype=np.uint8).reshape(8, 8), np.full((5, 7, 3), 9, np.uint8)
    folder.save_pictures("A b", [[(grey, "one"), (colour, "two")]], columns=("left", "right"), note="n")
    folder.save_pictures("a-B", [[(colour, "three")]])
    folder.save_pictures("A b", [[(grey, "again")]])
    galleries = folder.read_pictures()
    assert [g["title"] for g in galleries] == ["a-B", "A b"]
    ((name, caption),) = galleries[1]["rows"][0]
    assert caption == "again"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / name)), grey)
    other = galleries[0]["rows"][0][0][0]
    assert Image.open(tmp_path / "pictures" / other).size == (7, 5), "titles that look alike keep files of their own"
    with pytest.raises(DataError) as error:
        folder.save_pictures("bad", [[(np.zeros((4, 4)), "float")]])
    assert "must be uint8, got float64 of shape (4, 4)" in str(error.value) and "fix: (x.clip(0, 1)" in str(error.value)
    with pytest.raises(DataError, match=r"must be \(H, W\).*got \(3, 8, 8\)\n  fix: move channels last"):
        folder.save_pictures("bad", [[(np.zeros((3, 8, 8), np.uint8), "chw")]])
    folder.release()


def test_importing_and_reading_needs_no_torch(tmp_path):
    claimed(tmp_path)[0].release()
    code = (
        "import sys; from vitkit.run.folder import RunFolder; f = RunFolder(sys.argv[1]); f.read_config(), f.records();"
        "print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
