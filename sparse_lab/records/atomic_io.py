"""Files that are written whole, and carry their own checksum. No torch: reports read records with it too.

A record is JSON with a key for it. A checkpoint is a zip archive (torch.save makes one), which may end in a comment:
the checksum stands there, so that it comes and goes with the file, and everything that reads zip archives reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sparse_lab.host import process
from sparse_lab.host.full_disk import naming
from sparse_lab.host.regular_file import TENSORS, opened
from sparse_lab.records.redaction import clean

CHECKSUM = "checksum"
SEAL = b"sparse_lab sha256 "
TEMPORARY = r"\..*\.([0-9a-f]{8}-\d+-\d+)\.tmp"  # names of the files that `temporary_of` gives, with who writes them
CHUNK = 2**20
END_OF_ZIP = struct.Struct("<4s16xH")  # the last record of an archive: its signature ..., the comment's length


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes the place of `path` when the block ends well.

    A reader sees the old file or the new one, and a full disk or a kill leaves the old one as it was. An OSError that
    does not know which file it is of then names `path`.
    """
    temporary = temporary_of(path)
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """Where this process writes what is to take the place of `path`. Its name says whose it is: what a killed process
    leaves is found by it (`lock.remove_left_behind`).
    """
    return path.with_name(f".{path.name[:60]}.{process.mark()}.tmp")  # a name has at most 255 bytes


def write_text_atomic(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON, without the checksum that it may hold."""
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def damaged(record: dict[str, Any]) -> bool:
    """Does the record hold a checksum that is not its own? One without a checksum is taken at its word."""
    return CHECKSUM in record and record[CHECKSUM] != checksum(record)


def printable_lines(text: str) -> str:
    """Text of several lines, of whatever origin, each of which stays one on a terminal."""
    return "\n".join(printable(line) for line in text.split("\n"))


def printable(plain: Any) -> Any:
    """A record's plain values, of whatever origin, with text that stays text on a terminal and in any file.

    What steers a terminal, breaks a line or turns the direction of writing becomes a space; half a surrogate pair,
    which JSON can spell and no file in UTF-8 can hold, a question mark.
    """
    if isinstance(plain, str):
        if plain.isprintable():
            return plain
        text = plain.encode("utf-8", "replace").decode("utf-8")
        return "".join(sign if sign.isprintable() else " " for sign in text)
    if isinstance(plain, list):
        return [printable(value) for value in plain]
    if isinstance(plain, dict):
        return {printable(key): printable(value) for key, value in plain.items()}
    return plain


def write_record(path: Path, record: dict[str, Any]) -> None:
    """A record as JSON, with its checksum, without secrets."""
    record = clean(record)
    write_text_atomic(path, json.dumps({**record, CHECKSUM: checksum(record)}, indent=2, allow_nan=False) + "\n")


def append_checksum(path: Path) -> None:
    """Give the zip archive its SHA-256 as a comment. Raises ValueError when it is none, or has a comment already."""
    with open(path, "r+b") as file:
        file.seek(-END_OF_ZIP.size, os.SEEK_END)
        signature, length = END_OF_ZIP.unpack(file.read())
        if signature != b"PK\x05\x06" or length:
            raise ValueError(f"{path} is no zip archive that a seal could be added to")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest().encode()  # type: ignore[arg-type]
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", len(SEAL + digest)) + SEAL + digest)


def seal_of(path: Path) -> str | None:
    """The SHA-256 that an archive says of itself; None without a seal, or without a file."""
    try:
        with opened(path, TENSORS) as file:
            end = _end(file, len(SEAL) + 64)
    except OSError:
        return None
    return end[len(SEAL) :].decode("ascii", "replace") if end.startswith(SEAL) else None


def verify_checksum(path: Path) -> bool | None:
    """Is the archive what it was when it was sealed? None for a whole archive without a seal, and for other files.

    Raises OSError where there is no file to read.
    """
    comment = len(SEAL) + 64
    with opened(path, TENSORS) as file:
        end = _end(file, comment)
        size = file.tell()
        file.seek(0)
        if not end.startswith(SEAL):
            return False if file.read(4) == b"PK\x03\x04" and end[-END_OF_ZIP.size :][:4] != b"PK\x05\x06" else None
        file.seek(0)
        digest = hashlib.sha256()
        left = size - comment - 2
        while left > 0 and (part := file.read(min(left, CHUNK))):
            digest.update(part)
            left -= len(part)
    digest.update(b"\0\0")  # the comment's length, as it was before the seal
    return digest.hexdigest().encode() == end[len(SEAL) :]


def _end(file: BinaryIO, length: int) -> bytes:
    """The last bytes of a file, which is left at its end."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - length))
    return file.read()
