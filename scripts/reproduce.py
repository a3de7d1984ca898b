"""Fill a paper's table within a time budget, cell by cell, and print it beside the published numbers.

    python scripts/reproduce.py bidirectional --minutes 600

Runs are made in order of value: one seed of every cell first, then the next seed. What is done stays done: the same
command goes on where it was, on this machine or, with --records, on another one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_lab.errors import SparseLabError, UserError

if TYPE_CHECKING:
    from reproduce_jobs import Filling
    from reproduce_table import Cell, Run, State, Table

EPILOG = """\
examples:
  python scripts/reproduce.py bidirectional --list
  python scripts/reproduce.py bidirectional --minutes 600 --recipe quarter --data DATA --records results/bidirectional
  python scripts/reproduce.py east --device gpu --jobs 4 --minutes 60 --records results/east --data DATA
  python scripts/reproduce.py my_table.yaml dataset.verify=false training.epochs=3

A run that is stopped (time is up, Ctrl-C, SIGTERM) is saved first and goes on next time. A record counts for a run when
everything but the arithmetic (trainer.precision, compute) is the same: runs made on a GPU count on a CPU machine. With
--records the record of every finished run is added to DIR/records.jsonl, beside DIR/table.yaml; `sparse-lab report DIR`
makes a report of them. Each run's output is in OUTPUTS/logs.

exit status: 0, 1 if a run failed (the others are made), 2 if the request is wrong, 130 after Ctrl-C, 143 after SIGTERM
"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parser().parse_intermixed_args(argv)
    try:
        return _reproduce(options)
    except SparseLabError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first run
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as in `--list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tables = ", ".join(sorted(path.stem for path in Path(__file__).with_name("tables").glob("*.yaml")))
    parser.add_argument("table", metavar="TABLE", help=f"a name in scripts/tables ({tables}), or a YAML file")
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="KEY=VALUE for every run, as for sparse-lab")
    parser.add_argument("--minutes", metavar="N", type=_minutes, help="stop after so long (default: when done)")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where there is one")
    parser.add_argument("--recipe", metavar="NAME", help="one of the table's recipes (default: its first)")
    parser.add_argument(
        "--jobs", metavar="N", type=_jobs, default=1, help="runs at a time, which share the cores (default: 1)"
    )
    parser.add_argument("--seeds", metavar="N", type=int, help="only the first N of the table's seeds")
    parser.add_argument("--records", metavar="DIR", type=Path, help="where records are kept, and count from")
    parser.add_argument("--outputs", metavar="DIR", type=Path, default=Path("outputs"), help="default: outputs")
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder of the data sets (default: data)")
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
    from reproduce_table import State, Table, check_reserved, plan, write_copy

    from sparse_lab.experiment.compose import gpus_a_job

    table = Table.read(options.table)
    recipe = table.recipe(options.recipe)
    check_reserved(options.overrides)
    paths = [f"paths.outputs={_quoted(options.outputs)}"]
    paths += [f"paths.data={_quoted(options.data)}"] if options.data else []
    device = options.device or ("gpu" if gpus_a_job("auto") else "cpu")
    runs = plan(table, recipe, device, options.overrides, paths, options.seeds)
    state = State(options.records)
    for run in runs:
        state.result(run)
    if options.list:
        _list(runs, state)
        return 0
    extra = shlex.join(["--recipe", recipe, *options.overrides])
    command = f"python scripts/reproduce.py {shlex.quote(options.table)} {extra}"
    if options.records:
        write_copy(table, command, runs, state)
        for run in runs:
            state.keep(run)
    deadline = None if options.minutes is None else began + 60 * options.minutes
    filling = _fill(runs, state, options, deadline)
    for run in runs:  # what was made for others, as their start, is done too
        state.result(run)
    if options.records:
        write_copy(table, command, runs, state)
    _show(table, recipe, runs, state)
    for name, line in filling.failed.items():
        print(f"failed: {name}: {line}")
    if filling.stopped_by is not None:
        return 128 + filling.stopped_by
    return 1 if filling.failed else 0


def _quoted(path: Path) -> str:
    """A path as Hydra's grammar reads it back, whatever it holds."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _fill(runs: list[Run], state: State, options: argparse.Namespace, deadline: float | None) -> Filling:
    """Make what is missing. Raises UserError when nothing of it could run here."""
    from reproduce_jobs import Filling

    filling = Filling(runs, state, options.outputs, options.jobs, deadline, lambda line: print(line, flush=True))
    if options.minutes == 0:
        return filling
    missing = [run for run in runs if run.name not in state.done]
    unfit = _unfit(missing)
    if missing and len(unfit) == len(missing) and len(set(unfit.values())) == 1:
        raise UserError(next(iter(unfit.values())))
    for run in missing:
        if run.name in unfit:
            print(f"[{run.number}/{len(runs)}] failed {run.name}: {unfit[run.name]}", flush=True)
    filling.failed = unfit
    if len(missing) < len(runs):
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already", flush=True)
    filling.run()
    return filling


def _unfit(runs: list[Run]) -> dict[str, str]:
    """The runs that lack something on this machine (data, a GPU, a package), with what it is."""
    from sparse_lab.experiment.validate import check

    found: dict[int, str | None] = {}
    for run in runs:
        if id(run.cell) not in found:
            try:
                check(run.config)
                found[id(run.cell)] = None
            except SparseLabError as error:
                found[id(run.cell)] = str(error)
    return {run.name: line for run in runs if (line := found[id(run.cell)]) is not None}


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
    print(f"{done} of {len(runs)} runs done{'' if done == len(runs) else '; the same command goes on'}")


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


if __name__ == "__main__":
    sys.exit(main())
