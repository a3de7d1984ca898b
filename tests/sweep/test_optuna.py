"""Searches: both ends of an interval are checked before anything runs, the same command asks for the same trials."""

from __future__ import annotations

import json
import re

import pytest

from sparse_lab.cli.main import main
from sparse_lab.sweep.plan import Request

SEARCH = ("-m", "hydra/sweeper=optuna")
REGROW = ("method=oneshot_regrow", "sparsity=s90", "dataset=digits")


def test_an_interval_stands_for_both_its_ends():
    request = Request.read([*SEARCH, *REGROW, "method.regrow.budget=interval(0.01,0.05)", "seed=range(1,4)"])
    assert request.axes["method.regrow.budget"] == ["0.01", "0.05"]
    request.check()
    assert request.jobs == 20 and request.plan == [] and request.sweeper == "optuna"


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([*SEARCH, *REGROW, "method.regrow.budget=interval(0.01,0.2)"], "would have to start at"),
        ([*SEARCH, *REGROW, "method.regrow.budget=tag(log,interval(-0.01,0.05))"], "outside [0, 1]"),
        ([*SEARCH, *REGROW, "method.regrow.steps=range(0,3)"], "outside [1, 1000]"),
        ([*SEARCH, "method=glob(one*)"], "does not know glob()"),
        ([*SEARCH, "seed=1"], "has nothing to search"),
        ([*SEARCH, "seed=1,2", "hydra.sweeper.storage='sqlite:///x.db'"], "Hydra writes below paths.outputs"),
        ([*SEARCH, "seed=1,2", "hydra.sweeper.storage='sqlite:///${paths.outputs}/x.db'"], "storage does not work"),
        (["-m", "training.lr=interval(0.01,0.1)"], "add hydra/sweeper=optuna"),
    ],
)
def test_a_search_that_cannot_work_is_one_line(argv, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "dataset=digits", "paths.outputs=out"]) == 2
    error = capsys.readouterr().err
    assert wanted in error and len(error.strip().splitlines()) == 1


def test_long_searches_are_checked_by_jobs_that_hold_every_value():
    axes = [f"training.{key}=interval(0.1,0.5)" for key in ("lr", "warmup", "momentum", "weight_decay")]
    request = Request.read([*SEARCH, *axes, "seed=range(1,40)", "model.width=0.5,1"])
    request.read_experiment_axes()
    corners = list(request.corners())
    assert len(corners) == 39
    for key, values in request.axes.items():
        assert {corner[key] for corner in corners} == set(values)


def test_the_example_is_a_search_by_validation_accuracy():
    request = Request.read(["experiment=optuna_regrow"])
    base = request.read_experiment_axes()
    assert request.multirun and base.hydra.sweeper.direction == "maximize" and base.hydra.sweeper.sampler.seed == 1
    assert set(request.axes) == {"method.regrow.budget", "method.regrow.steps", "training.regrow.epochs"}
    request.check()


@pytest.mark.full
def test_the_same_search_again_finds_its_trials_and_a_failed_one_does_not_end_it(small, command, outcomes, results):
    pytest.importorskip("optuna")
    argv = [*SEARCH, "hydra.sweeper.n_trials=5", "training.lr=0.02,1e30", "training.momentum=interval(0.5,0.9)", *small]
    first = command(*argv)
    assert first.returncode == 1, first.stderr
    ended, made = outcomes(), results()
    assert {one["outcome"] for one in ended} == {"done", "failed"} and len(ended) == 5
    assert first.stderr.count("\n") == sum(one["outcome"] == "failed" for one in ended), first.stderr
    scored = [one for one in ended if one["outcome"] == "done"]
    best = max(scored, key=lambda one: one["value"])
    line = next(line for line in first.stdout.splitlines() if line.startswith("best: "))
    assert best["run"] in line and all(word in line for word in best["swept"])
    assert re.search(r"validation (\d+\.\d+)%", line).group(1) == f"{best['value']:.2f}"  # type: ignore[union-attr]
    again = command(*argv)
    assert again.returncode == 1 and results() == made
    assert [one["run"] for one in outcomes()] == [one["run"] for one in ended]
    assert [one["swept"] for one in outcomes()] == [one["swept"] for one in ended]
    assert next(line for line in again.stdout.splitlines() if line.startswith("best: ")) == line


@pytest.mark.nightly
def test_a_search_of_which_every_trial_fails_says_so(small, command, outcomes):
    pytest.importorskip("optuna")
    done = command(*SEARCH, "hydra.sweeper.n_trials=2", "training.lr=1e30", "seed=1,2", *small)
    assert done.returncode == 1 and "2 runs: 2 failed" in done.stdout
    assert "Traceback" not in done.stderr and [one["outcome"] for one in outcomes()] == ["failed", "failed"]


@pytest.mark.full
def test_the_value_is_the_records_validation_accuracy(tmp_path, small, command, outcomes):
    pytest.importorskip("optuna")
    command(*SEARCH, "hydra.sweeper.n_trials=1", "hydra/sweeper/sampler=random", "seed=1,2", *small)
    [one] = outcomes()
    record = json.loads((tmp_path / "out" / "runs" / one["run"] / "result.json").read_text())
    found = next((tmp_path / "out").glob("sweeps/*/optimization_results.yaml")).read_text()
    assert one["value"] == record["validation_accuracy"] and str(record["validation_accuracy"])[:6] in found
