"""`sparse-lab methods`: what conf/method offers, read from the files themselves.

Hydra would take seconds to compose forty methods, so the files are merged here, by Hydra's rules, onto the schema.
Peak memory is measured, by scripts/measure_memory.py; everything else follows from a method's config.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sparse_lab.config import KINDS, Config, MethodConfig, ScheduleConfig, check_ranges, conf_dir, renamed
from sparse_lab.errors import UserError, nearest

MEMORY = Path(__file__).with_name("memory.csv")
SURGERIES = ("dyrelu", "sharing", "cyclic", "dct", "compactors", "hypersphere")
FROM_GRADIENTS = ("gradient", "taylor", "snip", "grasp", "synflow", "mest")
USUAL = ("one_shot", "constant")  # all at once: after the dense training, or before any
ROUNDS = ("iterative", "layerwise")
DENSE_FIRST = ("cubic", "alternating", "soft", "at_end")
HEADS = {
    "name": "method",
    "kind": "kind",
    "paper": "paper",
    "config": "config",
    "needs": "needs",
    "memory": "peak memory",
    "summary": "what it does",
}
BESIDE = ("paper", "config", "needs")
NARROW = 100


def methods(user_conf: Path | None = None, measured: Path = MEMORY) -> list[dict[str, str]]:
    """One dict a method, with the keys of HEADS; by kind in the order of KINDS, then by name. "-": nothing, or unknown.

    user_conf: a folder of the user's own with method/NAME.yaml files; measured: the file that scripts/measure_memory.py
    writes. Raises UserError for a method that no run could read.
    """
    files = Files([folder for folder in (conf_dir(), user_conf) if folder is not None])
    ratios = memory(measured)
    rows = []
    for name in files.names("method"):
        chosen = files.method(name)
        rows.append(
            {
                "name": name,
                "kind": chosen.method.kind,
                "paper": chosen.method.paper or "-",
                "config": ", ".join(parts(chosen)) or "-",
                "needs": ", ".join(needs(chosen)) or "-",
                "memory": ratios.get(name, "-"),
                "summary": chosen.method.summary,
            }
        )
    return sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["name"]))


def memory(measured: Path = MEMORY) -> dict[str, str]:
    """Method -> peak memory of its training in dense training's, as in "1.07x"."""
    with open(measured, newline="", encoding="utf-8") as file:
        return {row["method"]: f"{float(row['ratio']):.2f}x" for row in csv.DictReader(file)}


@dataclass
class Chosen:
    """What `method=NAME` alone asks for. `choice` is the name of the schedule's file, `schedule.name` its kind."""

    method: MethodConfig
    schedule: ScheduleConfig
    choice: str


def parts(chosen: Chosen) -> list[str]:
    """The surgeries and the parts of a method, each with its score or its two (what goes, what comes); the schedule."""
    method = chosen.method
    named = [name for name in SURGERIES if getattr(method, name)]
    for part in method.parts:
        settings = getattr(method, part, None)
        scores = ", ".join(getattr(settings, key) for key in ("score", "drop", "grow") if hasattr(settings, key))
        what = f"{part} filters" if part == "prune" and method.prunes_filters else part
        named.append(f"{what} ({scores})" if scores else what)
    return named + ([chosen.choice] if method.prunes and chosen.choice not in USUAL else [])


def needs(chosen: Chosen) -> list[str]:
    """What a method needs beyond one sparse training: a trained dense network, epochs, gradients of pruned weights."""
    method, schedule = chosen.method, chosen.schedule
    if not method.prunes:
        return []
    found = [] if method.from_scratch else ["pretrained"]
    rounds = schedule.name in ROUNDS
    if not method.from_scratch or (rounds and schedule.round_epochs is not None):
        found.append("extra epochs (rounds)" if rounds else "extra epochs")
    return found + _dense_gradients(chosen)


def _dense_gradients(chosen: Chosen) -> list[str]:
    """Where gradients are used of weights that are pruned, or about to be. Dropping looks at living weights alone."""
    method, schedule = chosen.method, chosen.schedule
    grow = [method.drop_and_grow.grow] if method.drops_and_grows else []
    grow += [method.cycles.grow] if method.cyclic else []
    if any(score in FROM_GRADIENTS for score in grow):
        return ["dense gradients"]
    if method.from_scratch and schedule.name in DENSE_FIRST and schedule.initial == 0.0:
        return ["dense gradients (while dense)"]
    found = []
    if method.prune.score in FROM_GRADIENTS:
        found.append("each round" if schedule.name in ROUNDS else _times(method.prune.iterations))
    if method.regrows and method.regrow.score in FROM_GRADIENTS:
        found.append(_times(method.regrow.steps))
    return [f"dense gradients ({when})" for when in dict.fromkeys(found)]


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


@dataclass
class Files:
    """Config groups on disk. Where two folders have a file of the same name the first one's counts, as in Hydra."""

    folders: list[Path]
    schema: DictConfig = field(default_factory=lambda: OmegaConf.structured(Config))
    _have_read: dict[tuple[str, str], tuple[DictConfig, str | None]] = field(default_factory=dict, init=False)

    def names(self, group: str) -> list[str]:
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def method(self, name: str) -> Chosen:
        """The method on the schema's defaults, with the schedule that it brings along."""
        try:
            values, choice = self._read("method", name)
            choice = choice or ScheduleConfig().name
            root = OmegaConf.merge(self.schema, {"method": values, "schedule": self._read("schedule", choice)[0]})
            method, schedule = OmegaConf.to_object(root.method), OmegaConf.to_object(root.schedule)
            assert isinstance(method, MethodConfig) and isinstance(schedule, ScheduleConfig)
            check_ranges(method, "method")
        except yaml.YAMLError as error:
            raise UserError(f"method {name}: {' '.join(str(error).split())}") from None
        except (OmegaConfBaseException, UserError) as error:
            said = renamed(str(getattr(error, "full_key", ""))) or str(error).splitlines()[0]
            raise UserError(f"method {name}: {said}") from None
        return Chosen(method, schedule, choice)

    def _read(self, group: str, name: str) -> tuple[DictConfig, str | None]:
        """A file laid over the files that its defaults list names, and the schedule that the list chooses.

        What a file chooses itself goes before what the files below it choose.
        """
        if (group, name) in self._have_read:
            return self._have_read[group, name]
        own = OmegaConf.load(self._find(group, name))
        assert isinstance(own, DictConfig)
        layers, choice, inherited = [], None, None
        for entry in own.pop("defaults", ["_self_"]):
            if entry == "_self_":
                layers.append(own)
            elif isinstance(entry, str):
                values, below = self._read(group, entry.removeprefix(f"/{group}/"))
                layers.append(values)
                inherited = inherited or below
            else:
                choice = next((value for key, value in entry.items() if _is_schedule(key)), choice)
        merged = OmegaConf.merge(*layers, *([] if any(layer is own for layer in layers) else [own]))
        assert isinstance(merged, DictConfig)
        self._have_read[group, name] = merged, choice or inherited
        return self._have_read[group, name]

    def _find(self, group: str, name: str) -> Path:
        paths = [folder / group / f"{name}.yaml" for folder in self.folders]
        for path in paths:
            if path.is_file():
                return path
        raise UserError(f"unknown {group} {name!r}; {nearest(name, self.names(group))}")


def _is_schedule(key: Any) -> bool:
    return str(key).split("@")[0] == "override /schedule"


def markdown(rows: list[dict[str, str]]) -> str:
    """The gallery as one Markdown table with all columns."""
    lines = [list(HEADS.values()), ["---"] * len(HEADS)]
    lines += [[f"`{row['name']}`", *(row[key].replace("|", r"\|") for key in list(HEADS)[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(rows: list[dict[str, str]], width: int) -> Table:
    """The gallery for a terminal: a section a kind; what has no room beside each other stands below each other."""
    narrow = width < NARROW
    grid = Table(Column("method", no_wrap=True), Column("memory", justify="right"))
    grid.add_column(", ".join(BESIDE) + (", what it does" if narrow else ""))
    if not narrow:
        grid.add_column("what it does")
    for kind, group in itertools.groupby(rows, key=lambda row: row["kind"]):
        grid.add_section()
        grid.add_row(Text(kind, style="bold"))
        for row in group:
            about = [row[key] if key != "needs" else f"needs {row[key]}" for key in BESIDE if row[key] != "-"]
            cells = ["\n".join([*about, row["summary"]])] if narrow else ["\n".join(about), row["summary"]]
            grid.add_row(*(Text(cell) for cell in (f"  {row['name']}", row["memory"], *cells)))
    return grid


def main(argv: list[str]) -> int:
    """Print the gallery as a table, or as Markdown for the README."""
    parser = argparse.ArgumentParser(prog="sparse-lab methods", description="The methods that method=NAME takes.")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="a folder of your own with method/NAME.yaml files"
    )
    args = parser.parse_args(argv)
    if args.config_dir is not None and not args.config_dir.is_dir():
        raise UserError(f"--config-dir {args.config_dir}: no such folder")
    rows = methods(args.config_dir)
    if args.markdown:
        print(markdown(rows))
        return 0
    console = Console()
    console.print(table(rows, console.width))
    return 0
