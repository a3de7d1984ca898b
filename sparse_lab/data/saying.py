"""What is said while data is read, before a run has a console: one line, by one process of a run."""

from __future__ import annotations

import sys

from sparse_lab.sparsity.processes import rank


def say(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def size(count: int) -> str:
    """Return a number of bytes as a person would say it."""
    unit, name = next((one for one in ((2**30, "GiB"), (2**20, "MiB")) if count >= one[0]), (2**10, "KiB"))
    return f"{count / unit:,.1f} {name}"


def shape(one: tuple[int, int, int]) -> str:
    """Return (channels, height, width) as a person would say it."""
    return "x".join(map(str, one))
