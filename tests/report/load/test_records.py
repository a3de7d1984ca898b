from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_lab.errors import UserError
from sparse_lab.records.atomic_io import write_record
from sparse_lab.report import read

Make = Callable[..., Path]


def test_every_finished_run_is_found_at_any_depth_and_once(make_run: Make, tmp_path: Path) -> None:
    first = make_run(seed=1, accuracy=91.0, folder="a/b/c/one")
    make_run(seed=2, accuracy=92.0, folder="two")
    records = read(tmp_path, tmp_path / "runs", first)
    assert sorted(run.accuracy for run in records.results) == [91.0, 92.0]
    assert not records.unfinished and not records.warnings


@pytest.mark.parametrize("text", ['{"cell": "ab', "", "[1, 2]", "\x00\x01", "[" * 100_000])
def test_a_broken_result_is_a_warning_and_its_run_is_listed(make_run: Make, tmp_path: Path, text: str) -> None:
    make_run(seed=1)
    broken = make_run(seed=2)
    (broken / "result.json").write_text(text)
    records = read(tmp_path)
    assert len(records.results) == 1
    assert [(run.name, run.status.state) for run in records.unfinished] == [(broken.name, "unreadable")]
    assert len(records.warnings) == 1 and str(broken / "result.json") in records.warnings[0]
    assert "\n" not in records.warnings[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"test_accuracy": None},
        {"test_accuracy": 101.0},
        {"test_accuracy": float("nan")},
        {"cell": None},
        {"seed": "1"},
        {"sparsity_target": None},
        {"name": ""},
        {"kept": -1},
        {"total": 10.5},
        {"seconds": "long"},
        {"config": []},
    ],
)
def test_a_result_that_cannot_be_tabulated_is_not_counted(
    make_run: Make, seal: Callable[..., None], tmp_path: Path, wrong: dict[str, object]
) -> None:
    path = make_run() / "result.json"
    seal(path, {**json.loads(path.read_text()), **wrong})
    records = read(tmp_path)
    assert not records.results and len(records.unfinished) == 1
    assert repr(next(iter(wrong))) in records.warnings[0]


def test_failed_and_broken_statuses_are_listed(make_status: Make, tmp_path: Path) -> None:
    make_status("f", state="failed", error="out of\nmemory")
    (make_status("g", state="running") / "status.json").write_text("{")
    found = {run.name: run.status for run in read(tmp_path).unfinished}
    assert (found["f"].state, found["f"].error, found["f"].epoch, found["f"].epochs) == (
        "failed",
        "out of memory",
        3,
        9,
    )
    assert found["g"].state == "unreadable"


def test_running_needs_a_living_process_on_this_host(make_status: Make, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    make_status("alive", state="running", pid=os.getpid(), host=here)
    make_status("dead", state="running", pid=gone.pid, host=here)
    make_status("elsewhere", state="running", pid=gone.pid, host=f"not-{here}")
    make_status("senseless", state="running", pid=-1, host=here)
    states = {run.name: run.status.state for run in read(tmp_path).unfinished}
    assert states == {"alive": "running", "dead": "interrupted", "elsewhere": "running", "senseless": "interrupted"}


def test_a_result_whose_checksum_is_wrong_does_not_count(make_run: Make, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        path = make_run(seed=seed, accuracy=90.0 + seed) / "result.json"
        write_record(path, json.loads(path.read_text()))
        if seed == 2:
            path.write_text(path.read_text().replace('"test_accuracy": 92.0', '"test_accuracy": 99.0'))
    records = read(tmp_path)
    assert [run.accuracy for run in records.results] == [91.0, 93.0]
    [run], [warning] = records.unfinished, records.warnings
    assert run.status.state == "unreadable" and "checksum" in warning
    assert str(run.folder / "result.json") in warning


def test_a_result_whose_checksum_was_taken_away_does_not_count(make_run: Make, tmp_path: Path) -> None:
    path = make_run(accuracy=90.0) / "result.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps({**record, "test_accuracy": 99.9}))
    records = read(tmp_path)
    assert not records.results and "its checksum is gone" in records.warnings[0]


def test_a_run_that_was_stopped_is_interrupted(make_status: Make, tmp_path: Path) -> None:
    make_status("stopped", state="interrupted", error="stopped by SIGTERM; the same command goes on")
    [run] = read(tmp_path).unfinished
    assert (run.status.state, run.status.error) == ("interrupted", "stopped by SIGTERM; the same command goes on")


def test_text_that_no_file_can_hold_is_made_storable(make_run: Make, tmp_path: Path) -> None:
    make_run(method="half \ud800 a pair", folder="half")
    [run] = read(tmp_path).results
    assert run.result["method"] == "half ? a pair"


def test_a_result_beside_a_failed_status_counts_with_a_warning(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    (folder / "status.json").write_text(json.dumps({"state": "failed", "error": "late"}))
    records = read(tmp_path)
    assert len(records.results) == 1 and "failed" in records.warnings[0]


def test_a_missing_root_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        read(tmp_path / "nowhere")


def test_the_room_needs_no_torch_no_hydra_and_no_window_system() -> None:
    heavy = "{'torch', 'pytorch_lightning', 'lightning', 'hydra', 'matplotlib'}"
    code = f"import sparse_lab.report, sparse_lab.cli.report, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
