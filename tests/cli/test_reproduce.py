"""A tiny table, filled by the real script: stopped in its middle, gone on with, counted from records.

`make test-all` plays the processes that the script starts, one after the other in this one; `make test-nightly` has
real ones.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reproduce_jobs
import yaml
from keep_records import keep_run
from reproduce import main
from reproduce_table import TABLES, Run, Table, merged, plan, request_of

from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.cli import main as cli
from sparse_lab.errors import UserError
from sparse_lab.records.atomic_io import damaged

SCRIPT = Path(sys.modules["reproduce"].__file__ or "")
TINY = """\
title: A tiny table
seeds: [1, 2]
always:
  - model.width=0.0625 dataset=digits training=digits dataset.train_limit=64 dataset.eval_limit=50
  - training.batch_size=32 training.epochs=3 training.finetune.epochs=5 training.regrow.epochs=2 trainer.progress=false
cells:
  - method=dense
  - method=oneshot sparsity.target=0.95
  - {name: regrown, run: method=oneshot_regrow sparsity=s90}
"""
CELLS = ["dense", "oneshot-95", "oneshot_regrow-90"]


def run_of(name: str) -> tuple[int, str]:
    """(seed, cell) of a run's name."""
    found = re.fullmatch(r"vgg16-digits-(.+)-seed(\d)-[0-9a-f]{10}", name)
    assert found is not None
    return int(found[2]), found[1]


def events(said: str, word: str) -> list[tuple[int, str]]:
    """The runs of the lines that hold this word, in order."""
    lines = [line for line in said.splitlines() if re.match(rf"\[\d/\d\] {word}", line)]
    return [run_of(found[0]) for line in lines if (found := re.search(r"vgg16-digits-\S+-[0-9a-f]{10}", line))]


def written(outputs: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in outputs.glob("runs/*/result.json")}


def row(said: str, name: str) -> list[str]:
    """The cells of a row of the printed table."""
    [line] = [line for line in said.splitlines() if re.match(rf"│ {name} ", line)]
    return [cell.strip() for cell in line.strip("│").split("│")]


class Played:
    """A process that is none: the command, in this process, to its end. Instead of subprocess.Popen."""

    def __init__(self, command: list[str], stdout: Any, **_: Any) -> None:
        with open(stdout.name, "a") as log, redirect_stdout(log), redirect_stderr(log):
            self.returncode = cli.main(command[3:])  # behind python -m sparse_lab

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None:
        pass  # it has ended


class PlayedUntilStopped(Played):
    """The pruning run is stopped by a signal at its fifth step; then a signal comes to the script."""

    def __init__(self, command: list[str], stdout: Any, **_: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if "method=oneshot" in command:
                patch.setattr(NanGuard, "on_train_batch_end", stop_at_the_fifth_step)
            super().__init__(command, stdout)
        if self.returncode == 143:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_at_the_fifth_step(self: NanGuard, trainer: Any, *_: Any) -> None:
    if trainer.global_step == 5:
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def played(process: type[Played] = Played) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reproduce_jobs,
            "subprocess",
            SimpleNamespace(Popen=process, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT),
        )
        yield


@dataclass(frozen=True)
class Filled:
    """The table filled by two starts of the script, the first one stopped in the middle of a run by SIGTERM.

    place: the folder. said: what each start said. times: when each result was written, after each start.
    """

    place: Path
    said: list[str]
    times: list[dict[str, int]]
    real: bool

    def start(self, *arguments: str) -> int:
        """The script once more, with processes as they were when the table was filled."""
        if self.real:
            return main([*arguments])
        with played():
            return main([*arguments])


@pytest.fixture(scope="module", params=[pytest.param("played", marks=pytest.mark.full)])
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    place = tmp_path_factory.mktemp("tiny")
    return Filled(place, *fill_here(place), real=False)


def fill_here(place: Path) -> tuple[list[str], list[dict[str, int]]]:
    (place / "tiny.yaml").write_text(TINY)
    arguments = ["tiny.yaml", "--device", "cpu", "--outputs", str(place / "out"), "--records", "kept"]
    said, times = [], []
    for process, more, status in ((PlayedUntilStopped, [], 143), (Played, ["--jobs", "2"], 0)):
        out = io.StringIO()
        with chdir(place), played(process), redirect_stdout(out):
            assert main([*arguments, *more]) == status
        said.append(out.getvalue())
        times.append(written(place / "out"))
    return said, times


def fill_by_processes(place: Path) -> tuple[list[str], list[dict[str, int]]]:
    # long enough to be stopped in, on any machine
    (place / "tiny.yaml").write_text(TINY.replace("finetune.epochs=5", "finetune.epochs=60"))
    command = [sys.executable, str(SCRIPT), "tiny.yaml", "--device", "cpu", "--outputs", str(place / "out")]
    command += ["--records", "kept"]
    first = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 200
    while not list(place.glob("out/runs/*-oneshot-95-seed1-*/metrics.csv")):
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said = [first.communicate(timeout=200)[0]]
    assert first.returncode == 143, said[0]
    times = [written(place / "out")]
    second = subprocess.run([*command, "--jobs", "2"], cwd=place, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stdout + second.stderr
    return [*said, second.stdout], [*times, written(place / "out")]


def test_a_stopped_table_goes_on_and_makes_nothing_twice(filled: Filled) -> None:
    place, said, times = filled.place, filled.said, filled.times
    assert "stopped by SIGTERM" in said[0] and "missing" in said[0]
    stopped = events(said[0], "stopped")
    assert stopped and not set(stopped) & set(events(said[1], "done")) - set(events(said[1], "started"))
    [log] = (place / "out" / "logs").glob("*-oneshot-95-seed1-*.log")
    assert "stopped by SIGTERM" in log.read_text() and "goes on from last.ckpt" in log.read_text()
    for name, when in times[0].items():
        assert times[1][name] == when
    cells = [(seed, cell) for seed in (1, 2) for cell in CELLS]
    done = events(said[0], "(done|made)") + events(said[1], "(done|made)")
    assert sorted(done) == sorted(cells)
    hidden = [(seed, "oneshot-95") for seed in (1, 2)]  # the start of the regrowth to 90% is a cell of its own
    assert sorted(run_of(name) for name in times[1]) == sorted(cells) and set(hidden) < set(cells)
    length = {"dense": 3, "oneshot-95": 60 if filled.real else 5, "oneshot_regrow-90": 2}
    for folder in (place / "out" / "runs").iterdir():
        epochs = [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]
        assert len(epochs) == 1 + length[run_of(folder.name)[1]] and len(set(epochs)) == len(epochs)


@pytest.mark.nightly
def test_so_does_one_filled_by_real_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled = Filled(tmp_path, *fill_by_processes(tmp_path), real=True)
    test_a_stopped_table_goes_on_and_makes_nothing_twice(filled)
    test_the_table_says_what_the_results_say(filled)
    test_a_failing_cell_stops_no_other(filled, tmp_path / "failing", capsys)


def test_one_seed_of_every_cell_comes_first(filled: Filled) -> None:
    place, said = filled.place, filled.said
    runs = plan(Table.read(str(place / "tiny.yaml")), "default", "cpu", [], [], None)
    assert [run_of(run.name) for run in runs] == [(seed, cell) for seed in (1, 2) for cell in CELLS]
    assert events(said[0], "started") == [(1, "dense"), (1, "oneshot-95")]
    assert events(said[1], "started")[0] == (1, "oneshot-95")  # a second slot may take what is ready further on


def test_the_table_says_what_the_results_say(filled: Filled) -> None:
    place, said = filled.place, filled.said
    for cell, name in zip(CELLS, ("dense", "oneshot", "regrown"), strict=True):
        paths = sorted((place / "out" / "runs").glob(f"vgg16-digits-{cell}-seed*/result.json"))
        values = [json.loads(path.read_text())["test_accuracy"] for path in paths]
        shown = row(said[1], name)
        assert shown[3] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert shown[5] == "2/2" and shown[6] == ""
    assert "6 of 6 runs done" in said[1]


def test_records_count_without_the_runs(filled: Filled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, said = filled.place, filled.said
    kept = shutil.copytree(place / "kept", tmp_path / "kept")
    assert yaml.safe_load((kept / "table.yaml").read_text())["title"] == "A tiny table"
    assert str(place) not in "".join(path.read_text() for path in kept.rglob("*") if path.is_file())
    assert not any(damaged(json.loads(path.read_text())) for path in kept.glob("runs/*/result.json"))
    # the copy beside the records is a table too; what was computed otherwise is the same request
    arguments = [str(kept / "table.yaml"), "--device", "cpu", "--outputs", str(tmp_path / "new")]
    assert main([*arguments, "--records", str(kept), "trainer.precision=bf16-mixed"]) == 0
    shown = capsys.readouterr().out
    assert row(shown, "regrown") == row(said[1], "regrown") and "started" not in shown
    assert not list((tmp_path / "new").glob("runs/*")) and len(list(kept.glob("runs/*"))) == 6
    assert (kept / "table.yaml").read_text().count("planned:") == 1
    # another length is another request
    assert main([*arguments, "--records", str(kept), "--minutes", "0", "training.epochs=4"]) == 0
    assert row(capsys.readouterr().out, "dense")[5:] == ["0/2", "seed 1, 2"]


def test_a_damaged_record_does_not_count(filled: Filled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = shutil.copytree(filled.place / "kept", tmp_path / "kept")
    [path] = kept.glob("runs/*-dense-seed2-*/result.json")
    path.write_text(path.read_text().replace('"seed": 2', '"seed": 7', 1))
    arguments = ["--device", "cpu", "--outputs", str(tmp_path / "new"), "--minutes", "0"]
    assert main([str(kept / "table.yaml"), *arguments, "--records", str(kept)]) == 0
    assert row(capsys.readouterr().out, "dense")[5:] == ["1/2", "seed 2"]


def test_a_failing_cell_stops_no_other(filled: Filled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = shutil.copytree(filled.place / "out", tmp_path / "out")
    [fails] = outputs.glob("runs/*-oneshot-95-seed2-*")
    [lacks] = outputs.glob("runs/*-oneshot_regrow-90-seed1-*")
    for folder in (fails, lacks):
        shutil.rmtree(folder)
    fails.write_text("in the way of its folder")
    arguments = [str(filled.place / "tiny.yaml"), "--device", "cpu", "--outputs", str(outputs)]
    assert filled.start(*arguments) == 1
    said = capsys.readouterr().out
    assert events(said, "started") == [(1, "oneshot_regrow-90"), (2, "oneshot-95")]
    assert (lacks / "result.json").is_file() and row(said, "oneshot")[5:] == ["1/2", "seed 2"]
    assert re.search(rf"^failed: {fails.name}: .*cannot write to", said, flags=re.MULTILINE)


def test_no_minutes_make_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = [str(tmp_path / "tiny.yaml"), "--device", "cpu", "--outputs", str(tmp_path / "out")]
    assert main([*arguments, "--minutes", "0"]) == 0
    said = capsys.readouterr().out
    assert all(row(said, name)[3:] == ["", "", "0/2", "seed 1, 2"] for name in ("dense", "oneshot", "regrown"))
    assert "0 of 6 runs done" in said and not (tmp_path / "out").exists()
    assert main([*arguments, "--minutes", "0", "--seeds", "1"]) == 0
    assert row(capsys.readouterr().out, "dense")[5:] == ["0/1", "seed 1"]


def composes(name: str, recipe: str, device: str) -> list[Run]:
    table = Table.read(name)
    runs = plan(table, recipe, device, [], [], 1)
    assert len(runs) == len(table.cells) == len({run.name for run in runs})
    return runs


@pytest.mark.full
def test_the_table_of_east_composes() -> None:
    runs = composes("east", "quarter", "gpu")
    every = {run.config.method.name: run.config.method.drop_and_grow.update_every for run in runs}
    assert every["east"] == every["rigl_itop"] == 1000 and every["set_itop"] == 375
    assert {run.config.training.epochs for run in runs} == {62}


@pytest.mark.full
def test_the_table_of_bidirectional_regrowth_composes() -> None:
    runs = composes("bidirectional", "quarter", "cpu")
    names = [run.name for run in runs]
    regrown, *stronger = [run for run in runs if run.config.method.name == "iterative_regrow"]
    # a start stands before what it is needed for
    assert list(regrown.starts) == names[:2] and regrown.name == names[2]
    assert [run.config.schedule.round_epochs for run in runs if run.config.method.name == "lrr"] == [40, 40, 40]
    for run, target in zip(stronger, (0.9685, 0.9639, 0.9296), strict=True):
        config = run.config
        assert config.sparsity.target == target and config.method.prune.rewind_lr
        assert config.training.epochs == config.schedule.round_epochs == config.training.regrow.epochs == 40
        assert (config.training.regrow.optimizer, config.training.regrow.lr) == ("sgd", 0.1)


@pytest.mark.full
@pytest.mark.parametrize("name", ["bidirectional", "bidirectional_cpu", "east", "east_cpu"])
def test_every_recipe_of_the_papers_tables_composes(name: str) -> None:
    for recipe in Table.read(name).recipes:
        for device in ("cpu", "gpu"):
            composes(name, recipe, device)


WRONG: list[tuple[list[str], str]] = [
    (["bidirektional"], "unknown table 'bidirektional'; did you mean 'bidirectional'?"),
    (["TINY", "--recipe", "papers"], "unknown recipe 'papers' of table tiny; known: default"),
    (["TINY", "training.epoch=3"], "did you mean 'epochs'?"),
    (["TINY", "method=onshot"], "unknown method 'onshot'; did you mean 'oneshot'?"),
    (["TINY", "training.epochs=2,3"], "training.epochs=2,3 is a sweep"),
    (["TINY", "seed=4"], "seed=4: the table's seeds and --seeds say which"),
    (["TINY", "paths.outputs=there"], "use --outputs"),
    (["TINY", "sparsity.target=2"], "sparsity.target"),
    (["TINY", "--seeds", "3"], "--seeds 3: table tiny has 2 seeds"),
]


@pytest.mark.parametrize(("argv", "line"), WRONG)
def test_a_wrong_request_is_one_line(
    argv: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    argv = [str(tmp_path / "tiny.yaml") if word == "TINY" else word for word in argv]
    assert main([*argv, "--outputs", str(tmp_path / "out"), "--device", "cpu"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert line in said
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda plain: plain.pop("title"), "title"),
        (lambda plain: plain.update(seed=[1]), "unknown key 'seed'; did you mean 'seeds'?"),
        (lambda plain: plain.update(seeds=[1, 1]), "twice"),
        (lambda plain: plain.update(cells=[]), "cells"),
        (lambda plain: plain.update(cells=[{"method": "dense"}]), "cell 1: unknown key 'method'"),
        (lambda plain: plain.update(cells=["method=dense", "seed=1"]), "cell 2"),
        (lambda plain: plain["cells"].append("method=dense"), "cells 1 and 4"),
        (lambda plain: plain.update(always="method='dense"), "always: No closing quotation"),
    ],
)
def test_a_wrong_table_is_one_line(
    change: Callable[[dict[str, Any]], Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = yaml.safe_load(TINY)
    change(plain)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plain))
    assert main([str(tmp_path / "tiny.yaml"), "--outputs", str(tmp_path / "out"), "--minutes", "0"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert "tiny" in said and line in said


def test_of_two_overrides_the_last_one_counts() -> None:
    assert merged(["a=1", "training=digits"], ["b=2"], ["training=east", "+a=3"]) == ["b=2", "training=east", "+a=3"]


def test_arithmetic_is_no_part_of_a_request() -> None:
    plain = {"trainer": {"precision": "32-true"}, "compute": "sparse", "seed": 1}
    assert (
        request_of(plain) == request_of({"trainer": {"precision": "bf16-mixed"}, "seed": 1}) == request_of({"seed": 1})
    )
    assert request_of(plain) != request_of({**plain, "seed": 2})


def test_help_answers_without_torch() -> None:
    code = "import sys; sys.argv[0] = 'reproduce.py'; sys.path.insert(0, sys.argv.pop(1)); import reproduce\n"
    code += "try: reproduce.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "examples:" in done.stdout, done.stderr
    assert all(path.stem in done.stdout for path in TABLES.glob("*.yaml"))


def test_a_broken_record_is_not_kept(filled: Filled, tmp_path: Path) -> None:
    [run] = (filled.place / "out" / "runs").glob("*-dense-seed1-*")
    copy = shutil.copytree(run, tmp_path / run.name)
    text = (copy / "result.json").read_text()
    (copy / "result.json").write_text(text.replace('"seed": 1', '"seed": 3', 1))
    with pytest.raises(ValueError, match="damaged"):
        keep_run(copy, tmp_path / "kept")
    with pytest.raises(UserError, match="unknown table"):
        Table.read("nothing like it")
    assert {path.stem for path in TABLES.glob("*.yaml")} == {"bidirectional", "bidirectional_cpu", "east", "east_cpu"}
