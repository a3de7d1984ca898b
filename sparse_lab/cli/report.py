"""`sparse-lab report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.report.load.planned import NOT_STARTED
from sparse_lab.report.load.table_spec import below
from sparse_lab.report.write import NoRecords, Written, show, write


def main(argv: list[str]) -> int:
    """`sparse-lab report DIR... [--out DIR]`. Returns 0, or 2 after one line on stderr about what to mend."""
    parser = argparse.ArgumentParser(
        prog="sparse-lab report",
        description="Tables (mean ± std over seeds, the published number beside them with a verdict), plots and pages "
        "from finished runs, in folders or in a records.jsonl, and what is missing from them. A folder that holds "
        "table.yaml (its title, and what was planned for it) is a table of its own: given a folder above such folders, "
        "each of them gets its report in place, and what else lies there one in DIR.",
        epilog="Writes report.html (one file that needs no network: tables to sort and filter, plots), report.md, "
        "results.csv (a row a cell), levels.csv (every level of every run), table.tex (LaTeX with booktabs), and each "
        "plot as PNG and PDF: accuracy, costs, density, curves, and where runs recorded how they went, updates, "
        "layers, activations, gradients.",
    )
    parser.add_argument("roots", metavar="DIR", nargs="+", type=Path, help="folder that holds runs, at any depth")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the report goes (default: the first DIR)")
    options = parser.parse_args(argv)
    try:
        tables = _tables(options.roots, options.out)
        _rest(options.roots, options.out, tables)
    except SparseLabError as error:
        return _refused(error)
    status = 0
    for folder in tables:
        try:
            _tell(write([folder], folder))
        except SparseLabError as error:  # the other tables are made all the same
            status = _refused(error)
    return status


def _refused(error: SparseLabError) -> int:
    print(f"sparse-lab report: {error}", file=sys.stderr)
    return 2


def _tables(roots: list[Path], out: Path | None) -> list[Path]:
    """The folders below the roots that are tables of their own. Raises UserError where --out then says too little."""
    tables = below(roots)
    if tables and out is not None:
        listed = ", ".join(str(folder) for folder in tables)
        raise UserError(f"--out is for one report, and below {roots[0]} each of these is one: {listed}: leave it out")
    return tables


def _rest(roots: list[Path], out: Path | None, tables: list[Path]) -> None:
    """The report on what lies in no table's folder, if anything does. Raises UserError where there is nothing."""
    try:
        _tell(write(roots, out or roots[0], without=tables))
    except NoRecords:
        if not tables:
            raise


def _tell(written: Written) -> None:
    report = written.made_from
    console = Console(highlight=False)
    if report.title != "Report":
        console.print(Text(f"\n{report.title} ({written.report.parent})", style="bold"), soft_wrap=True)
    show(report.table, console)
    for run in report.records.unfinished:
        print(f"missing: {run.name} ({run.status.state}{f': {run.status.error}' if run.status.error else ''})")
    if idle := sum(run.status.state == NOT_STARTED for run in report.planned):
        print(f"missing: {idle} of the runs that sweeps planned, not started: {written.report.name} lists them")
    if report.gaps:
        cells = "1 cell lacks" if len(report.gaps) == 1 else f"{len(report.gaps)} cells lack"
        print(f"missing: {cells} seeds that others have: {written.report.name} lists them")
    for note in report.notes:
        print(f"note: {note}")
    for warning in report.records.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    beside = [written.report, written.results, written.levels, written.latex, *written.pictures]
    print(f"wrote {written.page}, {', '.join(path.name for path in beside)}; the plots also as PDF")
