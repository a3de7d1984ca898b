"""What the pages say, whatever they are written in: the same sections as text and tables of strings."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sparse_lab.records.record import is_number
from sparse_lab.report.figures.registry import Picture
from sparse_lab.report.load.planned import Gap, Planned
from sparse_lab.report.load.records import Finished, Records
from sparse_lab.report.tables import columns as own
from sparse_lab.report.tables.aggregate import COLUMNS
from sparse_lab.report.tables.cell import accuracy, marks, percent

AVERAGED = "Cells: mean ± sample standard deviation of top-1 test accuracy over seeds, in percent (no ± with one seed)."
BRACKETS = "In square brackets: the published number at the same sparsity"
FAILURES = (
    "Runs that were started and have no result. The whole traceback of a failed one lies in its folder's error.txt; "
    "the same command again goes on where an interrupted one was."
)
MISSING = "Runs that a sweep planned and nobody has finished."
PLOTS = "`sparse-lab report` on this folder draws them beside this page; report.html shows them."
GAPS = "Cells that lack seeds which other cells of the same network and data set have."
_ORIGIN = ("command", "commit", "device")
_NOT_SHOWN = ("std", "published_std", "base")  # on a page these are part of another column
_COUNTS = ("kept", "nonzero", "kept_with_reuse", "parameters_left", "inference_flops", "peak_memory_mb")
_SHARES = ("effective", "explored", "flops_removed", "filters_only")
_PUBLISHED = ("published", "difference", "verdict", "published_source")
_COSTS = ("seconds", "inference_flops", "peak_memory_mb")
_IF_KNOWN = ("partial", "nonzero", "kept_with_reuse", "parameters_left", *_COSTS, *_PUBLISHED, *_SHARES)
_FIXED = {"min": "{:.2f}", "max": "{:.2f}", "difference": "{:+.2f}", "width": "{:g}", "seconds": "{:.1f}"}


@dataclass(frozen=True)
class Report:
    """Everything that a report is made from. `table`: the long table; `planned`, `gaps`: what is missing.

    `title`, `command`: those of a table of its own (`load/table_spec.py`). `plots_beside`: the page names its plots and
    does not show them; a table's folder is kept without what is made again from its records.
    """

    table: pd.DataFrame
    records: Records
    notes: Sequence[str]
    pictures: Sequence[Picture]
    planned: Sequence[Planned]
    gaps: Sequence[Gap]
    title: str = "Report"
    command: str = ""
    plots_beside: bool = False


def counts(report: Report) -> list[str]:
    """What there is, a phrase each: finished runs, runs without a result by state, planned runs that nobody started."""
    runs, table = int(report.table["seeds"].sum()), report.table
    said = [f"{_many(runs, 'finished run')} in {_many(len(table), 'cell')}"]
    said.append(f"{_many(len(report.records.unfinished), 'run')} without a result")
    states = Counter(run.status.state for run in report.planned if run.status.state == "not started")
    return said + [f"{_many(count, 'planned run')} {state}" for state, count in states.items()]


def widths(table: pd.DataFrame, model: str, dataset: str) -> str:
    """One line on a panel: the width of its networks and how many seeds its cells average over."""
    panel = table[(table["model"] == model) & (table["dataset"] == dataset)]
    known = sorted({f"{width:g}" for width in panel["width"] if not math.isnan(width)})
    fewest, most = panel["seeds"].min(), panel["seeds"].max()
    seeds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"Width {' and '.join(known) or 'not recorded'}; {seeds} seed{'' if seeds == '1' else 's'} a cell."


def legend(table: pd.DataFrame, brackets: str = f"{BRACKETS}.") -> list[str]:
    """What stands in a cell of a wide table, a line each; `brackets` of the published number, where there is one."""
    return [AVERAGED, *([brackets] if table["published"].notna().any() else []), *marks(table)]


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """Every cell as text, a mean with its deviation; columns that no run knows are left out."""
    shown = table.astype(object)
    shown["sparsity"] = table["sparsity"].map(percent)
    for name in _COUNTS:
        shown[name] = [f"{round(count):,}" if pd.notna(count) else "" for count in table[name]]
    for name in _SHARES:
        shown[name] = ["" if math.isnan(share) else f"{100 * share:.1f}%" for share in table[name]]
    for name, form in _FIXED.items():
        shown[name] = ["" if math.isnan(value) else form.format(value) for value in table[name]]
    shown["mean"] = [accuracy(*pair) for pair in zip(table["mean"], table["std"], strict=True)]
    pairs = zip(table["published"], table["published_std"], strict=True)
    shown["published"] = ["" if math.isnan(mean) else accuracy(mean, std) for mean, std in pairs]
    for name in ("official_data", "same_data", "connected"):
        shown[name] = ["" if pd.isna(value) else ("yes" if value else "no") for value in table[name]]
    for name in ("published_source", "verdict", "partial"):
        shown[name] = ["" if pd.isna(text) else text for text in table[name]]
    for column in own.OWN.values():
        shown[column.name] = [own.shown(value) for value in table[column.name]]
    shown = shown.drop(columns=_hidden(table))
    headings = {column.name: column.heading for column in own.known(table)}
    return shown.rename(columns={"mean": "mean ± std", "published": "published ± std", **headings}).map(str)


def meanings(table: pd.DataFrame) -> dict[str, str]:
    """What the columns of `cells` mean; those of plugins by their headings."""
    hidden = _hidden(table)
    found = {name: text for name, text in COLUMNS.items() if name not in hidden}
    return found | {column.heading: column.meaning for column in own.known(table)}


def origins(records: Records) -> pd.DataFrame:
    """Who made these numbers: each command, commit and device, with the seeds and the time of its runs."""
    groups: dict[tuple[str, ...], list[Finished]] = defaultdict(list)
    for run in records.results:
        groups[tuple(str(run.result.get(key) or "not recorded") for key in _ORIGIN)].append(run)
    rows = []
    for origin, runs in groups.items():
        seconds = sum(run.result["seconds"] for run in runs if is_number(run.result.get("seconds")))
        seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
        rows.append([*origin, str(len(runs)), seeds, f"{seconds / 60:.1f}"])
    return pd.DataFrame(rows, columns=[*_ORIGIN, "runs", "seeds", "minutes"])


def failures(records: Records) -> pd.DataFrame:
    """Runs without a result: name, state, epoch and the error's line."""
    rows = [
        [run.name, run.status.state, f"{_or(run.status.epoch)}/{_or(run.status.epochs)}", run.status.error or ""]
        for run in records.unfinished
    ]
    return pd.DataFrame(rows, columns=["run", "state", "epoch", "error"])


def missing(planned: Sequence[Planned]) -> pd.DataFrame:
    """Planned runs without a result."""
    rows = [
        [run.name, run.model, run.dataset, run.method, run.sparsity, run.seed, run.status.state, run.status.error or ""]
        for run in planned
    ]
    columns = ["run", "model", "dataset", "method", "sparsity", "seed", "state", "error"]
    return pd.DataFrame(rows, columns=columns)


def lacking(gaps: Sequence[Gap]) -> pd.DataFrame:
    """Cells that lack seeds."""
    rows = [
        [gap.model, gap.dataset, gap.method, percent(gap.sparsity), _listed(gap.seeds), _listed(gap.lacks)]
        for gap in gaps
    ]
    return pd.DataFrame(rows, columns=["model", "dataset", "method", "sparsity", "seeds", "lacks"])


def _hidden(table: pd.DataFrame) -> list[str]:
    return [*_NOT_SHOWN, *(name for name in (*_IF_KNOWN, *own.OWN) if table[name].isna().all())]


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _or(number: Any) -> str:
    return "?" if number is None else str(number)
