"""The report as a Markdown page."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from sparse_lab.report.render import sections
from sparse_lab.report.render.sections import Report
from sparse_lab.report.tables.aggregate import panels, wide


def markdown(report: Report) -> str:
    """The whole page: a wide table a panel, the pictures, every cell, what is missing, notes, and what columns mean."""
    table, records = report.table, report.records
    parts = [f"# {escape(report.title)}", "; ".join(sections.counts(report)) + "."]
    parts += [f"Filled by {escape(report.command)}"] if report.command else []
    for model, dataset in panels(table):
        parts += [f"## {escape(model)} on {escape(dataset)}", sections.widths(table, model, dataset)]
        parts.append(_grid(wide(table, model, dataset).reset_index()))
    if len(table):
        parts.append(_bullets(sections.legend(table)))
        parts += _plots(report)
        parts += ["## Every cell", _grid(sections.cells(table))]
    parts += _section("Where the numbers come from", sections.origins(records))
    parts += _section("Failures: runs without a result", sections.failures(records), sections.FAILURES)
    parts += _section("Missing runs", sections.missing(report.planned), sections.MISSING)
    parts += _section("Missing seeds", sections.lacking(report.gaps), sections.GAPS)
    if report.notes:
        parts += ["## Data notes", _bullets(report.notes)]
    if records.warnings:
        parts += ["## Warnings", _bullets(records.warnings)]
    if len(table):
        meanings = [f"- **{name}**: {escape(text)}" for name, text in sections.meanings(table).items()]
        parts += ["## What the columns mean", "\n".join(meanings)]
    return "\n\n".join(parts) + "\n"


def _plots(report: Report) -> list[str]:
    if report.plots_beside:
        named = [f"- `{picture.name}.png`: {picture.title}. {picture.sentence}" for picture in report.pictures]
        return ["## Plots", sections.PLOTS, "\n".join(named)]
    shown = []
    for picture in report.pictures:
        shown += [f"## {picture.title}", f"![{picture.title}]({picture.name}.png)", picture.sentence]
    return shown


def escape(text: object) -> str:
    """Text that stays text inside a Markdown table: one line, with the signs that mean something escaped."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\|`*<>]|\](?=[(\[:]))", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)


def _section(title: str, table: pd.DataFrame, *said: str) -> list[str]:
    return [f"## {title}", *said, _grid(table)] if len(table) else []


def _grid(table: pd.DataFrame) -> str:
    lines = [[escape(name) for name in table.columns], ["---"] * len(table.columns)]
    lines += [[escape(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)
