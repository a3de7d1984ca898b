"""`sparse-lab status` on sweeps: planned runs, progress, many runs, small terminals."""

from __future__ import annotations

import json
import os
import pty
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_lab.cli import status
from sparse_lab.records.atomic_io import write_record
from sparse_lab.records.sweep_dir import SweepFolder, now

HERE = {"pid": os.getpid(), "host": socket.gethostname()}


def result(name: str, seed: int) -> dict[str, object]:
    return {
        "name": name, "cell": "c", "model": "vgg16", "dataset": "digits", "method": "oneshot", "seed": seed,
        "sparsity_target": 0.9, "test_accuracy": 91.5, "kept": 1, "total": 10, "seconds": 1.0, "config": {},
        "layers": {f"features.{i}.weight": i for i in range(60)},
    }  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path):
    """sweep(done, running, waiting) -> a plan and its runs under tmp_path."""

    def make(done: int, running: int, waiting: int, **changes: object) -> list[str]:
        names = [f"vgg16-digits-oneshot-90-seed{number}-0123456789" for number in range(done + running + waiting)]
        folder = SweepFolder(tmp_path / "sweeps" / "abcdef01")
        folder.path.mkdir(parents=True)
        about = {"command": "sparse-lab -m", "started": now(), **HERE, "jobs": len(names), "launcher": "basic"}
        folder.write_plan({**about, "runs": [{"name": name} for name in names], **changes})
        for number, name in enumerate(names[: done + running]):
            (tmp_path / "runs" / name).mkdir(parents=True)
            state = {"state": "done" if number < done else "running", "epoch": 1, "epochs": 2, "updated": now(), **HERE}
            (tmp_path / "runs" / name / "status.json").write_text(json.dumps(state))
            if number < done:
                write_record(tmp_path / "runs" / name / "result.json", result(name, number))
                folder.outcome(number, {"run": name, "outcome": "done", "said": "91.50%"})
            else:
                folder.begin(number, name)
        return names

    return make


def test_planned_runs_and_the_sweep_are_listed(tmp_path, sweep, capsys):
    names = sweep(2, 1, 3)
    assert status.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:6]] == [
        [name, state] for name, state in zip(names, ["done"] * 2 + ["running"] + ["waiting"] * 3, strict=True)
    ]
    assert lines[6] == "6 runs: 2 done, 1 running, 3 waiting"
    assert lines[7].startswith("sweep abcdef01: 2 of 6 runs done, 1 running, 3 waiting, about ")


def test_a_sweep_whose_command_is_gone_says_what_to_do(tmp_path, sweep, capsys):
    sweep(1, 0, 1, pid=2**22 + 1)
    assert status.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("no longer going: start the same command again")


@pytest.mark.full
def test_a_thousand_runs_are_quick_and_read_once(tmp_path, sweep, monkeypatch):
    sweep(1000, 0, 0)
    place = status.Place(tmp_path)
    began = time.perf_counter()
    place.look()
    assert time.perf_counter() - began < 5.0
    read: list[Path] = []
    monkeypatch.setattr(status, "read", lambda folder: read.append(folder) or pytest.fail("read again"))
    began = time.perf_counter()
    place.look()
    assert not read and len(place.rows) == 1000 and time.perf_counter() - began < 1.5


def test_a_changed_run_is_read_again(tmp_path, sweep):
    names = sweep(1, 1, 0)
    place = status.Place(tmp_path)
    place.look()
    assert [row.state for row in place.rows] == ["done", "running"]
    failed = {"state": "failed", "error": "no memory", "updated": now()}
    (tmp_path / "runs" / names[1] / "status.json").write_text(json.dumps(failed))
    place.look()
    assert [(row.state, row.outcome) for row in place.rows] == [("done", "91.50%"), ("failed", "no memory")]


def test_a_low_terminal_shows_what_runs_and_failed_first(tmp_path, sweep):
    from rich.console import Console

    sweep(30, 1, 5)
    place = status.Place(tmp_path)
    place.look()
    console = Console(width=120, height=8, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(status._screen(place, 8))
    lines = console.export_text().splitlines()
    assert len(lines) <= 8 and lines[0].startswith("36 runs:") and lines[1].startswith("sweep abcdef01: 30 of 36")
    assert "seed30-" in lines[2] and "running" in lines[2] and lines[-1] == "... and 33 more"


def test_in_a_terminal_it_follows_until_nothing_runs(tmp_path, sweep):
    names = sweep(1, 1, 0)
    plan = json.loads((tmp_path / "sweeps" / "abcdef01" / "plan.json").read_text())
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_lab", "status", str(tmp_path)],
        stdout=follower, stderr=follower, stdin=follower, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(follower)
    seen, finished, deadline = b"", False, time.monotonic() + 40
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                seen += os.read(leader, 65536)
            except OSError:
                break
        if b"1 running" in seen and not finished:
            finished = True
            name = names[1]
            (tmp_path / "runs" / name / "status.json").write_text(json.dumps({"state": "done"}))
            write_record(tmp_path / "runs" / name / "result.json", result(name, 1))
            folder = SweepFolder(tmp_path / "sweeps" / "abcdef01")
            folder.outcome(1, {"run": name, "outcome": "done", "said": "91.50%"})
            folder.end({key: value for key, value in plan.items() if key != "checksum"})
    assert process.wait(timeout=10) == 0
    os.close(leader)
    assert finished and b"2 of 2 runs done; ended" in seen
