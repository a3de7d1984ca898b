"""What can go wrong in a way that the caller can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000  # letters of a line that a person still reads


class SparseLabError(Exception):
    """Something that the caller can mend, in one line: what is wrong, and what to do about it. Of a line that holds a
    text without end the middle is left out.
    """

    def __str__(self) -> str:
        line = super().__str__()
        left_out = len(line) - LONGEST
        return line if left_out <= 0 else f"{line[: LONGEST // 2]} [{left_out:,} letters] {line[-LONGEST // 2 :]}"


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
