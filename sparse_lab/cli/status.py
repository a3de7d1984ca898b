"""`sparse-lab status`: every run under a folder, and where each sweep stands; live in a terminal."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.records.atomic_io import printable
from sparse_lab.records.kept import FILE
from sparse_lab.records.sweep_dir import Overview, SweepFolder
from sparse_lab.report.load.records import RECORDS, Finished, Records, Status, Unfinished, kept_runs, read

if TYPE_CHECKING:
    from rich.console import Group

LOOK_EVERY = 2.0  # seconds
WIDEST = 300  # characters of a name or an error; a folder's name has at most 255
URGENT = ("running", "failed", "interrupted", "unreadable", "waiting", "done")


def main(argv: list[str]) -> int:
    """`sparse-lab status DIR`: one line a run, one a sweep, counts. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab status",
        description="One line a run: name, state, epoch, accuracy or error, and how long ago it was heard of; and one "
        "a sweep. In a terminal it goes on until nothing runs any more, or Ctrl-C.",
        epilog="'interrupted' is a run that was stopped, or says it is running though its process on this machine is "
        "gone: the same command again goes on where it was. 'waiting' is planned by a sweep and has not begun.",
    )
    parser.add_argument("root", metavar="DIR", type=Path, help="folder that holds runs, at any depth")
    parser.add_argument("--once", action="store_true", help="print once, in a terminal too")
    options = parser.parse_args(argv)
    place = Place(options.root)
    try:
        place.look()
    except SparseLabError as error:
        print(f"sparse-lab status: {error}", file=sys.stderr)
        return 2
    if place.rows and sys.stdout.isatty() and not options.once:
        _live(place)
    elif place.rows:
        for line in place.lines():
            print(line)
    for warning in place.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if not place.rows:
        print(f"sparse-lab status: no runs under {options.root}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Row:
    """What is said of one run."""

    name: str
    state: str
    epochs: str = ""
    outcome: str = ""
    age: str = ""


@dataclass
class Place:
    """Everything under a folder. A look reads only what has changed since the one before, and what runs."""

    root: Path
    rows: list[Row] = field(default_factory=list)
    sweeps: list[Overview] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _known: dict[Path, tuple[tuple[int, ...], Records]] = field(default_factory=dict)
    _sweeps: dict[Path, SweepFolder] = field(default_factory=dict)

    def look(self) -> None:
        """Read the folder. Raises UserError if it is none."""
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not a folder: give the folder that holds the runs")
        runs: list[Finished | Unfinished] = []
        self.warnings, self.sweeps = [], []
        for folder, files in _folders(self.root):
            if "plan.json" in files and folder.parent.name == "sweeps":
                overview = self._sweeps.setdefault(folder, SweepFolder(folder)).look(self.warnings)
                self.sweeps += [overview] if overview is not None else []
            if files & {"status.json", "result.json", FILE}:
                records = self._records(folder, files)
                runs += [*records.results, *records.unfinished]
                self.warnings += records.warnings
        self.warnings = list(dict.fromkeys(self.warnings))  # a table may be found from two sides
        self.sweeps.sort(key=lambda overview: str(overview.plan["started"]))
        runs.sort(key=lambda run: str(run.folder))
        self.rows = [_row(run) for run in runs]
        known = {row.name for row in self.rows}
        planned = dict.fromkeys(job.run for overview in self.sweeps for job in overview.jobs if job.run not in known)
        self.rows += [Row(name, "waiting") for name in planned if name]

    def _records(self, folder: Path, files: set[str]) -> Records:
        stamp = tuple(_stamp(folder / name) for name in ("status.json", "result.json", FILE))
        stamped, records = self._known.get(folder, ((), None))
        if records is None or stamp != stamped or any(run.status.state == "running" for run in records.unfinished):
            # what lies below a table's folder is looked at by itself
            records = read(folder) if files & {"status.json", "result.json"} else kept_runs(folder)
            self._known[folder] = (stamp, records)
        return records

    @property
    def goes_on(self) -> bool:
        return any(row.state == "running" for row in self.rows) or any(overview.alive for overview in self.sweeps)

    def counts(self) -> str:
        counts = Counter(row.state for row in self.rows)
        said = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        return f"{len(self.rows)} run{'' if len(self.rows) == 1 else 's'}: {said}"

    def sweep_lines(self) -> list[str]:
        return [f"sweep {overview.folder.name}: {overview.line()}{_ending(overview)}" for overview in self.sweeps]

    def lines(self) -> list[str]:
        return [*_aligned(self.rows), self.counts(), *self.sweep_lines()]


def _ending(overview: Overview) -> str:
    if overview.alive:
        return ""
    return "; no longer going: start the same command again" if overview.left else "; ended"


def _folders(root: Path) -> Iterable[tuple[Path, set[str]]]:
    for place, subfolders, files in os.walk(root):
        folder, found = Path(place), {*files, *RECORDS.intersection(subfolders)}
        subfolders[:] = sorted(name for name in subfolders if name not in {"checkpoints", *RECORDS})
        yield folder if folder.name else folder.resolve(), found


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _row(run: Finished | Unfinished) -> Row:
    name = _short(run.name)
    if isinstance(run, Finished):
        return Row(name, "done", _epochs(run.status), f"{run.accuracy:.2f}%", _age(run.status))
    return Row(name, run.status.state, _epochs(run.status), _short(run.status.error or ""), _age(run.status))


def _short(text: str) -> str:
    """All rows are as wide as the widest."""
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _aligned(rows: list[Row]) -> list[str]:
    name, state, epochs, outcome = (
        max((len(getattr(row, column)) for row in rows), default=0) for column in ("name", "state", "epochs", "outcome")
    )
    return [
        f"{row.name:{name}}  {row.state:{state}}  {row.epochs:>{epochs}}  {row.outcome:{outcome}}  {row.age}".rstrip()
        for row in rows
    ]


def _epochs(status: Status) -> str:
    return "" if status.epoch is None else _short(f"{status.epoch}/{'?' if status.epochs is None else status.epochs}")


def _age(status: Status) -> str:
    if status.updated is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - status.updated).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _live(place: Place) -> None:
    """Look again and again until nothing runs, or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    try:
        with Live(
            _screen(place, console.height), console=console, auto_refresh=False, vertical_overflow="crop"
        ) as live:
            while place.goes_on:
                time.sleep(LOOK_EVERY)
                place.look()
                live.update(_screen(place, console.height), refresh=True)
    except KeyboardInterrupt:
        pass  # that is how it is left


def _screen(place: Place, height: int) -> Group:
    """Counts and sweeps first; then as many runs as there is room for, what runs and what failed before the rest."""
    from rich.console import Group
    from rich.text import Text

    colours = {"running": "cyan", "failed": "red", "interrupted": "yellow", "done": "green", "waiting": "dim"}
    head = [place.counts(), *place.sweep_lines()]
    rows = sorted(place.rows, key=lambda row: URGENT.index(row.state))
    room = max(1, height - len(head) - 2)
    shown = rows if len(rows) <= room else rows[: room - 1]
    lines = [Text(line, style="bold", no_wrap=True, overflow="ellipsis") for line in head]
    for row, line in zip(shown, _aligned(shown), strict=True):
        lines.append(Text(line, style=colours.get(row.state, ""), no_wrap=True, overflow="ellipsis"))
    if len(shown) < len(rows):
        lines.append(Text(f"... and {len(rows) - len(shown)} more", style="dim"))
    return Group(*lines)
