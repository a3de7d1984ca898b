"""Reads how finished runs went: metrics a row an epoch; changes of the masks, activations and gradients a JSON object
a line; or the same as rows that a table keeps.

A file is read when something asks for it: a report of a thousand runs shows the insides of some only. Nothing here
trusts a file: it may be absent, torn in its last line or from another version. What cannot be read is left out, with
one warning a file; a value that is missing or senseless is NaN.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparse_lab.records.record import is_number
from sparse_lab.report.load.records import Finished, section, share
from sparse_lab.report.tables.aggregate import distinct
from sparse_lab.report.tables.labels import labels

UPDATES, ACTIVATIONS, GRADIENTS = "updates.jsonl", "activations.jsonl", "gradients.jsonl"
METRICS, MEASURES = "metrics.csv", ("train_loss", "validation_accuracy")
PARTS = ("live weights", "pruned positions", "BatchNorm", "DyReLU", "sharing scales", "biases", "excluded weights")
_SHARES = {
    "density": ("kept", "total"),
    "asked": ("asked", "total"),
    "effective": ("effective", "kept"),
    "live": ("live_logits", "logits"),
    "dead": ("dead_channels", "channels"),
}
_MOST_EPOCHS = 1e6  # nothing trains for longer: beyond it a number is damage that would ruin an axis
_LARGEST_NORM = 1e100

Values = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Layers:
    """Density and effective share (of the kept weights) in 0..1, arrays of shape (layers, updates)."""

    names: list[str]
    epochs: Values
    density: Values
    effective: Values


@dataclass(frozen=True)
class Moment:
    """One epoch's share (0..1) of positive pre-activations, by activation in the order of the network."""

    phase: str
    epoch: float
    beta: float | None
    shares: dict[str, float]


@dataclass(frozen=True, eq=False)
class Trace:
    """How one run went; each part is read from its file once, when something asks. All runs share `warnings`."""

    run: Finished
    label: str
    warnings: list[str]

    @property
    def place(self) -> tuple[str, str, float]:
        """Network, data set and the sparsity that was asked for."""
        return self.run.result["model"], self.run.result["dataset"], self.run.sparsity

    @property
    def dense(self) -> bool:
        return bool(self.run.result["method"] == "dense")

    @property
    def end(self) -> float:
        """The epochs that it trained, NaN where not known."""
        status = self.run.status
        trained = status.epochs if status.epoch is None else status.epoch
        return float(trained) if trained is not None and 0 <= trained <= _MOST_EPOCHS else math.nan

    @property
    def changes(self) -> int:
        """Lines of updates.jsonl, sound or not."""
        return self._seen[0]

    @property
    def by_layer(self) -> bool:
        """Do the updates say how every layer was? As far as can be told without reading them."""
        return self._seen[1]

    @property
    def phased(self) -> bool:
        """Did a DyReLU go through its phases? As the first line of activations.jsonl says."""
        kept = self._kept(ACTIVATIONS)
        try:
            if kept is None:
                with open(self.run.folder / ACTIVATIONS, "rb") as file:
                    line = _parsed(file.readline(), _activation)
            else:
                line = _checked(kept[0], _activation) if kept else None
        except OSError:
            return False
        return line is not None and line.beta is not None

    def has(self, name: str) -> bool:
        """Is there such a file beside the record, or what was kept of it?"""
        if self.run.traces is not None:
            return _stem(name) in self.run.traces
        return (self.run.folder / name).exists()

    def _kept(self, name: str) -> list[dict[str, Any]] | None:
        """The rows that a table keeps of a file; None where the run has a folder, and files in it."""
        return None if self.run.traces is None else self.run.traces.get(_stem(name), [])

    def _sound(self, name: str, sound: Callable[[dict[str, Any]], T | None], warnings: list[str]) -> list[T]:
        """What `sound` makes of each line of a file, without those of which it makes nothing."""
        path, kept = self.run.folder / name, self._kept(name)
        if kept is None:
            lines = _lines(path, warnings)
            found = [_parsed(line, sound) for line in lines]
        else:
            found = [_checked(row, sound) for row in kept]
        return _left(path, found, warnings)

    @cached_property
    def updates(self) -> pd.DataFrame:
        """A row a change of the masks: shares in 0..1 beside their epoch."""
        rows = self._sound(UPDATES, _update, self.warnings)
        rows.sort(key=lambda row: (row["epoch"], row["step"]))
        columns = ["epoch", *_SHARES, "explored"]
        return pd.DataFrame(
            np.array([[row[name] for name in columns] for row in rows]).reshape(-1, len(columns)), columns=columns
        )

    @cached_property
    def arrays(self) -> dict[str, Values]:
        """The columns of `updates`: what draws a thousand lines takes them from here, many times faster."""
        return {str(name): values.to_numpy(float) for name, values in self.updates.items()}

    @cached_property
    def layers(self) -> Layers | None:
        """Density and effective share of every layer after every update; None where they were not recorded."""
        unsaid: list[str] = []  # `updates` warns of this file
        found = [row for row in self._sound(UPDATES, _layered, unsaid) if row["layers"]]
        return _layers(sorted(found, key=lambda row: (row["epoch"], row["step"]))) if found else None

    @cached_property
    def moments(self) -> list[Moment]:
        """Activations at the epochs that tell most."""
        return _moments(self._sound(ACTIVATIONS, _activation, self.warnings))

    @cached_property
    def gradients(self) -> pd.DataFrame:
        """The norm of every part by epoch."""
        found = {row["epoch"]: row for row in self._sound(GRADIENTS, _gradient, self.warnings)}
        return _by_epoch(found.values(), PARTS)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """`MEASURES` by epoch: the loss while training, and accuracy on the validation images in percent."""
        path, kept = self.run.folder / METRICS, self._kept(METRICS)
        rows = _csv_rows(path, self.warnings) if kept is None else kept
        return _by_epoch(_epochs(path, rows, self.warnings), MEASURES)

    @cached_property
    def densities(self) -> dict[str, float]:
        """The share of its weights that every layer keeps at the end, by name, as the record says."""
        layers = self.run.result.get("layers")
        sound = [one for one in layers if isinstance(one, dict)] if isinstance(layers, list) else []
        known = {str(one.get("name")): share(one.get("kept"), one.get("total")) for one in sound}
        return {name: density for name, density in known.items() if not math.isnan(density)}

    @cached_property
    def _seen(self) -> tuple[int, bool]:
        if (kept := self._kept(UPDATES)) is not None:
            return len(kept), any("layers" in row for row in kept)
        try:
            content = (self.run.folder / UPDATES).read_bytes()
        except OSError:
            return 0, False
        return sum(1 for line in content.split(b"\n") if line.strip()), b'"layers"' in content


@dataclass(frozen=True, eq=False)
class Course:
    """A value over epochs in the seeds of one cell: each holds from its epoch to the next."""

    epochs: Values
    mean: Values
    low: Values
    high: Values


def traces(runs: Iterable[Finished]) -> tuple[list[Trace], list[str]]:
    """The counted runs by network, data set, falling sparsity, method and seed; and the list that will hold the
    warnings about those of their files that are read.
    """
    counted, _ = distinct(runs)
    names = labels(counted)
    counted.sort(key=lambda run: (run.result["model"], run.result["dataset"], -run.sparsity, names[run.cell], run.seed))
    warnings: list[str] = []
    return [Trace(run, names[run.cell], warnings) for run in counted], warnings


def cells(found: Iterable[Trace]) -> list[list[Trace]]:
    """The seeds of every cell, in the order given."""
    groups: dict[str, list[Trace]] = defaultdict(list)
    for trace in found:
        groups[trace.run.cell].append(trace)
    return list(groups.values())


def course(seeds: Sequence[Trace], value: str, end: float = math.nan) -> Course:
    """Mean, lowest and highest value of the updates' column over the seeds, held on to the epoch `end` if it is given.

    A seed counts from its first update on; one that does not say the value is passed over. NaN where no seed has it.
    """
    said = [(seed.arrays["epoch"], seed.arrays[value], np.isfinite(seed.arrays[value])) for seed in seeds]
    own = [epochs[known] if known.any() else epochs for epochs, _, known in said if len(epochs)]
    values = [numbers[known] if known.any() else numbers for _, numbers, known in said if len(numbers)]
    epochs = np.unique(np.concatenate([*own, *([] if math.isnan(end) else [[end]])])) if own else np.empty(0)
    held = np.full((max(len(own), 1), len(epochs)), np.nan)
    for row, (places, known) in enumerate(zip(own, values, strict=True)):
        last = np.searchsorted(places, epochs, side="right") - 1
        held[row] = np.where(last >= 0, known[np.maximum(last, 0)], np.nan)
    return Course(epochs, *spread(held))


def by_epoch(tables: Sequence[pd.DataFrame], column: str) -> Course:
    """Mean, lowest and highest value of a column at every epoch that a table has; tables are indexed by epoch."""
    own = [table.index.to_numpy(float) for table in tables]
    epochs = np.unique(np.concatenate(own)) if own else np.empty(0)
    held = np.full((max(len(own), 1), len(epochs)), np.nan)
    for row, (places, table) in enumerate(zip(own, tables, strict=True)):
        held[row, np.searchsorted(epochs, places)] = table[column].to_numpy(float)
    return Course(epochs, *spread(held))


def spread(values: Values) -> tuple[Values, Values, Values]:
    """Mean, lowest and highest over the first axis without what is not finite; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(0)
    mean = np.where(known, values, 0.0).sum(0) / np.maximum(count, 1)
    low, high = np.where(known, values, np.inf).min(0), np.where(known, values, -np.inf).max(0)
    mean, low, high = (np.where(count > 0, part, np.nan) for part in (mean, low, high))
    return mean, low, high


def _by_epoch(rows: Iterable[dict[str, float]], columns: Sequence[str]) -> pd.DataFrame:
    listed = sorted(rows, key=lambda row: row["epoch"])
    values = np.array([[row.get(name, math.nan) for name in columns] for row in listed]).reshape(-1, len(columns))
    return pd.DataFrame(values, index=[row["epoch"] for row in listed], columns=list(columns), dtype=float)


def _csv_rows(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return list(csv.DictReader(line.replace("\0", "") for line in file))
    except FileNotFoundError:
        return []
    except (OSError, csv.Error) as error:
        warnings.append(f"{path}: cannot be read ({' '.join(str(error).split())})")
        return []


def _epochs(path: Path, lines: list[dict[str, Any]], warnings: list[str]) -> list[dict[str, float]]:
    """The rows of metrics.csv, the last of each epoch."""
    rows = {}
    for line in lines:
        epoch = _number(line.get("epoch"))
        if 0 <= epoch <= _MOST_EPOCHS:
            rows[epoch] = {"epoch": epoch, **{name: _number(line.get(name)) for name in MEASURES}}
    if bad := sum(not 0 <= _number(line.get("epoch")) <= _MOST_EPOCHS for line in lines):
        warnings.append(f"{path}: {bad} of {len(lines)} lines cannot be read and are left out")
    return list(rows.values())


def _number(cell: object) -> float:
    """A cell of metrics.csv, as text or as the number that was kept of it; NaN for what is none."""
    try:
        value = float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return math.nan
    return float(value) if is_number(value) and abs(value) <= _LARGEST_NORM else math.nan


def _lines(path: Path, warnings: list[str]) -> list[bytes]:
    try:
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []
    except OSError as error:
        warnings.append(f"{path}: cannot be read ({error.strerror})")
        return []


def _left(path: Path, found: list[T | None], warnings: list[str]) -> list[T]:
    sound = [entry for entry in found if entry is not None]
    if bad := len(found) - len(sound):
        warnings.append(f"{path}: {bad} of {len(found)} lines cannot be read and are left out")
    return sound


def _parsed(line: bytes, sound: Callable[[dict[str, Any]], T | None]) -> T | None:
    try:
        return _checked(json.loads(line), sound)
    except (ValueError, RecursionError):
        return None


def _checked(entry: Any, sound: Callable[[dict[str, Any]], T | None]) -> T | None:
    return sound(entry) if isinstance(entry, dict) and _epoch(entry) is not None else None


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _epoch(entry: dict[str, Any]) -> float | None:
    epoch = entry.get("epoch")
    return float(epoch) if is_number(epoch) and 0 <= epoch <= _MOST_EPOCHS else None


def _update(entry: dict[str, Any]) -> dict[str, Any] | None:
    if not is_number(entry.get("step")) or math.isnan(share(entry.get("kept"), entry.get("total"))):
        return None
    row = {name: share(entry.get(part), entry.get(whole)) for name, (part, whole) in _SHARES.items()}
    numbers = {"step": entry["step"], "epoch": _epoch(entry), "explored": share(entry.get("explored"), 1.0)}
    return {**row, **numbers}


def _layered(entry: dict[str, Any]) -> dict[str, Any] | None:
    if (row := _update(entry)) is None:
        return None
    return row | {"layers": {name: one for name, one in section(entry, "layers").items() if isinstance(one, dict)}}


def _activation(entry: dict[str, Any]) -> Moment | None:
    beta, shares = entry.get("beta"), section(entry, "layers")
    if not shares or (beta is not None and math.isnan(share(beta, 1.0))):
        return None
    return Moment("", float(entry["epoch"]), beta, shares)


def _gradient(entry: dict[str, Any]) -> dict[str, float] | None:
    if not isinstance(entry.get("parts"), dict):
        return None
    norms = {part: norm for part, norm in entry["parts"].items() if is_number(norm) and 0 <= norm <= _LARGEST_NORM}
    return {"epoch": float(entry["epoch"]), **norms}


def _layers(updates: Sequence[dict[str, Any]]) -> Layers:
    names = list(dict.fromkeys(name for update in updates for name in update["layers"]))

    def table(part: str, whole: str) -> Values:
        rows = [[update["layers"].get(name, {}) for update in updates] for name in names]
        return np.array([[share(layer.get(part), layer.get(whole)) for layer in row] for row in rows])

    epochs = np.array([update["epoch"] for update in updates])
    return Layers(names, epochs, table("kept", "total"), table("effective", "kept"))


def _moments(lines: Sequence[Moment]) -> list[Moment]:
    """Three telling epochs: around the phasing of DyReLU where there is one, else first, middle and last.

    The phased layers are taken out of a network whose beta has come to 0: no beta is then as good as 0.
    """
    epochs = sorted({line.epoch: line for line in lines}.values(), key=lambda line: line.epoch)
    if not epochs:
        return []
    phased = [line for line in epochs if line.beta is not None]
    if len({line.beta or 0.0 for line in epochs}) > 1:
        before = next((line for line in reversed(phased) if line.beta == 1), epochs[0])
        during = min(phased, key=lambda line: abs((line.beta or 0.0) - 0.5))
        chosen = {"before": before, "during": during, "after": epochs[-1]}
    else:
        chosen = {"first": epochs[0], "middle": epochs[(len(epochs) - 1) // 2], "last": epochs[-1]}
    # A short run has fewer epochs than names; the ends matter more than what lies between.
    order = sorted(chosen, key=lambda phase: (phase in ("during", "middle"), phase in ("before", "first")))
    taken: dict[float, str] = {}
    for phase in order:
        taken.setdefault(chosen[phase].epoch, phase)
    return [
        replace(line, phase=phase, shares={name: share(value, 1.0) for name, value in line.shares.items()})
        for phase, line in chosen.items()
        if taken[line.epoch] == phase
    ]
