from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sparse_lab.cli.report import main
from sparse_lab.cli.status import main as status_main

Make = Callable[..., Path]


def test_report_writes_beside_the_runs_by_default(
    make_run: Make, make_status: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(accuracy=91.2)
    make_status("lost", state="failed", error="no memory")
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert (tmp_path / "report.md").is_file()
    assert "91.20 [91.03 ± 0.17]" in said.out and "missing: lost (failed: no memory)" in said.out
    assert main([str(tmp_path), "--out", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "accuracy.png").is_file()


def test_broken_json_is_a_warning_line(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(seed=1)
    (make_run(seed=2) / "result.json").write_text("{")
    assert main([str(tmp_path)]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "result.json" in line


@pytest.mark.parametrize("verb", [main, status_main])
def test_nothing_to_report_is_one_line_and_exit_2(
    verb: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb([str(tmp_path)]) == 2
    assert verb([str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("verb", [main, status_main])
def test_help_and_wrong_arguments(verb: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        verb(["--help"])
    assert stop.value.code == 0 and "DIR" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        verb([])
    assert stop.value.code == 2


def test_status_says_what_every_run_does(
    make_run: Make, make_status: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(accuracy=91.234, folder="d")
    hours_ago = (datetime.now(UTC) - timedelta(hours=3, minutes=5)).isoformat()
    make_status("a", state="running", pid=os.getpid(), host=socket.gethostname(), updated=hours_ago)
    make_status("b", state="running", pid=-1, host=socket.gethostname(), updated="not a time")
    make_status("c", state="failed", error="no memory")
    assert status_main([str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["a", "running", "3/9", "3", "h", "ago"]
    assert lines[1] == ["b", "interrupted", "3/9"]
    assert lines[2] == ["c", "failed", "3/9", "no", "memory"]
    assert lines[3][1:4] == ["done", "160/160", "91.23%"]
    assert " ".join(lines[4]) == "4 runs: 1 done, 1 failed, 1 interrupted, 1 running"


def test_status_survives_odd_records(make_status: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_status("odd", state="running", pid="x", host=None, updated=None)
    (folder / "status.json").write_text(json.dumps({"state": ["?"], "epoch": "three"}))
    assert status_main([str(tmp_path)]) == 0
    assert "unreadable" in capsys.readouterr().out
