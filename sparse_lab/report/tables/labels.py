"""Names for the rows of a table: cells that differ never share a name at one sparsity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from sparse_lab.config import Config, current
from sparse_lab.report.load.records import Finished, section

SHOWN = 3  # settings that a row's name spells out
LONGEST = 400  # signs of a row's name; a plot would draw one of 100,000 for a minute


def labels(runs: Iterable[Finished]) -> dict[str, str]:
    """The row name of every cell: the method, with the settings that tell its variants apart where there are any.

    The settings come from the cells that share model, data set, method and sparsity. A method's cells at its other
    sparsities are named by the same settings, so that a row holds one variant.
    """
    groups: dict[tuple[str, str, str], dict[float, dict[str, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        group = groups[run.result["model"], run.result["dataset"], run.result["method"]]
        group[run.sparsity].setdefault(run.cell, _asked(run))
    names: dict[str, str] = {}
    for (_, _, method), by_sparsity in groups.items():
        names.update(_variants(method, by_sparsity))
    return {cell: _shortened(name) for cell, name in names.items()}


def _shortened(name: str) -> str:
    """A name that is too long by its beginning, its end and its hash: those that differ still do."""
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST // 2]} ... {name[-LONGEST // 4 :]} ({hashlib.sha256(name.encode()).hexdigest()[:8]})"


def foldable(label: str, room: int) -> str:
    """A row's name for a place where a line holds `room` characters: settings that are longer may be broken before
    their values, so that no value is broken.
    """
    return " ".join(word if len(word) <= room else word.replace("=", "= ", 1) for word in label.split())


def changing(runs: Iterable[Finished], names: Mapping[str, str]) -> list[str]:
    """A note for every row in which more than the sparsity changes from one column to the next."""
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        row = rows[run.result["model"], run.result["dataset"], names[run.cell]]
        row.setdefault(run.cell, _asked(run))
    notes = []
    for (model, dataset, name), cells in sorted(rows.items()):
        if keys := [key for key in differing(list(cells.values())) if key != "sparsity.target"]:
            listed = ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
            notes.append(f"{name} ({model} on {dataset}): besides the sparsity, the row also changes {listed}")
    return notes


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """A nested config as dotted keys, in its own order, without the keys that do not change a result. A part with
    nothing to set is {}. What 0.1 wrote otherwise has the name of today, so that old and new records can stand in one
    row.
    """
    return dict(_flat(_of_today(config) if "parts" in section(dict(config), "method") else config, ""))


def _asked(run: Finished) -> dict[str, Any]:
    """A run's settings, and what else is in its name: which data it read, and how many processes it had."""
    fingerprint, ranks = section(run.result, "data").get("fingerprint"), run.result.get("ranks")
    beside = {"data": fingerprint[:8] if isinstance(fingerprint, str) else "", "processes": ranks}
    return {**flatten(run.config), **{name: value for name, value in beside.items() if value}}


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        key = current(f"{prefix}{name}")
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif key not in _SILENT and not key.startswith(("paths.", "logger.")):
            yield key, value


def _of_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in which a method still was a list of parts and switches, and a schedule a name with all keys beside."""
    method, schedule = dict(section(dict(config), "method")), dict(section(dict(config), "schedule"))
    for gone in ("parts", "cyclic", "compactors", "hypersphere"):  # what they switched on has keys of its own
        method.pop(gone, None)
    for bare in ("sharing", "dct"):
        if method.pop(bare, False):
            method[bare] = {}
    if method.get("dyrelu") is True:
        del method["dyrelu"]
    if isinstance(method.get("prune"), Mapping):
        method["prune"] = {key: value for key, value in method["prune"].items() if key != "unit"}
    known = {"method": {key: value for key, value in method.items() if value != {} or key in ("sharing", "dct")}}
    if isinstance(name := schedule.pop("name", None), str):
        known["schedule"] = {name: schedule}
    return {**config, **known}


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted keys whose values are not the same in all flat configs, in the order of the configs."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({_text(config[key]) if key in config else None for config in configs}) > 1]


def _variants(method: str, by_sparsity: Mapping[float, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    crowded = [cells for cells in by_sparsity.values() if len(cells) > 1]
    if not crowded:
        return {cell: method for cells in by_sparsity.values() for cell in cells}
    keys = list(dict.fromkeys(key for cells in crowded for key in differing(list(cells.values()))))
    names: dict[str, str] = {}
    for cells in by_sparsity.values():
        said = {cell: _settings(config, keys) for cell, config in cells.items()}
        for cell, settings in said.items():
            if list(said.values()).count(settings) > 1:
                settings = [*settings, f"cell {cell}"]
            names[cell] = f"{method} ({', '.join(settings)})" if settings else method
    return names


def _settings(config: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    shown = [f"{key}={_shown(config[key])}" for key in keys[:SHOWN] if key in config]
    return [*shown, "..."] if len(keys) > SHOWN else shown


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _shown(value: object) -> str:
    # A sweep's 0.1 * 3 is 0.30000000000000004; what six digits cannot tell apart, the cell's hash does.
    return f"{value:.6g}" if isinstance(value, float) else _text(value)


def _silent(kind: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        kinds = (hint, *get_args(hint))
        nested = [inner for inner in kinds if isinstance(inner, type) and dataclasses.is_dataclass(inner)]
        if nested:
            yield from _silent(nested[0], f"{prefix}{item.name}.")
        elif not item.metadata.get("identity", True):
            yield f"{prefix}{item.name}"


_SILENT = frozenset({"seed", *_silent(Config)})
