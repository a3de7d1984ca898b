"""W&B, read back from the files that it leaves, by W&B's own reader: `wandb leet inspect`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_lab.experiment.identity import run_dir, settings
from sparse_lab.experiment.runner import run

WANDB = Path(sys.executable).with_name("wandb")


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No account, no settings of whoever runs the tests; nor the service that W&B names in the environment of a process
    that has logged: a child would write through it, and a kill of the child would not end it.
    """
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


def read(config) -> list[dict]:
    """What each offline folder of the run says: summary of the whole, and its records by kind."""

    def inspect(*options: str | Path) -> str:
        done = subprocess.run([WANDB, "leet", "inspect", "--json", *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = []
    for folder in sorted((run_dir(config).path / "wandb").glob("offline-run-*")):
        whole = inspect("--summary", folder)
        records = [json.loads(line) for line in inspect(folder).splitlines()]
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        begin = next(record["run"] for record in records if record["type"] == "run")
        found.append({"folder": folder, "whole": json.loads(whole), "rows": rows, "run": begin})
    return found


@pytest.mark.full
def test_offline_without_a_key_and_everything_arrives(compose, quiet, metrics):
    config = compose(
        "method=iterative", "sparsity=s90", "schedule.iterative.share=0.6", "logger=wandb", "logger.project=demo"
    )
    result = run(config, "x", quiet)
    (seen,) = read(config)
    whole, rows = seen["whole"], [row for row in seen["rows"] if "epoch" in row]
    assert whole["config"] == drop_empty(settings(config))
    assert (whole["run_id"], whole["name"]) == (result["hash"], result["name"])
    assert (whole["project"], seen["run"]["run_group"]) == ("demo", "iterative-0.9")
    assert (whole["state"], whole["exit_code"]) == ("finished", 0)
    assert [row["_step"] for row in rows] == [row["step"] for row in metrics(config)]
    for row, written in zip(rows, metrics(config), strict=True):
        assert all(row[key] == pytest.approx(value) for key, value in written.items() if key != "step")
        assert "masks/effective_share" in row and "density/features.0" in row
    for key in ("test_accuracy", "validation_accuracy", "kept", "sparsity"):
        assert whole["summary"][key] == pytest.approx(result[key])
    (table,) = seen["folder"].glob("files/media/table/levels_*.table.json")
    data = json.loads(table.read_text())
    assert data["columns"] == ["level", "sparsity", "kept", "validation_accuracy", "test_accuracy"]
    assert [row[4] for row in data["data"]] == [level["test_accuracy"] for level in result["levels"]]


def drop_empty(plain: dict) -> dict:
    """W&B keeps no empty group."""
    inner = {key: drop_empty(value) if isinstance(value, dict) else value for key, value in plain.items()}
    return {key: value for key, value in inner.items() if value != {}}


@pytest.mark.full
def test_two_runs_in_one_process_stay_two_and_a_failed_one_goes_on_under_its_id(compose, quiet, plug, metrics):
    import wandb

    config, other = (compose("method=dense", "logger=wandb", f"seed={seed}") for seed in (1, 2))
    plug(2)
    with pytest.raises(RuntimeError, match="plug"):
        run(config, "x", quiet)
    plug(0)
    run(other, "x", quiet)
    run(config, "x", quiet)
    assert wandb.run is None
    failed, done = read(config)
    (alone,) = read(other)
    assert (failed["whole"]["state"], failed["whole"]["exit_code"]) == ("failed", 1)
    assert (done["whole"]["state"], done["whole"]["exit_code"]) == ("finished", 0)
    assert failed["whole"]["run_id"] == done["whole"]["run_id"] != alone["whole"]["run_id"]
    steps = [row["_step"] for part in (failed, done) for row in part["rows"] if "epoch" in row]
    assert steps == [row["step"] for row in metrics(config)], "each row once, over both folders"
    assert [row["epoch"] for row in alone["rows"] if "epoch" in row] == [1, 2, 3]


@pytest.mark.full
def test_no_key_is_written(compose, quiet, monkeypatch):
    key = "0123456789abcdef" * 3
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = compose("method=dense", "logger=wandb")
    run(config, "x", quiet)
    assert read(config)
    files = [path for path in run_dir(config).path.rglob("*") if path.is_file()]
    assert not [path for path in files if key.encode() in path.read_bytes()]


ONLINE = """
import sys
from rich.console import Console
from sparse_lab.loggers import thread
from sparse_lab.sweep.plan import Request
from sparse_lab.experiment.runner import run
thread.PATIENCE = 2.0
run(Request.read([]).compose(sys.argv[1:]).config(), "x", Console(width=300))
print("over")
"""


@pytest.mark.full
def test_online_without_an_answer_the_run_goes_on_and_the_process_ends(small, monkeypatch):
    """A server that takes connections and never says a word; the process must not hang in W&B's hooks at exit."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        command = [sys.executable, "-c", ONLINE, *small, "method=dense", "logger=wandb"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("logger=wandb is left out") == 1
    assert done.stdout.strip().endswith("over") and "level 1/1" in done.stdout


@pytest.mark.nightly
def test_a_killed_run_goes_on_in_a_second_folder(compose, small):
    request = ("method=dense", "logger=wandb", "dataset.train_limit=null", "training.epochs=12")
    config = compose(*request)
    command = [sys.executable, "-m", "sparse_lab", *small, *request]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        # W&B writes once a second; a row has about 400 bytes, what stands before the first one 2,500
        while sum(file.stat().st_size for file in run_dir(config).path.glob("wandb/offline-run-*/*.wandb")) < 4000:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    first, second = ([row["epoch"] for row in part["rows"] if "epoch" in row] for part in read(config))
    assert 1 <= len(first) < 12 and first == list(range(1, len(first) + 1)), "what was on disk when it was killed"
    assert second == list(range(second[0], 13)) and second[0] > 1


@pytest.mark.full
def test_online_without_a_key_is_never_a_prompt(compose, quiet, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setenv("WANDB_MODE", "online")
    run(compose("method=dense", "logger=wandb"), "x", Console(width=300))
    assert (
        capsys.readouterr().out.count("logger=wandb is left out from here on: ConnectionError nobody is logged in") == 1
    )
