"""A worker that is killed, as by the out-of-memory killer, ends no other run; its own is submitted again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus

from sparse_lab.records.sweep_dir import SweepFolder
from sparse_lab.sweep.launch import Task
from sparse_lab.sweep.launchers import MOST_DEATHS, Basic, Job, Joblib
from tests.records.hostile import lay

LONG = ("training.epochs=24", "dataset.train_limit=256", "training.batch_size=64")


class Killed(Exception):
    pass


class Fragile(Basic):
    """Jobs that end when they are looked at; `deadly`: how often each of them dies first. Keeps who ran beside whom."""

    room = 2

    def __init__(self, folder: SweepFolder, deadly: dict[int, int]) -> None:
        self.folder, self.deadly = folder, dict(deadly)
        self.task = Task("x", "joblib", 4, folder=folder.path)
        self.together: list[set[int]] = []
        self.now: set[int] = set()

    def submit(self, jobs: list[Job]) -> list[Any]:
        self.now |= {job.number for job in jobs}
        self.together.append(set(self.now))
        return jobs

    def collect(self, handle: Any) -> JobReturn:
        self.now.remove(handle.number)
        if self.deadly.get(handle.number, 0):
            self.deadly[handle.number] -= 1
            raise Killed
        return JobReturn(status=JobStatus.COMPLETED)

    def killed(self, job: Job, error: Exception) -> str | None:
        return f"the process of {job.run} was killed" if isinstance(error, Killed) else None


def jobs(count: int) -> list[Job]:
    return [Job(number, f"run{number}", ()) for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(lay(tmp_path) / "sweeps" / "abcdef01")


@pytest.mark.parametrize("times", range(MOST_DEATHS))
def test_a_killed_job_is_submitted_again(times: int, folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    launcher = Fragile(folder, {3: times})
    returned = launcher.run(jobs(4), lambda job: ended.append(job.number))
    assert len(returned) == 4 and sorted(ended) == [0, 1, 2, 3] and not launcher.task.lost
    assert capsys.readouterr().out.count("sweep: the process of run3 was killed; it is submitted again") == times


def test_one_that_is_killed_thrice_has_failed_and_the_others_go_on(folder: SweepFolder) -> None:
    launcher = Fragile(folder, {3: 99})
    assert len(launcher.run(jobs(4))) == 4
    assert 99 - launcher.deadly[3] == MOST_DEATHS and list(launcher.task.lost) == ["003-run3"]
    outcome = json.loads((folder.path / "003.json").read_text())
    assert outcome["outcome"] == "failed" and "killed 3 times" in outcome["said"] and outcome["run"] == "run3"


def test_its_last_try_has_the_machine_for_itself(folder: SweepFolder) -> None:
    launcher = Fragile(folder, {0: 2, 1: 2})
    launcher.run(jobs(5))
    assert {0} in launcher.together and {1} in launcher.together and launcher.deadly == {0: 0, 1: 0}
    last = {number: max(at for at, one in enumerate(launcher.together) if number in one) for number in (0, 1)}
    assert all(launcher.together[at] == {number} for number, at in last.items())


def test_what_only_joblib_knows_to_be_a_death_is_one(folder: SweepFolder) -> None:
    errors = pytest.importorskip("joblib.externals.loky.process_executor")
    launcher = Joblib(2)
    launcher.folder = folder
    told = errors.TerminatedWorkerError("A worker\nThe exit codes of the workers are {SIGKILL(-9)}\n")
    said = launcher.killed(Job(1, "planned", ()), told)
    pid = json.loads((folder.path / "running-001.json").read_text())["pid"]
    assert said is not None and f"process {pid}, which made vgg16-digits-dense-seed1" in said and "SIGKILL(-9)" in said
    assert launcher.killed(Job(3, "planned", ()), told).startswith("the process of planned was killed (SIGKILL(-9), ")
    for other in (errors.BrokenProcessPool("cannot be unpickled"), ValueError("x"), MemoryError()):
        assert launcher.killed(Job(1, "planned", ()), other) is None


def start(out: Path, small: list[str], *words: str) -> subprocess.Popen[str]:
    argv = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *small, *LONG, *words]
    return subprocess.Popen(
        [sys.executable, "-m", "sparse_lab", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out.parent,
    )  # fmt: skip


def kill_one_that_trains(
    out: Path, process: subprocess.Popen[str], run: str | None = None, but: tuple[int, ...] = ()
) -> tuple[int, str]:
    """SIGKILL for the worker that makes `run`, or any; its number and the run's name."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        for path in out.glob("runs/*/status.json"):
            status = json.loads(path.read_text())
            saved = (path.parent / "checkpoints" / "last.ckpt").exists()
            fits = status["state"] == "running" and saved and status["pid"] not in but
            if fits and run in (None, path.parent.name):
                os.kill(status["pid"], signal.SIGKILL)
                return status["pid"], path.parent.name
        time.sleep(0.02)
    raise AssertionError("waited in vain")


@pytest.mark.full
def test_a_killed_worker_of_joblib_costs_nothing(
    tmp_path: Path,
    small: list[str],
    outcomes: Callable[[], list[dict[str, Any]]],
    results: Callable[[], dict[str, int]],
) -> None:
    pytest.importorskip("joblib")
    process = start(tmp_path / "out", small, "seed=1,2,3")
    pid, run = kill_one_that_trains(tmp_path / "out", process)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "3 runs: 3 done" in out and not error, out + error
    assert f"sweep: process {pid}, which made {run}, was killed (SIGKILL(-9), " in out
    assert f"{run}: goes on from" in out and len(results()) == 3
    assert [one["outcome"] for one in outcomes()] == ["done"] * 3


@pytest.mark.nightly(long=True)
def test_a_run_whose_worker_is_killed_again_and_again_has_failed(
    tmp_path: Path,
    small: list[str],
    outcomes: Callable[[], list[dict[str, Any]]],
    results: Callable[[], dict[str, int]],
) -> None:
    pytest.importorskip("joblib")
    process = start(tmp_path / "out", small, "seed=1,2,3", "training.epochs=60")
    killed = [kill_one_that_trains(tmp_path / "out", process)]
    for _ in range(MOST_DEATHS - 1):
        killed.append(kill_one_that_trains(tmp_path / "out", process, killed[0][1], tuple(pid for pid, _ in killed)))
    out, error = process.communicate(timeout=300)
    run = killed[0][1]
    assert process.returncode == 1 and "3 runs: 2 done, 1 failed" in out and not error, out + error
    assert all(f"process {pid}, which made {run}, was killed" in out for pid, _ in killed)
    assert len(results()) == 2 and run not in results()
    assert sorted(one["outcome"] for one in outcomes()) == ["done", "done", "failed"]
