"""Pure functions from records to tables: means over seeds, levels, and the wide table that people read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from sparse_lab.records.record import is_number
from sparse_lab.report.load.published import Published, find, verdict
from sparse_lab.report.load.records import Finished, section, share
from sparse_lab.report.tables.cell import Cell, cell, percent
from sparse_lab.report.tables.columns import OWN
from sparse_lab.report.tables.data_used import data_changed, data_of, partial
from sparse_lab.report.tables.labels import labels

COLUMNS = {
    "model": "network",
    "dataset": "data set",
    "method": "method; where several settings of it were run, the settings that differ stand in brackets",
    "sparsity": "share of conv and linear weights that was asked to be zero; 0 for dense",
    "kept": "weights that are not masked (biases and BatchNorm are dense and not counted)",
    "nonzero": "kept weights that are not exactly zero, fewest over seeds: a regrown weight may stay at zero",
    "kept_with_reuse": "kept weights counted as often as the network uses them; empty where no weights are shared",
    "seeds": "number of seeds that the row averages over",
    "mean": "mean top-1 test accuracy over seeds, %",
    "std": "sample standard deviation over seeds (n - 1), %; empty with one seed",
    "min": "lowest accuracy of a seed, %",
    "max": "highest accuracy of a seed, %",
    "published": "published top-1 accuracy at the same sparsity, %; only for networks of width 1",
    "published_std": "its standard deviation, %, where one was given",
    "difference": "mean - published, in points",
    "verdict": "the difference beside the published standard deviation: within one of it, above or below",
    "official_data": "the md5 of the data files is the official one in every run of the row",
    "same_data": "every run of the row read the same data",
    "partial": "what of the data set was left out in at least one run; empty where all of it was used",
    "selected_on": "what chose the epoch whose weights were tested: validation, last epoch, or test (optimistic)",
    "connected": "a path of kept weights leads from the input to the logits in every run; empty where not recorded",
    "effective": "share of the kept weights that lie on a path from input to logits at the end: mean over the "
    "seeds that recorded it",
    "explored": "share of the weights that were ever alive (in-time over-parameterisation rate): mean over "
    "the seeds that recorded it",
    "parameters_left": "parameters of the network without the filters that went (biases and BatchNorm "
    "too): most over seeds; empty where single weights go",
    "flops_removed": "share of the dense multiply-adds that is really gone without those filters: mean over seeds",
    "filters_only": "the same share counted as papers on filters do, without the next layers' inputs: mean over seeds",
    "seconds": "wall time of the run itself, mean over seeds, without the networks that it starts from",
    "inference_flops": "operations for one image (2 a multiply-add) that the sparse network needs, mean over seeds",
    "peak_memory_mb": "most memory that a run took while training, in MB (of the GPU where there is one)",
    "width": "factor on every channel count",
    "base": "the method's name without settings",
    "published_source": "where the published number stands",
    "cell": "hash of the config without the seed: the runs of one row share it",
}
_MOST = 2**53  # weights; what is more is damage
_LEVEL = (
    "level",
    "sparsity",
    "kept",
    "nonzero",
    "validation_accuracy",
    "test_accuracy",
    "best_epoch",
    "epochs",
    "seconds",
)
_BY_CLASS = ("balanced_accuracy", "worst_class_accuracy")  # %; empty for runs that recorded no classes
_EFFECTIVE = ("effective", "dead_channels", "channels", "connected", "live_logits")


@dataclass(frozen=True)
class Grid:
    """A wide table: sparsity and kept weights of every column in words, and the cells of every method, None where none
    ran.
    """

    heads: list[tuple[str, str]]
    rows: dict[str, list[Cell | None]]


def distinct(runs: Iterable[Finished]) -> tuple[list[Finished], list[str]]:
    """One run for each (cell, seed), the last one finished, and a note on what was left out."""
    groups: dict[tuple[str, int], list[Finished]] = defaultdict(list)
    for run in runs:
        groups[run.cell, run.seed].append(run)
    kept, notes, copies = [], [], 0
    for group in groups.values():
        chosen = max(group, key=lambda run: (run.status.updated or datetime.min.replace(tzinfo=UTC), str(run.folder)))
        kept.append(chosen)
        for other in group:
            if other is not chosen and other.accuracy != chosen.accuracy:
                notes.append(
                    f"{chosen.name}: {chosen.folder} ({chosen.accuracy:.2f}%) counts and {other.folder} "
                    f"({other.accuracy:.2f}%) does not: the same config and seed gave two results"
                )
            elif other is not chosen:
                copies += 1
    if copies:
        said = "1 copy of a run was" if copies == 1 else f"{copies} copies of runs were"
        notes.append(f"{said} left out (same config, seed and accuracy)")
    return kept, notes


def long(runs: Iterable[Finished], published: Sequence[Published]) -> pd.DataFrame:
    """One row a cell, with the columns that `COLUMNS` explains and those of plugins; runs that differ in nothing but
    their seed make a cell.
    """
    counted, _ = distinct(runs)
    names = labels(counted)
    cells: dict[str, list[Finished]] = defaultdict(list)
    for run in counted:
        cells[run.cell].append(run)
    rows = [_row(group, names[cell], published) for cell, group in cells.items()]
    whole = dict.fromkeys(("nonzero", "kept_with_reuse", "parameters_left"), "Int64")
    table = pd.DataFrame(rows, columns=[*COLUMNS, *OWN]).astype(whole)
    return _sorted(table, ["sparsity", "cell"])


def levels(runs: Iterable[Finished]) -> pd.DataFrame:
    """One row for every level that every counted run passed; accuracies in percent, seconds of wall time."""
    counted, _ = distinct(runs)
    names = labels(counted)
    rows: list[dict[str, Any]] = []
    for run in counted:
        known = {key: run.result[key] for key in ("model", "dataset")}
        known |= {
            "method": names[run.cell],
            "target": run.sparsity,
            "seed": run.seed,
            "run": run.name,
            "cell": run.cell,
        }
        for level in run.levels:
            effective = section(level, "effective")
            row = known | {key: level.get(key) for key in _LEVEL} | {key: effective.get(key) for key in _EFFECTIVE}
            rows.append(row | _by_class(level))
    columns = ["model", "dataset", "method", "target", "seed", "run", "cell", *_LEVEL, *_BY_CLASS, *_EFFECTIVE]
    return _sorted(pd.DataFrame(rows, columns=columns), ["target", "cell", "seed", "level"])


def _by_class(level: dict[str, Any]) -> dict[str, float]:
    """Test accuracy over the classes alike, and of the class that is recognised worst."""
    said = level.get("class_accuracy")
    found = [one for one in said if is_number(one) and 0 <= one <= 100] if isinstance(said, list) else []
    return dict(zip(_BY_CLASS, (sum(found) / len(found), min(found)), strict=True)) if found else {}


def wide(table: pd.DataFrame, model: str, dataset: str) -> pd.DataFrame:
    """`grid` as text, cells like `91.20 ± 0.31 [91.03 ± 0.17] ≈ †`, empty where none ran.

    The columns are named like `99% (9,213 kept)`, or `99% (9,213 kept, 9,104 not zero)`. `MARKS` explains the marks.
    """
    found = grid(table, model, dataset)
    rows = {method: ["" if cell is None else cell.text for cell in cells] for method, cells in found.rows.items()}
    heads = [f"{sparsity} ({kept})" for sparsity, kept in found.heads]
    return pd.DataFrame(list(rows.values()), columns=heads, index=pd.Index(list(rows), name="method"))


def grid(table: pd.DataFrame, model: str, dataset: str) -> Grid:
    """Method x sparsity for one network and data set, in the order of the table and of rising sparsity."""
    panel = table[(table["model"] == model) & (table["dataset"] == dataset)]
    heads: list[tuple[str, str]] = []
    rows: dict[str, list[Cell | None]] = {str(method): [] for method in panel["method"]}
    for sparsity, column in panel.sort_values("sparsity").groupby("sparsity"):
        heads.append((percent(float(str(sparsity))), _kept(column)))
        cells = {str(row["method"]): cell(row) for row in column.to_dict("records")}
        for method, row in rows.items():
            row.append(cells.get(method))
    return Grid(heads, rows)


def panels(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (model, data set) pairs of a table, in its order."""
    return list(dict.fromkeys(zip(table["model"].astype(str), table["dataset"].astype(str), strict=True)))


def _row(group: Sequence[Finished], name: str, published: Sequence[Published]) -> dict[str, Any]:
    result, first = group[0].result, group[0]
    values = pd.Series([run.accuracy for run in group])
    mean = float(values.mean())
    number = find(
        published,
        method=result["method"],
        model=result["model"],
        dataset=result["dataset"],
        sparsity=first.sparsity,
        width=first.width,
    )
    return {
        "model": result["model"],
        "dataset": result["dataset"],
        "method": name,
        "sparsity": first.sparsity,
        "kept": _most(run.result.get("kept") for run in group),
        "nonzero": _fewest(run.result.get("nonzero") for run in group),
        "kept_with_reuse": _most(run.result.get("kept_with_reuse") for run in group),
        "seeds": len(group),
        "mean": mean,
        "std": float(values.std(ddof=1)),
        "min": float(values.min()),
        "max": float(values.max()),
        "published": number.top1 if number else math.nan,
        "published_std": number.std if number and number.std is not None else math.nan,
        "difference": mean - number.top1 if number else math.nan,
        "verdict": verdict(mean - number.top1, number.std) if number else None,
        "official_data": all(section(run.result, "data").get("official") is True for run in group),
        "same_data": len({data_of(run) for run in group}) == 1 and not any(data_changed(run) for run in group),
        "partial": "; ".join(sorted({line for run in group for line in partial(run)})) or None,
        "selected_on": ", ".join(sorted({str(run.result.get("selected_on", "not recorded")) for run in group})),
        "connected": _connected(group),
        "effective": _mean(share(end.get("effective"), end.get("kept")) for end in _ends(group)),
        "explored": _mean(share(run.result.get("explored"), 1.0) for run in group),
        "parameters_left": _most(section(run.result, "small").get("parameters") for run in group),
        "flops_removed": _flops_gone(group, "removed"),
        "filters_only": _flops_gone(group, "removed_filters"),
        "seconds": _mean(_positive(run.result.get("seconds")) for run in group),
        "inference_flops": _mean(_positive(section(run.result, "flops").get("inference_sparse")) for run in group),
        "peak_memory_mb": _max(_positive(run.result.get("peak_memory_mb")) for run in group),
        "width": first.width,
        "base": result["method"],
        "published_source": number.source if number else None,
        "cell": first.cell,
        **{name: column.of(group) for name, column in OWN.items()},
    }


def _flops_gone(group: Iterable[Finished], counted: str) -> float:
    return _mean(share(section(section(run.result, "small"), counted).get("flops"), 1.0) for run in group)


def _most(numbers: Iterable[object]) -> int | None:
    return max(_counts(numbers), default=None)


def _fewest(numbers: Iterable[object]) -> int | None:
    return min(_counts(numbers), default=None)


def _counts(numbers: Iterable[object]) -> list[int]:
    return [int(number) for number in numbers if is_number(number) and 0 <= number < _MOST]


def _mean(shares: Iterable[float]) -> float:
    return float(pd.Series(list(shares), dtype=float).mean())


def _max(numbers: Iterable[float]) -> float:
    return float(pd.Series(list(numbers), dtype=float).max())


def _positive(value: object) -> float:
    return float(value) if is_number(value) and value > 0 else math.nan


def _ends(group: Iterable[Finished]) -> list[dict[str, Any]]:
    return [section(run.levels[-1], "effective") if run.levels else {} for run in group]


def _connected(group: Iterable[Finished]) -> bool | None:
    ends = [end.get("connected") for end in _ends(group)]
    if False in ends:
        return False
    return None if None in ends else True


def _sorted(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    # Dense rows head their panel, for every other row is read against them.
    order = table.assign(_sparse=~table["method"].astype(str).str.match(r"dense( \(|$)"))
    by = ["model", "dataset", "_sparse", "method", *columns]
    return order.sort_values(by, ignore_index=True).drop(columns="_sparse")


def _kept(column: pd.DataFrame) -> str:
    """`9,213 kept`, and how many of them are not zero where some are."""
    nonzero = column["nonzero"].dropna()
    zeros = bool((nonzero != column["kept"][nonzero.index]).any())
    return f"{_range(column['kept'])} kept" + (f", {_range(nonzero)} not zero" if zeros else "")


def _range(counts: pd.Series[Any]) -> str:
    known = counts.dropna()
    if known.empty:
        return "?"
    low, high = int(known.min()), int(known.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
