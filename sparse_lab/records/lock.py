"""A folder that one process has for itself, by a lock file in it. The lock goes when its holder dies."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from sparse_lab.errors import UserError
from sparse_lab.host import process
from sparse_lab.host.file_lock import lock as take
from sparse_lab.records.atomic_io import TEMPORARY, printable

FILE = ".lock"
MOST_SAID = 300  # bytes that are read of what a holder says of itself
FORGOTTEN = 3600.0  # seconds after which a temporary file of a process that cannot be asked counts as left behind


class Held(UserError):
    """Another process has the folder. `holder`: what it says of itself."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path.parent}: {holder} has it")
        self.holder = holder


class Moved(UserError):
    """The folder is no longer where it was: what is written there now is another process's."""


class Lock:
    """The lock of a folder, which is made where it is not there; taken as long as it is open.

    wait: called with what the holder says of itself, where another process has the lock; then this one waits. Without
    it Held is raised. Raises OSError where the folder cannot be written, NoLocks
    where nothing can be locked there.
    """

    def __init__(self, folder: Path, wait: Callable[[str], None] | None = None, name: str = FILE) -> None:
        self.path = folder / name
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a pipe would keep `open` waiting, and what a device is locked for nobody knows
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            try:
                self._take(wait)
            except BaseException:
                self.close()
                raise
            if self.in_place:
                return
            self.close()  # the folder was moved or removed meanwhile, or the file was

    def _take(self, wait: Callable[[str], None] | None) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise OSError(errno.EINVAL, f"{self.path.name} is a pipe or a device, not a file: remove it")
        try:
            take(self._file, self.path, wait=False)
        except BlockingIOError:
            said = os.pread(self._file, MOST_SAID, 0).decode("utf-8", "replace").strip()
            holder = printable(said) or "another process"
            if wait is None:
                raise Held(self.path, holder) from None
            wait(holder)
            take(self._file, self.path)

    def say(self, text: str) -> None:
        """Write down who holds the lock, for those who find it taken."""
        with suppress(OSError):  # on a full disk too the lock is held
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text.encode(), 0)

    @property
    def identity(self) -> int:
        """The number that tells this lock's file from another one in the same place."""
        return os.fstat(self._file).st_ino

    @property
    def in_place(self) -> bool:
        """Is the file that is locked still the one in its place?"""
        try:
            there, own = os.stat(self.path), os.fstat(self._file)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files of processes that were killed as they wrote. For whoever holds the folder's lock."""
    for path in folder.glob(".*.tmp"):
        told = re.fullmatch(TEMPORARY, path.name)
        try:
            lives = None if told is None else process.is_of_the_living(told[1])
            if lives is False or (lives is None and time.time() - path.lstat().st_mtime > FORGOTTEN):
                path.unlink()
        except OSError:
            continue
