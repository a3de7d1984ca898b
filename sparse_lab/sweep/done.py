"""Which runs of a table are done: in the outputs, or among the records kept of other machines and days."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import request_hash, run_dir
from sparse_lab.records.atomic_io import printable, write_text_atomic
from sparse_lab.records.kept import FILE, Kept, keep_run, read_kept
from sparse_lab.records.record import BadRecord, check_result
from sparse_lab.sweep.table import Run, Table

MARK = "# written by sparse-lab reproduce"
BEFORE = re.compile(r"^# written by (?:sparse-lab reproduce|scripts/reproduce\.py)", re.MULTILINE)


@dataclass
class State:
    """Which runs are done: in the outputs, or among the records kept of other machines and days."""

    records: Path | None
    done: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)  # run's name -> the record that counts
    warnings: list[str] = field(init=False, default_factory=list)  # records that do not count, and why
    # run's name -> its result in the outputs
    _made: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    _kept: dict[str, list[Kept]] = field(init=False, default_factory=dict)  # name without its hash -> records

    def __post_init__(self) -> None:
        if self.records is not None:
            kept, self.warnings = read_kept(self.records)
            for one in kept:
                try:
                    check_result(one.result)
                except BadRecord as error:
                    self.warnings.append(f"{self.records / FILE}: {printable(one.name)}: {error}; it is not counted")
                    continue
                self._kept.setdefault(_stem(one.name), []).append(one)
            if next(self.records.glob("runs/*/result.json"), None) is not None:
                way = f"`sparse-lab collect {self.records} {self.records}` brings them into one file, where they do"
                self.warnings.append(f"{self.records}/runs holds records that do not count: {way}")

    def result(self, run: Run) -> dict[str, Any] | None:
        """The record that counts for a run: one that is kept, if in another arithmetic too, or else its own."""
        found = self._recorded(run.config) or self._own(run.config)  # what is kept counts: it is what the report shows
        if found is not None:
            self.done[run.name] = found
        return found

    def needs(self, run: Run) -> list[str]:
        """The runs that it starts from and that are still to be made here: a record has no network to start from."""
        return [name for name, config in run.starts.items() if self._own(config) is None]

    def keep(self, run: Run) -> None:
        """Add what is finished of a run and of those that it starts from to the records, where it is not there yet.
        Raises UserError.
        """
        for config in (*run.starts.values(), run.config) if self.records is not None else ():
            if self._own(config) is not None and self._recorded(config) is None:
                assert self.records is not None
                folder = run_dir(config)
                try:
                    keep_run(folder.path, self.records)
                except (OSError, ValueError) as error:
                    raise UserError(f"{folder.path} cannot be kept in {self.records}: {error}") from None
                kept = [one for one in read_kept(self.records)[0] if one.name == folder.name]
                self._kept.setdefault(_stem(folder.name), []).extend(kept)

    def _own(self, config: Config) -> dict[str, Any] | None:
        """Looked at on disk until it is done: whole networks are hashed."""
        folder = run_dir(config)
        if folder.name not in self._made and (result := folder.result()) is not None:
            self._made[folder.name] = result
        return self._made.get(folder.name)

    def _recorded(self, config: Config) -> dict[str, Any] | None:
        folder = run_dir(config)
        near = self._kept.get(_stem(folder.name), [])
        for kept in near:
            if kept.name == folder.name:
                return kept.result
        asked = request_hash(config) if near else ""
        return next((one.result for one in near if one.result.get("request") == asked), None)


def _stem(name: str) -> str:
    return name.rpartition("-")[0]


def write_copy(table: Table, command: str, runs: list[Run], state: State) -> None:
    """records/table.yaml: the definition, how it was filled, and the runs that belong into it."""
    assert state.records is not None
    planned = []
    for run in runs:
        name = state.done.get(run.name, {}).get("name", run.name)
        about = {key: getattr(run.config, key).name for key in ("model", "dataset", "method")}
        planned.append({"name": name, **about, "sparsity": run.cell.sparsity, "seed": run.seed})
    own = BEFORE.split(table.text, maxsplit=1)[0].rstrip()
    lines = [own, "", f"{MARK}, anew each time", f"command: {json.dumps(command)}", "planned:"]
    lines += [f"  - {json.dumps(row)}" for row in planned]
    try:
        state.records.mkdir(parents=True, exist_ok=True)
        write_text_atomic(state.records / "table.yaml", "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {state.records}: {error.strerror}; choose another --records") from None
