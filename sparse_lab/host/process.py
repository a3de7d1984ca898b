"""Which process wrote a file, and does it still live? A number alone does not say: machines use them again."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

UNKNOWN = 0  # when a process started, where the machine does not say


def about() -> dict[str, Any]:
    """Return what a file says of the process that writes it. pid_started: in ticks since the machine's own start."""
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "boot": _boot(), "pid_started": _started(pid)}


def is_gone(said: dict[str, Any]) -> bool:
    """Return whether the process of `about` is known to be gone; one on another machine is taken at its word.

    said: of whatever origin. It may lack boot and pid_started, as files of earlier versions do.
    """
    pid = said.get("pid")
    if said.get("host") != socket.gethostname():
        return False
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return True
    if said.get("boot") and _boot() and said["boot"] != _boot():
        return True
    return not _lives(pid) or not _is(pid, said.get("pid_started"))


def mark() -> str:
    """Return the same in a few letters, for the names of temporary files."""
    return _mark(os.getpid())


def is_of_the_living(mark: str) -> bool | None:
    """Return whether the process of a `mark` lives; None for one of another machine or of another start of this one."""
    machine, pid, started = mark.split("-")
    if machine != _machine():
        return None
    return _lives(int(pid)) and _is(int(pid), int(started))


def _is(pid: int, started: object) -> bool:
    """Did the process of this number start then? Where one of the two is not known, it is taken for it."""
    now = _started(pid)
    return not isinstance(started, int) or UNKNOWN in (started, now) or started == now


def _lives(pid: int) -> bool:
    if os.name != "posix":  # there signal 0 is no question but Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return _fields(pid)[:1] != ["Z"]  # one that nobody has waited for yet is dead all the same


def _started(pid: int) -> int:
    fields = _fields(pid)
    return int(fields[19]) if len(fields) > 19 else UNKNOWN


def _fields(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; nothing elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


@cache
def _mark(pid: int) -> str:
    return f"{_machine()}-{pid}-{_started(pid)}"


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@cache
def _machine() -> str:
    return hashlib.sha256(f"{socket.gethostname()} {_boot()}".encode()).hexdigest()[:8]
