"""One writer a folder: a lock that the operating system lets go of when its process dies, however it dies."""

from __future__ import annotations

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: the process number in the file decides (see `_take`)
    fcntl = None  # type: ignore[assignment]

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # file systems mounted without locks
_held: dict[str, tuple[int, int, int]] = {}  # real path -> (process, file descriptor, serial number of the holder)


class Busy(Exception):
    """Another live process holds the lock; `pid` is its number (0 when the file does not say)."""

    def __init__(self, pid: int):
        super().__init__(pid)
        self.pid = pid


class Lock:
    """A record lock (`fcntl.lockf`) on a file that names its process.

    Record locks, not `flock`: they are not inherited by forked data workers, which may outlive a killed trainer by seconds.
    A second `Lock` on the same file in the same process takes over from the first, so that a notebook cell can be run again.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._serial = 0

    def acquire(self) -> int | None:
        """Take the lock. Returns the process number of a holder that died without releasing it, else None. Raises Busy."""
        key = os.path.realpath(self.path)
        process, file, serial = _held.get(key, (0, -1, 0))
        dead = None
        if process != os.getpid():
            file, dead = self._open()
        self._serial = serial + 1
        _held[key] = (os.getpid(), file, self._serial)
        return dead

    def release(self) -> None:
        """Let go and remove the file. Does nothing when this lock was never taken, was taken over, or belongs to a parent."""
        key = os.path.realpath(self.path)
        process, file, serial = _held.get(key, (0, -1, 0))
        if not self._serial or (process, serial) != (os.getpid(), self._serial):
            return
        del _held[key]
        self.path.unlink(missing_ok=True)  # while it is still locked: nobody else can hold this file
        os.close(file)

    def _open(self) -> tuple[int, int | None]:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            try:
                dead = _take(file)
                current = self.path.exists() and os.path.samestat(os.fstat(file), os.stat(self.path))
            except BaseException:
                os.close(file)
                raise
            if current:
                break
            os.close(file)  # its holder removed it between our open and our lock: start again with the new file
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, f"{os.getpid()}\n".encode())
        return file, dead


def _take(file: int) -> int | None:
    """Lock an open file; returns the number that a dead holder left in it. Raises Busy."""
    text = os.read(file, 32).strip()
    owner = int(text) if text.isdigit() else 0
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no record locks here")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or (owner not in (0, os.getpid()) and _alive(owner)):
            if error.errno in (errno.EAGAIN, errno.EACCES, *_UNSUPPORTED):
                raise Busy(owner) from None
            raise
    return owner or None


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 is Ctrl-C there; asking would not be harmless
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
