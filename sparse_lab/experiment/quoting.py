"""Values in quotes: as Hydra's grammar reads them back, and as a shell hands them on."""

from __future__ import annotations

import os
import re
import shlex

PLAIN_IN_SHELL = re.compile(r"[^\"\\$`!]*")  # what a shell leaves as it is between "


def quoted(value: object) -> str:
    """A text, such as a path or an address of one, as Hydra's grammar reads it back, whatever it holds.

    Backslashes count there before a quote alone, and before what would be an interpolation.
    """
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"


def word(key: str, value: str) -> str:
    """What is typed in a shell so that `key` is set to this very text."""
    return in_shell(f"{key}={quoted(value)}")


def in_shell(text: str) -> str:
    """A word of a command line, in the quotes that a shell takes off."""
    return f'"{text}"' if PLAIN_IN_SHELL.fullmatch(text) else shlex.quote(text)


def written_out(folder: str) -> str:
    """A folder's name without the ~ that a shell would have taken for a home folder."""
    home = os.path.expanduser(folder)
    return home if home != folder else f"./{folder}"
