"""A run's name: what changes it, what does not; and two processes that want the same dense network at once."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from sparse_lab.experiment.identity import cell, run_dir, run_name
from sparse_lab.experiment.runner import run
from sparse_lab.methods import phases
from sparse_lab.methods.table import starts


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "same",
    ["paths.data=elsewhere", "logger=wandb", "trainer.accelerator=auto", "dataset.workers=0",
     "trainer.checkpoint_every=7", "method.regrow.score=random", "schedule.iterative.share=0.9"],
)  # fmt: skip
def test_what_does_not_matter_does_not_rename_a_run(same, compose):
    assert run_name(compose("method=oneshot", same)) == run_name(compose("method=oneshot"))


@pytest.mark.parametrize(
    "other",
    ["seed=9", "sparsity=s98", "training.lr=0.3", "training.finetune.epochs=7", "trainer.precision=bf16-mixed",
     "trainer.devices=2", "sparsity.require_connected=true", "dataset.train_limit=77", "model.width=0.5",
     "schedule=cubic"],
)  # fmt: skip
def test_what_matters_renames_it(other, compose):
    assert run_name(compose("method=oneshot", other)) != run_name(compose("method=oneshot"))


def test_a_dense_run_has_no_sparsity(compose):
    assert run_name(compose("method=dense", "sparsity=s90")) == run_name(compose("method=dense", "sparsity=s99"))


def test_seeds_share_a_cell(compose):
    assert cell(compose("method=oneshot", "seed=1")) == cell(compose("method=oneshot", "seed=2"))
    assert cell(compose("method=oneshot")) != cell(compose("method=oneshot", "sparsity=s98"))


def test_stages_lead_back_to_runs_that_can_be_asked_for_by_name(compose):
    child = compose("method=iterative_regrow", "sparsity.target=0.9", "method.regrow.budget=0.04")
    one_way = starts(child).get("parent")
    assert one_way is not None
    assert run_name(one_way) == run_name(compose("method=iterative", "sparsity.target=0.94"))
    dense = starts(one_way).get("parent")
    assert dense is not None and starts(dense).get("parent") is None
    assert run_name(dense) == run_name(compose("method=dense"))
    extra = compose("method=iterative_extra", "sparsity.target=0.9", "method.regrow.budget=0.04")
    assert phases.final_sparsity(extra) == 0.94 and run_name(starts(extra).get("parent")) == run_name(one_way)
    long = compose("method=iterative_long", "sparsity.target=0.9", "method.regrow.budget=0.04")
    assert phases.final_sparsity(long) == 0.9
    assert run_name(starts(long).get("parent")) == run_name(compose("method=iterative", "sparsity.target=0.9"))


def test_a_budget_left_open_starts_with_half_as_many_weights(compose):
    config = compose("method=oneshot_regrow", "sparsity.target=0.98")
    assert phases.regrowth_start(config) == 0.99
    assert phases.regrowth_start(replace(config, sparsity=replace(config.sparsity, target=0.9999))) == 0.99995


def test_a_run_that_another_process_makes_is_waited_for_and_not_made_again(compose, with_starts, tmp_path, capsys):
    """The other process is played by a lock on the dense run's folder, which goes when its result is there."""
    config = compose("method=oneshot", "sparsity.target=0.9")
    dense = run_dir(starts(config).get("parent"))
    elsewhere = with_starts(replace(config, paths=replace(config.paths, outputs=str(tmp_path / "elsewhere"))))
    said: list[str] = []

    class Listening(Console):
        def print(self, *words, **how) -> None:
            said.append(str(words[0]))
            if "waiting for" in said[-1]:
                shutil.copytree(run_dir(starts(elsewhere).get("parent")).path, dense.path, dirs_exist_ok=True)
                fcntl.flock(lock, fcntl.LOCK_UN)

    (dense.path / "checkpoints").mkdir(parents=True)
    with open(dense.path / ".lock", "a+") as lock:
        lock.write("process 1 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(config, "x", Listening(quiet=True))
    assert result["start"] == dense.name
    about = [line for line in said if dense.name in line and "started from" not in line]
    assert ["process 1 on elsewhere runs it" in about[0], "done already" in about[1], len(about)] == [True, True, 2]


@pytest.mark.full
def test_two_processes_that_start_at_the_same_moment_train_the_dense_network_once(small, tmp_path):
    commands = [
        [
            sys.executable,
            "-m",
            "sparse_lab",
            *small,
            f"paths.outputs={tmp_path}",
            "method=oneshot",
            f"sparsity.target={s}",
        ]
        for s in (0.9, 0.95)
    ]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    assert sorted(result["method"] for result in results) == ["dense", "oneshot", "oneshot"]
    dense = next(result["name"] for result in results if result["method"] == "dense")
    assert sum(f"{dense}: started" in output for output in outputs) == 1
    assert {result["start"] for result in results} == {None, dense}
