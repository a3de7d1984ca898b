"""`sparse-lab collect`: finished runs below the sources in one file, and what it says of the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_lab.cli.main import main
from sparse_lab.records.atomic_io import write_record
from sparse_lab.records.kept import FILE, read_kept
from sparse_lab.report import read
from tests.records import hostile

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A tree of three finished runs and one that was stopped."""
    for number in range(4):
        run = tmp_path / "outputs" / "runs" / f"run{number}"
        (run / "checkpoints").mkdir(parents=True)
        about = {"name": run.name, "cell": f"{number}", "seed": 1, "test_accuracy": 90.0 + number}
        about |= {"model": "vgg16", "dataset": "digits", "method": "dense", "config": {}}
        about |= {"kept": 10, "total": 10, "seconds": 1.0}
        paths = {"outputs": str(tmp_path / "outputs"), "data": "data"}
        (run / "config.yaml").write_text(json.dumps({"seed": 1, "paths": paths}))
        (run / "metrics.csv").write_text("epoch,train_loss\n1,0.5\n")
        (run / "status.json").write_text(json.dumps({"state": "done" if number else "interrupted"}))
        if number:
            write_record(run / "result.json", about)
    return tmp_path / "outputs"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def collect(*words: object) -> tuple[int, str, str]:
        status = main(["collect", *map(str, words)])
        said = capsys.readouterr()
        return status, said.out.strip(), said.err.strip()

    return collect


def test_finished_runs_are_added_once(outputs: Path, tmp_path: Path, say: Say) -> None:
    table = tmp_path / "results" / "table"
    assert say(outputs, table) == (0, f"{table / FILE}: 3 added, 0 there already, 1 unfinished left out", "")
    before = (table / FILE).read_bytes()
    assert (
        say(outputs / "runs", outputs, table)[1] == f"{table / FILE}: 0 added, 3 there already, 1 unfinished left out"
    )
    assert (table / FILE).read_bytes() == before and str(tmp_path).encode() not in before
    assert [run.accuracy for run in read(table).results] == [91.0, 92.0, 93.0]
    assert (outputs / "runs" / "run1" / "result.json").is_file()


def test_an_old_table_is_migrated_in_its_place(outputs: Path, tmp_path: Path, say: Say) -> None:
    table = tmp_path / "table"
    shutil.copytree(outputs / "runs", table / "runs")
    assert say(table, table)[1].endswith("3 added, 0 there already, 1 unfinished left out")
    assert say(table, table)[1].endswith("0 added, 3 there already, 1 unfinished left out")
    shutil.rmtree(table / "runs")
    assert [kept.name for kept in read_kept(table)[0]] == ["run1", "run2", "run3"]
    status, out, err = say(table, table)  # it is its own source no more
    assert (status, out) == (2, "") and err.startswith(
        f"sparse-lab collect: no finished run in a folder below {table} ("
    )


def test_a_damaged_run_is_a_line_and_the_others_are_collected(outputs: Path, tmp_path: Path, say: Say) -> None:
    (outputs / "runs" / "run1" / "metrics.csv").write_text("epoch,train_loss\n1")
    (outputs / "runs" / "run2" / "metrics.csv").unlink()
    status, out, err = say(outputs, tmp_path / "table")
    assert status == 2 and ": 1 added, 0 there already, " in out
    assert [kept.name for kept in read_kept(tmp_path / "table")[0]] == ["run3"]
    first, second = err.splitlines()
    assert "run1/metrics.csv is damaged" in first and "run2" in second and "No such file" in second


def test_what_cannot_be_done_is_one_line_and_exit_2(outputs: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for words, line in (
        ((tmp_path / "empty", tmp_path / "table"), "no finished run"),
        ((tmp_path / "nowhere", tmp_path / "table"), "is not a folder"),
        ((outputs, tmp_path / "file"), "cannot write to"),
        ((outputs, tmp_path / "file" / "table"), "cannot write to"),
    ):
        status, out, err = say(*words)
        assert status == 2 and not out and len(err.splitlines()) == 1 and line in err
    assert not (tmp_path / "table").exists() and (tmp_path / "file").read_text() == ""
    with pytest.raises(SystemExit) as stop:
        main(["collect", str(outputs)])
    assert stop.value.code == 2


@pytest.mark.parametrize("name", ["config", "metrics", "updates", "table"])
@pytest.mark.parametrize(
    "what", ["a number", "a pipe", "a folder", "a device", "memory", "a gigabyte of zeros", "deep objects"]
)
def test_whatever_lies_in_a_files_place_costs_its_run_alone(name: str, what: str, tmp_path: Path, say: Say) -> None:
    """Neither a traceback nor a wait; what metrics.csv may hold is anything."""
    hostile.lay(tmp_path)
    path = tmp_path / hostile.FILES[name]
    hostile.put(path, what)
    status, _, err = say(tmp_path / "runs", tmp_path / ("table" if name == "table" else "new"))
    taken = (name, what) in {("metrics", "a number"), ("table", "a number"), ("table", "deep objects")}
    assert (status == 0) is taken and len(err.splitlines()) == (not taken), err
    assert taken or str(tmp_path) in err
