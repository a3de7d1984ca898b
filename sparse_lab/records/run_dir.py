"""A run's folder, its status and its results on disk. CSV and JSON here are the source of truth.

Everything is written whole: a temporary file, then a rename.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sparse_lab.errors import UserError
from sparse_lab.host import process
from sparse_lab.host.full_disk import naming, unwritable
from sparse_lab.host.regular_file import GIB, TENSORS, check, read_bytes
from sparse_lab.records.atomic_io import seal_of, verify_checksum, write_record, write_text_atomic
from sparse_lab.records.lock import Held, Lock, Moved, remove_left_behind
from sparse_lab.records.record import BadRecord, read_result, read_status
from sparse_lab.records.redaction import clean, redact

MOST_LINES = 4 * GIB  # bytes of what a run writes a line at a time


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def zeros_among(found: Mapping[str, Any]) -> str:
    """What is to be said behind the kept weights of a record or a level: how many are not zero, where some are."""
    nonzero = found.get("nonzero")  # a record of before does not say
    return "" if nonzero in (None, found["kept"]) else f", {nonzero:,} not zero"


def network_of(path: str | None) -> str | None:
    """Return the file with the network of the run in a folder, or `path` itself where it is no run's folder."""
    if path is None or not os.path.isdir(folder := Path(path).expanduser() / "checkpoints"):
        return path
    return str(folder / "best.ckpt")


class RunLocked(UserError):
    """Another process has this run."""


class RunDir:
    """One run on disk: config.yaml, status.json, metrics.csv, result.json, checkpoints/.

    config: what config.yaml is to hold, plain values.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.name = path.name
        self.config = config
        self.last = self.path / "checkpoints" / "last.ckpt"
        self.previous = self.path / "checkpoints" / "previous.ckpt"
        self.best = self.path / "checkpoints" / "best.ckpt"
        self.small = self.path / "checkpoints" / "small.ckpt"
        self.trace = self.path / "checkpoints" / "trace.ckpt"
        self.status: dict[str, Any] = {}
        self._lock: Lock | None = None

    @property
    def has_result(self) -> bool:
        """Does a sound result lie here? Whether its network is whole is seen when the run is asked for it."""
        return self._record() is not None

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, or None: then the run is finished again, from its last checkpoint.

        A run is finished when its result is there, whole and its own, with the very network that it was measured on.
        """
        result = self._record()
        try:
            if result is None or self.foreign(result) or not verify_checksum(self.best):
                return None
            if "small" in result and not verify_checksum(self.small):
                return None
        except OSError:
            return None
        return result

    def _record(self) -> dict[str, Any] | None:
        try:
            result = read_result(self.path / "result.json")
        except (FileNotFoundError, BadRecord):
            return None
        return result if result["name"] == self.name else None

    def foreign(self, result: dict[str, Any]) -> list[Path]:
        """The networks here that are not those that the result was measured on: it knows the seals of its own."""
        seals = result.get("networks")
        if not isinstance(seals, dict):  # results from before there were seals
            return []
        return [path for path in (self.best, self.small, self.trace) if seal_of(path) != seals.get(path.stem)]

    def networks(self) -> dict[str, str]:
        """The seals of the networks here, by name (best, small, trace), for a result to know them by."""
        there = (self.best, self.small, self.trace)
        return {path.stem: seal for path in there if (seal := seal_of(path)) is not None}

    @contextmanager
    def claim(self, say: Callable[[str], None], wait: bool) -> Iterator[None]:
        """Hold the run for this process. The lock goes when its holder dies.

        Raises RunLocked while another process has it, unless `wait`; UserError when the folder cannot be written, or
        not locked.
        """
        with self._taken(say, wait) as lock:
            for folder in (self.path, self.path / "checkpoints"):
                remove_left_behind(folder)
            self._lock = lock
            try:
                yield
            finally:
                self._lock = None

    def _taken(self, say: Callable[[str], None], wait: bool) -> Lock:
        def waiting(holder: str) -> None:
            say(f"waiting for {self.name}: {holder} runs it")

        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path, waiting if wait else None)
        except Held as held:
            raise RunLocked(f"{held.holder} runs it already") from None
        except OSError as error:
            raise unwritable(self.path, error) from None
        lock.say(f"process {os.getpid()} on {socket.gethostname()}")
        return lock

    @property
    def moved(self) -> Moved | None:
        """What is to be said where this process holds the run, and its folder is no longer where it was."""
        if self._lock is None or self._lock.in_place:
            return None
        return Moved(
            f"{self.path} was moved, removed or replaced while this run went on: it stops and writes nothing more; "
            "put the folder back and start the same command again to go on"
        )

    def to_write(self, path: Path) -> Path:
        """The same path, if it is still this run's own. Raises Moved."""
        if (moved := self.moved) is not None:
            raise moved
        return path

    def set_aside_damaged(self, say: Callable[[str], None]) -> None:
        """Rename checkpoints that are not what was saved: the one before is used, or they are made anew."""
        for path in (self.last, self.previous, self.best, self.small, self.trace):
            try:
                holds = verify_checksum(path)
            except FileNotFoundError:
                continue
            if not holds:
                self.set_aside(path, "damaged", "is damaged (torn or changed since it was saved)", say)
        result = self._record()
        for path in [] if result is None else self.foreign(result):
            if path.exists():
                self.set_aside(path, "foreign", "is not the network that this run's result was measured on", say)

    def set_aside(self, path: Path, ending: str, why: str, say: Callable[[str], None]) -> None:
        aside = self.to_write(path).with_name(f"{path.name}.{ending}")
        os.replace(path, aside)
        say(f"WARNING: {path} {why}: set aside as {aside.name}")

    def newest(self) -> Path | None:
        """The checkpoint to go on from; damaged ones have been set aside."""
        return next((path for path in (self.last, self.previous) if path.is_file()), None)

    def begin(self) -> None:
        """Say that this process makes the run. Raises UserError where something else lies in the place of a file."""
        self._check_files()
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self.to_write(self.path / "error.txt").unlink(missing_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.create(clean(self.config)))
        write_text_atomic(self.to_write(self.path / "config.yaml"), text)
        self.status = {
            "state": "running",
            "error": None,
            "started": now(),
            **process.about(),
        }
        self._write_status()

    def _check_files(self) -> None:
        """A pipe would keep the run waiting when it comes to write there; a folder would fail it."""
        for path in (*self.path.iterdir(), *(self.path / "checkpoints").glob("*.ckpt")):
            if path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".txt", ".ckpt"):
                try:
                    check(path, TENSORS)
                except FileNotFoundError:
                    continue  # gone by now, or a link to nothing
                except OSError as error:
                    raise UserError(f"{path}: {error.strerror}: remove it and start the same command again") from None

    def progress(self, epoch: int, epochs: int) -> None:
        self.status.update(epoch=epoch, epochs=epochs)
        self._write_status()

    def fail(self, error: str, details: str) -> None:
        """Mark the run failed: one line in status.json, the whole traceback in error.txt."""
        self.status.update(state="failed", error=error)
        write_text_atomic(self.to_write(self.path / "error.txt"), redact(details))
        self._write_status()

    def settle(self) -> None:
        """A finished run was killed before its status said so."""
        try:
            status = read_status(self.path / "status.json")
        except (FileNotFoundError, BadRecord):
            status = {}
        if status.get("state") != "done":
            self.status = {**status, "state": "done", "error": None}
            self._write_status()

    def interrupt(self, line: str) -> None:
        """Mark the run stopped on demand: the same command goes on from here."""
        self.status.update(state="interrupted", error=line)
        self._write_status()

    def finish(self, result: dict[str, Any]) -> None:
        write_record(self.to_write(self.path / "result.json"), result)
        self.previous.unlink(missing_ok=True)  # last.ckpt is enough to write the result again
        self.status.update(state="done", error=None)
        self._write_status()

    def _write_status(self) -> None:
        self.status["updated"] = now()
        path = self.to_write(self.path / "status.json")
        write_text_atomic(path, json.dumps(clean(self.status), indent=2) + "\n")

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append one epoch to metrics.csv (with a head line if it is new)."""
        path = self.to_write(self.path / "metrics.csv")
        new = not path.exists()
        with naming(path), open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def cut_metrics(self, epochs: int) -> None:
        """Keep only the first `epochs` rows: later ones were written after the checkpoint that the run goes on from."""
        path = self.to_write(self.path / "metrics.csv")
        if path.exists():
            lines = read_bytes(path, MOST_LINES).decode("utf-8", "replace").splitlines(keepends=True)
            write_text_atomic(path, "".join(lines[: epochs + 1] if epochs else []))
            if not epochs:
                path.unlink()

    def add_line(self, name: str, row: dict[str, Any]) -> None:
        """Append one line to NAME.jsonl."""
        path = self.to_write(self.path / f"{name}.jsonl")
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean(row), allow_nan=False) + "\n")

    def cut_lines(self, name: str, keep: Callable[[int, dict[str, Any]], bool]) -> None:
        """Keep only the lines of NAME.jsonl of which `keep(number from 0, row)` is true, and none that is torn."""
        path = self.to_write(self.path / f"{name}.jsonl")
        if not path.exists():
            return
        kept = []
        text = read_bytes(path, MOST_LINES).decode("utf-8", "replace")
        for number, line in enumerate(text.splitlines(keepends=True)):
            try:
                if keep(number, json.loads(line)):
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):  # torn, or no line of this run's
                break
        write_text_atomic(path, "".join(kept))
