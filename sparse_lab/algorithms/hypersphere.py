"""Hyperspherical training that needs no training after pruning (Pruning On-the-fly, arXiv 2212.12651)."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sparse_lab.algorithms.prune import Prune
from sparse_lab.config import SphereConfig
from sparse_lab.models import offsets
from sparse_lab.sparsity.clock import Clock


class Hypersphere(pl.Callback):
    """Filters live on the unit sphere, and a penalty empties the positions that pruning is going to take.

    The paper gives no formula that we could read; this is ours. In front of BatchNorm the length of a filter has no
    say, so every convolution's filters are brought back to length 1 after each step. With K the positions that would be
    kept now, the penalty of a filter is the share of its squared length outside of K,
    E = (sum over j not in K of w_j^2) / ||w||^2, whose gradient 2 w_j / ||w||^2 * ([j not in K] - E) pulls what is
    outside to zero and, the length being fixed, pushes what is inside away from it. The penalties of all filters add
    up, times `config.penalty`, which rises linearly from 0 over the training. After the last step `prune` takes what
    is outside of K, and, with `config.recovery`, the mean of what it took from a filter stands in its place.
    """

    def __init__(self, config: SphereConfig, prune: Prune, clock: Clock) -> None:
        self.config = config
        self.prune = prune
        self.masks = prune.masks
        self.clock = clock
        self._inside: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (
            self.clock.round == 0 and self.clock.step_in_round == 0
        ):  # what a checkpoint holds is of length 1 but for rounding
            self._normalise()
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._normalise())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = self.clock.step_in_round
        # an epoch's first step always looks, so that a run that goes on from a checkpoint sees the same
        if step % self.clock.steps_an_epoch % self.config.every == 0 or not self._inside:
            generator = torch.Generator().manual_seed(step)
            sparsity = self.prune.schedule.sparsity(step)
            chosen = self.prune.choice(sparsity, pl_module.get_submodule("model"), generator, 0, True)[1]
            self._inside = trainer.strategy.broadcast(chosen)
        strength = self.config.penalty * step / self.clock.steps_a_round
        for name, weight in self.masks.weights().items():
            if weight.grad is not None:
                weight.grad.add_(outside(weight.detach(), self._inside[name]), alpha=strength)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (trainer.is_last_batch and self.clock.in_last_epoch):
            return
        before = {name: weight.detach().clone() for name, weight in self.masks.weights().items()}
        self.prune.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.config.recovery:
            network = pl_module.get_submodule("model")
            offsets.recover(network, {name: mean_of_pruned(before[name], self.masks[name]) for name in before})

    @torch.no_grad()
    def _normalise(self) -> None:
        for weight in self.masks.weights().values():
            if weight.dim() > 2:
                weight.div_(_lengths(weight).clamp_min(torch.finfo(weight.dtype).tiny))


def outside(weight: Tensor, inside: Tensor) -> Tensor:
    """Gradient of every filter's share of squared length outside of `inside` (bool), shape of the weight."""
    squares = _lengths(weight).square().clamp_min(torch.finfo(weight.dtype).tiny)
    share = (weight * ~inside).square().flatten(1).sum(1).view(squares.shape) / squares
    return 2.0 * weight / squares * ((~inside).to(weight.dtype) - share)


def mean_of_pruned(weight: Tensor, mask: Tensor) -> Tensor:
    """For each filter the mean of its values where `mask` is False; 0 where nothing is pruned: [out]."""
    pruned = ~mask
    return (weight * pruned).flatten(1).sum(1) / pruned.flatten(1).sum(1).clamp_min(1)


def _lengths(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1).view(-1, *(1,) * (weight.dim() - 1))
