"""A sweep whose folder, or all its outputs, are moved or removed while it goes on: no more runs begin, one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus

from sparse_lab.records.lock import Moved
from sparse_lab.records.sweep_dir import SweepFolder
from sparse_lab.sweep.launch import Task
from sparse_lab.sweep.launchers import Basic, Job


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def move(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replace(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


@pytest.mark.parametrize("how", [move, remove, replace])
@pytest.mark.parametrize("above", [0, 1, 2], ids=["the sweep's", "sweeps", "outputs"])
def test_nothing_is_written_any_more(how, above, tmp_path):
    with SweepFolder.claim(tmp_path / "out", "abc") as folder:
        worker = SweepFolder(folder.path, folder.lock)  # as a process that the command has started knows it
        worker.begin(0, "run")
        assert folder.moved is None and worker.moved is None
        how((folder.path, *folder.path.parents)[above])
        left = sorted(str(path) for path in tmp_path.rglob("*"))
        for write in (lambda one: one.begin(1, "run"), lambda one: one.outcome(0, {}), lambda one: one.write_plan({})):
            for one in (folder, worker):
                with pytest.raises(Moved, match="no more of its runs begin; start the same command again"):
                    write(one)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == left


def test_the_same_sweep_started_again_has_the_folder_for_itself(tmp_path):
    with SweepFolder.claim(tmp_path, "abc") as first:
        move(first.path)
        with SweepFolder.claim(tmp_path, "abc") as second:
            assert second.path == first.path and second.moved is None
            second.begin(0, "run")
            with pytest.raises(Moved):
                first.outcome(0, {"run": "run", "outcome": "done", "said": ""})
            assert second.begun(0) is not None


class Slow(Basic):
    """Two at a time; the folder goes while the first two run."""

    room = 2

    def __init__(self, folder: SweepFolder) -> None:
        self.folder, self.looks, self.begun = folder, 0, list[int]()
        self.task = Task("x", "joblib", 4, folder=folder.path, lock=folder.lock)

    def submit(self, jobs: list[Job]) -> list[Any]:
        self.begun += [job.number for job in jobs]
        return jobs

    def over(self, handle: Any) -> bool:
        self.looks += 1
        if self.looks == 3:
            move(self.folder.path)
        return self.looks > 6

    def collect(self, handle: Any) -> JobReturn:
        return JobReturn(status=JobStatus.COMPLETED)


def test_what_runs_elsewhere_may_end_and_nothing_else_begins(tmp_path):
    ended: list[int] = []
    with SweepFolder.claim(tmp_path, "abc") as folder:
        launcher = Slow(folder)
        with pytest.raises(Moved):
            launcher.run([Job(number, f"run{number}", ()) for number in range(4)], lambda job: ended.append(job.number))
    assert launcher.begun == [0, 1] == ended


@pytest.mark.parametrize(
    ("launcher", "what"),
    [
        pytest.param("basic", "out", marks=pytest.mark.nightly),
        pytest.param("basic", "out/sweeps", marks=pytest.mark.nightly),
        pytest.param("joblib", "out", marks=pytest.mark.full),
        pytest.param("joblib", "out/sweeps", marks=pytest.mark.nightly),
    ],
)
def test_the_command_says_one_line_and_leaves(what, launcher, small, tmp_path):
    pytest.importorskip({"basic": "hydra"}.get(launcher, launcher))
    argv = ["-m", f"hydra/launcher={launcher}", "seed=range(1,7)", *small, "training.epochs=60"]
    argv += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_lab", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/runs/*/checkpoints/last.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    (tmp_path / what).rename(tmp_path / "elsewhere")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in out + error, out + error
    said = [line for line in error.splitlines() if "was moved, removed or replaced while this sweep" in line]
    assert len(said) == 1, error
    # one that was about to take its folder just then begins in a new one
    begun = list((tmp_path / "out" / "runs").glob("*")) if what == "out" else []
    assert len(begun) <= (launcher == "joblib") and not (tmp_path / "out" / "sweeps").exists()
    runs = (tmp_path / ("elsewhere" if what == "out" else "out") / "runs").iterdir()
    assert len(list(runs)) <= 3, "more of them began"
