"""`sparse-lab methods`: what conf/method offers, read from the files themselves.

Peak memory is measured, by scripts/measure_memory.py; everything else follows from a method's config.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sparse_lab.config import KINDS, MethodConfig, ScheduleConfig, check_ranges, conf_dir, renamed
from sparse_lab.errors import UserError
from sparse_lab.experiment.compose import ConfigSource, schema
from sparse_lab.methods import table
from sparse_lab.methods.schedules import kind_of
from sparse_lab.records.atomic_io import printable

MEMORY = Path(__file__).with_name("memory.csv")
USUAL = ("one_shot", "constant")  # all at once: after the dense training, or before any
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
    source, defaults = ConfigSource(conf_dir(), user_conf), schema(in_place=False)
    ratios = memory(measured)
    rows = []
    for name in source.choices("method"):
        chosen = read(source, name, defaults)
        rows.append(
            {
                "name": printable(name),
                "kind": chosen.method.kind,
                "paper": printable(chosen.method.paper) or "-",
                "config": ", ".join(parts(chosen)) or "-",
                "needs": ", ".join(needs(chosen)) or "-",
                "memory": ratios.get(name, "-"),
                "summary": printable(chosen.method.summary),
            }
        )
    return sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["name"]))


def memory(measured: Path = MEMORY) -> dict[str, str]:
    """Method -> peak memory of its training in dense training's, as in "1.07x"."""
    with open(measured, newline="", encoding="utf-8") as file:
        return {row["method"]: f"{float(row['ratio']):.2f}x" for row in csv.DictReader(file)}


@dataclass
class Chosen:
    """What `method=NAME` alone asks for. `choice`: the name of the schedule's file."""

    method: MethodConfig
    schedule: ScheduleConfig
    choice: str


def read(source: ConfigSource, name: str, defaults: DictConfig) -> Chosen:
    """The method on the schema's defaults without parts, with the schedule that it brings along. Raises UserError."""
    files, choice = source.chosen(name)
    try:
        root = OmegaConf.merge(defaults, files)
        method, schedule = OmegaConf.to_object(root.method), OmegaConf.to_object(root.schedule)
        assert isinstance(method, MethodConfig) and isinstance(schedule, ScheduleConfig)
        check_ranges(method, "method")
    except (OmegaConfBaseException, UserError) as error:
        said = renamed(str(getattr(error, "full_key", ""))) or str(error).splitlines()[0]
        raise UserError(f"method {name}: {said}") from None
    return Chosen(method, schedule, choice)


def parts(chosen: Chosen) -> list[str]:
    """What a method is made of, each part with its score or its two (what goes, what comes); the schedule."""
    named = [said for one in table.present(chosen.method) if (said := one.describe(chosen.method))]
    return named + ([chosen.choice] if chosen.method.prune and chosen.choice not in USUAL else [])


def needs(chosen: Chosen) -> list[str]:
    """What a method needs beyond one sparse training: a trained dense network, epochs, gradients of pruned weights."""
    method, kind = chosen.method, kind_of(chosen.schedule)
    if method.prune is None:
        return []
    trained, rounds = method.init_from is not None, kind.in_rounds
    found = ["pretrained"] if trained else []
    if trained or (rounds and chosen.schedule.iterative and chosen.schedule.iterative.round_epochs is not None):
        found.append("extra epochs (rounds)" if rounds else "extra epochs")
    return found + _dense_gradients(chosen)


def _dense_gradients(chosen: Chosen) -> list[str]:
    """Where gradients are used of weights that are pruned, or about to be. Dropping looks at living weights alone."""
    method, kind, cubic = chosen.method, kind_of(chosen.schedule), chosen.schedule.cubic
    when = [one.dense_gradients(method, kind.in_rounds) for one in table.present(method)]
    if "always" in when:
        return ["dense gradients"]
    if method.init_from is None and kind.dense_first and (cubic is None or cubic.initial == 0.0):
        return ["dense gradients (while dense)"]
    return [f"dense gradients ({one})" for one in dict.fromkeys(when) if one is not None]


def markdown(rows: list[dict[str, str]]) -> str:
    """The gallery as one Markdown table with all columns."""
    lines = [list(HEADS.values()), ["---"] * len(HEADS)]
    lines += [[f"`{row['name']}`", *(row[key].replace("|", r"\|") for key in list(HEADS)[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grid(rows: list[dict[str, str]], width: int) -> Table:
    """The gallery for a terminal: a section a kind; what has no room beside each other stands below each other."""
    narrow = width < NARROW
    sheet = Table(Column("method", no_wrap=True), Column("memory", justify="right"))
    sheet.add_column(", ".join(BESIDE) + (", what it does" if narrow else ""))
    if not narrow:
        sheet.add_column("what it does")
    for kind, group in itertools.groupby(rows, key=lambda row: row["kind"]):
        sheet.add_section()
        sheet.add_row(Text(kind, style="bold"))
        for row in group:
            about = [row[key] if key != "needs" else f"needs {row[key]}" for key in BESIDE if row[key] != "-"]
            cells = ["\n".join([*about, row["summary"]])] if narrow else ["\n".join(about), row["summary"]]
            sheet.add_row(*(Text(cell) for cell in (f"  {row['name']}", row["memory"], *cells)))
    return sheet


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
    console.print(grid(rows, console.width))
    controls = sum(row["kind"] == "control" for row in rows)
    beside = sum(row["kind"] == "dense" for row in rows)
    console.print(f"{len(rows) - controls - beside} methods, {controls} controls, and dense training")
    return 0
