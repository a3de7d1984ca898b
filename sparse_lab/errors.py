"""What can go wrong in a way that the caller can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseLabError(Exception):
    """Something that the caller can mend, in one line: what is wrong, and what to do about it."""


class UserError(SparseLabError):
    """The same of a command: the line names the keys that the user can change."""


NOTED = "the whole traceback is in "  # so begins a note of an error that is on record; a file's path follows

MOST = 100  # names that a line still holds
NEAREST = 8


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the nearest known one, and all of them; of very many the nearest few."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=NEAREST, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(names) <= MOST:
        return f"{hint}known: {', '.join(names)}"
    return f"{hint}near it: {', '.join(close) or 'none'}, of {len(names):,}"
