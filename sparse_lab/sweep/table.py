"""A table's definition (conf/table/*.yaml, or a file of the user's) as the runs that fill it.

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

import reprlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sparse_lab.config import Config, conf_dir
from sparse_lab.errors import SparseLabError, UserError, nearest
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.security.interpolations import check_interpolations
from sparse_lab.experiment.security.servers import check_server, sets_server
from sparse_lab.experiment.validate import check_request
from sparse_lab.methods import phases
from sparse_lab.methods import table as components
from sparse_lab.records.atomic_io import printable
from sparse_lab.records.run_dir import RunDir
from sparse_lab.sweep.plan import Request

KEYS = ("title", "seeds", "always", "recipes", "devices", "cells")
WRITTEN = ("command", "planned")  # what a copy beside records holds too
DEVICES = {"cpu": ["trainer=cpu"], "gpu": ["trainer=gpu"]}
RESERVED = {
    "seed": "the table's seeds and --seeds say which",
    "paths.outputs": "use --outputs",
    "paths.data": "use --data",
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
    def read(cls, asked: str, user_conf: Path | None = None) -> Table:
        """By its name in conf/table or in the user's own folder, or by its file. Raises UserError."""
        known = tables(user_conf)
        path = known.get(asked, Path(asked))
        if not path.is_file():
            raise UserError(f"unknown table {asked!r}; {nearest(asked, known)}; or the path of a YAML file")
        try:
            text = path.read_text(encoding="utf-8")
            plain = yaml.safe_load(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{path} cannot be read: {printable(' '.join(str(error).split()))}") from None
        try:
            return cls(printable(path.stem), text=text, **_checked(plain))
        except SparseLabError as error:
            raise UserError(f"{path}: {error}") from None

    def recipe(self, name: str | None) -> str:
        """The recipe that is asked for, or the first. Raises UserError."""
        if name is not None and name not in self.recipes:
            raise UserError(f"unknown recipe {name!r} of table {self.name}; {nearest(name, list(self.recipes))}")
        return name or next(iter(self.recipes))


def tables(user_conf: Path | None = None) -> dict[str, Path]:
    """Every table that has a name, the user's own among them."""
    folders = [folder / "table" for folder in (conf_dir(), user_conf) if folder is not None]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


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
        raise UserError(f"seeds: {reprlib.repr(seeds)} is no list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {reprlib.repr(seeds)} holds one twice")
    if not isinstance(cells, list) or not cells:
        raise UserError("cells: a list of overrides is missing")
    groups = {}
    for key, default in (("recipes", {"default": []}), ("devices", DEVICES)):
        named: Any = plain.get(key) or default
        if not isinstance(named, dict):
            raise UserError(f"{key}: {reprlib.repr(named)} is no mapping of names to overrides")
        groups[key] = {str(name): words(lines, f"{key}.{name}") for name, lines in named.items()}
    if taken := groups["recipes"].keys() & {"run", "name"}:
        raise UserError(f"recipes: {taken.pop()!r} is a key of every cell: choose another name")
    always = words(plain.get("always") or [], "always")
    found = [_cell(cell, number, list(groups["recipes"])) for number, cell in enumerate(cells, 1)]
    return {"title": printable(" ".join(title.split())), "seeds": seeds, "always": always, **groups, "cells": found}


def _cell(cell: Any, number: int, recipes: list[str]) -> dict[str, Any]:
    plain = cell if isinstance(cell, dict) else {"run": cell}
    known = ["run", "name", *recipes]
    for key in plain:
        if key not in known:
            raise UserError(f"cell {number}: unknown key {key!r}; {nearest(str(key), known)}")
    if "run" not in plain:
        raise UserError(f"cell {number}: run, its overrides, is missing")
    named: dict[str, Any] = {}
    if "name" in plain:
        if not isinstance(plain["name"], str) or not plain["name"].strip():
            raise UserError(f"cell {number}: name: {reprlib.repr(plain['name'])} is no text")
        named["name"] = printable(" ".join(plain["name"].split()))
    return named | {key: words(value, f"cell {number}") for key, value in plain.items() if key != "name"}


def words(lines: Any, where: str) -> list[str]:
    """Overrides: a list of them, or a string (also within the list) as on a command line. Raises UserError."""
    lines = [lines] if isinstance(lines, str) else lines
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{where}: {reprlib.repr(lines)} is no list of overrides like training.epochs=3")
    try:
        found = [word for line in lines for word in shlex.split(line)]
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    for word in found:
        if "=" not in word or word.startswith("-"):
            raise UserError(f"{where}: {reprlib.repr(word)} is no override like training.epochs=3")
    check_interpolations(where, found)
    for word in found:
        key, _, value = word.partition("=")
        if sets_server(key):
            check_server(where, value)
    return found


def merged(*groups: Sequence[str]) -> list[str]:
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
        return {run_dir(config).name: config for config in components.ancestors(self.config)}

    @property
    def command(self) -> list[str]:
        return [*self.cell.asked, *self.cell.paths, f"seed={self.seed}"]


@dataclass(frozen=True)
class Asked:
    """What a table is asked for on a command line. `cells`: names or numbers from 1, none for all; `conf`: the words
    that name the user's own folder of choices.
    """

    recipe: str
    device: str
    extra: Sequence[str] = ()
    paths: Sequence[str] = ()
    conf: Sequence[str] = ()
    seeds: int | None = None
    cells: Sequence[str] = ()


def plan(table: Table, asked: Asked) -> list[Run]:
    """Every run of the table, one seed of each cell after the other. Raises UserError for the first wrong cell."""
    seeds, device = asked.seeds, asked.device
    if seeds is not None and not 1 <= seeds <= len(table.seeds):
        raise UserError(f"--seeds {seeds}: table {table.name} has {len(table.seeds)} seeds, {table.seeds}")
    if device not in table.devices:
        raise UserError(f"table {table.name} has no device {device!r}; {nearest(device, list(table.devices))}")
    cells: list[Cell] = []
    known: dict[str, int] = {}
    for number, cell in enumerate(table.cells, 1):
        own = [*cell["run"], *cell.get(asked.recipe, [])]
        lines = merged(table.always, table.devices[device], table.recipes[asked.recipe], own, asked.extra)
        try:
            check_reserved(lines)
            config = compose([*asked.conf, *lines, *asked.paths], table.seeds[0])
        except SparseLabError as error:
            raise UserError(f"cell {number} of table {table.name} ({shlex.join(cell['run'])}): {error}") from None
        name = run_dir(config).name
        if name in known:
            raise UserError(f"cells {known[name]} and {number} of table {table.name} ask for the same runs: {name}")
        known[name] = number
        cells.append(Cell(cell.get("name", config.method.name), lines, list(asked.paths), config))
    chosen = _chosen(table, cells, asked.cells)
    pairs = [(seed, cell) for seed in table.seeds[:seeds] for cell in chosen]
    return [
        Run(number, cell, seed, replace(cell.config, seed=seed)) for number, (seed, cell) in enumerate(pairs, start=1)
    ]


def _chosen(table: Table, cells: list[Cell], asked: Sequence[str]) -> list[Cell]:
    """The cells that are asked for by name or by number, in the table's order. Raises UserError for an unknown one."""
    if not asked:
        return cells
    for word in asked:
        if word not in {cell.name for cell in cells} and word not in {
            str(number) for number in range(1, len(cells) + 1)
        }:
            known = nearest(word, list(dict.fromkeys(cell.name for cell in cells)))
            raise UserError(f"unknown cell {word!r} of table {table.name}; {known}; or a number, 1 to {len(cells)}")
    return [cell for number, cell in enumerate(cells, 1) if cell.name in asked or str(number) in asked]


def compose(words: list[str], seed: int) -> Config:
    """The config of one run, checked as far as that needs no data, package or GPU. Raises UserError."""
    request = Request.read(["--multirun", *words, f"seed={seed}"])
    for key, values in request.axes.items():
        raise UserError(f"{key}={','.join(values)} is a sweep: a cell is one run, give it a cell a value")
    config = request.compose([]).config()
    request.check_job(config)
    check_request(config)
    return config


def check_reserved(lines: Sequence[str]) -> None:
    """Raises UserError for keys that the command sets itself."""
    for line in lines:
        key = line.split("=", 1)[0].lstrip("+")
        if key.startswith("hydra") or "@" in key:
            raise UserError(f"{line}: what runs a table, and nothing else of Hydra's, is said on the command line")
        if key in RESERVED:
            raise UserError(f"{line}: {RESERVED[key]}")
