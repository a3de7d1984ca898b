"""Measure the peak memory of every method's training beside dense training's, for `sparse-lab methods`.

    python scripts/measure_memory.py                # every method, with the whole networks
    python scripts/measure_memory.py rigl resrep    # these; the other rows stay as they are
    python scripts/measure_memory.py --width 0.25   # a quick trial, which writes nothing

Each method trains a few steps in a process of its own, on the CPU (Linux): VGG16, or ResNet-34 where a method shares
weights, in batches of 128, at 99% sparsity, with every mask change of the method among those steps. The runs that it
starts from are made before, in other processes. Counted is how far resident memory rises above what the process had
when all libraries were loaded: network, masks, gradients, optimizer state, feature maps, the tool's own copies.
The ratio divides that by what dense training of the same network takes. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sparse_lab.cli.methods import MEMORY
from sparse_lab.config import Config, MethodConfig
from sparse_lab.errors import UserError, nearest
from sparse_lab.experiment.identity import run_dir
from sparse_lab.methods import phases, table
from sparse_lab.records.atomic_io import write_text_atomic
from sparse_lab.sweep.plan import Request

OVERRIDES = (
    "dataset=synthetic",
    "dataset.train_limit=128",
    "dataset.eval_limit=128",
    "training=standard",  # SGD in every phase: the same optimizer state for all
    "training.batch_size=128",
    "training.epochs=4",
    "trainer=cpu",
    "trainer.progress=false",
    "sparsity=s99",
    # every mask change of every method within 4 steps
    "schedule.iterative.share=0.8",
    "schedule.iterative.round_epochs=1",
    "schedule.cubic.every=1",
    "method.drop_and_grow.update_every=1",
    "method.drop_and_grow.end=1.0",
    "method.elastic_mutation.update_every=1",
    "method.cycles.every=1",
    "method.compactors.begin=0",
    "method.compactors.every=1",
    "method.compactors.channels=1000",
    "method.hypersphere.every=1",
    # batches, and steps without training, come one after the other: more of them take longer, not more memory
    "method.prune.batches=1",
    "method.regrow.batches=1",
)
FEW = 3
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # a GPU's peak is not what is counted here
    "MALLOC_MMAP_THRESHOLD_": "1048576",  # what a tensor gives back leaves the process at once: no luck of the heap's
}


@dataclass
class Row:
    """A line of the file: MiB above the loaded libraries, the method's and dense training's; where and of what."""

    method: str
    model: str
    peak_mb: str
    dense_peak_mb: str
    ratio: str
    commit: str
    machine: str


def config_of(method: str, width: float, outputs: Path) -> Config:
    """A few steps of `method`. Raises UserError when it cannot be composed."""
    request = Request.read([])
    overrides = [*OVERRIDES, f"method={method}", f"model.width={width}", f"paths.outputs={outputs}"]
    config = request.compose(overrides).config()
    if config.method.prune is not None:
        config.method.prune.iterations = min(config.method.prune.iterations, FEW)
    return replace(config, model=replace(config.model, name="resnet34")) if config.method.sharing else config


def starts_of(config: Config) -> list[Config]:
    """The runs that `config` starts from."""
    return list(table.starts(config).values())


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def train(config: Config) -> dict[str, Any]:
    """The run's record. Raises UserError when the request is wrong."""
    from rich.console import Console

    from sparse_lab.experiment.runner import run
    from sparse_lab.experiment.validate import check

    check(config)
    return run(config, "scripts/measure_memory.py", Console(quiet=True))


def measure(config: Config) -> dict[str, Any]:
    """The run's record, `peak_memory_mb` counted from when all libraries were loaded. Raises UserError where the system
    does not let a process reset its peak.
    """
    from sparse_lab.records.system import peak_memory, reset_peak_memory

    with tempfile.TemporaryDirectory() as folder:
        warm = replace(config, model=replace(config.model, width=1 / 16), method=MethodConfig(name="dense"))
        train(replace(warm, paths=replace(config.paths, outputs=folder)))
    shutil.rmtree(run_dir(config).path, ignore_errors=True)  # another method may have started from this run
    reset_peak_memory()
    before = resident()
    if peak_memory() > 1.05 * before:
        raise UserError("this system does not let a process reset its peak memory (/proc/self/clear_refs)")
    result = train(config)
    return {**result, "peak_memory_mb": result["peak_memory_mb"] - before}


def resident() -> float:
    """Resident memory of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def row_of(method: str, config: Config, dense: dict[str, dict[str, Any]], commit: str | None) -> Row:
    """Measure one method, and dense training of the same network if `dense` (by network) does not have it yet."""
    model = config.model.name
    if model not in dense:
        dense[model] = apart(measure, phases.dense(config))
    if method == "dense":
        result = dense[model]
    else:
        for start in starts_of(config):
            apart(train, start)
        result = apart(measure, config)
        shutil.rmtree(run_dir(config).path)  # forty of them would fill a small disk
    peak, whole = result["peak_memory_mb"], dense[model]["peak_memory_mb"]
    figures = f"{peak:.1f}", f"{whole:.1f}", f"{peak / whole:.3f}"
    return Row(method, model, *figures, commit or "", result["device"])


def commit_now() -> str | None:
    from sparse_lab.records.system import commit

    return commit()


def read(path: Path) -> dict[str, Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return {line["method"]: Row(**line) for line in csv.DictReader(file)}


def write(path: Path, rows: dict[str, Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(rows[method]) for method in sorted(rows))
    write_text_atomic(path, text.getvalue())


def main() -> int:
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="methods of the gallery; without any: all")
    parser.add_argument("--width", type=float, metavar="W", help="model.width for a quick trial, which writes nothing")
    args = parser.parse_args()
    known = Request.read([]).source.choices("method")
    for method in args.methods:
        if method not in known:
            parser.error(f"unknown method {method!r}; {nearest(method, known)}")
    os.environ.update(ENVIRONMENT)
    rows = {method: row for method, row in read(MEMORY).items() if method in known}
    dense: dict[str, dict[str, Any]] = {}
    commit = apart(commit_now)  # before this file itself is a change to the checkout
    failed = 0
    with tempfile.TemporaryDirectory() as outputs:
        for method in args.methods or known:
            since = time.monotonic()
            try:
                row = row_of(method, config_of(method, args.width or 1.0, Path(outputs)), dense, commit)
            except Exception as error:  # the others are still worth measuring
                failed += 1
                print(f"{method}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            print(
                f"{method:<24}{float(row.ratio):5.2f}x  {row.peak_mb} of {row.dense_peak_mb} MiB ({row.model}), "
                f"{time.monotonic() - since:.0f} s",
                flush=True,
            )
            rows[method] = row
            if args.width is None:
                write(MEMORY, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
