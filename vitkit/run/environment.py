"""What a run was computed with: versions, threads, devices. Never a host name, a user name or a path."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "scikit-learn", "safetensors", "pillow")


def vitkit_version() -> str:
    """The installed version, or "unknown" when vitkit runs from a folder that was never installed."""
    try:
        return version("vitkit")
    except PackageNotFoundError:
        return "unknown"


def environment() -> dict[str, Any]:
    """Versions, threads and devices of this process, with the time (UTC) as `started`."""
    import torch

    found: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "vitkit": vitkit_version()}
    found["python"] = platform.python_version()
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["cpu_cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["threads"] = torch.get_num_threads()
    found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found
