"""What is said while data is read, before a run has a console: one line, by one process of a run."""

from __future__ import annotations

import sys

from sparse_lab.sparsity.processes import rank


def say(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def shape(one: tuple[int, int, int]) -> str:
    """Return (channels, height, width) as a person would say it."""
    return "x".join(map(str, one))
