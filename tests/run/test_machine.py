"""`vitkit doctor`: what it finds, what it advises, and that it opens no socket."""

from __future__ import annotations

import socket

import pytest

from vitkit.run import machine


@pytest.fixture
def versions(monkeypatch):
    """Installed versions, to be changed by a test."""
    real, changed = machine._version, {}
    monkeypatch.setattr(machine, "_version", lambda name: changed[name] if name in changed else real(name))
    return changed


def rows() -> dict[str, tuple[str, str]]:
    return {what: (found, advice) for what, found, advice in machine.look()}


def test_rows_are_three_texts_and_name_the_essentials(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = machine.look()
    assert all(len(row) == 3 and all(isinstance(cell, str) for cell in row) for row in found)
    names = [row[0] for row in found]
    assert {"Python", "vitkit", "torch", "timm", "lightning-fabric", "processor", "disk", "weights cache"} <= set(names)
    assert any(name.startswith("GPU") for name in names)


def test_a_version_outside_the_tested_bounds_is_named_with_the_command(versions):
    versions["timm"] = "0.4.5"
    found, advice = rows()["timm"]
    assert found == "0.4.5"
    assert advice.startswith("outside the tested bounds") and "pip install 'timm" in advice and "<1.1" in advice


def test_a_missing_package_is_named_with_the_command(versions):
    versions["scikit-learn"] = None
    found, advice = rows()["scikit-learn"]
    assert found == "not installed" and advice.startswith("pip install 'scikit-learn")


@pytest.mark.parametrize("name", machine.LIGHTNING)
@pytest.mark.parametrize("version", sorted(machine.MALICIOUS))
def test_malicious_releases_are_called_that(versions, name, version):
    versions[name] = version
    found, advice = rows()[f"{name} {version}"]
    assert "MALICIOUS" in found and "GHSA-w37p-236h-pfx3" in found
    assert f"pip uninstall -y {name}" in advice and "password" in advice


def test_other_lightning_versions_raise_no_alarm(versions):
    versions["lightning"] = "2.6.6"
    assert not any("MALICIOUS" in found for found, _ in rows().values())


def test_a_missing_extra_gives_its_pip_command(versions):
    versions["onnxruntime"] = None
    found, advice = rows()["extra 'export'"]
    assert found == "missing onnxruntime" and advice == "pip install 'vitkit[export]'"
    assert not {"extra 'dev'", "extra 'docs'"} & rows().keys()


def test_more_threads_than_cores_are_advised_against(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    found, advice = rows()["processor"]
    assert "torch uses 64 threads" in found and advice.endswith("OMP_NUM_THREADS=2")


def test_a_containers_limits_count(monkeypatch):
    files = {
        "/sys/fs/cgroup/cpu.max": ["100000 100000"],
        "/sys/fs/cgroup/memory.max": [str(3 << 30)],
        "/sys/fs/cgroup/memory.current": [str(2 << 30)],
    }
    monkeypatch.setattr(machine, "_lines", lambda path: files.get(path, []))
    assert machine.usable_cores() == 1
    free, total = machine.memory()
    assert total == 3 << 30 and free <= 1 << 30
    assert "smaller --batch_size" in rows()["memory"][1]


def test_offline_and_cache_folder_are_said(monkeypatch, tmp_path):
    (tmp_path / "models--timm--a").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, advice = rows()["weights cache"]
    assert found == f"1 model in {tmp_path}" and "HF_HUB_OFFLINE" in advice
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "new"))
    assert rows()["weights cache"][0].startswith("empty so far")


def test_a_checkout_that_was_never_installed_still_has_rows(monkeypatch):
    def nothing(name):
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "metadata", nothing)
    found = rows()
    assert found["vitkit"][0].startswith("version unknown") and "torch" in found
