"""DyReLU early in training, fading into ReLU (EAST, arXiv 2411.13545)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparse_lab.algorithms.base import Algorithm
from sparse_lab.errors import SparseLabError
from sparse_lab.models import dyrelu
from sparse_lab.sparsity.optimizer_state import remove_params


def beta(step: int, begin: int, end: int) -> float:
    """Return how much DyReLU there is at optimizer step `step`: 1 up to `begin`, then linear down to 0 at `end`."""
    if step >= end:
        return 0.0
    return 1.0 if step <= begin else (end - step) / (end - begin)


class DyReLUPhasing(Algorithm):
    """Sets beta before every step; at 0 it puts plain ReLUs there, and the optimizer forgets what is gone.

    begin, end: steps. The network's answer is the same before and after the replacement. removed: told of the step and
    of the number of parameters that are gone.
    """

    order = 10

    def __init__(
        self, model: nn.Module, begin: int, end: int, *, removed: Callable[[int, int], None] = lambda step, number: None
    ) -> None:
        super().__init__()
        self.model = model
        self.begin = begin
        self.end = end
        self.removed = removed
        self._beta: float | None = None

    def attach(self, optimizer: Optimizer, broadcast: Callable[[Any], Any] | None = None) -> None:
        if self.step < self.end and not dyrelu.activations(self.model):
            raise SparseLabError("there is no DyReLU in this network: models.dyrelu.install puts them in")
        super().attach(optimizer, broadcast)

    def begin_step(self, optimizer: Optimizer) -> None:
        now = beta(self.step, self.begin, self.end)
        if now == self._beta:  # most steps: the walk through the network is only for those that change something
            return
        self._beta = now
        dyrelu.fade(self.model, now)
        gone = dyrelu.remove(self.model) if now == 0.0 else []
        if gone:
            remove_params(optimizer, gone)
            self.removed(self.step, sum(parameter.numel() for parameter in gone))
