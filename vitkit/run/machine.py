"""What this machine offers, for `vitkit doctor`: rows of (what, found, advice). Files and devices are looked at, no network.

Version bounds are those of the installed package's own metadata, so there is one place that states them.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

Row = tuple[str, str, str]

SHOWN = ("torch", "torchvision", "timm", "lightning-fabric")
# Releases that stole credentials (GHSA-w37p-236h-pfx3); the three names ship the same code.
MALICIOUS = {"2.6.2", "2.6.3"}
LIGHTNING = ("lightning", "pytorch-lightning", "lightning-fabric")
DEVELOPERS = ("dev", "docs", "bench")  # extras that only work on vitkit itself needs


def look() -> list[Row]:
    """Everything worth knowing before a run; `advice` is empty where nothing has to be done."""
    parts: tuple[Callable[[], Iterator[Row]], ...] = (
        _python, _packages, _lightning, _extras, _processors, _memory, _devices, _disk, _hub,
    )  # fmt: skip
    return [row for part in parts for row in part()]


def _python() -> Iterator[Row]:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    bounds = _field("Requires-Python")
    outside = f"tested with Python {bounds}" if bounds and not SpecifierSet(bounds).contains(version) else ""
    yield "Python", f"{version}, {platform.system()} {platform.machine()}", outside
    where = Path(__file__).resolve().parent.parent
    yield "vitkit", f"{_field('Version') or 'version unknown'}, {where}", ""


def _packages() -> Iterator[Row]:
    """The four that numbers depend on most, then the others in one row."""
    rest, odd, needs = 0, [], _requirements()
    if not needs:  # a checkout that was never installed
        yield from (
            (name, _version(name) or "not installed", "pip install -e . states the tested bounds") for name in SHOWN
        )
    for need in needs:
        version = _version(need.name)
        advice = _judge(need, version)
        if need.name in SHOWN:
            yield need.name, version or "not installed", advice
        elif advice:
            odd.append((need.name, version or "not installed", advice))
        else:
            rest += 1
    yield from odd
    if rest:
        yield "other packages", f"{rest} needed, all within the tested bounds", ""


def _judge(need, version: str | None) -> str:
    """What to do about an installed version; empty when it is within the bounds."""
    if version is None:
        return f"pip install '{need.name}{need.specifier}'"
    if need.specifier.contains(version, prereleases=True):
        return ""
    return f"outside the tested bounds {need.specifier}; pip install '{need.name}{need.specifier}'"


def _lightning() -> Iterator[Row]:
    """The two malicious releases, under every name that they were published."""
    for name in LIGHTNING:
        version = _version(name)
        if version in MALICIOUS:
            steps = f"pip uninstall -y {name}, change every password and token that this machine could read"
            yield f"{name} {version}", "MALICIOUS RELEASE: it steals credentials (GHSA-w37p-236h-pfx3)", steps


def _extras() -> Iterator[Row]:
    """Optional features: which of their packages are there."""
    by_extra: dict[str, list] = {}
    for need in _requirements(optional=True):
        for extra in _about().get_all("Provides-Extra") or ():
            if need.marker is not None and need.marker.evaluate({"extra": extra}) and extra not in DEVELOPERS:
                by_extra.setdefault(extra, []).append(need)
    for extra, needs in by_extra.items():
        missing = [need.name for need in needs if _version(need.name) is None]
        present = [(need, _version(need.name)) for need in needs if need.name not in missing]
        odd = [f"{need.name} {version}" for need, version in present if _judge(need, version)]
        if missing:
            found = f"missing {', '.join(missing)}"
        else:
            found = f"outside the tested bounds: {', '.join(odd)}" if odd else "installed"
        yield f"extra '{extra}'", found, f"pip install 'vitkit[{extra}]'" if missing or odd else ""


def _processors() -> Iterator[Row]:
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    total = os.cpu_count() or cores
    seen = f"{cores} cores" if cores == total else f"{cores} of {total} cores usable by this process"
    advice = ""
    if threads > cores:
        advice = f"more threads than cores slow torch down: OMP_NUM_THREADS={cores}"
    elif threads < cores and "OMP_NUM_THREADS" in os.environ:
        advice = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves cores idle; unset it for a single run"
    yield "processor", f"{seen}, torch uses {threads} threads", advice


def _memory() -> Iterator[Row]:
    free, total = memory()
    if total is None:
        yield "memory", "unknown on this system", ""
        return
    low = free is not None and free < 2 << 30
    found = f"{_gib(total)} in all" if free is None else f"{_gib(free)} free of {_gib(total)}"
    yield "memory", found, "close other programs, or use a smaller --batch_size and --workers 0" if low else ""


def _devices() -> Iterator[Row]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            native = properties.major >= 8 or torch.version.hip is not None
            found = f"{properties.name}, {_gib(free)} free of {_gib(total)}, bf16 {'native' if native else 'emulated'}"
            busy = "another program holds most of its memory" if free < total / 4 else ""
            yield f"GPU {index}", found, busy
        return
    if torch.backends.mps.is_available():
        yield "GPU", "Apple MPS", "evaluation's float64 fits run on the CPU"
        return
    advice = ""
    if shutil.which("nvidia-smi"):
        built = torch.version.cuda
        advice = (
            f"an NVIDIA driver is here, but torch {'(CUDA ' + built + ')' if built else '(CPU build)'} cannot use it; "
            "install the torch build that pytorch.org names for this driver"
        )
    yield "GPU", "none that torch can use; everything runs on the CPU", advice


def _disk() -> Iterator[Row]:
    here = Path.cwd()
    usage = shutil.disk_usage(here)
    low = "less than 5 GiB: checkpoints of large models may not fit" if usage.free < 5 << 30 else ""
    blocked = "" if os.access(here, os.W_OK) else "this folder cannot be written: give --out elsewhere"
    yield "disk", f"{_gib(usage.free)} free at {here}", blocked or low


def _hub() -> Iterator[Row]:
    """Where released weights are kept. Only the folder is looked at."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    models = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    advice = "" if os.access(nearest, os.W_OK) else "it cannot be written: set HF_HOME to a folder that can"
    if offline and not advice:
        advice = "HF_HUB_OFFLINE is set: only weights already there can be named"
    count = "1 model" if models == 1 else f"{models} models"
    found = f"{count} in {folder}" if folder.is_dir() else f"empty so far ({folder})"
    yield "weights cache", found, advice


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of a container."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    quota = _first_words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def memory() -> tuple[int | None, int | None]:
    """(free, total) bytes, limited by the container's own limit; None where the system does not say."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None, None
    for line in _lines("/proc/meminfo"):  # counts caches that the system gives back when asked
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _first_words("/sys/fs/cgroup/memory.max"), _first_words("/sys/fs/cgroup/memory.current")
    if limit and limit[0].isdigit() and int(limit[0]) < total:
        total = int(limit[0])
        free = min(free, total - int(used[0])) if used and used[0].isdigit() else free
    return free, total


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _first_words(path: str) -> list[str]:
    return next(iter(_lines(path)), "").split()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _about() -> metadata.PackageMetadata:
    """vitkit's own metadata; empty when it runs from a checkout that was never installed."""
    try:
        return metadata.metadata("vitkit")
    except metadata.PackageNotFoundError:
        from email.message import Message

        return Message()  # type: ignore[return-value]


def _field(name: str) -> str:
    """One field of vitkit's metadata; empty where it has none."""
    return str(_about().get_all(name, [""])[0])


def _requirements(*, optional: bool = False) -> list:
    """Parsed requirements of vitkit: the hard ones, or those of the extras (without references to vitkit itself)."""
    from packaging.requirements import Requirement

    needs = [Requirement(line) for line in _about().get_all("Requires-Dist") or ()]
    needs = [need for need in needs if need.name != "vitkit"]
    if optional:
        return [need for need in needs if need.marker is not None and "extra" in str(need.marker)]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
