"""MLflow: a real server on SQLite, read back through its API; a server that dies; one that never answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from sparse_lab.callbacks.metrics_csv import MetricsCsv
from sparse_lab.experiment.identity import settings
from sparse_lab.experiment.runner import run
from sparse_lab.loggers import thread
from sparse_lab.loggers.base import flat

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A dead server is given up in seconds, not in the minutes that a real run can spare."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real `mlflow server` on SQLite: (address, process). The process is stopped at the end, with its workers.

    One for this file: it takes many seconds to start. The test that kills it stands behind the one that needs it alive.
    """
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    command = [Path(sys.executable).with_name("mlflow"), "server", "--port", str(port), "--workers", "1", *store]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()
                time.sleep(0.25)
        yield address, process
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    """The server and its workers: a session of their own."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait(10)


def test_two_runs_and_one_that_goes_on_are_read_back_through_the_api(server, compose, quiet, plug, metrics):
    from mlflow import MlflowClient

    address, _ = server
    where = ("logger=mlflow", f"logger.mlflow_uri={address}", "logger.project=demo")
    config = compose("method=dense", "seed=2", *where)
    plug(2)
    with pytest.raises(RuntimeError, match="plug"):
        run(config, "x", quiet)
    client = MlflowClient(address)
    (experiment,) = [one for one in client.search_experiments() if one.name == "demo"]
    (seen,) = client.search_runs([experiment.experiment_id])
    assert seen.info.status == "FAILED"
    plug(0)
    other = compose("method=iterative", "sparsity=s90", "schedule.iterative.share=0.6", "seed=2", *where)
    results = {result["name"]: (one, result) for one in (config, other) for result in [run(one, "x", quiet)]}
    runs = client.search_runs([experiment.experiment_id])
    assert {one.info.run_name for one in runs} == set(results) and len(runs) == 2, "resumed into the same MLflow run"
    for one in runs:
        asked, result = results[one.info.run_name]
        assert one.info.status == "FINISHED"
        assert one.data.tags["sparse_lab.hash"] == result["hash"]
        assert one.data.params == {key: str(value) for key, value in flat(settings(asked)).items()}
        for key in ("validation_accuracy", "train_loss", "kept"):
            history = sorted((point.step, point.value) for point in client.get_metric_history(one.info.run_id, key))
            assert history == [(row["step"], pytest.approx(row[key])) for row in metrics(asked)], "each row once"
        assert one.data.metrics["final/test_accuracy"] == result["test_accuracy"]
        table = json.loads(Path(client.download_artifacts(one.info.run_id, "levels.json")).read_text())
        assert [row[2] for row in table["data"]] == [level["kept"] for level in result["levels"]]
    assert "masks/effective_share" in client.get_run(seen_pruned(runs)).data.metrics


def seen_pruned(runs) -> str:
    return next(one.info.run_id for one in runs if "iterative" in one.info.run_name)


def test_a_server_that_dies_in_the_middle_is_said_once(server, compose, monkeypatch, capsys, metrics):
    address, process = server
    original = MetricsCsv.on_train_epoch_end

    def kill_after_the_first(self, trainer, module):
        if trainer.current_epoch == 1:
            stop(process)
        original(self, trainer, module)

    monkeypatch.setattr(MetricsCsv, "on_train_epoch_end", kill_after_the_first)
    config = compose("method=dense", "training.epochs=6", "logger=mlflow", f"logger.mlflow_uri={address}")
    result = run(config, "x", Console(width=300))
    assert result["levels"][0]["epochs"] == 6 and len(metrics(config)) == 6
    out = capsys.readouterr()
    assert out.out.count("logger=mlflow is left out from here on") == 1
    assert "Retrying" not in out.err


def test_a_server_that_never_answers_does_not_slow_training(compose, monkeypatch, capsys, metrics):
    monkeypatch.setattr(thread, "PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.settimeout(60)
        where = f"logger.mlflow_uri=http://127.0.0.1:{deaf.getsockname()[1]}"
        config = compose("method=dense", "training.epochs=6", "logger=mlflow", where)
        run(config, "x", Console(width=300))
        connection, _ = deaf.accept()  # it was asked, and the run is over before it said a word
        connection.close()
    assert len(metrics(config)) == 6
    assert capsys.readouterr().out.count("logger=mlflow is left out from here on: it has not taken everything") == 1


def test_without_a_server_a_file_beside_the_runs(compose, quiet, tmp_path, metrics):
    from mlflow import MlflowClient

    config = compose("method=dense", "logger=mlflow")
    result = run(config, "x", quiet)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sparse_lab")
    (seen,) = client.search_runs([experiment.experiment_id])
    assert seen.data.metrics["final/test_accuracy"] == result["test_accuracy"]
    assert len(client.get_metric_history(seen.info.run_id, "train_loss")) == 3
    assert list((tmp_path / "mlflow-artifacts").rglob("levels.json"))
    assert not Path("mlruns").exists(), "nothing lands in the folder that the command was called from"
