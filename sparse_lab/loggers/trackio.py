"""Trackio: a dashboard like W&B's on this machine alone, in one SQLite file beside the runs."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_lab.loggers.base import RunInfo


class Trackio:
    """Rows go straight into Trackio's own local store: `trackio.init` would ask the Hugging Face hub who is logged in,
    could be sent to a Space by an environment variable, and prints.

    Where: TRACKIO_DIR, else `trackio` beside the runs. A run that goes on is found by its hash; rows up to the last
    step that Trackio has are not sent again. Trackio knows no end of a run, so a failed one cannot be marked.
    """

    def __init__(self, outputs: Path) -> None:
        where = Path(os.environ.setdefault("TRACKIO_DIR", str((outputs / "trackio").resolve())))
        from trackio import utils
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.table import Table

        if where != utils.TRACKIO_DIR:
            raise RuntimeError(f"Trackio was loaded with TRACKIO_DIR={utils.TRACKIO_DIR} and cannot change it")
        self.store = SQLiteStorage
        self.Table = Table
        self.run: dict[str, Any] = {}
        self.last = -1

    def open(self, about: RunInfo) -> None:
        self.store.validate_project_name(about.project)
        self.run = {"project": about.project, "run": about.name, "run_id": about.hash}
        self.config: dict[str, Any] | None = {
            **about.config,
            "_Created": datetime.datetime.now(datetime.UTC).isoformat(),
            "_Group": about.group,
        }
        last = self.store.get_max_step_for_run(about.project, about.name, run_id=about.hash)
        self.last = -1 if last is None else last

    def log(self, row: dict[str, float], step: int) -> None:
        if step > self.last:
            self._write(row, step)

    def _write(self, row: dict[str, Any], step: int) -> None:
        self.store.bulk_log(**self.run, metrics_list=[row], steps=[step], config=self.config)
        self.config = None

    def summary(self, figures: dict[str, float], step: int) -> None:
        self._write({f"final/{name}": value for name, value in figures.items()}, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[float]], step: int) -> None:
        table = self.Table(columns=list(columns), data=[list(row) for row in rows])
        project, run = self.run["project"], self.run["run"]
        self._write({name: table._to_dict(project=project, run=run, step=step)}, step)

    def close(self, failed: bool) -> None:
        pass  # every row is on disk already
