"""Folders that are a table of their own: those that hold `table.yaml`, with its title and what was planned for it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparse_lab.errors import UserError
from sparse_lab.records.atomic_io import printable

TABLE = "table.yaml"


@dataclass(frozen=True)
class About:
    """What a table.yaml says. `command`: what made the table; `planned`: rows as in a sweep's plan."""

    title: str
    command: str = ""
    planned: list[dict[str, Any]] = field(default_factory=list)


def about(folder: Path) -> About | None:
    """The table that a folder is, or None. Raises UserError for a table.yaml that cannot be read."""
    path = folder / TABLE
    if not path.is_file():
        return None
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    plain = printable(plain) if isinstance(plain, dict) else {}
    title, command, planned = plain.get("title"), plain.get("command"), plain.get("planned")
    return About(
        title=title if isinstance(title, str) and title.strip() else printable(folder.resolve().name),
        command=command if isinstance(command, str) else "",
        planned=planned if isinstance(planned, list) else [],
    )


def below(roots: Iterable[Path]) -> list[Path]:
    """The table folders below the roots, by name. What lies within one belongs to it; a root that is one is whole."""
    found: dict[Path, Path] = {}
    for root in roots:
        for place, folders, files in os.walk(root):
            folders.sort()
            folder = Path(place)
            if TABLE not in files:
                continue
            folders.clear()
            if folder != root:
                found.setdefault(folder.resolve(), folder)
    return list(found.values())
