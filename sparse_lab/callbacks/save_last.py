"""`checkpoints/last.ckpt`: everything that a run needs to go on, written whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from sparse_lab.training.files import random_state, set_random_state


class SaveLast(pl.Callback):
    """Saves every `every` epochs and at the last one: to a temporary file, then renamed. Random states are in it.

    Must stand last in the list of callbacks: what the others change at an epoch's end is then inside.
    """

    def __init__(self, path: Path, every: int, finished: Callable[[], bool]) -> None:
        self.path = path
        self.every = every
        self.finished = finished

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every and not self.finished():
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
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
