"""Writes a report to a folder, each file whole, and shows its tables in a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_lab.config import UserError
from sparse_lab.report.dynamics import traces
from sparse_lab.report.notes import notes
from sparse_lab.report.page import page, widths
from sparse_lab.report.pictures import NAMES, pictures
from sparse_lab.report.plot import draw
from sparse_lab.report.published import load
from sparse_lab.report.records import Records, read
from sparse_lab.report.table import levels, long, marks, panels, wide

NAME_COLUMN = 30  # the methods' column may be folded down to so many characters
PIPE_COLUMNS = 120  # a pipe has no width of its own


@dataclass(frozen=True)
class Written:
    """The files of a report, and what they were made from. `pictures`: those of how runs went, where there are any."""

    results: Path
    levels: Path
    report: Path
    plot: Path
    table: pd.DataFrame
    records: Records
    notes: list[str]
    pictures: list[Path] = field(default_factory=list)


def write(roots: list[Path], out: Path) -> Written:
    """Reads every run under the roots and writes results.csv, levels.csv, report.md and accuracy.png into `out`.

    Where runs have recorded how they went, the pictures of `pictures.NAMES` come with it; one that an earlier report
    left and this one does not draw goes.

    Raises UserError if there is no record at all, or if `out` cannot be written.
    """
    records = read(*roots)
    if not records.results and not records.unfinished:
        listed = ", ".join(str(root) for root in roots)
        raise UserError(f"no records under {listed}: give a folder that holds runs (result.json, status.json)")
    published = load()
    table, passed, remarks = long(records.results, published), levels(records.results), notes(records.results)
    found, warnings = traces(records.results)
    records = replace(records, warnings=[*records.warnings, *warnings])
    drawn = pictures(found, table)
    written = Written(
        results=out / "results.csv",
        levels=out / "levels.csv",
        report=out / "report.md",
        plot=out / "accuracy.png",
        table=table,
        records=records,
        notes=remarks,
        pictures=[out / picture.name for picture in drawn],
    )
    text = page(table, records, remarks, written.plot.name, drawn)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _whole(written.results, lambda path: table.round(6).to_csv(path, index=False))
        _whole(written.levels, lambda path: passed.to_csv(path, index=False))
        _whole(written.plot, lambda path: draw(table, passed, published, path))
        for picture in drawn:
            _whole(out / picture.name, picture.draw)
        _whole(written.report, lambda path: path.write_text(text, encoding="utf-8"))
        for name in set(NAMES) - {picture.name for picture in drawn}:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out} ({error.strerror}): choose another --out") from error
    return written


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
        table.add_row(Text(str(method)), *(Text(str(cell)) for cell in row))
    return table


def _name_width(grid: pd.DataFrame) -> int:
    return max(len("method"), min(NAME_COLUMN, max(cell_len(str(method)) for method in grid.index)))


def _width(grid: pd.DataFrame, head: str) -> int:
    return max(cell_len(line) for line in [*_two_lines(head).split("\n"), *grid[head]])


def _two_lines(head: str) -> str:
    return head.replace(" (", "\n(")


def _whole(path: Path, put: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        put(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
