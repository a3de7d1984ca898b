"""Reads the records that runs leave on disk: `status.json` and `result.json` in a folder a run, and `records.jsonl`, in
which a table keeps finished runs.

Nothing here trusts a file: what cannot be read, or does not match its own checksum, becomes a warning line, and its run
is listed as unfinished. The plans of sweeps are found on the way; `planned.py` reads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from sparse_lab.errors import UserError
from sparse_lab.host import process
from sparse_lab.records import record
from sparse_lab.records.atomic_io import printable
from sparse_lab.records.kept import FILE, Kept, read_kept
from sparse_lab.records.record import (
    STATES,
    BadRecord,
    check_result,
    check_seal,
    is_number,
    read_record,
    whole_number,
)
from sparse_lab.records.sweep_dir import sound

PLAN = "plan.json"  # of a sweep
RECORDS = {"status.json", "result.json", PLAN, FILE}  # names of files


@dataclass(frozen=True)
class Status:
    """How far a run is. `state`: done, running, failed, interrupted (stopped, or its process is gone) or unreadable."""

    state: str
    error: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    updated: datetime | None = None


@dataclass(frozen=True)
class Finished:
    """A run with a sound `result.json`; `result` is its content, accuracies in percent.

    Of a run in a table's `records.jsonl`, `folder` is that file and the run's name, and `traces` how it went; of a run
    in a folder of its own `traces` is None, and files there say it.
    """

    folder: Path
    name: str
    result: dict[str, Any]
    status: Status
    traces: dict[str, list[dict[str, Any]]] | None = field(default=None, repr=False)

    @property
    def cell(self) -> str:
        return str(self.result["cell"])

    @property
    def seed(self) -> int:
        return int(self.result["seed"])

    @property
    def accuracy(self) -> float:
        """Top-1 test accuracy in percent."""
        return float(self.result["test_accuracy"])

    @property
    def sparsity(self) -> float:
        """The share of zero weights that was asked for, to six digits; 0 for a dense run, whatever its config says."""
        return 0.0 if self.result["method"] == "dense" else round(float(self.result["sparsity_target"]), 6)

    @property
    def config(self) -> dict[str, Any]:
        return section(self.result, "config")

    @property
    def width(self) -> float:
        """The factor on every channel count; NaN where the record does not say."""
        for width in (section(self.config, "model").get("width"), self.result.get("width")):
            if is_number(width):
                return float(width)
        return math.nan

    @property
    def levels(self) -> list[dict[str, Any]]:
        """The levels of sparsity that the run passed, in order."""
        levels = self.result.get("levels")
        sound = [level for level in levels if isinstance(level, dict)] if isinstance(levels, list) else []
        return [level for level in sound if is_number(level.get("level")) and is_number(level.get("sparsity"))]


@dataclass(frozen=True)
class Unfinished:
    """A run without a result that counts."""

    folder: Path
    name: str
    status: Status


@dataclass(frozen=True)
class Records:
    """All that was found under the roots, in the order of the folders' names. `plans`: the files of sweeps' plans."""

    results: list[Finished] = field(default_factory=list)
    unfinished: list[Unfinished] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    plans: list[Path] = field(default_factory=list)


def read(*roots: Path, without: Iterable[Path] = ()) -> Records:
    """Every run under the roots, but for the folders of `without`; one that lies under two roots is read once.

    Raises UserError if a root is not a folder.
    """
    records = Records()
    for folder, files in _folders(roots, {folder.resolve() for folder in without}):
        if PLAN in files:
            records.plans.append(folder / PLAN)
        if FILE in files:
            kept = kept_runs(folder)
            records.results.extend(kept.results)
            records.unfinished.extend(kept.unfinished)
            records.warnings.extend(kept.warnings)
        if "status.json" in files or "result.json" in files:
            _add(records, folder)
    return records


def kept_runs(folder: Path) -> Records:
    """The runs that folder/records.jsonl keeps, with a warning for each line that is none."""
    records = Records()
    found, warnings = read_kept(folder)
    records.warnings.extend(warnings)
    for kept in found:
        place = folder / FILE / printable(kept.name)
        try:
            _count(records, place, _kept_result(kept, place, records.warnings), printable(kept.status), kept.traces)
        except RecursionError as error:
            records.warnings.append(f"{place}: cannot be read ({error})")
    return records


def _kept_result(kept: Kept, place: Path, warnings: list[str]) -> dict[str, Any] | None:
    try:
        check_seal(kept.result, required=False)  # its line has one
    except BadRecord as error:
        warnings.append(f"{place}: its result is {error}; it is not counted")
        return None
    return _sound(printable(kept.result), place, warnings)


def read_status(folder: Path, warnings: list[str], fallback: str = "unreadable") -> Status:
    """How far the run in a folder is; the fallback where its `status.json` does not say."""
    return _status(sound(partial(record.read_status, shown=True), folder / "status.json", warnings), fallback)


def share(part: object, whole: object) -> float:
    """part / whole where that lies in 0..1; NaN where it does not, or where either is no number."""
    if is_number(part) and is_number(whole) and 0 <= part <= whole and whole > 0:
        return part / whole
    return math.nan


def section(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The dict under a name, or an empty one where there is none."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _add(records: Records, folder: Path) -> None:
    path = folder / "result.json"
    result = sound(partial(read_record, shown=True), path, records.warnings)
    counted = None if result is None else _sound(result, path, records.warnings)
    _count(
        records,
        folder,
        counted,
        sound(partial(record.read_status, shown=True), folder / "status.json", records.warnings),
    )


def _sound(result: dict[str, Any], path: Path, warnings: list[str]) -> dict[str, Any] | None:
    """The result if it says all that a table needs; None, with a warning, if not."""
    try:
        check_result(result)
    except BadRecord as error:
        warnings.append(f"{path}: {error}; the run is not counted")
        return None
    return result


def _count(
    records: Records,
    folder: Path,
    result: dict[str, Any] | None,
    said: dict[str, Any] | None,
    traces: dict[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Add a run by its sound result, where it has one, and what its status says."""
    if result is None:
        status = _status(said, "unreadable")
        if status.state == "done":
            status = Status("unreadable", "done, but without a sound result.json", updated=status.updated)
        records.unfinished.append(Unfinished(folder, printable(folder.name), status))
    else:
        status = _status(said, "done")
        if status.state != "done":
            records.warnings.append(
                f"{folder}: status.json says {status.state}, yet result.json is there and is counted"
            )
        records.results.append(
            Finished(folder, printable(str(result.get("name", folder.name))), result, status, traces)
        )


def _folders(roots: tuple[Path, ...], without: set[Path]) -> Iterator[tuple[Path, list[str]]]:
    seen: set[Path] = set()
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder: give the folder that holds the runs")
        for place, subfolders, files in os.walk(root):
            folder = Path(place)
            subfolders[:] = sorted(
                name for name in subfolders if not without or (folder / name).resolve() not in without
            )
            # what lies in a record's place is named, a folder too
            files += RECORDS.intersection(subfolders)
            subfolders[:] = [name for name in subfolders if name not in RECORDS]
            if RECORDS.intersection(files) and (real := folder.resolve()) not in seen:
                seen.add(real)
                # "." has no name, and a run given by itself should still be listed under one.
                yield folder if folder.name else real, files


def _status(raw: dict[str, Any] | None, fallback: str) -> Status:
    if raw is None or raw.get("state") not in STATES:
        return Status(fallback)
    state, error = str(raw["state"]), raw.get("error")
    if state == "running" and process.is_gone(raw):
        state = "interrupted"
    return Status(
        state=state,
        error=" ".join(str(error).split()) if error else None,
        epoch=whole_number(raw.get("epoch")),
        epochs=whole_number(raw.get("epochs")),
        updated=_time(raw.get("updated")),
    )


def _time(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)).astimezone()
    except (ValueError, OverflowError, OSError):
        return None
