"""`sparse-lab collect`: the finished runs of a tree in one file, to keep, to share and to report on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.records.atomic_io import printable
from sparse_lab.records.kept import FILE, keep_runs
from sparse_lab.report.load.records import read


def main(argv: list[str]) -> int:
    """`sparse-lab collect SOURCE... TABLE_DIR`. Returns 0, or 2 after a line on stderr for all that is to be mended."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab collect",
        description=f"Adds every finished run below the sources to TABLE_DIR/{FILE}, a run a line: its result, "
        "status, config, metrics and diagnostics, without its network. `sparse-lab report TABLE_DIR` makes the table "
        "from it as from the runs themselves, on any machine; with a table.yaml beside it (title: ...) it is a table "
        "of its own in a report on a folder above.",
        epilog="Values stay as they were measured; of the command and the config only paths.outputs and paths.data are "
        "changed, to OUTPUTS and DATA. A run that is there already is not added again, lines are sorted by name and "
        "carry a checksum, and several of these commands may add to one file at a time. Sources are left as they are.",
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="folder that holds runs, at any depth")
    parser.add_argument("table", metavar="TABLE_DIR", type=Path, help="folder of the table; made where there is none")
    options = parser.parse_args(argv)
    try:
        return _collect(options.sources, options.table)
    except SparseLabError as error:
        print(f"sparse-lab collect: {error}", file=sys.stderr)
        return 2


def _collect(sources: list[Path], table: Path) -> int:
    """Raises UserError where there is nothing to collect, or no writing."""
    found = read(*sources)
    runs = [run.folder for run in found.results if run.traces is None]
    if not runs:
        listed = ", ".join(str(source) for source in sources)
        raise UserError(
            f"no finished run in a folder below {listed} ({len(found.unfinished)} unfinished): nothing to collect"
        )
    try:
        added, refused = keep_runs(runs, table)
    except OSError as error:
        raise UserError(f"cannot write to {table}: {error.strerror}; choose another TABLE_DIR") from None
    there = len(runs) - len(added) - len(refused)
    print(f"{table / FILE}: {len(added)} added, {there} there already, {len(found.unfinished)} unfinished left out")
    for line in [*found.warnings, *(f"{_told(error)}; the run is left out" for error in refused)]:
        print(f"sparse-lab collect: {printable(line)}", file=sys.stderr)
    return 2 if refused else 0


def _told(error: ValueError | OSError) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
