"""DyReLU early in training, fading into ReLU (EAST, arXiv 2411.13545)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from sparse_lab.models import dyrelu
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.optimizer_state import remove_params
from sparse_lab.training.lightning_module import Classifier


def beta(step: int, begin: int, end: int) -> float:
    """How much DyReLU there is at optimizer step `step`: 1 up to `begin`, then linear down to 0 at `end`."""
    if step >= end:
        return 0.0
    return 1.0 if step <= begin else (end - step) / (end - begin)


class DyReLUPhasing(pl.Callback):
    """Sets beta before every step; at 0 it puts plain ReLUs there, and the optimizer forgets what is gone.

    begin, end: steps. The network's answer is the same before and after the replacement.
    """

    def __init__(self, begin: int, end: int, clock: Clock, say: Callable[[str], None]) -> None:
        self.begin = begin
        self.end = end
        self.clock = clock
        self.say = say
        self._beta: float | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = self.clock.step_in_round
        now = beta(step, self.begin, self.end)
        if now == self._beta:  # most steps: the walk through the network is only for those that change something
            return
        self._beta = now
        network = pl_module.get_submodule("model")
        dyrelu.fade(network, now)
        gone = dyrelu.remove(network) if now == 0.0 else []
        if not gone:
            return
        for optimizer in trainer.optimizers:
            remove_params(optimizer, gone)
        assert isinstance(pl_module, Classifier)
        if pl_module.step is not None:
            pl_module.step.renew()
        self.say(f"step {step}: DyReLU has faded into ReLU, its {sum(p.numel() for p in gone):,} parameters are gone")
