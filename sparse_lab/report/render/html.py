"""The report as one HTML file that needs no network: pictures, style and script lie inside.

Everything that comes from records and configs goes through a template that escapes by itself. A content security policy
allows this page's own style and script, by their hashes, and pictures out of the page; nothing else is run or loaded.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from datetime import UTC
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sparse_lab.report.figures.registry import Picture
from sparse_lab.report.load.records import Records
from sparse_lab.report.render import sections
from sparse_lab.report.render.sections import Report
from sparse_lab.report.tables.aggregate import grid, panels
from sparse_lab.report.tables.columns import known

_CHOICES = {"model": "model", "dataset": "dataset", "method": "base"}  # what the cells can be filtered by: its column
_BRACKETS = f"{sections.BRACKETS}; beside it ours less the published one, in points, and what that says."
_PARTS = Path(__file__).with_name("page")
_RAW = {"mean ± std": "mean", "published ± std": "published"}  # columns of the page, by the number that they sort by


def webpage(report: Report, folder: Path) -> str:
    """The whole page. folder: where the pictures have been written.

    Raises OSError if a picture cannot be read.
    """
    table, records = report.table, report.records
    style, script = (_PARTS / name for name in ("style.css", "tables.js"))
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            policy=_policy(style, script),
            style=_own(style),
            script=_own(script),
            title=report.title,
            command=report.command,
            counts=sections.counts(report),
            newest=_newest(records),
            tiles=_tiles(report),
            panels=[_panel(table, model, dataset) for model, dataset in panels(table)],
            legend=sections.legend(table, _BRACKETS) if len(table) else [],
            pictures=[_picture(picture, folder) for picture in report.pictures] if len(table) else [],
            cells=_cells(table),
            choices={name: sorted(table[of].unique()) for name, of in _CHOICES.items()},
            failures=_plain(sections.failures(records)),
            missing=_plain(sections.missing(report.planned)),
            lacking=_plain(sections.lacking(report.gaps)),
            origins=_plain(sections.origins(records)),
            said={"failures": sections.FAILURES, "missing": sections.MISSING, "lacking": sections.GAPS},
            notes=report.notes,
            warnings=records.warnings,
            meanings=sections.meanings(table) if len(table) else {},
        )
    )


def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(_PARTS), autoescape=True, undefined=StrictUndefined)


def _own(path: Path) -> Markup:
    """A file of this package, which is what it should be; nothing else in the page goes unescaped."""
    return Markup(path.read_text(encoding="utf-8"))


def _policy(style: Path, script: Path) -> str:
    hashes = (base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for path in (style, script))
    style_hash, script_hash = hashes
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _newest(records: Records) -> str:
    times = [run.status.updated for run in records.results if run.status.updated is not None]
    return max(times).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if times else ""


def _tiles(report: Report) -> list[dict[str, Any]]:
    table, states = report.table, [run.status.state for run in report.records.unfinished]
    failed, idle = states.count("failed"), sum(run.status.state == "not started" for run in report.planned)
    counts = {
        "finished runs": (int(table["seeds"].sum()), False),
        "cells": (len(table), False),
        "methods": (table["base"].nunique(), False),
        "failed": (failed, failed > 0),
        "unfinished": (len(states) - failed, False),
        "not started": (idle, False),
    }
    always = ("finished runs", "cells", "methods", "failed")
    return [
        {"name": name, "count": f"{count:,}", "bad": bad}
        for name, (count, bad) in counts.items()
        if count or name in always
    ]


def _panel(table: pd.DataFrame, model: str, dataset: str) -> dict[str, Any]:
    found = grid(table, model, dataset)
    said = sections.widths(table, model, dataset)
    rows = list(found.rows.items())
    return {"model": model, "dataset": dataset, "widths": said, "heads": found.heads, "rows": rows}


def _picture(picture: Picture, folder: Path) -> dict[str, Any]:
    png = (folder / f"{picture.name}.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])  # the first chunk of every PNG
    data = base64.b64encode(png).decode()
    size = {"width": 2 * width // 3, "height": 2 * height // 3}  # finer than a screen's pixels
    return {"title": picture.title, "sentence": picture.sentence, "data": data, **size}


def _cells(table: pd.DataFrame) -> dict[str, Any]:
    if not len(table):
        return {"columns": [], "rows": []}
    shown, meanings = sections.cells(table), sections.meanings(table)
    of_plugins = {column.heading: column.name for column in known(table)}
    raw = [(_RAW | of_plugins).get(name, name) for name in shown.columns]
    numbers = [pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool for name in raw]
    columns = [
        {"name": name, "number": number, "meaning": meanings[name if name in of_plugins else of]}
        for name, of, number in zip(shown.columns, raw, numbers, strict=True)
    ]
    keys = [
        [_key(value) for value in table[name]] if number else [None] * len(table)
        for name, number in zip(raw, numbers, strict=True)
    ]
    owners = table[list(_CHOICES.values())].to_numpy().tolist()
    pairs = [
        list(zip(texts, own, strict=True))
        for texts, own in zip(shown.to_numpy().tolist(), zip(*keys, strict=True), strict=True)
    ]
    rows = [{**dict(zip(_CHOICES, own, strict=True)), "pairs": row} for own, row in zip(owners, pairs, strict=True)]
    return {"columns": columns, "rows": rows}


def _key(value: Any) -> str:
    """A number to sort by, as text; nothing where there is none."""
    return "" if pd.isna(value) or not math.isfinite(value) else repr(float(value))


def _plain(table: pd.DataFrame) -> dict[str, Any]:
    return {"columns": list(table.columns), "rows": table.to_numpy().tolist()}
