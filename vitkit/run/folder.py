"""A run is a folder: its settings, its numbers, its checkpoint, its summary, each readable after a crash at any moment.

    config.yaml       resolved settings under the command line that made them; also `--config` for the next run
    environment.json  versions and threads, for the reader who gets other numbers
    metrics.jsonl     one flat record a line
    last.ckpt         everything that exact resuming needs
    summary.json      final numbers; its presence is what "finished" means
    pictures/         PNG files and pictures.json, which says how to lay them out

`claim` is the only way in for a writer. It decides between a new run, the same run resumed and the same run finished, and
refuses anything else before touching a byte.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Any, Literal

from vitkit.errors import ConfigError, DataError, TrainingError, VitkitError, WeightsError
from vitkit.run.environment import environment, vitkit_version
from vitkit.run.files import atomic, atomic_write
from vitkit.run.lock import Busy, Lock
from vitkit.run.values import differing, flatten, not_storable, plain, shown

_OWN_KEYS = ("vitkit", "verb", "method")  # describe the run in config.yaml; settings never have these names
_SETTINGS = ("config.yaml", "environment.json")  # what a claim writes
_LEFTOVER = re.compile(r"^\..+\.\w{8}\.part$")  # what `files.atomic` leaves when its process is killed


class RunFolder:
    """Reading needs nothing but the path; writing starts with `claim` and ends with `release` (or leave a `with` block)."""

    def __init__(self, path: str | Path, *, say: Callable[[str], None] | None = None):
        self.path = Path(path)
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._lock: Lock | None = None
        self._metrics: int | None = None  # open file descriptor
        self._begun = False  # by this claim: no run was here before
        self._made = False  # the folder itself, too

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, VitkitError):
            self.abandon()
        else:
            self.release()

    # ---- claiming ----------------------------------------------------------------------------------------------------

    def claim(
        self, config: Mapping[str, Any], kind: str, *, free: frozenset[str] = frozenset(), command: str = ""
    ) -> Literal["new", "resume", "finished"]:
        """Make this folder the home of the run `kind` ("adapt.lora", "evaluate") with the resolved settings `config`.

        "new": the folder was absent or empty. "resume": it holds the same settings, unfinished; `free` names settings that
        may differ (dotted, or a parent; `out` always may). Records that no checkpoint belongs to are dropped, as the run
        starts from its beginning. "finished": it also has a summary; nothing is locked or written then.
        Raises ConfigError when the folder holds another run, something that is no run, or is being written right now.
        """
        asked = plain({key: value for key, value in config.items() if key not in _OWN_KEYS})
        state = self._state(asked, kind, free)
        if state == "finished":
            return state
        self._acquire()
        try:
            state = self._state(asked, kind, free)  # again: another process may have come first
            self._begun = state == "new"
            if state == "finished":
                self.release()
                return state
            with _writing(self.path):
                for leftover in [*self.path.glob(".*.part"), *self.path.glob("pictures/.*.part")]:
                    leftover.unlink()
                if not (self.path / "last.ckpt").is_file():  # the run starts from its beginning, and so do its records
                    (self.path / "metrics.jsonl").unlink(missing_ok=True)
                self._write_config(asked, kind, command)
                self._write_environment()
        except BaseException:
            self.release()
            raise
        return state

    def release(self) -> None:
        """Close files and let another process claim the folder. Harmless when nothing was claimed."""
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def abandon(self) -> None:
        """Release the folder, and leave no trace of a run that this claim began and that was refused before it wrote more than
        its settings: they would stand in the way of the corrected command."""
        if self._lock is not None and self._begun:
            if {one.name for one in self.path.iterdir()} <= {*_SETTINGS, ".lock"}:
                for name in _SETTINGS:
                    (self.path / name).unlink(missing_ok=True)
            else:
                self._made = False
        made = self._lock is not None and self._made
        self.release()
        if made:
            with suppress(OSError):  # something has come into it meanwhile
                self.path.rmdir()

    def _acquire(self) -> None:
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path / ".lock")
            dead = lock.acquire()
        except Busy as busy:
            who = f"process {busy.pid}" if busy.pid else "another process"
            raise ConfigError(
                f"{self.path} is being written by {who} right now",
                fix=f"wait for it, choose another --out, or if no such process runs, delete {self.path / '.lock'}",
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written: {error.strerror or error}", fix="choose another --out"
            ) from None
        self._lock = lock
        weakref.finalize(self, lock.release)  # also at interpreter exit
        if dead and dead != os.getpid():
            self._say(f"{self.path}: process {dead} ended without closing this run; taking it over")

    def _state(self, asked: dict[str, Any], kind: str, free: frozenset[str]) -> Literal["new", "resume", "finished"]:
        if not self.path.exists():
            return "new"
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a run folder", fix="choose another --out")
        try:
            inside = [one.name for one in self.path.iterdir() if one.name != ".lock" and not _LEFTOVER.match(one.name)]
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}", fix="choose another --out") from None
        if not inside:
            return "new"
        if not self.is_run():
            some = ", ".join(sorted(inside)[:3]) + (", ..." if len(inside) > 3 else "")
            raise ConfigError(
                f"{self.path} holds files but no vitkit run ({some})",
                fix="choose another --out, or empty the folder; nothing in it was touched",
            )
        self._require_same(asked, kind, free)
        return "finished" if (self.path / "summary.json").is_file() else "resume"

    def _require_same(self, asked: dict[str, Any], kind: str, free: frozenset[str]) -> None:
        old, new = self.read_config(), _through_yaml(asked)
        free = free | {"out"}  # another spelling of this very folder, or the folder was moved
        changed = [key for key in differing(old, new) if not any(f"{key}.".startswith(f"{one}.") for one in free)]
        a, b = flatten(old), flatten(new)
        lines = [f"    {key}: {shown(a, key)} -> {shown(b, key)}" for key in changed]
        if self.kind != kind:
            lines.insert(0, f"    verb: {self.kind} -> {kind}")
        if not lines:
            return
        back = " ".join(f"--{key} {shlex.quote(shown(a, key))}" for key in changed if key in a)
        again = f"give the old values ({back}), " if back and self.kind == kind else ""
        raise ConfigError(
            f"{self.path} holds another run; what differs (there -> asked for):\n" + "\n".join(lines),
            fix=f"choose another --out, {again}or delete the folder",
        )

    # ---- settings and environment ------------------------------------------------------------------------------------

    def is_run(self) -> bool:
        """Whether a vitkit run was started here."""
        return isinstance(self._yaml().get("vitkit"), str)

    @property
    def kind(self) -> str:
        """Verb and method, as "adapt.lora" or "evaluate"."""
        content = self._yaml()
        return ".".join(str(content[key]) for key in ("verb", "method") if content.get(key))

    def read_config(self) -> dict[str, Any]:
        """The settings of config.yaml. Raises ConfigError where there is no run."""
        content = self._yaml()
        if not isinstance(content.get("vitkit"), str):
            raise ConfigError(f"there is no vitkit run in {self.path}", fix="give the folder that --out named")
        return {key: value for key, value in content.items() if key not in _OWN_KEYS}

    def read_environment(self) -> dict[str, Any]:
        """Versions and threads of the process that started the run (empty when it was killed before writing them)."""
        file = self.path / "environment.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _yaml(self) -> dict[str, Any]:
        import yaml

        file = self.path / "config.yaml"
        if not file.is_file():
            return {}
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = str(error).strip().splitlines()[-1].strip()
            raise ConfigError(f"{file} is not valid YAML: {where}", fix="mend it, or choose another --out") from None
        return content if isinstance(content, dict) else {}

    def _write_config(self, asked: dict[str, Any], kind: str, command: str) -> None:
        import yaml

        file = self.path / "config.yaml"
        command = (command or "(called from Python)").replace("\r", "\\r").replace("\n", "\\n")
        comments = [f"# {command}"]
        if file.is_file():
            comments = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
            if not {f"# {command}", f"# resumed by: {command}"} & set(comments):
                comments.append(f"# resumed by: {command}")
        verb, _, method = kind.partition(".")
        about = {"vitkit": vitkit_version(), "verb": verb} | ({"method": method} if method else {})
        parts = [yaml.safe_dump(one, sort_keys=False, allow_unicode=True, width=110) for one in (about, asked) if one]
        atomic_write(file, "\n".join(comments) + "\n" + "\n".join(parts))

    def _write_environment(self) -> None:
        now, first = environment(), self.read_environment()
        if first:
            changed = {key: value for key, value in now.items() if key != "started" and first.get(key) != value}
            first.setdefault("resumed", []).append({"started": now["started"], **changed})
        atomic_write(self.path / "environment.json", json.dumps(first or now, indent=2) + "\n")

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one flat record as one line, in one write. Non-finite numbers become null: JSON has no NaN."""
        line = (json.dumps(plain(record, finite=True), ensure_ascii=False) + "\n").encode()
        file = self.path / "metrics.jsonl"
        with _writing(file):
            if self._metrics is None:
                self._repair()
                self._metrics = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            before = os.fstat(self._metrics).st_size
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._metrics, rest) :]
            except BaseException:
                os.ftruncate(self._metrics, before)  # no half line, whatever happened
                raise

    def records(self) -> list[dict[str, Any]]:
        """All records, oldest first. A last line cut short by a killed process is passed over."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        lines = file.read_bytes().split(b"\n")[:-1]
        out = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                out.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise DataError(
                    f"{file}, line {number} is not JSON: {line[:60].decode(errors='replace')!r}",
                    fix="mend or remove that line",
                ) from None
        return out

    def truncate(self, step: int) -> int:
        """Drop the records after `step` (one without a step counts as 0), to resume from it. Returns how many went."""
        records = self.records()
        kept = [record for record in records if (record.get("step") or 0) <= step]
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None
        if len(kept) < len(records):
            file = self.path / "metrics.jsonl"
            with _writing(file):
                atomic_write(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        return len(records) - len(kept)

    def _repair(self) -> None:
        """Cut a half-written last line off, so that the next record starts on a line of its own."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which makes the run finished. The folder stays claimed (for the report) until `release`."""
        file = self.path / "summary.json"
        with _writing(file):
            atomic_write(file, json.dumps(plain(summary, finite=True), indent=2, ensure_ascii=False) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    # ---- checkpoint --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace last.ckpt by `state`: tensors, numbers, text and containers of them, as `weights_only=True` reads back.

        Until the new file is complete and on disk the old one stays; a failure (disk full) raises TrainingError and leaves it.
        """
        import torch

        refused = list(not_storable(state))
        if refused:
            raise TypeError(
                f"a checkpoint holds tensors, numbers, text and containers of them; not {', '.join(refused)}"
            )
        file = self.path / "last.ckpt"
        if self._metrics is not None:
            os.fsync(self._metrics)  # a checkpoint is never ahead of the records on disk
        with _writing(file, kept="the previous checkpoint is intact"), atomic(file) as handle:
            torch.save(dict(state), handle)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU; None when none was saved yet. Raises WeightsError when it cannot be read safely."""
        import torch

        file = self.path / "last.ckpt"
        if not file.is_file():
            return None
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
            why = f"it wants to run {blocked.group(1)}" if blocked else f"damaged ({file.stat().st_size} bytes)"
            raise WeightsError(
                f"{file} cannot be loaded: {why}", fix=f"delete {file} to start the run from its beginning"
            ) from error

    # ---- pictures ----------------------------------------------------------------------------------------------------

    def save_pictures(
        self, title: str, rows: Sequence[Sequence[tuple[Any, str]]], *, columns: Sequence[str] = (), note: str = ""
    ) -> None:
        """Store rows of (uint8 picture (H, W, 3) or (H, W), caption) for the report; the same title replaces itself."""
        from vitkit.run.pictures import png

        folder = self.path / "pictures"
        stem = f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')[:40]}-{zlib.crc32(title.encode()):08x}"
        laid_out = []
        with _writing(folder):
            for r, row in enumerate(rows):
                names = [f"{stem}-{r:02d}-{c:02d}.png" for c in range(len(row))]
                for name, (picture, _) in zip(names, row, strict=True):
                    atomic_write(folder / name, png(picture))
                laid_out.append([[name, caption] for name, (_, caption) in zip(names, row, strict=True)])
            others = [one for one in self.read_pictures() if one["title"] != title]
            entry = {"title": title, "columns": list(columns), "note": note, "rows": laid_out}
            atomic_write(folder / "pictures.json", json.dumps([*others, entry], indent=1, ensure_ascii=False) + "\n")

    def read_pictures(self) -> list[dict[str, Any]]:
        """The galleries of pictures.json: {title, columns, note, rows of [file in pictures/, caption]}."""
        file = self.path / "pictures" / "pictures.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def _through_yaml(values: dict[str, Any]) -> dict[str, Any]:
    """What comes back from config.yaml, so that only real differences count as such."""
    import yaml

    return yaml.safe_load(yaml.safe_dump(values)) or {}


@contextmanager
def _writing(path: Path, *, kept: str = "") -> Iterator[None]:
    """Turn a failed write into a TrainingError that names the file, the free space and what is still there."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps what its file raised
        if not isinstance(cause, OSError):
            raise
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
        free = f"{shutil.disk_usage(there).free / 1e9:.2f} GB free on its disk"
        fix = "write to another disk with --out, or mend the cause; the same command resumes"
        if cause.errno in (ENOSPC, EDQUOT, EFBIG):
            fix = "free some space (or quota) and give the same command again: it resumes"
        elif cause.errno in (EACCES, EPERM, EROFS):
            fix = "give this user the right to write there, or choose another --out"
        also = f"; {kept}" if kept else ""
        raise TrainingError(
            f"{path} could not be written: {cause.strerror or cause} ({free}){also}", fix=fix
        ) from error
