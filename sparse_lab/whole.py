"""Files that are written whole, and JSON that carries its own checksum. No torch: reports read records with it too."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes the place of `path` when the block ends well.

    A reader sees the old file or the new one, and a full disk or a kill leaves the old one as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON, without the checksum that it may hold."""
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def damaged(record: dict[str, Any]) -> bool:
    """Does the record hold a checksum that is not its own? One without a checksum is taken at its word."""
    return CHECKSUM in record and record[CHECKSUM] != checksum(record)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """A record as JSON, with its checksum."""
    write_whole(path, json.dumps({**record, CHECKSUM: checksum(record)}, indent=2, allow_nan=False) + "\n")
