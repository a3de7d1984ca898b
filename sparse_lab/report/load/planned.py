"""What should have been there: runs that a sweep planned and nobody finished, and seeds that a cell lacks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_lab.records.record import is_name, is_number
from sparse_lab.records.sweep_dir import read_outcome, read_plan, sound
from sparse_lab.report.load.records import Finished, Records, Status, read_status
from sparse_lab.report.tables.aggregate import distinct
from sparse_lab.report.tables.cell import percent
from sparse_lab.report.tables.labels import labels

NOT_STARTED = "not started"
_OUTCOMES = {"failed": "failed", "stopped": "interrupted", "done": "unreadable", "skipped": "unreadable"}


@dataclass(frozen=True)
class Planned:
    """A run that a sweep planned and that has no result. `status.state`: as a run's own, or not started."""

    name: str
    model: str
    dataset: str
    method: str
    sparsity: str
    seed: str
    status: Status


@dataclass(frozen=True)
class Gap:
    """A cell that lacks seeds which other cells of its network and data set have."""

    model: str
    dataset: str
    method: str
    sparsity: float
    seeds: tuple[int, ...]
    lacks: tuple[int, ...]


def unfinished(records: Records, table: Sequence[dict[str, Any]] = ()) -> tuple[list[Planned], list[str]]:
    """Every run of the plans found that has no finished record, once, in the order of the plans; warnings.

    `table`: the runs that belong into a table of its own, as its table.yaml lists them.

    Its state is that of its own folder; of a run that never had one, what the newest sweep said.
    """
    warnings: list[str] = []
    finished = {name for run in records.results for name in (run.name, run.folder.name)}
    states = {run.name: run.status for run in records.unfinished}
    found: dict[str, Planned] = {}
    for path, plan in _plans(records.plans, warnings):
        said, named = _said(path.parent, warnings)
        runs = path.parent.resolve().parents[1] / "runs"
        for number, run in enumerate(plan["runs"]):
            # on another machine a job may compute in another precision than here, and has another name then
            name = named[number] if named.get(number) in finished else run["name"]
            status = states.get(name) or _elsewhere(runs / name, warnings) or said.get(name, Status(NOT_STARTED))
            if name not in finished and status.state != "done":
                found[name] = _planned(run, status)
    for run in table:
        if not isinstance(run, dict) or not is_name(run.get("name")):  # it is joined to a path
            warnings.append("table.yaml: 'planned' holds something that is no run; it is not counted")
        elif run["name"] not in finished and run["name"] not in found:
            found[run["name"]] = _planned(run, states.get(run["name"], Status(NOT_STARTED)))
    return list(found.values()), warnings


def gaps(runs: Iterable[Finished]) -> list[Gap]:
    """The cells that lack seeds which another cell of the same network and data set has."""
    counted, _ = distinct(runs)
    names = labels(counted)
    panels: dict[tuple[str, str], set[int]] = defaultdict(set)
    cells: dict[str, list[Finished]] = defaultdict(list)
    for run in counted:
        panels[run.result["model"], run.result["dataset"]].add(run.seed)
        cells[run.cell].append(run)
    found = []
    for cell, group in cells.items():
        place = group[0].result["model"], group[0].result["dataset"]
        seeds = {run.seed for run in group}
        if lacks := panels[place] - seeds:
            there, missing = tuple(sorted(seeds)), tuple(sorted(lacks))
            found.append(Gap(*place, names[cell], group[0].sparsity, there, missing))
    return sorted(found, key=lambda gap: (gap.model, gap.dataset, gap.method, gap.sparsity))


def _plans(paths: Iterable[Path], warnings: list[str]) -> list[tuple[Path, dict[str, Any]]]:
    """The sound plans, oldest first. A plan lies in OUTPUTS/sweeps/ID; what lies elsewhere is somebody else's file."""
    found = []
    for path in paths:
        if path.parent.resolve().parent.name == "sweeps" and (plan := sound(read_plan, path, warnings)) is not None:
            found.append((path, plan))
    return sorted(found, key=lambda pair: (str(pair[1].get("started")), str(pair[0])))


def _said(folder: Path, warnings: list[str]) -> tuple[dict[str, Status], dict[int, str]]:
    """What the jobs of a sweep said of their runs, by name; and each job's run, by its number."""
    said, named = {}, {}
    for path in sorted(folder.glob("*.json")):
        job = sound(read_outcome, path, warnings) if path.stem.isdecimal() else None
        if job is not None:
            state, line = _OUTCOMES[job["outcome"]], " ".join(job["said"].split())
            if state == "unreadable":
                line = f"the sweep says {job['outcome']}, yet no record of it was found"
            named[int(path.stem)] = job["run"]
            said[named[int(path.stem)]] = Status(state, line or None)
    return said, named


def _elsewhere(folder: Path, warnings: list[str]) -> Status | None:
    """The state of a run whose folder lies beside the sweeps, though under none that the report was asked for."""
    return read_status(folder, warnings) if (folder / "status.json").is_file() else None


def _planned(run: Mapping[str, Any], status: Status) -> Planned:
    share = run.get("sparsity")
    model, dataset, method, seed = (
        "" if run.get(key) is None else str(run[key]) for key in ("model", "dataset", "method", "seed")
    )
    sparsity = percent(float(share)) if is_number(share) else ""
    return Planned(run["name"], model, dataset, method, sparsity, seed, status)
