"""`checkpoints/last.ckpt`: everything that a run needs to go on, written whole; `previous.ckpt` is the one before."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from sparse_lab.record import RunFolder
from sparse_lab.training.files import random_state, set_random_state
from sparse_lab.training.stop import StopRequest
from sparse_lab.whole import seal


class SaveLast(pl.Callback):
    """Saves every `every` epochs and at the last one, and at once when the run is asked to stop; then it stops.

    Must stand last in the list of callbacks: what the others change at a step's or an epoch's end is then inside.
    """

    def __init__(self, folder: RunFolder, every: int, finished: Callable[[], bool], stop: StopRequest) -> None:
        self.folder = folder
        self.every = every
        self.finished = finished
        self.stop = stop

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # the last step of an epoch is saved with the epoch: its validation and its row in metrics.csv belong to it
        if batch_idx + 1 < trainer.num_training_batches and self.stop.wanted(trainer):
            self._save(trainer)
            raise self.stop.stopped(self._saved(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop = self.stop.wanted(trainer)
        if stop or (trainer.current_epoch + 1) % self.every == 0 or self.finished():
            self._save(trainer)
        if stop and not self.finished():
            raise self.stop.stopped(self._saved(trainer))

    def _saved(self, trainer: pl.Trainer) -> str:
        return f"saved at step {trainer.global_step:,}; start the same command again to go on"

    def _save(self, trainer: pl.Trainer) -> None:
        last = self.folder.last
        temporary = last.with_name(f".{last.name}.tmp")
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                seal(temporary)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                if last.exists():
                    os.replace(last, self.folder.previous)
                os.replace(temporary, last)
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["random_state"] = random_state()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._random_state = checkpoint["random_state"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored = self.__dict__.pop("_random_state", None)
        if restored is not None:
            set_random_state(restored)
        self.stop.listen()
        self.stop.training = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stop.training = False
