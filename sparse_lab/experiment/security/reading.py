"""What a config file is before it is read: one that lies in its own folder, and stays small once it is written out."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from sparse_lab.errors import UserError
from sparse_lab.host.regular_file import read_text

MOST_BYTES = 200_000
MOST_VALUES = 100_000  # aliases of aliases make a billion of a few lines


def check_file(folder: Path, name: str) -> None:
    """Refuse the file `name` of a folder (no suffix) for where it lies, links followed, or for its size.

    Raises UserError with one line; what YAML raises for a file that is none. Nothing is said of a file that is missing.
    """
    path = Path(os.path.realpath(folder / f"{name.removesuffix('.yaml')}.yaml"))
    if not path.is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{name}.yaml lies in another folder, by a link: put the file itself there")
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{name}.yaml cannot be read: {error.strerror}") from None
    if "*" in text and (values := _values(text)) > MOST_VALUES:
        raise UserError(
            f"{name}.yaml holds {values:,} values, its aliases (*NAME) written out: at most {MOST_VALUES:,}"
        )


def _values(text: str) -> int:
    """How many values a file has once its aliases are written out. None is."""
    sizes: dict[str, int] = {}
    open_ones: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            total += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_ones.append((event.anchor, total - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            if anchor is not None:
                sizes[anchor] = total - before
    return total
