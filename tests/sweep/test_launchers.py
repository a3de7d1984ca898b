"""Every launcher for real: a failing job stops no other, the summary and the exit status are the same, and a second
start of the same command does exactly what is left."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LONG = ("training.epochs=24", "dataset.train_limit=256", "training.batch_size=64")
LONGER = ("training.epochs=40", *LONG[1:])


def check_one_failed(done: subprocess.CompletedProcess[str], outcomes: list[dict[str, Any]], out: Path) -> None:
    """Three jobs, of which the second fails."""
    assert done.returncode == 1, done.stderr
    assert [one["outcome"] for one in outcomes] == ["done", "failed", "done"], done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("  failed")]
    assert "3 runs: 2 done, 1 failed" in done.stdout and len(failed) == 1 and "lower training.lr" in failed[0]
    assert "Traceback" in (out / "runs" / outcomes[1]["run"] / "error.txt").read_text()
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_sweep_with_a_failing_job(launcher, tmp_path, small, command, outcomes, results):
    pytest.importorskip({"submitit_local": "submitit"}.get(launcher, launcher))
    argv = ["-m", f"hydra/launcher={launcher}", "training.lr=0.01,1e30,0.02", *small]
    argv += {"ray": ["hydra.launcher.ray.init.num_cpus=2"], "joblib": ["hydra.launcher.n_jobs=2"]}.get(launcher, [])
    done = command(*argv)
    check_one_failed(done, outcomes(), tmp_path / "out")
    [path] = (tmp_path / "out" / "sweeps").glob("*/plan.json")
    assert json.loads(path.read_text())["launcher"] == launcher
    statuses = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*/status.json")]
    pids = {status["pid"] for status in statuses}
    # joblib keeps its two processes; the others take a fresh one for each job
    assert len(statuses) == 3 and (len(pids) <= 2 if launcher == "joblib" else len(pids) == 3)
    if launcher == "joblib":
        first = results()
        again = command(*argv)
        assert again.returncode == 1 and results() == first
        assert [one["outcome"] for one in outcomes()] == ["skipped", "failed", "skipped"]


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def training(out: Path) -> list[tuple[int, str]]:
    """(process, run) of the jobs that have trained for an epoch."""
    found = []
    for path in out.glob("sweeps/*/running-*.json"):
        try:
            about = json.loads(path.read_text())
            status = json.loads((out / "runs" / about["run"] / "status.json").read_text())
        except (OSError, ValueError):
            continue
        if status.get("epoch") and status["state"] == "running":
            found.append((about["pid"], about["run"]))
    return found


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    "launcher",
    [pytest.param("basic", marks=pytest.mark.full),
     *(pytest.param(name, marks=pytest.mark.nightly(long=True)) for name in ("joblib", "ray"))],
)  # fmt: skip
def test_sigterm_saves_what_runs_and_the_second_start_goes_on(launcher, tmp_path, small, command, outcomes, results):
    if launcher != "basic":
        pytest.importorskip(launcher)
    argv = ["-m", f"hydra/launcher={launcher}", "seed=1,2,3", *small, *LONG]
    argv += ["hydra.launcher.ray.init.num_cpus=2"] if launcher == "ray" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_lab", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    running = wait_for(lambda: training(tmp_path / "out"), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert [line for line in error.splitlines() if line][-1].startswith("sparse-lab: stopped by SIGTERM")
    stopped = [one["run"] for one in outcomes() if one["outcome"] == "stopped"]
    assert stopped and {run for _, run in running} <= set(stopped)
    # Ray's own processes end its workers a moment after the command has left
    deadline = time.monotonic() + (30 if launcher == "ray" else 0)
    while not (all_ended := all(ended(pid) for pid, _ in running)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all_ended
    state = json.loads((tmp_path / "out" / "runs" / stopped[0] / "status.json").read_text())["state"]
    assert state == "interrupted" and len(results()) == 0
    again = command(*argv)
    assert again.returncode == 0, again.stderr
    assert len(results()) == 3
    if launcher != "ray":  # whose workers' lines are not shown
        # a job that had not begun to train when the signal came has nothing to go on from
        assert all(f"{run}: goes on from" in again.stdout for _, run in running)


@pytest.mark.nightly(long=True)
def test_a_worker_that_dies_ends_its_own_run_alone(tmp_path, small, command, outcomes, results):
    """joblib's is submitted again: `test_killed`."""
    pytest.importorskip("submitit")
    argv = ["-m", "hydra/launcher=submitit_local", "seed=1,2,3", *small, *LONG]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_lab", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    pid, lost = wait_for(lambda: training(tmp_path / "out"), process)[0]
    os.kill(pid, signal.SIGKILL)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "3 runs: 2 done, 1 interrupted" in out, out + error
    assert "Traceback" not in out + error and error.count("\n") == 1 and "sparse-lab: " in error
    [whole] = tmp_path.glob("out/sweeps/*/error.txt")
    assert re.match(rf"00\d-{lost}:\n", whole.read_text())
    finished = results()
    assert len(finished) == 2 and lost not in finished
    again = command(*argv)
    assert again.returncode == 0 and set(results()) - set(finished) == {lost}, again.stderr


def tree(pid: int) -> list[int]:
    """A process and everything that it started, itself first."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """A Ray node and its workers, from its own process tree."""
    for pid in tree(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # gone with its parent
    process.wait()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, the second node) of two Ray nodes with a processor each on this machine, which share a token."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    place = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # its sockets' paths must be short
    ray = str(Path(sys.executable).with_name("ray"))
    small = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false", f"--temp-dir={place}"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        with open(f"{place}.log", "wb") as log:
            for words in (["--node-ip-address=127.0.0.1", *head], [f"--address={address}"]):
                nodes.append(subprocess.Popen([ray, "start", *words, *small], stdout=log, stderr=log))
                waited = time.monotonic() + 90
                while not any("raylet" in _name(pid) for pid in tree(nodes[-1].pid)):
                    assert nodes[-1].poll() is None and time.monotonic() < waited, Path(f"{place}.log").read_text()
                    time.sleep(0.5)
                time.sleep(3)
        yield address, nodes[1]
    finally:
        for node in reversed(nodes):
            kill(node)
        shutil.rmtree(place, ignore_errors=True)
        Path(f"{place}.log").unlink(missing_ok=True)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


@pytest.mark.nightly(long=True)
def test_a_ray_cluster_that_loses_a_node_and_the_second_start(cluster, tmp_path, small, command, outcomes, results):
    address, node = cluster
    argv = ["-m", "hydra/launcher=ray", f"hydra.launcher.ray.init.address={address}"]
    argv += ["hydra.launcher.ray.remote.max_retries=0", "seed=1,2,3,4", *small, *LONGER]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_lab", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip

    def on_the_second_node() -> str | None:
        mine = set(tree(node.pid))
        # halfway: something is done, and this node is training
        return next((run for pid, run in training(tmp_path / "out") if pid in mine), None) if results() else None

    lost = wait_for(on_the_second_node, process)
    kill(node)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 1, (lost, out, error)
    finished = results()
    assert len(finished) == 3 and lost not in finished
    assert "4 runs: 3 done, 1 interrupted" in out
    assert any(line.startswith(f"  interrupted  {lost}") and "start the same command again" in line
               for line in out.splitlines())  # fmt: skip
    again = command(*argv)
    assert again.returncode == 0, again.stderr
    after = results()
    assert set(after) - set(finished) == {lost} and all(after[name] == finished[name] for name in finished)
    assert sorted(one["outcome"] for one in outcomes()) == ["done", "skipped", "skipped", "skipped"]
    record = json.loads((tmp_path / "out" / "runs" / lost / "metrics.csv").with_name("result.json").read_text())
    assert record["name"] == lost and len((tmp_path / "out" / "runs" / lost / "metrics.csv").read_text().split()) == 41
