"""What every benchmark shares: where data are, how figures are timed, printed and committed.

A benchmark is `python -m benchmarks.<kind>.<system> [--quick]`. It prints its tables, writes
benchmarks/results/<kind>/<system>.json (quick runs write nothing there) and exits non-zero when its claim fails.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "peft", "lightly")


def arguments(doc: str) -> argparse.Namespace:
    """`--quick`: the same code in under three minutes, for a look; its figures prove nothing and are not kept."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under three minutes; writes no result")
    return parser.parse_args()


def data(name: str) -> Path:
    """A data set of the folder $VITKIT_DATA."""
    root = os.environ.get("VITKIT_DATA")
    if not root or not (Path(root) / name).exists():
        sys.exit(
            f"this benchmark needs {name} in the folder that VITKIT_DATA names (now {root!r}); see benchmarks/README.md"
        )
    return Path(root) / name


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass
class Result:
    """Figures of one benchmark on their way to the terminal and to the result file."""

    system: str
    kind: str
    claim: str
    quick: bool
    tables: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """Keep and print a table."""
        rows = [[_plain(cell) for cell in row] for row in rows]
        self.tables.append({"title": title, "columns": list(columns), "rows": rows, "note": note})
        texts = [list(columns), *[[_text(cell) for cell in row] for row in rows]]
        widths = [max(len(row[i]) for row in texts) for i in range(len(columns))]
        print(f"\n{title}")
        for row in texts:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if note:
            print(f"  {note}")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"- {text}", flush=True)

    def finish(self, holds: bool) -> int:
        """Write the result file (not for quick runs), say whether the claim holds, return the exit status."""
        import torch

        content = {
            "system": self.system,
            "kind": self.kind,
            "claim": self.claim,
            "holds": bool(holds),
            "measured": datetime.date.today().isoformat(),
            "command": f"python -m benchmarks.{self.kind}.{self.system}",
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "versions": {name: _version(name) for name in PACKAGES if _version(name)},
            "seconds": round(time.perf_counter() - self.started, 1),
            "tables": self.tables,
            "notes": self.notes,
        }
        print(f"\nclaim: {self.claim}\n{'holds' if holds else 'DOES NOT HOLD'} ({content['seconds']:.0f} s)")
        if not self.quick:
            path = RESULTS / self.kind / f"{self.system}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
        return 0 if holds else 1


def race(
    contestants: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 2
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Median seconds of each call, run in turn A B A B ...; and the quartiles of the ratio (other / first) round by round."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        for name in names:
            start = time.perf_counter()
            contestants[name]()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {}
    for name in names[1:]:
        ratios = [other / own for other, own in zip(times[name], times[names[0]], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        spread[name] = (low, high)
    return medians, spread


def peak_memory(function: Callable[[], Any]) -> int:
    """Largest number of bytes that torch tensors newly hold at once during `function` on the CPU."""
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # torch's profiler writes lines of its own to the terminal otherwise
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(cell: Any) -> Any:
    return cell.item() if hasattr(cell, "item") else cell


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
