"""One row an epoch: into metrics.csv always, into dashboards where some are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from sparse_lab.callbacks.rounds import Rounds
from sparse_lab.record import RunFolder


class History(pl.Callback):
    """Writes the row that `rounds` has just made, with the masks' figures, and the run's status."""

    def __init__(
        self, folder: RunFolder, rounds: Rounds, mask_figures: Callable[[], dict[str, Any]], say: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.rounds = rounds
        self.mask_figures = mask_figures
        self.say = say
        self._dead_loggers: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.cut_metrics(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        row = {**self.rounds.row, **self.mask_figures()}
        if trainer.is_global_zero:
            self.folder.add_metrics(row)
            self.folder.progress(row["epoch"], self.rounds.clock.total_epochs)
        for logger in trainer.loggers:
            self._log(logger, row)

    def _log(self, logger: Any, row: dict[str, Any]) -> None:
        """A dashboard that is down or misconfigured is said once; the run goes on."""
        if id(logger) in self._dead_loggers:
            return
        try:
            logger.log_metrics({key: float(value) for key, value in row.items()}, step=row["step"])
        except Exception as error:
            self._dead_loggers.add(id(logger))
            self.say(f"WARNING: {type(logger).__name__} failed and is left out from here on: {error}")
