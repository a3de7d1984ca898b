"""`sparse-lab status`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from sparse_lab.config import UserError
from sparse_lab.report.records import Finished, Status, Unfinished, read


def main(argv: list[str]) -> int:
    """`sparse-lab status DIR`: one line a run, counts at the end. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab status",
        description="One line a run: name, state, epoch, accuracy or error, and how long ago it was heard of.",
        epilog="'interrupted' is a run that says it is running though its process on this machine is gone: "
        "the same command again goes on where it was.",
    )
    parser.add_argument("root", metavar="DIR", type=Path, help="folder that holds runs, at any depth")
    options = parser.parse_args(argv)
    try:
        records = read(options.root)
    except UserError as error:
        print(f"sparse-lab status: {error}", file=sys.stderr)
        return 2
    runs: list[Finished | Unfinished] = [*records.results, *records.unfinished]
    runs.sort(key=lambda run: str(run.folder))
    if not runs:
        print(f"sparse-lab status: no runs under {options.root}", file=sys.stderr)
        return 2
    _list(runs)
    for warning in records.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _list(runs: list[Finished | Unfinished]) -> None:
    lines = [(run.name, _state(run), _epochs(run.status), _outcome(run), _age(run.status)) for run in runs]
    name, state, epochs, outcome = (max(len(line[i]) for line in lines) for i in range(4))
    for line in lines:
        row = f"{line[0]:{name}}  {line[1]:{state}}  {line[2]:>{epochs}}  {line[3]:{outcome}}  {line[4]}"
        print(row.rstrip())
    counts = Counter(line[1] for line in lines)
    said = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    print(f"{len(runs)} run{'' if len(runs) == 1 else 's'}: {said}")


def _state(run: Finished | Unfinished) -> str:
    return "done" if isinstance(run, Finished) else run.status.state


def _epochs(status: Status) -> str:
    return "" if status.epoch is None else f"{status.epoch}/{'?' if status.epochs is None else status.epochs}"


def _outcome(run: Finished | Unfinished) -> str:
    return f"{run.accuracy:.2f}%" if isinstance(run, Finished) else (run.status.error or "")


def _age(status: Status) -> str:
    if status.updated is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - status.updated).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
