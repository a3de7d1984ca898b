"""A table's definition (tables/*.yaml) as the runs that fill it, and which of them are there already.

    title: one line
    seeds: [1, 2, 3]
    always: [KEY=VALUE, ...]                # of every cell; may be left out, as recipes and devices
    recipes: {paper: [], quarter: [training.epochs=50]}     # the first is the default
    devices: {cpu: [trainer=cpu, compute=auto], gpu: [trainer=gpu]}
    cells:                                  # most valuable first
      - method=dense                        # overrides as on a command line; a list of them will do too
      - {name: what its row is called, run: method=east, quarter: method.drop_and_grow.update_every=1000}

A cell's `quarter` holds for that recipe alone. Of a key that is given twice the last value counts: always, device,
recipe, cell, the cell's own for the recipe, command line.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sparse_lab.config import Config
from sparse_lab.errors import SparseLabError, UserError, nearest
from sparse_lab.experiment import phases
from sparse_lab.experiment.components import table
from sparse_lab.experiment.identity import digest, identity, run_dir
from sparse_lab.experiment.validate import check_request
from sparse_lab.records.atomic_io import write_text_atomic
from sparse_lab.records.kept import keep_run
from sparse_lab.records.run_dir import RunDir
from sparse_lab.report.load.records import Finished, read
from sparse_lab.sweep.plan import Request

TABLES = Path(__file__).with_name("tables")
KEYS = ("title", "seeds", "always", "recipes", "devices", "cells")
WRITTEN = ("command", "planned")  # what a copy beside records holds too
MARK = "# written by scripts/reproduce.py"
DEVICES = {"cpu": ["trainer=cpu"], "gpu": ["trainer=gpu"]}
RESERVED = {
    "seed": "the table's seeds and --seeds say which",
    "paths.outputs": "use --outputs",
    "paths.data": "use --data",
    "hydra.mode": "each run is started by itself",
}


@dataclass(frozen=True)
class Table:
    """A definition as it stands in its file, checked. `text`: the file's own."""

    name: str
    title: str
    seeds: list[int]
    always: list[str]
    recipes: dict[str, list[str]]
    devices: dict[str, list[str]]
    cells: list[dict[str, Any]]  # {"run": overrides}, with "name" and a recipe's own overrides where given
    text: str

    @classmethod
    def read(cls, asked: str) -> Table:
        """By its name below tables/, or by its file. Raises UserError."""
        own = TABLES / f"{asked}.yaml"
        path = own if own.is_file() else Path(asked)
        if not path.is_file():
            known = sorted(one.stem for one in TABLES.glob("*.yaml"))
            raise UserError(f"unknown table {asked!r}; {nearest(asked, known)}; or the path of a YAML file")
        try:
            text = path.read_text(encoding="utf-8")
            plain = yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        try:
            return cls(path.stem, text=text, **_checked(plain))
        except SparseLabError as error:
            raise UserError(f"{path}: {error}") from None

    def recipe(self, name: str | None) -> str:
        """The recipe that is asked for, or the first. Raises UserError."""
        if name is not None and name not in self.recipes:
            raise UserError(f"unknown recipe {name!r} of table {self.name}; {nearest(name, list(self.recipes))}")
        return name or next(iter(self.recipes))


def _checked(plain: Any) -> dict[str, Any]:
    """The definition's parts. Raises UserError for what is none."""
    if not isinstance(plain, dict):
        raise UserError(f"a table is a mapping of {', '.join(KEYS)}")
    for key in plain:
        if key not in (*KEYS, *WRITTEN):
            raise UserError(f"unknown key {key!r}; {nearest(str(key), KEYS)}")
    title, seeds, cells = plain.get("title"), plain.get("seeds"), plain.get("cells")
    if not isinstance(title, str) or not title:
        raise UserError("title: a line of text is missing")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"seeds: {seeds!r} is no list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {seeds} holds one twice")
    if not isinstance(cells, list) or not cells:
        raise UserError("cells: a list of overrides is missing")
    groups = {}
    for key, default in (("recipes", {"default": []}), ("devices", DEVICES)):
        named: Any = plain.get(key) or default
        if not isinstance(named, dict):
            raise UserError(f"{key}: {named!r} is no mapping of names to overrides")
        groups[key] = {str(name): words(lines, f"{key}.{name}") for name, lines in named.items()}
    always = words(plain.get("always") or [], "always")
    found = [_cell(cell, number, list(groups["recipes"])) for number, cell in enumerate(cells, 1)]
    return {"title": title, "seeds": seeds, "always": always, **groups, "cells": found}


def _cell(cell: Any, number: int, recipes: list[str]) -> dict[str, Any]:
    plain = cell if isinstance(cell, dict) else {"run": cell}
    known = ["run", "name", *recipes]
    for key in plain:
        if key not in known:
            raise UserError(f"cell {number}: unknown key {key!r}; {nearest(str(key), known)}")
    if "run" not in plain:
        raise UserError(f"cell {number}: run, its overrides, is missing")
    named: dict[str, Any] = {"name": str(plain["name"])} if "name" in plain else {}
    return named | {key: words(value, f"cell {number}") for key, value in plain.items() if key != "name"}


def words(lines: Any, where: str) -> list[str]:
    """Overrides: a list of them, or a string (also within the list) as on a command line. Raises UserError."""
    lines = [lines] if isinstance(lines, str) else lines
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{where}: {lines!r} is no list of overrides like training.epochs=3")
    try:
        return [word for line in lines for word in shlex.split(line)]
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def merged(*groups: list[str]) -> list[str]:
    """Overrides in their order, of each key the last: Hydra refuses a group that is chosen twice."""
    found: dict[str, str] = {}
    for line in (line for group in groups for line in group):
        key = line.split("=", 1)[0].lstrip("+")
        found.pop(key, None)
        found[key] = line
    return list(found.values())


@dataclass(frozen=True)
class Cell:
    """A row of the table. `asked`: its overrides; `paths`: where this machine has its folders; `config`: composed."""

    name: str
    asked: list[str]
    paths: list[str]
    config: Config

    @property
    def sparsity(self) -> float:
        return round(phases.final_sparsity(self.config), 6)


@dataclass(frozen=True)
class Run:
    """One seed of a cell. `number`: its place in the plan, from 1."""

    number: int
    cell: Cell
    seed: int
    config: Config

    @cached_property
    def folder(self) -> RunDir:
        return run_dir(self.config)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def starts(self) -> dict[str, Config]:
        """Every run that it starts from, directly or not, by name, each before what it is needed for."""
        return {run_dir(config).name: config for config in ancestors(self.config)}

    @property
    def command(self) -> list[str]:
        return [*self.cell.asked, *self.cell.paths, f"seed={self.seed}"]


def ancestors(config: Config) -> Iterator[Config]:
    """What `sparse_lab.experiment.runner` makes first for this config, and for that in turn."""
    yield from table.ancestors(config)


def plan(table: Table, recipe: str, device: str, extra: list[str], paths: list[str], seeds: int | None) -> list[Run]:
    """Every run of the table, one seed of each cell after the other. Raises UserError for the first wrong cell."""
    if seeds is not None and not 1 <= seeds <= len(table.seeds):
        raise UserError(f"--seeds {seeds}: table {table.name} has {len(table.seeds)} seeds, {table.seeds}")
    if device not in table.devices:
        raise UserError(f"table {table.name} has no device {device!r}; {nearest(device, list(table.devices))}")
    cells: list[Cell] = []
    known: dict[str, int] = {}
    for number, cell in enumerate(table.cells, 1):
        own = [*cell["run"], *cell.get(recipe, [])]
        lines = merged(table.always, table.devices[device], table.recipes[recipe], own, extra)
        try:
            check_reserved(lines)
            config = compose([*lines, *paths], table.seeds[0])
        except SparseLabError as error:
            raise UserError(f"cell {number} of table {table.name} ({shlex.join(cell['run'])}): {error}") from None
        name = run_dir(config).name
        if name in known:
            raise UserError(f"cells {known[name]} and {number} of table {table.name} ask for the same runs: {name}")
        known[name] = number
        cells.append(Cell(cell.get("name", config.method.name), lines, paths, config))
    pairs = [(seed, cell) for seed in table.seeds[:seeds] for cell in cells]
    return [
        Run(number, cell, seed, replace(cell.config, seed=seed)) for number, (seed, cell) in enumerate(pairs, start=1)
    ]


def compose(lines: list[str], seed: int) -> Config:
    """The config of one run, checked as far as that needs no data, package or GPU. Raises UserError."""
    request = Request.read(["--multirun", *lines, f"seed={seed}"])
    for key, values in request.axes.items():
        raise UserError(f"{key}={','.join(values)} is a sweep: a cell is one run, give it a cell a value")
    config = request.compose([]).config()
    if config.method.regrow is not None and config.method.init_from not in (known := request.source.choices("method")):
        raise UserError(f"method.init_from={config.method.init_from}: {nearest(str(config.method.init_from), known)}")
    check_request(config)
    return config


def check_reserved(lines: list[str]) -> None:
    """Raises UserError for keys that this command sets itself."""
    for line in lines:
        key = line.split("=", 1)[0].lstrip("+")
        if key in RESERVED:
            raise UserError(f"{line}: {RESERVED[key]}")


def request_of(matters: dict[str, Any]) -> str:
    """The hash of an identity without its arithmetic: how a run was computed is not what was asked for."""
    plain = json.loads(json.dumps(matters))
    plain.pop("compute", None)
    plain.get("trainer", {}).pop("precision", None)
    return digest({key: value for key, value in plain.items() if value != {}})


@dataclass
class State:
    """Which runs are done: in the outputs, or among the records kept of other machines and days."""

    records: Path | None
    done: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)  # run's name -> the record that counts
    _made: dict[str, dict[str, Any]] = field(
        init=False, default_factory=dict
    )  # run's name -> its result in the outputs
    _kept: dict[str, list[Finished]] = field(init=False, default_factory=dict)  # name without its hash -> records

    def __post_init__(self) -> None:
        if self.records is not None and self.records.is_dir():
            self._look()

    def _look(self) -> None:
        assert self.records is not None
        self._kept.clear()
        for finished in read(self.records).results:
            self._kept.setdefault(_stem(finished.name), []).append(finished)

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
        """Copy what is finished of a run and of those that it starts from to the records, where it is not there yet."""
        for config in (*run.starts.values(), run.config) if self.records is not None else ():
            if self._own(config) is not None and self._recorded(config) is None:
                assert self.records is not None
                folder = run_dir(config)
                try:
                    keep_run(folder.path, self.records)
                except (OSError, ValueError) as error:
                    raise UserError(f"{folder.path} cannot be copied to {self.records}: {error}") from None
                self._look()

    def _own(self, config: Config) -> dict[str, Any] | None:
        """Looked at on disk until it is done: whole networks are hashed."""
        folder = run_dir(config)
        if folder.name not in self._made and (result := folder.result()) is not None:
            self._made[folder.name] = result
        return self._made.get(folder.name)

    def _recorded(self, config: Config) -> dict[str, Any] | None:
        folder = run_dir(config)
        near = self._kept.get(_stem(folder.name), [])
        for finished in near:
            if finished.name == folder.name:
                return finished.result
        asked = request_of(identity(config)) if near else ""
        return next((one.result for one in near if request_of(one.config) == asked), None)


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
    own = re.split(rf"^{re.escape(MARK)}", table.text, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    lines = [own, "", f"{MARK}, anew each time", f"command: {json.dumps(command)}", "planned:"]
    lines += [f"  - {json.dumps(row)}" for row in planned]
    try:
        state.records.mkdir(parents=True, exist_ok=True)
        write_text_atomic(state.records / "table.yaml", "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {state.records}: {error.strerror}; choose another --records") from None
