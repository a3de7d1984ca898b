"""`sparse-lab report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from sparse_lab.config import UserError
from sparse_lab.report.write import Written, show, write


def main(argv: list[str]) -> int:
    """`sparse-lab report DIR... [--out DIR]`. Returns 0, or 2 after one line on stderr about what to mend."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab report",
        description="Tables (mean ± std over seeds, the published number beside them) and a plot from finished runs.",
        epilog="Writes results.csv (a row a cell), levels.csv (every level of every run), report.md and accuracy.png; "
        "where runs recorded how they went, also updates.png, layers.png, activations.png, gradients.png.",
    )
    parser.add_argument("roots", metavar="DIR", nargs="+", type=Path, help="folder that holds runs, at any depth")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the report goes (default: the first DIR)")
    options = parser.parse_args(argv)
    try:
        written = write(options.roots, options.out or options.roots[0])
    except UserError as error:
        print(f"sparse-lab report: {error}", file=sys.stderr)
        return 2
    _tell(written)
    return 0


def _tell(written: Written) -> None:
    console = Console(highlight=False)
    show(written.table, console)
    for run in written.records.unfinished:
        print(f"missing: {run.name} ({run.status.state}{f': {run.status.error}' if run.status.error else ''})")
    for note in written.notes:
        print(f"note: {note}")
    for warning in written.records.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    beside = [written.results, written.levels, written.plot, *written.pictures]
    print(f"wrote {written.report}, {', '.join(path.name for path in beside)}")
