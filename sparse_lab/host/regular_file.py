"""Files that somebody else may have put there: opened without waiting, read only where they are files and small enough.

A pipe or a device in a file's place would make its reader wait for ever, or read without end.
"""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

KIB, MIB, GIB = 2**10, 2**20, 2**30
TENSORS = 256 * GIB  # a file of tensors has no more: optimizer and weights of some ten billion parameters


@contextmanager
def opened(path: str | Path, most: int) -> Iterator[BinaryIO]:
    """The regular file at `path`, links followed, open for reading.

    most: bytes that a file of its kind may have. Raises OSError, whose `strerror` is fit for the user: as `open` does,
    and for what is no regular file or larger than that.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, a device or a socket, not a file", str(path))
        if found.st_size > most:
            raise OSError(
                errno.EINVAL, f"it has {found.st_size:,} bytes, and no such file has more than {most:,}", str(path)
            )
        yield file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would keep `open` waiting


def read_bytes(path: str | Path, most: int) -> bytes:
    """Return what the file holds. Raises OSError as `opened` does."""
    with opened(path, most) as file:
        size = os.fstat(file.fileno()).st_size  # room is made for what is asked for, whether it is there or not
        return file.read(min(most, max(size, 64 * KIB)))


def read_text(path: str | Path, most: int) -> str:
    """Return the file's text. Raises OSError as `opened` does, UnicodeDecodeError for what is not UTF-8."""
    return read_bytes(path, most).decode("utf-8")


def check(path: str | Path, most: int) -> None:
    """Raise OSError as `opened` does, for readers that want the path itself."""
    with opened(path, most):
        pass


def check_tensors(path: str | Path, most: int) -> None:
    """The same, of a file of tensors, as torch.save and safetensors begin one.

    In a zip archive they lie as they are, so that what it holds is no more than the file itself; what unpacks to more
    is no such archive.
    """
    with opened(path, most) as file:
        begin = file.read(9)
        if not begin.startswith((b"PK\x03\x04", b"\x80")) and begin[8:] != b"{":
            raise OSError(errno.EINVAL, "it is no file of tensors, as torch.save and safetensors write them", str(path))
        try:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError):  # another kind of file, or a damaged one
            return
        if unpacked > (size := os.fstat(file.fileno()).st_size):
            said = f"it has {size:,} bytes and unpacks to {unpacked:,}, as no file of tensors does"
            raise OSError(errno.EINVAL, said, str(path))
