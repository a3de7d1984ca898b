"""Hyperspherical training that needs no training after pruning (Pruning On-the-fly, arXiv 2212.12651)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_lab.algorithms.enforce import Changed, MaskAlgorithm, nobody
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.selectors import Selector
from sparse_lab.models import offsets
from sparse_lab.sparsity.schedules import EpochEnds


class Hypersphere(MaskAlgorithm):
    """Filters live on the unit sphere, and a penalty empties the positions that pruning is going to take.

    The paper gives no formula that we could read; this is ours. In front of BatchNorm the length of a filter has no
    say, so every convolution's filters are brought back to length 1 after each step. With K the positions that would be
    kept now, the penalty of a filter is the share of its squared length outside of K,
    E = (sum over j not in K of w_j^2) / ||w||^2, whose gradient 2 w_j / ||w||^2 * ([j not in K] - E) pulls what is
    outside to zero and, the length being fixed, pushes what is inside away from it. The penalties of all filters add
    up, times `penalty`, which rises linearly from 0 over the training. After the last step what is outside of K goes
    (`schedule`, `selector`), and, with `recovery`, the mean of what went from a filter stands in its place.

    every: steps of an epoch between two looks at K. steps_an_epoch, total_steps: of the training.
    """

    order = 40

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        schedule: EpochEnds,
        *,
        steps_an_epoch: int,
        total_steps: int,
        penalty: float = 1.0,
        every: int = 10,
        recovery: bool = True,
        seed: int = 0,
        changed: Changed = nobody,
    ) -> None:
        super().__init__(selector.masks, seed, changed)
        self.model = model
        self.prune = Prune(model, selector, schedule, total_steps=total_steps, seed=seed, changed=changed)
        self.steps_an_epoch = steps_an_epoch
        self.total_steps = total_steps
        self.penalty = penalty
        self.every = every
        self.recovery = recovery
        self._inside: dict[str, Tensor] = {}

    def attach(self, optimizer: Optimizer, broadcast: Callable[[Any], Any] | None = None) -> None:
        super().attach(optimizer, broadcast)
        self.prune.broadcast = self.broadcast
        if self.step == 0:  # what a checkpoint holds is of length 1 but for rounding
            self._normalise()

    def gradients_ready(self, optimizer: Optimizer) -> None:
        if self.step % self.steps_an_epoch % self.every == 0 or not self._inside:
            generator = torch.Generator().manual_seed(self.step)
            sparsity = self.prune.schedule.sparsity(self.step)
            self._inside = self.broadcast(self.prune.selector(sparsity, self.model, generator, 0, soft=False)[1])
        strength = self.penalty * self.step / self.total_steps
        for name, weight in self.masks.weights().items():
            if weight.grad is not None:
                weight.grad.add_(outside(weight.detach(), self._inside[name]), alpha=strength)

    def after_step(self, optimizer: Optimizer) -> None:
        self._normalise()

    def end_epoch(self, optimizer: Optimizer) -> None:
        self.prune.step, self.prune.epoch = self.step, self.epoch
        before = {name: weight.detach().clone() for name, weight in self.masks.weights().items()}
        self.prune.end_epoch(optimizer)
        if self.recovery and self.prune.changes:
            offsets.recover(self.model, {name: mean_of_pruned(before[name], self.masks[name]) for name in before})

    @torch.no_grad()
    def _normalise(self) -> None:
        for weight in self.masks.weights().values():
            if weight.dim() > 2:
                weight.div_(_lengths(weight).clamp_min(torch.finfo(weight.dtype).tiny))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inside": self._inside}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._inside = state["inside"]


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
