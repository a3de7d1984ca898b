"""Pruned weights stay pruned: after every optimizer step that really happened."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from sparse_lab.sparsity.masks import Masks
from sparse_lab.training.lightning_module import Classifier


class EnforceMasks(pl.Callback):
    """What is masked gets no gradient, so no optimizer moves it: weight and state are zero and stay so. One number a
    weight is touched, where zeroing weights and state after the step would touch up to three.

    Where the gradients of pruned weights are read after the step they are left whole, and weights and state are zeroed
    in the optimizer's own post-step hook; so are those whose mask has changed. The hook does not run when the gradient
    scaler skips a step, and it runs before anything else can see the weights.
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._module = pl_module
        self._cut = False
        self._weights = frozenset(self.masks.weights().values())
        # a restored checkpoint or a move to a device has changed the buffers behind our back
        self.masks.refresh()
        self.masks.enforce()
        pl_module.after_clipping.append(self._cut_gradients)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._after_step)

    def _cut_gradients(self) -> None:
        # sparse arithmetic has no others than live ones, but where they are read
        self._cut = self._module.arithmetic is None and not self._module.gradients_are_read()
        if self._cut:
            self.masks.cut_gradients()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.masks.enforce(optimizer, but=self._weights if self._cut else self._module.moved_live(optimizer))
