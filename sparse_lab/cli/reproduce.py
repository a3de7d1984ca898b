"""`sparse-lab reproduce`: fill a paper's table within a time budget, and print it beside the published numbers.

Runs are made in order of value: one seed of every cell first, then the next seed. What is done stays done: the same
command goes on where it was, on this machine or, with --records, on another one.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_lab.errors import SparseLabError, UserError

if TYPE_CHECKING:
    from sparse_lab.sweep.done import State
    from sparse_lab.sweep.jobs import Filled
    from sparse_lab.sweep.table import Cell, Run, Table

EPILOG = """\
examples:
  sparse-lab reproduce                                  # the tables that there are
  sparse-lab reproduce bidirectional --list
  sparse-lab reproduce bidirectional --minutes 600 --recipe quarter --data DATA --records results/bidirectional_quarter
  sparse-lab reproduce east --device gpu --jobs 4 --minutes 60 --records results/east_full --data DATA
  sparse-lab reproduce my_table.yaml hydra/launcher=ray dataset.verify=false training.epochs=3

hydra/launcher=joblib, ray, submitit_slurm or submitit_local says where runs are made, and hydra.launcher.KEY=VALUE how,
as for sparse-lab -m; --jobs N is joblib with N processes. `sparse-lab status DIR` shows how far they are. A run that is
stopped (time is up, Ctrl-C, SIGTERM) is saved first and goes on next time; those on Slurm and on other machines run to
their end. A record counts for a run when everything but the arithmetic (trainer.precision, compute) is the same: runs
made on a GPU count on a CPU machine. With --records every finished run is kept in DIR/records.jsonl, beside
DIR/table.yaml; `sparse-lab report DIR` makes a report of them.

A table is a YAML file: see those in conf/table, or put your own in CONF/table, where --config-dir CONF finds it.

exit status: 0, 1 if a run failed (the others are made), 2 if the request is wrong, 130 after Ctrl-C, 143 after SIGTERM
"""
LAUNCHER = "hydra/launcher="


def main(argv: list[str]) -> int:
    """Returns the exit status. Raises Stopped after a signal, UserError for what is wrong with the whole request."""
    return _reproduce(_parser().parse_intermixed_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparse-lab reproduce",
        description="Fill a paper's table within a time budget, cell by cell, and print it beside the published "
        "numbers. Without TABLE: show which tables there are.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="TABLE", nargs="?", help="a name, or a YAML file")
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="KEY=VALUE for every run, as for sparse-lab")
    parser.add_argument("--minutes", metavar="N", type=_minutes, help="stop after so long (default: when done)")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where there is one")
    parser.add_argument("--recipe", metavar="NAME", help="one of the table's recipes (default: its first)")
    parser.add_argument(
        "--jobs", metavar="N", type=_jobs, help="runs at a time on this machine, which share the cores (default: 1)"
    )
    parser.add_argument("--seeds", metavar="N", type=int, help="only the first N of the table's seeds")
    parser.add_argument(
        "--cell", metavar="NAME", action="append", default=[], help="only this cell, by name or number; may be repeated"
    )
    parser.add_argument("--records", metavar="DIR", type=Path, help="where records are kept, and count from")
    parser.add_argument("--outputs", metavar="DIR", type=Path, default=Path("outputs"), help="default: outputs")
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder of the data sets (default: data)")
    parser.add_argument("--config-dir", metavar="DIR", type=Path, help="your own choices, and tables in DIR/table")
    parser.add_argument("--list", action="store_true", help="check and show every run, in order, and make none")
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _jobs(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _reproduce(options: argparse.Namespace) -> int:
    began = time.monotonic()
    from sparse_lab.experiment import plugins
    from sparse_lab.sweep.done import State, write_copy
    from sparse_lab.sweep.table import Asked, Table, check_reserved, plan

    if options.config_dir is not None and not options.config_dir.is_dir():
        raise UserError(f"--config-dir {options.config_dir}: no such folder")
    if options.table is None:
        return _tables(options.config_dir)
    table = Table.read(options.table, options.config_dir)
    recipe = table.recipe(options.recipe)
    where, extra = _parted(options)
    check_reserved(extra)
    asked = Asked(recipe, _device(options.device), extra, _paths(options), _conf(options), options.seeds, options.cell)
    runs = plan(table, asked)
    state = State(options.records)
    for line in state.warnings:
        print(f"warning: {line}", flush=True)
    for run in runs:
        state.result(run)
    if options.list:
        _list(runs, state)
        return 0
    command = shlex.join(["sparse-lab", *plugins.words(), "reproduce", options.table, "--recipe", recipe, *extra])
    if options.records:
        write_copy(table, command, runs, state)
        for run in runs:
            state.keep(run)
    deadline = None if options.minutes is None else began + 60 * options.minutes
    filled = None if options.minutes == 0 else _fill(runs, state, where, asked.conf, command, deadline)
    for run in runs:  # what was made for others, as their start, is done too
        state.result(run)
        state.keep(run)
    if options.records:
        write_copy(table, command, runs, state)
    _show(table, recipe, runs, state)
    return _status(filled)


def _tables(user_conf: Path | None) -> int:
    """Every table that there is: its name, its title, how many cells it has."""
    from sparse_lab.records.atomic_io import printable
    from sparse_lab.sweep.table import Table, tables

    for name in tables(user_conf):
        try:
            table = Table.read(name, user_conf)
            said = f"{table.title}: {len(table.cells)} cells, {len(table.seeds)} seeds; {', '.join(table.recipes)}"
        except SparseLabError as error:
            said = str(error)
        print(printable(f"{name}: {said}"))
    return 0


def _parted(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The overrides that say where runs are made, and those of every run. Raises UserError."""
    from sparse_lab.sweep.jobs import check_launching

    where = [word for word in options.overrides if word.lstrip("+").startswith("hydra")]
    check_launching(where)
    if options.jobs is not None and any(word.startswith(LAUNCHER) for word in where):
        raise UserError(f"--jobs {options.jobs} is hydra/launcher=joblib: leave one of them out")
    if options.jobs is not None and options.jobs > 1:
        where = [f"{LAUNCHER}joblib", f"hydra.launcher.n_jobs={options.jobs}", *where]
    return where, [word for word in options.overrides if not word.lstrip("+").startswith("hydra")]


def _device(asked: str | None) -> str:
    from sparse_lab.experiment.compose import gpus_a_job

    return asked or ("gpu" if gpus_a_job("auto") else "cpu")


def _paths(options: argparse.Namespace) -> list[str]:
    from sparse_lab.experiment.quoting import quoted

    given = {"outputs": options.outputs, "data": options.data}
    return [f"paths.{name}={quoted(path)}" for name, path in given.items() if path is not None]


def _conf(options: argparse.Namespace) -> list[str]:
    return ["--config-dir", str(options.config_dir)] if options.config_dir is not None else []


def _fill(
    runs: list[Run], state: State, where: list[str], conf: Sequence[str], command: str, deadline: float | None
) -> Filled | None:
    """Make what is missing. Raises UserError when nothing of it could run here."""
    from sparse_lab.sweep.jobs import Alarm, fill, launching

    missing = [run for run in runs if run.name not in state.done]
    if not missing:
        return None
    request = launching([*conf, *missing[0].command, *where])
    unfit = _unfit(missing, request.launcher)
    if len(unfit) == len(missing) and len(set(unfit.values())) == 1:
        raise UserError(next(iter(unfit.values())))
    if len(missing) < len(runs):
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already", flush=True)
    trouble: list[SparseLabError] = []

    def ended(run: Run) -> None:
        try:
            state.keep(run)
        except SparseLabError as error:  # the other runs are made all the same
            trouble.append(error)

    filled = fill(request, command, runs, state, unfit, Alarm(deadline), ended)
    if trouble:
        raise trouble[0]
    return filled


def _unfit(runs: list[Run], launcher: str) -> dict[str, str]:
    """The runs that lack something where they would be made (data, a GPU, a package), with what it is."""
    from sparse_lab.sweep.plan import AWAY, check_run

    found: dict[int, str | None] = {}
    for run in runs:
        if id(run.cell) not in found:
            try:
                check_run(run.config, here=launcher not in AWAY)
                found[id(run.cell)] = None
            except SparseLabError as error:
                found[id(run.cell)] = str(error)
    return {run.name: line for run in runs if (line := found[id(run.cell)]) is not None}


def _status(filled: Filled | None) -> int:
    """Say what failed, and return the exit status. Raises Stopped after a signal."""
    from sparse_lab.sweep.launch import say_error

    if filled is None:
        return 0
    failed = [
        job
        for job in filled.overview.jobs
        if job.state == "failed" or (job.state == "interrupted" and filled.error is not None)
    ]
    for job in failed:
        print(f"{job.state}: {job.run}: {job.said}", flush=True)
    if filled.error is not None:
        say_error(filled.overview.folder, filled.error)
    if filled.stopped is not None:
        raise filled.stopped
    return 1 if failed or filled.error is not None else 0


def _list(runs: list[Run], state: State) -> None:
    for run in runs:
        result = state.done.get(run.name)
        said = f"done {result['test_accuracy']:.2f}%" if result else "missing"
        print(f"[{run.number}/{len(runs)}] {said}  {run.name}  {shlex.join([*run.cell.asked, f'seed={run.seed}'])}")


def _show(table: Table, recipe: str, runs: list[Run], state: State) -> None:
    """The table as it stands: published, ours, the difference, how many seeds, and which are missing."""
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(title=None)
    for head in ("cell", "sparsity", "published", "ours", "difference", "seeds", "missing"):
        grid.add_column(head, justify="left" if head in ("cell", "missing") else "right", overflow="fold")
    cells: dict[int, list[Run]] = {}
    for run in runs:
        cells.setdefault(id(run.cell), []).append(run)
    for group in cells.values():
        grid.add_row(*_row(group[0].cell, group, state))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=120)
    console.print(f"\n{table.title}, recipe {recipe}")
    console.print(grid)
    done = sum(run.name in state.done for run in runs)
    print("mean ± standard deviation of top-1 test accuracy over seeds, %; difference: ours less the published number")
    print(f"{done} of {len(runs)} runs done{'' if done == len(runs) else '; the same command goes on'}", flush=True)


def _row(cell: Cell, group: list[Run], state: State) -> list[str]:
    from sparse_lab.report.load.published import find, load
    from sparse_lab.report.tables.cell import accuracy, percent

    values = [float(state.done[run.name]["test_accuracy"]) for run in group if run.name in state.done]
    config = cell.config
    number = find(
        load(),
        method=config.method.name,
        model=config.model.name,
        dataset=config.dataset.name,
        sparsity=cell.sparsity,
        width=config.model.width,
    )
    mean = statistics.mean(values) if values else None
    std = statistics.stdev(values) if len(values) > 1 else None
    lacking = [str(run.seed) for run in group if run.name not in state.done]
    return [
        cell.name,
        percent(cell.sparsity),
        accuracy(number.top1, number.std) if number else "",
        accuracy(mean, std) if mean is not None else "",
        f"{mean - number.top1:+.2f}" if number and mean is not None else "",
        f"{len(values)}/{len(group)}",
        f"seed {', '.join(lacking)}" if lacking else "",
    ]
