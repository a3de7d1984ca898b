"""MLflow: one MLflow run a run, found again by the run's hash."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from sparse_lab.loggers.base import RunInfo, flat

HASH = "sparse_lab.hash"
MOST_PARAMS, LONGEST_PARAM = 100, 6000  # of one request, of one value: MLflow's own limits
MOST_METRICS = 1000
# nothing is sent home and nothing printed; a server that does not answer is given up within minutes, not a quarter hour
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Mlflow:
    """Metrics by step, the config as params, the table as levels.json.

    Where: logger.mlflow_uri, else MLFLOW_TRACKING_URI, else a SQLite file beside the runs. A run that goes on is found
    by its tag and goes on as the same MLflow run: the last step that the server has is asked for, and rows up to it are
    not sent again. A run that is made anew after it had finished gets a new MLflow run.
    """

    def __init__(self) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        import mlflow

        for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # they would tell every retry
            logging.getLogger(name).setLevel(logging.ERROR)
        self.mlflow = mlflow
        self.client: Any = None
        self.run = ""
        self.last = -1

    def open(self, about: RunInfo) -> None:
        uri = about.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None if uri else (about.outputs / "mlflow-artifacts").resolve().as_uri()
        client = self.mlflow.MlflowClient(uri or f"sqlite:///{(about.outputs / 'mlflow.db').resolve()}")
        experiment = self._experiment(client, about.project, artifacts)
        over = "" if about.step else " and attributes.status != 'FINISHED'"
        found = client.search_runs(
            [experiment],
            f"tags.`{HASH}` = '{about.hash}'{over}",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if found:
            self.run = found[0].info.run_id
            client.update_run(self.run, status="RUNNING")
            self.last = max((one.step for one in client.get_metric_history(self.run, "epoch")), default=-1)
        else:
            tags = {HASH: about.hash, "sparse_lab.group": about.group}
            self.run = client.create_run(experiment, run_name=about.name, tags=tags).info.run_id
        self.client = client
        param = self.mlflow.entities.Param
        params = [param(name, str(value)[:LONGEST_PARAM]) for name, value in flat(about.config).items()]
        for begin in range(0, len(params), MOST_PARAMS):
            client.log_batch(self.run, params=params[begin : begin + MOST_PARAMS])

    def _experiment(self, client: Any, name: str, artifacts: str | None) -> str:
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return client.create_experiment(name, artifact_location=artifacts)
            except self.mlflow.MlflowException:  # another run was faster
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def log(self, row: dict[str, float], step: int) -> None:
        if step > self.last:
            self._send(row, step)

    def _send(self, row: dict[str, float], step: int) -> None:
        metric, now = self.mlflow.entities.Metric, int(1000 * time.time())
        metrics = [metric(name, value, now, step) for name, value in row.items()]
        for begin in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.run, metrics=metrics[begin : begin + MOST_METRICS])

    def summary(self, figures: dict[str, float], step: int) -> None:
        self._send({f"final/{name}": value for name, value in figures.items()}, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[float]], step: int) -> None:
        # as MLflow's own log_table writes it, which would add to the table of an earlier start
        text = json.dumps({"columns": list(columns), "data": [list(row) for row in rows]})
        self.client.log_text(self.run, text, f"{name}.json")

    def close(self, failed: bool) -> None:
        if self.client is not None:
            self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")
