"""`sparse-lab keys`: every key of the config with its default, its range and its meaning, read from the schema."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sparse_lab import models
from sparse_lab.config import Config, parts_of, span
from sparse_lab.errors import nearest


def keys(part: Any = None, path: str = "") -> list[tuple[str, str, str, str]]:
    """(key, default, range or choices, meaning) of every key below `part`, a dataclass instance."""
    rows = []
    part = Config() if part is None else part
    for entry in dataclasses.fields(part):
        name, value = f"{path}{entry.name}", getattr(part, entry.name)
        if entry.metadata.get("part"):
            kind = parts_of(type(part))[entry.name]
            rows.append((name, "null", "", entry.metadata["help"]))
            rows += keys(kind(), f"{name}.")
        elif dataclasses.is_dataclass(value):
            rows += keys(value, f"{name}.")
        else:
            meta = dict(entry.metadata)
            rows.append((name, "null" if value is None else str(value), span(meta), meta["help"]))
    return rows


def options() -> list[tuple[str, str, str, str]]:
    """The same of every option that a network says it has."""
    return [
        (f"model.options.{key}", "null" if default is None else str(default), "", f"an option of model={name}")
        for name in models.names()
        for key, default in (models.options_of(name) or {}).items()
    ]


def main(argv: list[str]) -> int:
    """Print the keys that contain a word, or all."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab keys",
        description="Every config key: the schema's default, range, meaning. Override one with KEY=VALUE.",
    )
    parser.add_argument(
        "word", nargs="?", default="", help="only keys that contain this, such as regrow or training.lr"
    )
    args = parser.parse_args(argv)
    rows = [*keys(), *options()]
    found = [row for row in rows if args.word in row[0]]
    if not found:
        parser.error(f"no key contains {args.word!r}; {nearest(args.word, [row[0] for row in rows])}")
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("key", no_wrap=True), Column("default", overflow="fold"), Column("range", overflow="fold"), "meaning"
    )
    for row in found:
        table.add_row(*row)
    Console().print(table)
    return 0
