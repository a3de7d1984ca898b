"""Reads how finished runs went: changes of the masks, activations and gradients, a JSON object a line.

Nothing here trusts a file: it may be absent, torn in its last line or from another version. What cannot be read is
left out, with one warning a file; a value that is missing or senseless is NaN.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sparse_lab.report.labels import labels
from sparse_lab.report.records import Finished, is_number, section, share
from sparse_lab.report.table import distinct

UPDATES, ACTIVATIONS, GRADIENTS = "updates.jsonl", "activations.jsonl", "gradients.jsonl"
PARTS = ("live weights", "pruned positions", "BatchNorm", "DyReLU", "sharing scales", "biases")
MAPS = 6  # cells whose layers are kept in memory, and so the heat maps of a report
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
    """How one run went. `updates`: a row a change of the masks, shares in 0..1 beside their epoch; `gradients`: the
    norm of every part by epoch; `end`: the epochs that it trained, NaN where not known.
    """

    run: Finished
    label: str
    end: float
    updates: pd.DataFrame
    moments: list[Moment]
    gradients: pd.DataFrame
    layers: Layers | None = None
    by_layer: bool = False

    @property
    def place(self) -> tuple[str, str, float]:
        """Network, data set and the sparsity that was asked for."""
        return self.run.result["model"], self.run.result["dataset"], self.run.sparsity

    @property
    def dense(self) -> bool:
        return bool(self.run.result["method"] == "dense")


@dataclass(frozen=True, eq=False)
class Course:
    """A value over epochs in the seeds of one cell: each holds from its epoch to the next."""

    epochs: Values
    mean: Values
    low: Values
    high: Values


def traces(runs: Iterable[Finished]) -> tuple[list[Trace], list[str]]:
    """The counted runs that left at least one file, by network, data set, falling sparsity, method and seed; warnings.

    Layers stay in memory for the first seed of the first `MAPS` cells that have them.
    """
    counted, _ = distinct(runs)
    if not any((run.folder / name).exists() for run in counted for name in (UPDATES, ACTIVATIONS, GRADIENTS)):
        return [], []
    names = labels(counted)
    counted.sort(key=lambda run: (run.result["model"], run.result["dataset"], -run.sparsity, names[run.cell], run.seed))
    found: list[Trace] = []
    warnings: list[str] = []
    mapped: set[str] = set()
    for run in counted:
        trace = _trace(run, names[run.cell], warnings, map_layers=run.cell not in mapped and len(mapped) < MAPS)
        if trace.layers is not None:
            mapped.add(run.cell)
        if len(trace.updates) or trace.moments or len(trace.gradients):
            found.append(trace)
    return found, warnings


def cells(found: Iterable[Trace]) -> list[list[Trace]]:
    """The seeds of every cell, in the order given."""
    groups: dict[str, list[Trace]] = defaultdict(list)
    for trace in found:
        groups[trace.run.cell].append(trace)
    return list(groups.values())


def course(seeds: Sequence[Trace], value: str, end: float = math.nan) -> Course:
    """Mean, lowest and highest value of the updates' column over the seeds, held on to the epoch `end` if it is given.

    A seed counts from its first update on. NaN where no seed has the value.
    """
    own = [seed.updates["epoch"].to_numpy(float) for seed in seeds if len(seed.updates)]
    values = [seed.updates[value].to_numpy(float) for seed in seeds if len(seed.updates)]
    epochs = np.unique(np.concatenate([*own, *([] if math.isnan(end) else [[end]])])) if own else np.empty(0)
    held = np.full((max(len(own), 1), len(epochs)), np.nan)
    for row, (places, known) in enumerate(zip(own, values, strict=True)):
        last = np.searchsorted(places, epochs, side="right") - 1
        held[row] = np.where(last >= 0, known[np.maximum(last, 0)], np.nan)
    seen = np.ma.masked_invalid(held)
    mean, low, high = (np.ma.filled(part, np.nan) for part in (seen.mean(0), seen.min(0), seen.max(0)))
    return Course(epochs, mean, low, high)


def _trace(run: Finished, label: str, warnings: list[str], map_layers: bool) -> Trace:
    updates = _lines(run.folder / UPDATES, _update, warnings)
    updates.sort(key=lambda update: (update["epoch"], update["step"]))
    activations = _lines(run.folder / ACTIVATIONS, _activation, warnings)
    gradients = {row["epoch"]: row for row in _lines(run.folder / GRADIENTS, _gradient, warnings)}
    layered = [update for update in updates if update["layers"]]
    trained = run.status.epochs if run.status.epoch is None else run.status.epoch
    return Trace(
        run=run,
        label=label,
        end=float(trained) if trained is not None and 0 <= trained <= _MOST_EPOCHS else math.nan,
        updates=pd.DataFrame(updates, columns=["epoch", *_SHARES, "explored"], dtype=float),
        moments=_moments(activations),
        gradients=_by_epoch(gradients.values()),
        layers=_layers(layered) if layered and map_layers else None,
        by_layer=bool(layered),
    )


def _by_epoch(rows: Iterable[dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["epoch", *PARTS], dtype=float).set_index("epoch").sort_index()


def _lines(path: Path, sound: Callable[[dict[str, Any]], T | None], warnings: list[str]) -> list[T]:
    try:
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []
    except OSError as error:
        warnings.append(f"{path}: cannot be read ({error.strerror})")
        return []
    found = [entry for line in lines if (entry := _parsed(line, sound)) is not None]
    if bad := len(lines) - len(found):
        warnings.append(f"{path}: {bad} of {len(lines)} lines cannot be read and are left out")
    return found


def _parsed(line: bytes, sound: Callable[[dict[str, Any]], T | None]) -> T | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return sound(entry) if isinstance(entry, dict) and _epoch(entry) is not None else None


def _epoch(entry: dict[str, Any]) -> float | None:
    epoch = entry.get("epoch")
    return float(epoch) if is_number(epoch) and 0 <= epoch <= _MOST_EPOCHS else None


def _update(entry: dict[str, Any]) -> dict[str, Any] | None:
    if not is_number(entry.get("step")) or math.isnan(share(entry.get("kept"), entry.get("total"))):
        return None
    row = {name: share(entry.get(part), entry.get(whole)) for name, (part, whole) in _SHARES.items()}
    numbers = {"step": entry["step"], "epoch": _epoch(entry), "explored": share(entry.get("explored"), 1.0)}
    layers = {name: layer for name, layer in section(entry, "layers").items() if isinstance(layer, dict)}
    return {**row, **numbers, "layers": layers}


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
