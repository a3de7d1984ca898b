"""Where a sweep stands, read from its files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sparse_lab.errors import UserError
from sparse_lab.host import process
from sparse_lab.records.atomic_io import write_record
from sparse_lab.records.sweep_dir import MOST_JOBS, SweepFolder, duration, read_outcome, read_plan, read_running


def plan(names: list[str], seconds_ago: float = 0.0, **changes: object) -> dict[str, object]:
    started = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()
    about = {"command": "sparse-lab -m", "started": started, "pid": os.getpid(), "host": socket.gethostname()}
    return {**about, "jobs": len(names), "launcher": "basic", "runs": [{"name": name} for name in names], **changes}


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    (tmp_path / "sweeps" / "x").mkdir(parents=True)
    return SweepFolder(tmp_path / "sweeps" / "x")


RESULT = {
    **{"name": "e", "cell": "c", "model": "vgg16", "dataset": "digits", "method": "dense", "seed": 1},
    **{"test_accuracy": 90.0, "kept": 10, "total": 10, "seconds": 1.0, "config": {}},
}


def run(folder: SweepFolder, name: str, **files: dict[str, object]) -> None:
    (folder.runs / name).mkdir(parents=True)
    for stem, content in files.items():
        write_record(folder.runs / name / f"{stem}.json", content)


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_each_job_is_what_its_files_say(folder):
    folder.write_plan(plan(list("abcdefg")))
    folder.outcome(0, {"run": "a", "outcome": "done", "said": "90.00%"})
    folder.outcome(1, {"run": "b", "outcome": "failed", "said": "no memory"})
    folder.begin(2, "c")
    run(folder, "c", status={"state": "running", "epoch": 3, "epochs": 4})
    folder.begin(3, "d")
    about = json.loads((folder.path / "running-003.json").read_text())
    write_record(folder.path / "running-003.json", {"run": "d", "pid": dead(), "host": about["host"]})
    run(folder, "e", result=RESULT)
    (folder.path / "005.json").write_text('{"run": "f", "outcome": "do')
    overview = folder.look()
    assert overview is not None
    states = [job.state for job in overview.jobs]
    assert states == ["done", "failed", "running", "interrupted", "done", "waiting", "waiting"]
    assert overview.jobs[2].share == 0.75 and overview.left == 4 and overview.alive
    assert overview.jobs[4].said == "done already" and not overview.jobs[4].here


def test_expected_time_counts_parts_of_runs_and_only_what_this_start_did(folder):
    folder.write_plan(plan(list("abcde"), seconds_ago=100))
    folder.outcome(0, {"run": "a", "outcome": "skipped", "said": "done already"})
    folder.outcome(1, {"run": "b", "outcome": "done", "said": ""})
    folder.begin(2, "c")
    run(folder, "c", status={"state": "running", "epoch": 1, "epochs": 4})
    overview = folder.look()
    assert overview is not None
    # 1.25 runs in 100 s; 2.75 are left
    assert overview.seconds_left() == pytest.approx(100 * 2.75 / 1.25, rel=0.02)
    assert overview.line() == "2 of 5 runs done, 1 running, 2 waiting, about 4 min left"


def test_nothing_is_expected_of_a_sweep_whose_command_is_gone(folder):
    folder.write_plan(plan(["a", "b"], pid=dead()))
    folder.outcome(0, {"run": "a", "outcome": "done", "said": ""})
    overview = folder.look()
    assert overview is not None and not overview.alive and overview.seconds_left() is None


def test_what_still_says_it_runs_when_the_command_has_ended_is_interrupted(folder):
    folder.write_plan(plan(["a"]))
    folder.begin(0, "a")
    folder.end(plan(["a"]))
    overview = folder.look()
    assert overview is not None and overview.jobs[0].state == "interrupted"


def test_a_changed_plan_does_not_count(folder):
    folder.write_plan(plan(["a"]))
    content = json.loads((folder.path / "plan.json").read_text())
    (folder.path / "plan.json").write_text(json.dumps({**content, "jobs": 7}))
    assert folder.look() is None


def test_a_process_that_has_the_number_of_an_ended_one_is_not_it(folder):
    """Neither shown as running nor sent a signal."""
    reused = {**process.about(), "pid_started": 1}
    folder.write_plan(plan(["a", "b"], **reused))
    write_record(folder.path / "running-000.json", {"run": "a", **reused})
    folder.begin(1, "b")
    overview = folder.look()
    assert overview is not None and not overview.alive
    assert [job.state for job in overview.jobs] == ["interrupted", "running"]
    assert folder.running() == [(os.getpid(), socket.gethostname())]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"jobs": MOST_JOBS + 1}, "'jobs'"),
        ({"jobs": 10**9}, "'jobs'"),
        ({"jobs": 0}, "'jobs'"),
        ({"jobs": True}, "'jobs'"),
        ({"jobs": 3}, "'runs' holds more or fewer"),
        ({"runs": 7}, "'runs'"),
        ({"runs": [{"name": "a"}, 7]}, "'runs'"),
        ({"runs": [{"name": "a"}, {"name": "../b"}]}, "'runs'"),
        ({"pid": "7"}, "'pid'"),
        ({"host": None}, "'host'"),
        ({"started": "yesterday"}, "'started'"),
        ({"started": "2026-01-01T00:00:00"}, "'started'"),  # of which time zone?
        ({"ended": 7}, "'ended'"),
    ],
)
def test_a_plan_that_is_none_is_named(changes, said, folder):
    folder.write_plan({**plan(["a", "b"]), **changes})
    warnings: list[str] = []
    assert folder.look(warnings) is None and folder.planned_names() == []
    assert len(warnings) == 1 and f"plan.json: {said}" in warnings[0]


def test_a_search_plans_no_runs(folder):
    folder.write_plan({**plan([]), "jobs": 3})
    overview = folder.look()
    assert overview is not None and [job.run for job in overview.jobs] == ["", "", ""]


def test_what_the_sweep_writes_is_what_its_readers_take(folder):
    folder.write_plan(plan(["a"]))
    assert read_plan(folder.path / "plan.json")["runs"] == [{"name": "a"}]
    folder.begin(0, "a")
    assert not process.is_gone(read_running(folder.path / "running-000.json"))
    folder.outcome(0, {"run": "", "outcome": "failed", "said": "no such file", "swept": ["a=1"], "value": None})
    assert read_outcome(folder.path / "000.json")["swept"] == ["a=1"]


@pytest.mark.parametrize("name", [".lock", "plan.json", "000.json", "stop"])
@pytest.mark.parametrize("what", ["pipe", "folder", "loop"])
def test_the_same_sweep_starts_in_a_folder_that_holds_anything(name, what, tmp_path):
    """Or says in one line why it cannot."""
    path = tmp_path / "sweeps" / "abc" / name
    path.parent.mkdir(parents=True)
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: os.symlink(path.name, path)}[what](path)
    if what == "folder" or name == ".lock":
        with pytest.raises(UserError, match="abc"), SweepFolder.claim(tmp_path, "abc"):
            pass
    else:
        with SweepFolder.claim(tmp_path, "abc") as folder:
            assert not path.exists() and not folder.asked_to_stop


def test_duration():
    assert [duration(s) for s in (0.1, 59, 119, 121, 7100, 7300, 200000)] == [
        "1 s", "59 s", "119 s", "2 min", "118 min", "2 h", "2 d"
    ]  # fmt: skip
