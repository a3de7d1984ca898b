"""What all `register_*` functions share: which names can be given, what was registered, and how it is taken out again.

Each of them lives with its noun: a score's in sparsity/scores.py, a network's in models/registry.py, and so on.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from sparse_lab.errors import SparseLabError

NAME = re.compile(r"[A-Za-z]\w{0,79}", re.ASCII)
# what a config file or a command line would read as something else than text
NO_TEXT = ("null", "none", "true", "false", "yes", "no", "on", "off", "nan", "inf", "infinity")


@dataclass(frozen=True)
class Registration:
    """One thing that was registered: `kind` in words, as "filter score". `take_out` makes it unknown again."""

    kind: str
    name: str
    take_out: Callable[[], object] = field(repr=False, compare=False)


REGISTERED: list[Registration] = []  # in the order in which they came, built-in ones not among them


def check_name(kind: str, name: object, taken: Container[str]) -> str:
    """Return the name. Raise SparseLabError for one that is taken, or that is no plain word."""
    if not isinstance(name, str) or NAME.fullmatch(name) is None or keyword.iskeyword(name) or name.lower() in NO_TEXT:
        raise SparseLabError(
            f"{kind} {name!r}: a name is a plain word of letters, digits and _, as in my_{kind.replace(' ', '_')}"
        )
    if name in taken:
        raise SparseLabError(f"{kind} {name!r} is taken: choose another name")
    return name


def check_function(kind: str, function: object, taken: Container[str]) -> str:
    """Return the name of a function that is to be registered under it. Raise SparseLabError for what is none."""
    if not callable(function) or isinstance(function, type):
        raise SparseLabError(f"a {kind} is a function, not {function!r}")
    return check_name(kind, getattr(function, "__name__", None), taken)


def enter(kind: str, name: str, take_out: Callable[[], object]) -> None:
    """Note what has just been registered. take_out: undoes it."""
    REGISTERED.append(Registration(kind, name, take_out))


def take_out(registered: Iterable[Registration]) -> None:
    """Make all of these unknown again, the last first."""
    for one in reversed(list(registered)):
        REGISTERED.remove(one)
        one.take_out()
