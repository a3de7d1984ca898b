"""What is read of a data set as one hash: the names and the content of its files, and not where they lie.

Content is read once. What came of it is kept in a folder (outputs/fingerprints) under each file's name, size, times and
inode, so that afterwards a look at the files' metadata is enough. No torch: a finished run is looked up with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sparse_lab.host import regular_file
from sparse_lab.host.file_lock import NoLocks
from sparse_lab.host.file_lock import lock as take
from sparse_lab.records.atomic_io import write_record, write_text_atomic
from sparse_lab.records.record import BadRecord, read_record

RACY = 2.0  # seconds: a file that changed just now could change again, and nothing but its content would show it
FIRST_LINE, NEXT_LINES = 2.0, 10.0  # seconds between lines on how far it is
SAVE_EVERY = 60.0  # seconds of reading that a kill may cost
LARGEST = 2**14 * regular_file.GIB  # bytes of a file: whoever takes images of it says what is too much
CHUNK = 256  # files that a thread takes at a time

# (a file's name below the data set's folder, its metadata as text): a file that is known by this is not read again
Seen = tuple[str, str]


def of_contents(contents: dict[str, str]) -> str:
    """Return the SHA-256 over the sorted (name, digest of the content)."""
    return _digest(f"{name}\0{contents[name]}\n" for name in sorted(contents))


def of_files(base: Path, files: Iterable[tuple[str, os.stat_result]], store: Path, algorithm: str = "sha256") -> str:
    """Return `of_contents` of files below `base`.

    Args:
        files: (name below base, its stat) of each.
        store: the folder that keeps what is known; where it cannot be written, nothing is kept.
        algorithm: of each file's digest.

    Raise OSError where a file cannot be read.
    """
    seen = sorted((name, _metadata(stat)) for name, stat in files)
    listing = _digest(f"{name}\t{about}\n" for name, about in seen)
    kept = _Kept(store, base, algorithm)
    if (known := kept.fingerprint(listing)) is not None:
        return known
    with kept.locked():
        if (known := kept.fingerprint(listing)) is not None:  # another process read them while this one waited
            return known
        kept.load()
        just_changed = kept.read([one for one in seen if one not in kept.contents], len(seen))
        contents = just_changed | kept.contents
        found = of_contents({one[0]: contents[one] for one in seen})
        kept.contents = {one: kept.contents[one] for one in seen if one in kept.contents}
        kept.save()
        if not just_changed:
            kept.save_fingerprint(listing, found, len(seen))
    return found


def _metadata(stat: os.stat_result) -> str:
    return f"{stat.st_size}\t{stat.st_mtime_ns}\t{stat.st_ctime_ns}\t{stat.st_ino}"


def _changed(about: str) -> float:
    """When the file's metadata last changed, in seconds: nobody can set that time."""
    return int(about.split("\t")[2]) / 1e9


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass
class _Kept:
    """What is known of the files in one folder. contents: digest of each file that lay still."""

    store: Path
    base: Path
    algorithm: str
    contents: dict[Seen, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = _digest([self.algorithm, str(self.base.resolve())])[:16]
        self.summary, self.table, self.lock = (self.store / f"{name}{end}" for end in (".json", ".tsv", ".lock"))

    def fingerprint(self, listing: str) -> str | None:
        """Of exactly these files; None where that is not known."""
        try:
            record = read_record(self.summary)
        except (FileNotFoundError, BadRecord):
            return None
        return str(record["fingerprint"]) if record.get("listing") == listing else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process reads, the others wait for what it finds."""
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            lock = open(self.lock, "a")  # noqa: SIM115 - held open as long as the block
        except OSError:
            lock = None
        with lock or nullcontext():
            if lock is not None:
                with suppress(NoLocks):  # each reads for itself then
                    take(lock, lock.name)
            yield

    def load(self) -> None:
        try:
            text = regular_file.read_bytes(self.table, LARGEST).decode("ascii")
        except (OSError, ValueError):
            return
        *lines, seal = text.split("\n")
        if seal != _digest(f"{line}\n" for line in lines):
            return  # damaged: all is read again
        for line in lines:
            digest, name, about = line.split("\t", 2)
            self.contents[json.loads(name), about] = digest

    def read(self, unknown: list[Seen], total: int) -> dict[Seen, str]:
        """Add the content of files to what is known; return that of those which changed just now, apart."""
        just_changed: dict[Seen, str] = {}
        begun = said = saved = time.monotonic()
        wait, done = FIRST_LINE, total - len(unknown)
        chunks = [unknown[start : start + CHUNK] for start in range(0, len(unknown), CHUNK)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for chunk, read in zip(chunks, pool.map(self._read_chunk, chunks), strict=True):
                now, least = time.monotonic(), time.time() - RACY - (time.monotonic() - begun)
                for one, digest in zip(chunk, read, strict=True):
                    (just_changed if _changed(one[1]) > least else self.contents)[one] = digest
                done += len(chunk)
                if now - said > wait:
                    said, wait = now, NEXT_LINES
                    print(f"reading {self.base} to know it by its content: {done:,} of {total:,} files",
                          file=sys.stderr, flush=True)  # fmt: skip
                if now - saved > SAVE_EVERY:
                    saved = now
                    self.save()
        return just_changed

    def _read_chunk(self, chunk: list[Seen]) -> list[str]:
        digests = []
        for name, _ in chunk:
            regular_file.check(self.base / name, LARGEST)
            with open(self.base / name, "rb") as file:
                digests.append(hashlib.file_digest(file, self._hash).hexdigest())
        return digests

    def _hash(self) -> hashlib._Hash:
        return hashlib.new(self.algorithm, usedforsecurity=False)

    def save(self) -> None:
        lines = [f"{digest}\t{json.dumps(name)}\t{about}\n" for (name, about), digest in self.contents.items()]
        try:
            write_text_atomic(self.table, "".join([*lines, _digest(lines)]))
        except OSError:
            pass  # they are read again the next time

    def save_fingerprint(self, listing: str, fingerprint: str, files: int) -> None:
        try:
            write_record(self.summary, {"listing": listing, "fingerprint": fingerprint, "files": files})
        except OSError:
            pass
