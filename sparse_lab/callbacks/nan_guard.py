"""A loss that is no number stops the run, with the step at which it happened."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sparse_lab.errors import UserError
from sparse_lab.training.accumulation import steps_after


class NanGuard(pl.Callback):
    """Keeps the first bad step on the device; reads it every step on a CPU, once an epoch elsewhere (no sync in a
    step).
    """

    def __init__(self) -> None:
        self.first_bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"]
        stepped = steps_after(batch_idx, int(trainer.num_training_batches), trainer.accumulate_grad_batches)
        # of a batch that only adds to a step: of that one
        step = torch.full_like(loss, trainer.global_step + (not stepped), dtype=torch.long)
        bad = torch.where(torch.isfinite(loss), torch.full_like(step, -1), step)
        self.first_bad = bad if self.first_bad is None else torch.where(self.first_bad >= 0, self.first_bad, bad)
        if loss.device.type == "cpu":
            self._stop_if_bad(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_bad(pl_module)

    def _stop_if_bad(self, pl_module: pl.LightningModule) -> None:
        if self.first_bad is not None and int(self.first_bad) >= 0:
            raise UserError(
                f"the loss became NaN or infinite at step {int(self.first_bad)}: lower training.lr or clip gradients"
            )
