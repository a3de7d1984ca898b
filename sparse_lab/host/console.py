"""What the command says goes to a console that may be gone: a reader that left, a closed terminal, a full disk, an
encoding without the signs. None of them ends the work.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TextIO

from sparse_lab.host.full_disk import FULL


def keep_going() -> None:
    """Let nothing that is written to standard output or error raise any more, in this process.

    A stream that was closed becomes /dev/null, or the next file that is opened would get what is said.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout = _kept(sys.stdout, 1)
    sys.stderr = _kept(sys.stderr, 2)


def lost() -> OSError | None:
    """Return what a full disk did to standard output, where it did: what was said is not in the file it was to be in.

    A reader that has left, as of `| head`, wanted no more of it.
    """
    error = sys.stdout.error if isinstance(sys.stdout, _Console) else None
    return error if error is not None and error.errno in FULL else None


class _Descriptor(io.RawIOBase):
    """A file descriptor of which a failed write is kept in `error`, and is none to its writer."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data) -> int:  # type: ignore[no-untyped-def,override]
        while True:
            try:
                return os.write(self.number, data)
            except BlockingIOError:  # a pipe that another program made non-blocking
                select.select([], [self.number], [])
            except OSError as error:
                self.error = self.error or error
                return len(data)


class _Console(io.TextIOWrapper):
    """Text for a descriptor; signs that its encoding lacks are written as Python writes them in a string."""

    def __init__(self, descriptor: _Descriptor, encoding: str, each_line: bool) -> None:
        super().__init__(io.BufferedWriter(descriptor), encoding, "backslashreplace", line_buffering=each_line)
        self._descriptor = descriptor

    @property
    def error(self) -> OSError | None:
        return self._descriptor.error


def _kept(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # closed when Python began: /dev/null by now, or a file that was opened since
        return _Console(_Descriptor(os.open(os.devnull, os.O_WRONLY)), "utf-8", each_line=False)
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, _Console) or _number(stream) != number:
        return stream  # done already, or somebody else's
    stream.flush()
    return _Console(_Descriptor(number), stream.encoding, each_line=stream.line_buffering or stream.write_through)


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _open_null(number: int) -> None:
    """Open /dev/null as a descriptor that is closed, for the processes too that this one starts."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, number)
    if null != number:
        os.close(null)
    os.set_inheritable(number, True)
