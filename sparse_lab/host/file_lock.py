"""Locks by which processes know of each other. One goes when its holder dies, or closes the file."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO, Any

from sparse_lab.errors import UserError

# what a file system says that has no locks, or whose lock server does not answer
WITHOUT = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class NoLocks(UserError):
    """The file system has no locks: two processes could not know of each other there."""


def lock(file: IO[Any] | int, path: str | Path, *, wait: bool = True) -> None:
    """Hold the open file, or descriptor, of `path` for this process.

    Raises BlockingIOError while another process has it, unless `wait`; NoLocks where nobody can.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        raise NoLocks(
            f"{path} cannot be locked ({error.strerror}): two processes could write there at one time and not "
            "know of each other; choose a folder on a file system with locks (paths.outputs=DIR)"
        ) from None
