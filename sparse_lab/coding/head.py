"""The plain values in a packed file's head, which somebody else may have written: each is what it must be, or a
ValueError says what it is instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

DEEPEST = 32  # lists and mappings in each other
LONGEST = 2**24  # bytes of a head
MOST = 2**29  # numbers that a file stands for, whatever its size
A_BYTE = 2**14  # of them for each byte of the file: one weight in tens of thousands that is not zero
SIDE = 2**16  # of a window, and of an image, in pixels


def parsed(text: bytes | str) -> dict[str, Any]:
    """Return the mapping that a JSON text holds. Raise ValueError for another text, for NaN and infinity, for a name
    that stands twice, and for nesting that no head has.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a head of {len(text):,} bytes")
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("lists in lists in lists") from None
    if not isinstance(found, dict):
        raise ValueError("its head is no mapping")
    _check_depth(found)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in its head")
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [one for many in level for one in (many.values() if isinstance(many, dict) else many)
                 if isinstance(one, dict | list)]  # fmt: skip
        if not level:
            return
    raise ValueError("lists in lists in lists")


def field(of: Any, name: str) -> Any:
    """Return what a mapping has by a name."""
    if not isinstance(of, dict) or name not in of:
        raise ValueError(f"{name!r} is missing")
    return of[name]


def only(of: Any, names: Sequence[str]) -> None:
    """Raise ValueError where a mapping has other names than these."""
    if not isinstance(of, dict) or (more := of.keys() - set(names)):
        raise ValueError("it is no mapping" if not isinstance(of, dict) else f"{sorted(more)[0][:40]!r} is not known")


def whole(of: Any, name: str, low: int, high: int) -> int:
    """Return a whole number between two, both included; true and 2.0 are none."""
    return _whole(field(of, name), name, low, high)


def wholes(of: Any, name: str, low: int, high: int, length: int | None = None) -> tuple[int, ...]:
    """Return a list of whole numbers. length: how many there must be."""
    found = field(of, name)
    if not isinstance(found, list) or length not in (None, len(found)):
        raise ValueError(f"{name} is no list of {'whole' if length is None else length} numbers")
    return tuple(_whole(one, name, low, high) for one in found)


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is no whole number from {low:,} to {high:,}")
    return value


def number(of: Any, name: str) -> float:
    """Return a number above 0 and not infinite."""
    found = field(of, name)
    if type(found) not in (int, float) or not 0 < found < math.inf:
        raise ValueError(f"{name} is no number above 0")
    return float(found)


def choice(of: Any, name: str, choices: Sequence[Any]) -> Any:
    """Return one of these values, of its own type."""
    found = field(of, name)
    if not any(type(found) is type(one) and found == one for one in choices):
        raise ValueError(f"{name} is none of {', '.join(map(str, choices))}")
    return found


def items(of: Any, name: str) -> list[Any]:
    found = field(of, name)
    if not isinstance(found, list):
        raise ValueError(f"{name} is no list")
    return found


def mapping(of: Any, name: str) -> dict[str, Any]:
    found = field(of, name)
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no mapping")
    return found


def text(of: Any, name: str) -> str:
    found = field(of, name)
    if not isinstance(found, str):
        raise ValueError(f"{name} is no text")
    return found


class Allowance:
    """How many numbers a file may still stand for: many where most are zero, but not any number."""

    def __init__(self, size: int) -> None:
        self.most = self.left = min(MOST, A_BYTE * size)

    def take(self, sizes: Sequence[int]) -> int:
        """Return the product. Raise ValueError where it is more than is left."""
        count = math.prod(sizes)
        self.left -= count
        if self.left < 0:
            raise ValueError(f"it asks for more than {self.most:,} numbers")
        return count

    def check_results(self, count: int) -> None:
        """Raise ValueError where all that is computed for an image are too many numbers for a file of this size."""
        if count > self.most:
            raise ValueError(f"an image takes {count:,} numbers, more than {self.most:,}")
