"""Trackio, read back through its own API. It keeps one folder a process, so runs are made in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sparse_lab.experiment.identity import settings

pytestmark = pytest.mark.full

TOKEN = "hf_" + "x" * 30  # Trackio would ask the hub whose it is

MAKE = """
import sys
from rich.console import Console
from sparse_lab.callbacks.checkpoint import Checkpoint
from sparse_lab.sweep.plan import Request
from sparse_lab.experiment.runner import run
import os, socket

def no_network(*_):
    os._exit(9)  # an exception would be swallowed

socket.socket.connect = no_network
config = Request.read([]).compose(sys.argv[2:]).config()
if sys.argv[1] == "fail":
    original = Checkpoint.on_train_epoch_end
    def save_and_fail(self, trainer, module):
        original(self, trainer, module)
        raise RuntimeError("somebody pulled the plug")
    Checkpoint.on_train_epoch_end = save_and_fail
run(config, "x", Console(width=300))
"""

READ = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
def rows(run):
    return SQLiteStorage.get_logs("demo", run.name, run_id=run.id)

runs = trackio.Api().runs("demo")
told = [{"name": run.name, "id": run.id, "config": run.config, "rows": rows(run)} for run in runs]
print(json.dumps(told, default=str))
"""


def python(code, *args, **environment):
    plain = {name: value for name, value in os.environ.items() if name != "TRACKIO_DIR"}
    everything = {**plain, "HF_TOKEN": TOKEN, **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=everything, timeout=180
    )


def test_rows_are_read_back_and_a_run_goes_on_as_itself(compose, small, tmp_path, metrics):
    request = ("method=static", "sparsity=s90", "logger=trackio", "logger.project=demo")
    config = compose(*request)
    failed = python(MAKE, "fail", *small, *request)
    assert "somebody pulled the plug" in failed.stderr
    done = python(MAKE, "", *small, *request)
    assert done.returncode == 0 and "left out" not in done.stdout, done.stdout + done.stderr
    answer = python(READ, TRACKIO_DIR=str(tmp_path / "trackio"))
    (seen,) = json.loads(answer.stdout.splitlines()[-1])
    result = json.loads((tmp_path / "runs" / seen["name"] / "result.json").read_text())
    assert seen["id"] == result["hash"] and seen["config"]["_Group"] == "static-0.9"
    assert {key: value for key, value in seen["config"].items() if key[0] != "_"} == settings(config)
    rows = [row for row in seen["rows"] if "epoch" in row]
    assert [row["step"] for row in rows] == [row["step"] for row in metrics(config)]
    for row, written in zip(rows, metrics(config), strict=True):
        assert all(row[key] == pytest.approx(value) for key, value in written.items())
    assert "masks/effective_share" in rows[0]
    (final,) = [row for row in seen["rows"] if "final/test_accuracy" in row]
    assert final["final/test_accuracy"] == result["test_accuracy"]
    (table,) = [row["levels"] for row in seen["rows"] if "levels" in row]
    assert table["_value"][0]["kept"] == result["kept"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_folder_that_cannot_be_written_is_said_once(small, tmp_path):
    (tmp_path / "a_file").write_text("")
    done = python(MAKE, "", *small, "method=dense", "logger=trackio", TRACKIO_DIR=str(tmp_path / "a_file"))
    assert done.returncode == 0 and done.stdout.count("logger=trackio is left out from here on") == 1, done.stdout
