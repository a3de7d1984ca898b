"""A tiny table, filled by the real command: stopped in its middle, gone on with, counted from records. In this process,
and by each launcher's processes.
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
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_lab.callbacks.nan_guard import NanGuard
from sparse_lab.cli.main import main
from sparse_lab.records.kept import FILE, read_kept
from sparse_lab.sweep.jobs import Alarm

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
# long enough to be stopped in, on any machine
LONG = TINY.replace("finetune.epochs=5", "finetune.epochs=60")
CELLS = ["dense", "oneshot-95", "oneshot_regrow-90"]  # the regrowth starts from the one before it
EVERY = [(seed, cell) for seed in (1, 2) for cell in CELLS]


def run_of(name: str) -> tuple[int, str]:
    """(seed, cell) of a run's name."""
    found = re.fullmatch(r"vgg16-digits-(.+)-seed(\d)-[0-9a-f]{10}", name)
    assert found is not None
    return int(found[2]), found[1]


def row(said: str, name: str) -> list[str]:
    """The cells of a row of the printed table."""
    [line] = [line for line in said.splitlines() if re.match(rf"│ {name} ", line)]
    return [cell.strip() for cell in line.strip("│").split("│")]


@dataclass(frozen=True)
class Start:
    """What one start of the command left. `outcomes`: of each run's job. `written`: when each run's result was."""

    status: int
    said: str
    outcomes: dict[tuple[int, str], str]
    written: dict[str, int]

    @classmethod
    def ended(cls, status: int, said: str, place: Path) -> Start:
        files = [path for path in place.glob("out/sweeps/*/*.json") if path.stem.isdigit()]
        ended = [json.loads(path.read_text()) for path in files]
        results = place.glob("out/runs/*/result.json")
        return cls(
            status,
            said,
            {run_of(one["run"]): one["outcome"] for one in ended},
            {path.parent.name: path.stat().st_mtime_ns for path in results},
        )


def check_filled_once(place: Path, starts: list[Start], epochs: int) -> None:
    """Every cell was filled by exactly one start, and none of its epochs was trained twice.

    epochs: behind the pruning.
    """
    for run in EVERY:
        assert [start.outcomes.get(run) for start in starts].count("done") == 1, run
    for before, after in pairwise(starts):
        assert all(after.written[name] == when for name, when in before.written.items())
    assert sorted(map(run_of, starts[-1].written)) == sorted(EVERY) and len(starts[-1].written) == len(EVERY)
    length = {"dense": 3, "oneshot-95": epochs, "oneshot_regrow-90": 2}
    for folder in (place / "out" / "runs").iterdir():
        trained = [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]
        assert len(trained) == 1 + length[run_of(folder.name)[1]] and len(set(trained)) == len(trained)
    # Ray may say of a worker that it let go that it died
    assert "6 of 6 runs done" in starts[-1].said and "Traceback" not in starts[-1].said


# --- in this process ---


def here(place: Path, *arguments: str) -> Start:
    out = io.StringIO()
    with chdir(place), redirect_stdout(out), redirect_stderr(out):
        status = main(["reproduce", "tiny.yaml", "--device", "cpu", "--outputs", "out", *arguments])
    return Start.ended(status, out.getvalue(), place)


@pytest.fixture(scope="module", params=["SIGTERM", "time is up"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Start]]:
    """The table filled by two starts, the first one stopped at the fifth step of a pruning run."""
    place = tmp_path_factory.mktemp("tiny")
    (place / "tiny.yaml").write_text(TINY)
    clocks: list[Alarm] = []

    def stop(self: NanGuard, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5 and list(place.glob("out/sweeps/*/running-001.json")):
            if request.param == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                clocks[0]._ring()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NanGuard, "on_train_batch_end", stop)
        patch.setattr(Alarm, "start", lambda self: clocks.append(self))
        patch.setattr(Alarm, "cancel", lambda self: None)
        first = here(place, "--records", "kept")
    return place, [first, here(place, "--records", "kept")]


@pytest.mark.full
def test_a_stopped_table_goes_on_and_makes_nothing_twice(filled, request: pytest.FixtureRequest) -> None:
    place, starts = filled
    first, second = starts
    signalled = "time is up" not in first.said
    assert (first.status, second.status) == (143 if signalled else 0, 0), first.said
    assert ("sparse-lab: stopped by SIGTERM: " in first.said) == signalled
    assert "1 of 6 runs done; the same command goes on" in first.said
    # one seed of every cell comes first
    assert first.outcomes == {(1, "dense"): "done", (1, "oneshot-95"): "stopped"}
    assert "vgg16-digits-oneshot-95-seed1" in second.said and "goes on from last.ckpt" in second.said
    check_filled_once(place, starts, epochs=5)


@pytest.mark.full
def test_the_table_says_what_the_results_say(filled) -> None:
    place, (_, second) = filled
    for cell, name in zip(CELLS, ("dense", "oneshot", "regrown"), strict=True):
        paths = sorted((place / "out" / "runs").glob(f"vgg16-digits-{cell}-seed*/result.json"))
        values = [json.loads(path.read_text())["test_accuracy"] for path in paths]
        shown = row(second.said, name)
        assert shown[3] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert shown[5] == "2/2" and shown[6] == ""


@pytest.mark.full
def test_records_count_without_the_runs(filled, tmp_path: Path) -> None:
    place, (_, second) = filled
    shutil.copytree(place / "kept", tmp_path / "kept")
    shutil.copy(place / "kept" / "table.yaml", tmp_path / "tiny.yaml")  # the copy beside the records is a table too
    assert yaml.safe_load((tmp_path / "tiny.yaml").read_text())["title"] == "A tiny table"
    assert str(place) not in (tmp_path / "kept" / FILE).read_text() + (tmp_path / "tiny.yaml").read_text()
    # what was computed otherwise is the same request
    again = here(tmp_path, "--records", "kept", "trainer.precision=bf16-mixed")
    assert again.status == 0 and row(again.said, "regrown") == row(second.said, "regrown")
    assert not (tmp_path / "out").exists() and len(read_kept(tmp_path / "kept")[0]) == 6
    assert (tmp_path / "kept" / "table.yaml").read_text().count("planned:") == 1
    # another length is another request
    other = here(tmp_path, "--records", "kept", "--minutes", "0", "training.epochs=4")
    assert other.status == 0 and row(other.said, "dense")[5:] == ["0/2", "seed 1, 2"]


@pytest.mark.full
def test_a_damaged_record_does_not_count_and_is_named(filled, tmp_path: Path) -> None:
    shutil.copytree(filled[0] / "kept", tmp_path / "kept")
    shutil.copy(filled[0] / "tiny.yaml", tmp_path)
    text = (tmp_path / "kept" / FILE).read_text()
    damaged = [
        line.replace('"seed":2', '"seed":7', 1) if "digits-dense-seed2" in line[:60] else line
        for line in text.splitlines(keepends=True)
    ]
    (tmp_path / "kept" / FILE).write_text("".join(damaged))
    start = here(tmp_path, "--records", "kept", "--minutes", "0")
    assert start.status == 0 and row(start.said, "dense")[5:] == ["1/2", "seed 2"]
    assert re.search(r"^warning: kept/records.jsonl, line 2: damaged", start.said, flags=re.MULTILINE)


@pytest.mark.full
def test_records_of_before_are_brought_in_by_one_command(filled, tmp_path: Path) -> None:
    shutil.copy(filled[0] / "tiny.yaml", tmp_path)
    shutil.copytree(filled[0] / "out" / "runs", tmp_path / "kept" / "runs")
    start = here(tmp_path, "--records", "kept", "--minutes", "0")
    assert "warning: kept/runs holds records that do not count: `sparse-lab collect kept kept`" in start.said


@pytest.mark.full
def test_a_failing_cell_stops_no_other(filled, tmp_path: Path) -> None:
    shutil.copy(filled[0] / "tiny.yaml", tmp_path)
    shutil.copytree(filled[0] / "out", tmp_path / "out")
    [fails] = tmp_path.glob("out/runs/*-oneshot-95-seed2-*")
    [lacks] = tmp_path.glob("out/runs/*-oneshot_regrow-90-seed1-*")
    for folder in (fails, lacks):
        shutil.rmtree(folder)
    fails.write_text("in the way of its folder")
    start = here(tmp_path)
    assert start.status == 1
    assert start.outcomes == {
        run: {(1, CELLS[2]): "done", (2, CELLS[1]): "failed"}.get(run, "skipped") for run in EVERY
    }
    assert (lacks / "result.json").is_file() and row(start.said, "oneshot")[5:] == ["1/2", "seed 2"]
    assert re.search(rf"^failed: {fails.name}: .*cannot write to", start.said, flags=re.MULTILINE)


def test_no_minutes_make_nothing(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    start = here(tmp_path, "--minutes", "0")
    assert start.status == 0 and "0 of 6 runs done" in start.said and not (tmp_path / "out").exists()
    assert all(row(start.said, name)[3:] == ["", "", "0/2", "seed 1, 2"] for name in ("dense", "oneshot", "regrown"))
    one = here(tmp_path, "--minutes", "0", "--seeds", "1", "--cell", "regrown")
    assert row(one.said, "regrown")[5:] == ["0/1", "seed 1"] and "0 of 1 runs done" in one.said


def test_a_list_says_what_would_be_made(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    start = here(tmp_path, "--list", "--recipe", "default", "--seeds", "1", "training.lr=0.03")
    assert start.status == 0 and not (tmp_path / "out").exists()
    lines = start.said.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [f"[{number}/3] missing" for number in (1, 2, 3)]
    assert all("training.lr=0.03" in line and line.endswith("seed=1") for line in lines)


def test_without_a_table_those_that_there_are_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "own.yaml").write_text(TINY)
    (tmp_path / "table" / "wrong.yaml").write_text("title: x")
    assert main(["reproduce", "--config-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "own: A tiny table: 3 cells, 2 seeds; default" in lines and any(line.startswith("east: ") for line in lines)
    assert [line.partition(":")[0] for line in lines if "seeds: None is no list" in line] == ["wrong"]


def test_help_answers_without_torch() -> None:
    code = "import sys; from sparse_lab.cli.main import main\n"
    code += "try: main(['reproduce', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'hydra'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "examples:" in done.stdout, done.stderr


# --- by each launcher's processes ---


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sparse_lab", "reproduce", "tiny.yaml", "--device", "cpu", "--outputs", "out"]
    return subprocess.Popen(
        [*command, *arguments], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str], place: Path) -> Start:
    said = process.communicate(timeout=400)[0]
    return Start.ended(process.returncode, said, place)


@pytest.mark.nightly(long=True)
@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_each_launcher_goes_on_where_it_was_stopped(launcher: str, tmp_path: Path) -> None:
    pytest.importorskip(launcher)
    (tmp_path / "tiny.yaml").write_text(LONG)
    where = {
        "joblib": ["--jobs", "2"], "ray": ["hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2"]
    }[launcher]  # fmt: skip
    process = start(tmp_path, *where)
    until = time.monotonic() + 200
    while not list(tmp_path.glob("out/runs/*-oneshot-95-seed1-*/metrics.csv")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    starts = [ended(process, tmp_path)]
    assert starts[0].status == 143 and "the same command goes on" in starts[0].said, starts[0].said
    assert starts[0].outcomes[1, "oneshot-95"] == "stopped"
    starts.append(ended(start(tmp_path, *where, "--minutes", "0.3"), tmp_path))
    assert starts[1].status == 0, starts[1].said
    assert "time is up" in starts[1].said or "6 of 6 runs done" in starts[1].said
    starts.append(ended(start(tmp_path, *where), tmp_path))
    assert starts[2].status == 0, starts[2].said
    check_filled_once(tmp_path, starts, epochs=60)


@pytest.mark.nightly
def test_submitit_fills_a_table_too(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "tiny.yaml").write_text(TINY)
    only = ended(start(tmp_path, "hydra/launcher=submitit_local"), tmp_path)
    assert only.status == 0, only.said
    check_filled_once(tmp_path, [only], epochs=5)
