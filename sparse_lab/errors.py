"""What can go wrong in a way that the caller can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseLabError(Exception):
    """Something that the caller can mend, in one line: what is wrong, and what to do about it."""


class UserError(SparseLabError):
    """The same of a command: the line names the keys that the user can change."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"
