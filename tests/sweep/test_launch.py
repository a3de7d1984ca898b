"""A sweep in this process: planned, told apart job by job, done once."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from sparse_lab.cli.main import main
from sparse_lab.sweep.plan import Request


def test_the_second_time_nothing_runs(tmp_path, small, outcomes, results, capsys):
    argv = ["-m", "method=dense,oneshot", "sparsity=s90", "seed=1,2", *small]
    assert main(argv) == 0
    first, out = results(), capsys.readouterr().out
    assert len(first) == 4 and "4 runs: 4 done" in out and "sweep: 2 of 4 runs done" in out
    plan = json.loads(next((tmp_path / "out" / "sweeps").glob("*/plan.json")).read_text())
    assert [run["name"] for run in plan["runs"]] == [one["run"] for one in outcomes()]
    assert plan["jobs"] == 4 and plan["launcher"] == "basic" and "ended" in plan
    assert [run["sparsity"] for run in plan["runs"]] == [0.0, 0.0, 0.9, 0.9]
    assert main(argv) == 0
    assert results() == first
    assert [one["outcome"] for one in outcomes()] == ["skipped"] * 4
    for line in capsys.readouterr().out.splitlines()[-4:]:
        name, said = line.split()[1], line.split("  ")[-1]
        record = json.loads((tmp_path / "out" / "runs" / name / "result.json").read_text())
        assert said == f"done already, {record['test_accuracy']:.2f}%"


def test_a_failing_run_is_one_line_and_its_traceback_lies_in_its_folder(tmp_path, small, outcomes, results, capsys):
    assert main(["-m", "training.lr=1e30,0.01", *small]) == 1
    out = capsys.readouterr().out
    assert [one["outcome"] for one in outcomes()] == ["failed", "done"] and len(results()) == 1
    failed = tmp_path / "out" / "runs" / outcomes()[0]["run"]
    assert "Traceback (most recent call last)" in (failed / "error.txt").read_text()
    lines = [line for line in out.splitlines() if line.startswith("  failed")]
    assert len(lines) == 1 and failed.name in lines[0] and "lower training.lr" in lines[0]


def test_jobs_of_a_users_own_choices_are_composed_while_hydra_is_at_work(tmp_path, small, results, capsys):
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("defaults: [static]\nname: mine\n")
    argv = ["-m", "--config-dir", str(tmp_path / "conf"), "method=mine", "sparsity=s90", "seed=1,2", *small]
    assert main(argv) == 0, capsys.readouterr()
    assert len(results()) == 2 and all("-mine-90-" in name for name in results())


def test_one_run_writes_no_plan(tmp_path, small, results):
    assert main(["method=dense", *small]) == 0
    assert len(results()) == 1 and not (tmp_path / "out" / "sweeps").exists()


def test_a_run_of_another_process_is_skipped(tmp_path, small, outcomes, results, capsys):
    request = Request.read(["-m", "seed=1,2", *small])
    request.check()
    folder = tmp_path / "out" / "runs" / request.plan[0]["name"]
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        lock.write("process 123 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["-m", "seed=1,2", *small]) == 0
    assert [one["outcome"] for one in outcomes()] == ["skipped", "done"] and len(results()) == 1
    assert "process 123 on elsewhere" in outcomes()[0]["said"]
    assert f"skipped  {folder.name}  process 123 on elsewhere" in capsys.readouterr().out


@pytest.mark.full
def test_a_plan_numbers_jobs_as_hydra_does(tmp_path, small, outcomes):
    """Keys of the file first, a list on the command line in their place, what the file fixes in every job."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      seed: 1,2\n      training.momentum: 0.5\n      training.lr: 0.1,0.2\n"
    )
    argv = ["training.warmup=0,0.5", "training.lr=1e30", "seed=4,3", "experiment=mine", *small]
    request = Request.read(["-m", "--config-dir", str(tmp_path / "conf"), *argv])
    request.check()
    assert list(request.axes) == ["seed", "training.warmup"] and request.jobs == 4
    main(["-m", "--config-dir", str(tmp_path / "conf"), *argv])
    assert [one["run"] for one in outcomes()] == [run["name"] for run in request.plan]
    config = (tmp_path / "out" / "runs" / outcomes()[0]["run"] / "config.yaml").read_text()
    assert "momentum: 0.5" in config and "seed: 4" in config


def test_what_an_earlier_start_left_is_gone_and_one_that_goes_on_is_left_alone(tmp_path):
    from sparse_lab.records.sweep_dir import SweepFolder

    with SweepFolder.claim(tmp_path, "abc") as first:
        first.outcome(0, {"run": "a", "outcome": "failed", "said": "x"})
        with SweepFolder.claim(tmp_path, "abc") as beside:
            assert beside.path.name == "abc-2" and (first.path / "000.json").exists()
    with SweepFolder.claim(tmp_path, "abc") as again:
        assert again.path == first.path and not list(again.path.glob("*.json"))


def test_paths_with_odd_characters(tmp_path: Path, small, capsys):
    out = tmp_path / "it's a {strange}, [place]"
    quoted = str(out).replace("'", "\\'")
    assert main(["-m", "seed=1", *small, f"paths.outputs='{quoted}'"]) == 0
    assert len(list(out.glob("sweeps/*/000.json"))) == 1, capsys.readouterr()


def test_twins_are_trained_once_and_shown_once(tmp_path, small, outcomes, results, capsys):
    """And a job's overrides are those that a person would write."""
    axes = ["seed=1,1", "sparsity.target=range(0.9,0.99,0.03)"]
    assert main(["-m", "method=static", *axes, "training.epochs=1", *small]) == 0
    assert len(outcomes()) == len(results()) == 3
    wanted = [f"sparsity.target={value}" for value in ("0.9", "0.93", "0.96")]
    assert [one["swept"] for one in outcomes()] == [["seed=1", value] for value in wanted]
    said = capsys.readouterr().out
    assert "note: 6 jobs ask for 3 runs" in said and "3 runs: 3 done" in said
