"""Writes a report to a folder, each file whole, and shows its tables in a terminal."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_lab.errors import UserError
from sparse_lab.host import full_disk
from sparse_lab.records.atomic_io import atomic_write, printable
from sparse_lab.report.figures.registry import NAMES, Picture, pictures
from sparse_lab.report.figures.save import FORMATS, put_all
from sparse_lab.report.load.planned import gaps, unfinished
from sparse_lab.report.load.published import load
from sparse_lab.report.load.records import read
from sparse_lab.report.load.table_spec import About, about
from sparse_lab.report.load.traces import traces
from sparse_lab.report.render.html import webpage
from sparse_lab.report.render.latex import latex
from sparse_lab.report.render.markdown import markdown
from sparse_lab.report.render.sections import Report, widths
from sparse_lab.report.render.spreadsheet import write_csv
from sparse_lab.report.tables.aggregate import levels, long, panels, wide
from sparse_lab.report.tables.caveats import notes
from sparse_lab.report.tables.cell import marks
from sparse_lab.report.tables.labels import foldable

NAME_COLUMN = 30  # the methods' column may be folded down to so many characters
PIPE_COLUMNS = 120  # a pipe has no width of its own


@dataclass(frozen=True)
class Written:
    """The files of a report, and what they were made from. `pictures`: the PNGs; a PDF lies beside each."""

    page: Path
    report: Path
    results: Path
    levels: Path
    latex: Path
    made_from: Report
    pictures: list[Path] = field(default_factory=list)


class NoRecords(UserError):
    """There is nothing to report on."""


def write(roots: list[Path], out: Path, without: Sequence[Path] = ()) -> Written:
    """Reads every run under the roots, but for the folders of `without`, and writes report.html, report.md,
    results.csv, levels.csv, table.tex and the pictures of `pictures.NAMES`, as PNG and PDF, into `out`. A picture that
    an earlier report left and this one does not draw goes.

    Raises NoRecords if there is no record at all, UserError if something cannot be read or `out` cannot be written.
    """
    with _uncollected():
        return _write(roots, out, without)


def _write(roots: list[Path], out: Path, without: Sequence[Path]) -> Written:
    report, passed = _gather(roots, without)
    written = Written(
        page=out / "report.html",
        report=out / "report.md",
        results=out / "results.csv",
        levels=out / "levels.csv",
        latex=out / "table.tex",
        made_from=report,
        pictures=[out / f"{picture.name}.png" for picture in report.pictures],
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        _whole(written.results, lambda path: write_csv(report.table.round(6), path))
        _whole(written.levels, lambda path: write_csv(passed, path))
        _whole(written.latex, lambda path: path.write_text(latex(report.table), encoding="utf-8"))
        put_all(report.pictures, out)
        _whole(written.report, lambda path: path.write_text(markdown(report), encoding="utf-8"))
        _whole(written.page, lambda path: path.write_text(webpage(report, out), encoding="utf-8"))
        _remove_old(report.pictures, out)
    except Exception as error:
        if (full := full_disk.found_in(error)) is not None:
            raise UserError(f"{full_disk.what_of(full, out)}, or choose another --out") from error
        if not isinstance(error, OSError):
            raise
        said = error.strerror or " ".join(str(error).split())
        raise UserError(f"the report cannot be written to {out} ({said}): choose another --out") from error
    return written


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: a report makes millions of objects that it needs to its end, and looking through them
    again and again takes a fifth of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _gather(roots: list[Path], without: Sequence[Path]) -> tuple[Report, pd.DataFrame]:
    """Everything that the report says, and the table of the levels."""
    records = read(*roots, without=without)
    table_of_its_own = about(roots[0]) if len(roots) == 1 else None
    own = table_of_its_own or About("Report")
    planned, warnings = unfinished(records, own.planned)
    if not records.results and not records.unfinished and not planned:
        listed = ", ".join(str(root) for root in roots)
        raise NoRecords(
            f"no records under {listed}: give a folder that holds runs (result.json, status.json), or a records.jsonl"
        )
    published = load()
    table, passed = long(records.results, published), levels(records.results)
    found, unread = traces(records.results)
    drawn = pictures(table, passed, published, found)
    records = replace(records, warnings=printable([*records.warnings, *warnings, *unread]))
    report = Report(
        table,
        records,
        notes(records.results),
        drawn,
        planned,
        gaps(records.results),
        own.title,
        own.command,
        plots_beside=table_of_its_own is not None,
    )
    return report, passed


def _remove_old(drawn: Sequence[Picture], out: Path) -> None:
    for name in set(NAMES) - {picture.name for picture in drawn}:
        for kind in FORMATS:
            (out / f"{name}.{kind}").unlink(missing_ok=True)


def show(table: pd.DataFrame, console: Console) -> None:
    """Prints the wide table of each network and data set, split by sparsity where the console is too narrow."""
    room = console.width if console.is_terminal else max(console.width, PIPE_COLUMNS)
    for model, dataset in panels(table):
        grid = wide(table, model, dataset)
        console.print(Text(f"\n{model} on {dataset}", style="bold"))
        console.print(Text(widths(table, model, dataset)))
        for columns in _split(grid, room):
            console.print(_rich(grid[columns], room), crop=False)
    if len(table):
        console.print(Text("\nmean ± standard deviation over seeds, %; [published]", style="dim"))
    for line in marks(table):
        console.print(Text(line, style="dim"))


def _split(grid: pd.DataFrame, room: int) -> list[list[str]]:
    chunks: list[list[str]] = []
    left = 0
    for head in grid.columns:
        need = _width(grid, head) + 3
        if not chunks or left < need:
            chunks.append([])
            left = room - _name_width(grid) - 4
        chunks[-1].append(head)
        left -= need
    return chunks


def _rich(grid: pd.DataFrame, room: int) -> Table:
    # Rows that are empty in this part of a split table would only repeat names.
    filled = grid[(grid != "").any(axis=1)]
    name = _name_width(grid)
    need = name + 4 + sum(_width(grid, head) + 3 for head in grid.columns)
    table = Table(width=need, show_lines=any(cell_len(str(method)) > name for method in filled.index))
    table.add_column("method", width=name, overflow="fold")
    for head in grid.columns:
        table.add_column(Text(_two_lines(head)), width=_width(grid, head), no_wrap=True, justify="right")
    for method, row in filled.iterrows():
        table.add_row(Text(foldable(str(method), name)), *(Text(str(cell)) for cell in row))
    return table


def _name_width(grid: pd.DataFrame) -> int:
    return max(len("method"), min(NAME_COLUMN, max(cell_len(str(method)) for method in grid.index)))


def _width(grid: pd.DataFrame, head: str) -> int:
    return max(cell_len(line) for line in [*_two_lines(head).split("\n"), *grid[head]])


def _two_lines(head: str) -> str:
    return head.replace(" (", "\n(")


def _whole(path: Path, put: Callable[[Path], object]) -> None:
    with atomic_write(path) as part:
        put(part)
