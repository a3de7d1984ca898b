"""Pruned weights stay pruned: after every optimizer step that really happened."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.module import Classifier


class KeepMasks(pl.Callback):
    """Zeroes masked weights and their optimizer state in the optimizer's own post-step hook.

    The hook does not run when the gradient scaler skips a step, and it runs before anything else can see the weights.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._moved_live = pl_module.moved_live
        # a restored checkpoint or a move to a device has changed the buffers behind our back
        self.masks.refresh()
        self.masks.enforce()
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.masks.enforce(optimizer, but=self._moved_live(optimizer))
