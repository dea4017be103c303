"""Progress: plain lines for files, one live line for terminals, nothing when quiet, and hardly any time spent."""

import io
import os
import re
import subprocess
import sys
import textwrap
import time

import pytest

from vitkit.run.progress import Progress, clock, peak_memory


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("vitkit.run.progress.time.perf_counter", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_at_most_every_so_often_and_at_the_end(monkeypatch):
    clock_, out = Clock(monkeypatch), io.StringIO()
    with Progress(100, 32, steps_per_epoch=50, every=10, file=out) as progress:
        for i in range(100):
            clock_.now += 0.5
            progress.step(lr=1e-3, waited=0.1, images=32)
            progress.step(loss=1.0 / (i + 1))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith(
        "step   4/100  epoch 0.08  loss 0.3333  lr 1.00e-03  64 img/s  data wait 20%  ETA 00:00:48"
    )
    assert [int(re.search(r"step +(\d+)/", line)[1]) for line in lines[:-1]] == [4, 24, 44, 64, 84]
    assert lines[-1] == "100 of 100 steps in 00:00:50  loss 0.01  64 img/s"


def test_a_call_without_images_only_changes_what_is_shown():
    progress = Progress(10, 8, file=io.StringIO())
    progress.step(loss=2.0, grad_norm=0.5)
    assert progress.done == 0 and "loss 2" in progress.line() and "grad_norm 0.5" in progress.line()
    progress.step(waited=0.0)
    assert (progress.done, progress.images) == (1, 8)
    progress.step(images=3)
    assert (progress.done, progress.images) == (2, 11)


def test_speed_wait_and_eta_follow_a_change_of_pace(monkeypatch):
    clock_ = Clock(monkeypatch)
    with Progress(10_000, 10, file=io.StringIO(), every=1) as progress:
        for _ in range(100):
            clock_.now += 1.0
            progress.step(images=10, waited=0.0)
        assert progress.img_per_s == pytest.approx(10) and progress.data_wait == 0
        assert progress.seconds_left == pytest.approx(9_900, rel=0.01)
        for _ in range(1200):
            clock_.now += 0.1
            progress.step(images=10, waited=0.05)
        assert progress.img_per_s == pytest.approx(100, rel=0.05)
        assert progress.data_wait == pytest.approx(0.5, rel=0.05)
        assert progress.seconds_left == pytest.approx(870, rel=0.05)


def test_resume_does_not_count_the_earlier_steps_as_speed(monkeypatch):
    clock_, out = Clock(monkeypatch), io.StringIO()
    with Progress(1000, 1, file=out, every=1) as progress:
        progress.resume(900)
        for _ in range(20):
            clock_.now += 1.0
            progress.step(images=1)
        assert progress.seconds_left == pytest.approx(80)
    assert "step  920/1000" in out.getvalue() and out.getvalue().endswith("920 of 1000 steps in 00:00:20  1 img/s\n")


def test_quiet_says_nothing():
    out = Terminal()
    with Progress(10, 8, quiet=True, every=0, file=out) as progress:
        progress.step(images=8)
        progress.say("nothing")
    assert out.getvalue() == ""


def test_an_exception_passes_and_is_said_to_have_stopped(monkeypatch):
    for out in (io.StringIO(), Terminal()):
        with pytest.raises(KeyboardInterrupt), Progress(10, 8, file=out) as progress:
            progress.step(images=8)
            raise KeyboardInterrupt
        assert "stopped at step 1 of 10 after 00:00:00" in out.getvalue()


def test_nothing_trained_nothing_said():
    out = io.StringIO()
    with Progress(10, 8, start=10, file=out):
        pass
    assert out.getvalue() == ""


def test_a_terminal_gets_a_live_line_and_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out, before = Terminal(), (sys.stdout, sys.stderr)
    with pytest.raises(RuntimeError), Progress(4, 8, file=out) as progress:
        progress.step(loss=0.25, images=8)
        progress._next = 0.0
        progress.step(images=8)
        progress.say("a [bold]sentence[/bold]")
        raise RuntimeError
    text = out.getvalue()
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor comes back"
    assert "step 2/4" in text and "loss 0.25" in text and "a [bold]sentence[/bold]" in text
    assert (sys.stdout, sys.stderr) == before


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress(4, 8, file=out, every=0) as progress:
        progress.step(images=8)
        time.sleep(0.01)
        progress.step(images=8)
    assert "\x1b" not in out.getvalue() and "step 2/4" in out.getvalue()


def test_a_step_costs_microseconds():
    with Progress(10**9, 64, file=io.StringIO(), every=3600) as progress:
        for _ in range(1000):
            progress.step(lr=0.1, waited=0.0, images=64)
        best = min(_timed(progress) for _ in range(5))
    assert best < 50e-6


def _timed(progress):
    started = time.perf_counter()
    for _ in range(5000):
        progress.step(lr=0.1, waited=0.0, images=64)
    return (time.perf_counter() - started) / 5000


def test_output_stays_machine_readable_and_rich_is_not_imported_without_a_terminal():
    code = """
    import sys
    from vitkit.run.progress import Progress
    with Progress(3, 2, every=0) as p:
        p.say("a note")
        for _ in range(3): p.step(images=2, waited=0.0)
    print("rich" in sys.modules, "torch" in sys.modules)
    """
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "False False\n"
    assert done.stderr.startswith("a note\n") and "3 of 3 steps" in done.stderr


def test_clock_and_memory():
    assert [clock(0), clock(59.6), clock(3661), clock(360_000), clock(-1)] == [
        "00:00:00", "00:01:00", "01:01:01", "100:00:00", "00:00:00",
    ]  # fmt: skip
    assert re.fullmatch(r"peak [\d.]+ (MiB|GiB)( GPU)?", peak_memory())
