"""A file system that takes no more, by any of the names that it has for that, and which one it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_lab.errors import UserError

# what there is to say of it, and to do about it
FULL = {
    errno.ENOSPC: ("the disk is full", "make room there"),
    errno.EDQUOT: ("the disk quota is used up", "make room there"),
    errno.EFBIG: ("a file would become larger than files may be", "raise the limit (`ulimit -f`)"),
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Where a disk is full for a write within, and the error says nothing of where that went, let it name `path`."""
    try:
        yield
    except Exception as error:
        full = found_in(error)
        if full is not None and full.filename is None:
            full.filename = str(path)
        raise


def found_in(error: BaseException | None) -> OSError | None:
    """Return what a full disk raised, be it this error or one that led to it; None for any other error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def unwritable(folder: Path, error: OSError) -> UserError:
    """What there is to say where the outputs cannot be written to, before anything else is done."""
    if error.errno in FULL:
        return UserError(f"{what_of(error, folder)}, or set paths.outputs=DIR")
    return UserError(f"cannot write to {folder}: {error.strerror}; set paths.outputs=DIR")


def what_of(error: OSError, likely: Path) -> str:
    """Say what `found_in` returned: what is full, where, what to do. `likely`: where, if the error does not know."""
    assert error.errno is not None
    what, remedy = FULL[error.errno]
    name = error.filename2 or error.filename  # of a copy the second is where it was to go
    where = Path(os.fsdecode(name)).parent if isinstance(name, str | bytes) else likely
    return f"{what}: nothing more can be written to {where}; {remedy}"
