"""Dashboards beside metrics.csv: extra, never needed. One that is down is said once; the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger


class Dashboards(pl.Callback):
    """Opens each dashboard when training starts, sends it one row an epoch, closes it whatever happens.

    The trainer does not know of them: it would open them unguarded.
    """

    def __init__(
        self, factories: dict[str, Callable[[], Logger]], row: Callable[[], dict[str, Any]], say: Callable[[str], None]
    ) -> None:
        self.factories = factories
        self.row = row
        self.say = say
        self.open: dict[str, Logger] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, factory in self.factories.items() if trainer.is_global_zero else ():
            try:
                self.open[name] = factory()
            except Exception as error:
                self._drop(name, error)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        row = self.row() if self.open else {}
        for name, logger in list(self.open.items()):
            try:
                logger.log_metrics({key: float(value) for key, value in row.items()}, step=row["step"])
            except Exception as error:
                self._drop(name, error)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close("success")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close("failed")

    def _close(self, status: str) -> None:
        for name, logger in list(self.open.items()):
            try:
                logger.finalize(status)
                if name == "wandb":  # or the next run of a sweep would go on in this one
                    logger.experiment.finish(exit_code=status == "failed")  # type: ignore[attr-defined]
            except Exception as error:
                self._drop(name, error)
        self.open = {}

    def _drop(self, name: str, error: Exception) -> None:
        self.open.pop(name, None)
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        self.say(f"WARNING: logger={name} failed and is left out from here on: {type(error).__name__} {first}")
