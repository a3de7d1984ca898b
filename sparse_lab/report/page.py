"""The report as a Markdown page."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pandas as pd

from sparse_lab.report.pictures import Picture
from sparse_lab.report.records import Finished, Records, is_number
from sparse_lab.report.table import COLUMNS, accuracy, marks, panels, percent, wide

_ORIGIN = ("command", "commit", "device")
_NOT_SHOWN = ("std", "published_std", "base")  # on the page these are part of another column
_WHOLE = ("kept", "kept_with_reuse", "parameters_left")
_SHARES = ("effective", "explored", "flops_removed", "filters_only")
_IF_KNOWN = ("kept_with_reuse", "parameters_left", *_SHARES)

PICTURE = (
    "Markers are means with their standard deviation, dashed lines dense networks, stars published numbers, dotted "
    "lines the levels that a run passed. Methods at one sparsity stand a little beside each other."
)


def page(
    table: pd.DataFrame, records: Records, notes: Sequence[str], plot: str, pictures: Sequence[Picture] = ()
) -> str:
    """The whole page: a wide table a panel, the pictures, every cell, unfinished runs, notes, and what columns mean."""
    parts = ["# Report", _counts(table, records)]
    for model, dataset in panels(table):
        parts += [f"## {escape(model)} on {escape(dataset)}", widths(table, model, dataset)]
        parts.append(_grid(wide(table, model, dataset).reset_index()))
    if len(table):
        parts += [_legend(table), f"![Accuracy against sparsity]({plot})", PICTURE]
        for picture in pictures:
            parts += [f"## {picture.title}", f"![{picture.title}]({picture.name})", picture.sentence]
        parts += ["## Every cell", _cells(table)]
    parts += _origins(records)
    parts += _unfinished(records)
    if notes:
        parts += ["## Data notes", _bullets(notes)]
    if records.warnings:
        parts += ["## Warnings", _bullets(records.warnings)]
    if len(table):
        hidden = _hidden(table)
        meanings = [f"**{name}**: {text}" for name, text in COLUMNS.items() if name not in hidden]
        parts += ["## What the columns mean", "\n".join(f"- {line}" for line in meanings)]
    return "\n\n".join(parts) + "\n"


def widths(table: pd.DataFrame, model: str, dataset: str) -> str:
    """One line on a panel: the width of its networks and how many seeds its cells average over."""
    panel = table[(table["model"] == model) & (table["dataset"] == dataset)]
    known = sorted({f"{width:g}" for width in panel["width"] if not math.isnan(width)})
    fewest, most = panel["seeds"].min(), panel["seeds"].max()
    seeds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"Width {' and '.join(known) or 'not recorded'}; {seeds} seed{'' if seeds == '1' else 's'} a cell."


def escape(text: object) -> str:
    """Text that stays text inside a Markdown table: one line, with the signs that mean something escaped."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\|`*<>])", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)


def _counts(table: pd.DataFrame, records: Records) -> str:
    runs = int(table["seeds"].sum())
    return f"{runs} finished runs in {len(table)} cells; {len(records.unfinished)} runs without a result."


def _legend(table: pd.DataFrame) -> str:
    lines = [
        "Cells: mean ± sample standard deviation of top-1 test accuracy over seeds, in percent (no ± with one seed).",
        "In square brackets: the published number at the same sparsity.",
        *marks(table),
    ]
    return _bullets(lines)


def _cells(table: pd.DataFrame) -> str:
    shown = table.astype(object)
    shown["sparsity"] = table["sparsity"].map(percent)
    for name in _WHOLE:
        shown[name] = [f"{int(kept):,}" if pd.notna(kept) else "" for kept in table[name]]
    for name in _SHARES:
        shown[name] = ["" if math.isnan(share) else f"{100 * share:.1f}%" for share in table[name]]
    shown["mean"] = [accuracy(*pair) for pair in zip(table["mean"], table["std"], strict=True)]
    pairs = zip(table["published"], table["published_std"], strict=True)
    shown["published"] = ["" if math.isnan(mean) else accuracy(mean, std) for mean, std in pairs]
    shown["difference"] = ["" if math.isnan(points) else f"{points:+.2f}" for points in table["difference"]]
    for name in ("min", "max"):
        shown[name] = table[name].map("{:.2f}".format)
    shown["width"] = ["" if math.isnan(width) else f"{width:g}" for width in table["width"]]
    for name in ("official_data", "connected"):
        shown[name] = [_yes(value) for value in table[name]]
    shown["published_source"] = ["" if pd.isna(source) else source for source in table["published_source"]]
    shown = shown.drop(columns=_hidden(table))
    return _grid(shown.rename(columns={"mean": "mean ± std", "published": "published ± std"}))


def _hidden(table: pd.DataFrame) -> list[str]:
    return [*_NOT_SHOWN, *(name for name in _IF_KNOWN if table[name].isna().all())]


def _origins(records: Records) -> list[str]:
    """Who made these numbers: each command, commit and device, with the seeds and the time of its runs."""
    groups: dict[tuple[str, str, str], list[Finished]] = defaultdict(list)
    for run in records.results:
        groups[tuple(str(run.result.get(key) or "not recorded") for key in _ORIGIN)].append(run)  # type: ignore[index]
    rows = []
    for origin, runs in groups.items():
        seconds = sum(run.result["seconds"] for run in runs if is_number(run.result.get("seconds")))
        seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
        rows.append(
            {
                **dict(zip(_ORIGIN, origin, strict=True)),
                "runs": len(runs),
                "seeds": seeds,
                "minutes": f"{seconds / 60:.1f}",
            }
        )
    return ["## Where the numbers come from", _grid(pd.DataFrame(rows).astype(object))] if rows else []


def _unfinished(records: Records) -> list[str]:
    if not records.unfinished:
        return []
    rows = []
    for run in records.unfinished:
        epoch = "?" if run.status.epoch is None else run.status.epoch
        epochs = "?" if run.status.epochs is None else run.status.epochs
        rows.append(
            {"run": run.name, "state": run.status.state, "epoch": f"{epoch}/{epochs}", "error": run.status.error}
        )
    table = pd.DataFrame(rows).astype(object)
    return ["## Missing: runs without a result", _grid(table.where(table.notna(), ""))]


def _grid(table: pd.DataFrame) -> str:
    lines = [[escape(name) for name in table.columns], ["---"] * len(table.columns)]
    lines += [[escape(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _yes(value: Any) -> str:
    return "" if pd.isna(value) else ("yes" if value else "no")
