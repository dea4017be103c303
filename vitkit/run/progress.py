"""What a training run says while it runs: one live line on a terminal, a plain line now and then anywhere else.

Everything goes to the standard error stream, so that what a command prints as its result stays machine-readable.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, TextIO

_REDRAW = 0.2  # seconds between live updates: faster cannot be read, and drawing costs milliseconds
_MEMORY = 30.0  # seconds over which speed and waiting are averaged


class Progress:
    """Counts batches and shows where training is, how fast, and what it waits for.

    total_steps: batches in the whole run. batch_size: images a batch, counted when `step` does not say. start: batches done
    before (a resumed run). every: seconds between lines where there is no terminal. Use as a context manager.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        *,
        start: int = 0,
        steps_per_epoch: int | None = None,
        quiet: bool = False,
        every: float = 10.0,
        file: TextIO | None = None,
    ):
        self.total, self.batch_size, self.steps_per_epoch = total_steps, batch_size, steps_per_epoch
        self.done = self.start = start
        self.quiet, self.every = quiet, every
        self.loss: float | None = None
        self.lr: float | None = None
        self.extra: dict[str, float] = {}
        self.images = 0
        self._file = file or sys.stderr
        self._live: Any = None
        self._began = self._mark = time.perf_counter()
        self._mark_done, self._mark_images, self._waited = start, 0, 0.0
        self._sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # seconds, steps, images, seconds waited: fading sums
        self._next = float("inf")  # nothing is shown before the context is entered

    # ---- what the loop calls -----------------------------------------------------------------------------------------

    def step(
        self,
        *,
        loss: float | None = None,
        lr: float | None = None,
        waited: float | None = None,
        images: int | None = None,
        **extra: float,
    ) -> None:
        """One batch was done: `images` in it (by default `batch_size`), after `waited` seconds for data.

        Without `waited` and `images` nothing is counted; the figures to show (loss, lr, others by name) are replaced.
        """
        if loss is not None:
            self.loss = loss
        if lr is not None:
            self.lr = lr
        if extra:
            self.extra.update(extra)
        if images is None and waited is None:
            return
        self.done += 1
        self.images += self.batch_size if images is None else images
        self._waited += waited or 0.0
        now = time.perf_counter()
        if now >= self._next:
            self._measure(now)
            self._show()
            self._next = now + (_REDRAW if self._live is not None else self.every)

    def resume(self, done: int) -> None:
        """Count from `done` batches on; the time that they took elsewhere does not enter speed or ETA."""
        self.done = self.start = self._mark_done = done
        self._began = self._mark = time.perf_counter()

    def say(self, text: str) -> None:
        """A sentence for the reader, above the live line."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._file, flush=True)

    # ---- what it knows -----------------------------------------------------------------------------------------------

    @property
    def img_per_s(self) -> float:
        """Images a second, averaged over about the last half minute (over everything until the first measurement)."""
        seconds, _, images, _ = self._sums
        return images / seconds if seconds else self.images / max(time.perf_counter() - self._began, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for data, 0 to 1, averaged likewise."""
        return min(self._sums[3] / self._sums[0], 1.0) if self._sums[0] else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None before there is anything to go by."""
        seconds, steps, *_ = self._sums
        return max(self.total - self.done, 0) * seconds / steps if steps else None

    def line(self) -> str:
        """The state in one plain line."""
        width = len(str(self.total))
        return "  ".join([f"step {self.done:>{width}}/{self.total}", *self._parts()])

    # ---- showing -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Progress:
        if not self.quiet and self._file.isatty() and os.environ.get("TERM") != "dumb":
            self._start_live()
        self._began = self._mark = time.perf_counter()
        if not self.quiet:
            # The first line soon after the start: a wrong loss or a slow loader shows within seconds, not after `every`.
            self._next = self._began + (_REDRAW if self._live is not None else min(self.every, 2.0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next = float("inf")
        if self.quiet:
            return
        now = time.perf_counter()
        if self.done > self._mark_done:
            self._measure(now)
        live, self._live = self._live, None
        if live is not None:
            try:
                live.update(self._render(), refresh=False)
            finally:
                live.stop()  # draws once more and gives the cursor back, also on exceptions
        if self.done == self.start:
            return  # nothing was trained: a finished run, or an error before the first batch
        seconds = now - self._began
        speed = pace(self.images / max(seconds, 1e-9))
        if kind is None:
            loss = f"  loss {self.loss:.4g}" if self.loss is not None else ""
            print(f"{self.done} of {self.total} steps in {clock(seconds)}{loss}  {speed}", file=self._file, flush=True)
        else:
            print(f"stopped at step {self.done} of {self.total} after {clock(seconds)}", file=self._file, flush=True)

    def _measure(self, now: float) -> None:
        """Add what happened since the last measurement to sums that fade by half in half of `_MEMORY`."""
        passed = now - self._mark
        if passed <= 0:
            return
        fresh = (passed, self.done - self._mark_done, self.images - self._mark_images, self._waited)
        keep = 0.5 ** (2 * passed / _MEMORY)
        self._sums = tuple(keep * old + new for old, new in zip(self._sums, fresh, strict=True))
        self._mark, self._mark_done, self._mark_images, self._waited = now, self.done, self.images, 0.0

    def _parts(self) -> list[str]:
        out = []
        if self.steps_per_epoch:
            out.append(f"epoch {self.done / self.steps_per_epoch:.2f}")
        if self.loss is not None:
            out.append(f"loss {self.loss:.4g}")
        if self.lr is not None:
            out.append(f"lr {self.lr:.2e}")
        out += [f"{name} {value:.4g}" for name, value in self.extra.items()]
        if self.seconds_left is not None:
            out += [pace(self.img_per_s), f"data wait {self.data_wait:.0%}", f"ETA {clock(self.seconds_left)}"]
        memory = peak_memory()
        return [*out, memory] if memory else out

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
        else:
            print(self.line(), file=self._file, flush=True)

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._file, highlight=False)
        # Lines that others print must go above the live one; but output that is piped elsewhere is left alone.
        err = self._file is sys.stderr
        out = err and sys.stdout.isatty()
        self._live = Live(self._render(), console=console, auto_refresh=False, redirect_stdout=out, redirect_stderr=err)
        self._live.start(refresh=True)

    def _render(self) -> Any:
        """Bar, count and as many of the figures as the terminal is wide for."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        share = self.done / self.total if self.total else 1.0
        grid = Table.grid(padding=(0, 1), expand=False)
        grid.add_row(
            Text(f"step {self.done}/{self.total}"),
            ProgressBar(total=max(self.total, 1), completed=min(self.done, self.total), width=28),
            Text(f"{share:4.0%}"),
        )
        return Group(grid, Text("  ".join(self._parts()), style="dim", overflow="ellipsis", no_wrap=True))


def pace(images_per_second: float) -> str:
    """Images a second, with decimals below one."""
    digits = 0 if images_per_second >= 1 or not images_per_second else 2
    return f"{images_per_second:.{digits}f} img/s"


def clock(seconds: float) -> str:
    """Seconds as hh:mm:ss; hours go on counting past a day."""
    whole = round(max(seconds, 0.0))
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def peak_memory() -> str:
    """Most GPU memory ever allocated where a GPU is in use, else most memory of this process; "" where nobody tells."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"peak {_size(torch.cuda.max_memory_allocated())} GPU"
    try:
        import resource
    except ImportError:  # not a POSIX system
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on macOS bytes
    return f"peak {_size(peak if sys.platform == 'darwin' else peak * 1024)}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
