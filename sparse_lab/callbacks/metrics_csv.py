"""One row an epoch into metrics.csv, and the run's status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from sparse_lab.records.run_dir import RunDir
from sparse_lab.sparsity.clock import Clock


class MetricsCsv(pl.Callback):
    """Writes `row()`, as it stands at the end of an epoch."""

    def __init__(self, folder: RunDir, clock: Clock, row: Callable[[], dict[str, Any]]) -> None:
        self.folder = folder
        self.clock = clock
        self.row = row

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.cut_metrics(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            row = self.row()
            self.folder.add_metrics(row)
            self.folder.progress(row["epoch"], self.clock.total_epochs)
