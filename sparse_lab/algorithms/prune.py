"""Pruning while training: when the schedule says so, to what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_lab.algorithms.enforce import Changed, MaskAlgorithm, nobody
from sparse_lab.algorithms.selectors import Selector, WeightSelector
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.optimizer_state import reset_state
from sparse_lab.sparsity.schedules import Alternating, Cubic, EpochEnds, Schedule
from sparse_lab.sparsity.state import load_state


class Prune(MaskAlgorithm):
    """Before a step on which `schedule` is due, or after an epoch (`EpochEnds`), keep what `selector` says.

    In a dense turn (`Alternating`), and between epochs while the mask is soft, everything lives again: what comes back
    starts at zero.

    total_steps: of the training. iterations: prune in so many steps of equal ratio, each by scores of what the one
    before has left. rewind: a state dict that the network goes back to at every mask change (weight rewinding, arXiv
    1803.03635). changed: told of each change, with the number of weights that it was to keep.
    """

    order = 20

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        schedule: Schedule,
        *,
        total_steps: int | None = None,
        iterations: int = 1,
        rewind: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        changed: Changed = nobody,
    ) -> None:
        super().__init__(selector.masks, seed, changed)
        self.model = model
        self.selector = selector
        self.schedule = schedule
        self.total_steps = total_steps
        self.iterations = iterations
        self.rewind = rewind
        self.changes = 0

    def begin_step(self, optimizer: Optimizer) -> None:
        if isinstance(self.schedule, EpochEnds):
            first = self._ended_at == self.step  # of an epoch
            if self.schedule.soft and first and not self.schedule.final(self.epoch - 1):
                self._open()
        elif self.schedule.due(self.step):
            sparsity = self.schedule.sparsity(self.step)
            if isinstance(self.schedule, Alternating) and sparsity == 0.0:
                self._open()
                reset_state(optimizer)  # as AC/DC's authors do
            else:
                self.to(sparsity, optimizer)

    def scores_next(self) -> bool:
        return self.selector.passes and not isinstance(self.schedule, EpochEnds) and self.schedule.due(self.step)

    def end_epoch(self, optimizer: Optimizer) -> None:
        if isinstance(self.schedule, EpochEnds) and self.schedule.due_after(self.epoch):
            self.to(self.schedule.sparsity(self._last_step()), optimizer, soft=not self.schedule.final(self.epoch))

    def to(self, sparsity: float, optimizer: Optimizer | None = None, *, soft: bool = False) -> None:
        """Prune to `sparsity` now; the step seeds chance. soft: the mask will be lifted again."""
        generator = self.generator(self._last_step())
        now, asked = self.masks.kept() / self.masks.total(), self.masks.kept()
        for iteration in range(1, self.iterations + 1):
            last = iteration == self.iterations
            level = sparsity if last else 1.0 - now * ((1.0 - sparsity) / now) ** (iteration / self.iterations)
            asked, new = self.selector(level, self.model, generator, self.changes, soft)
            self.masks.set(self.broadcast(new), optimizer)
        if self.rewind is not None:
            load_state(self.model, self.rewind, strict=False)  # it holds no masks
            self.masks.enforce(optimizer)
        self.changes += 1
        self.changed("prune", asked)

    def _last_step(self) -> int:
        """The step, or the training's last one where that is over."""
        return self.step if self.total_steps is None else min(self.step, self.total_steps - 1)

    def _open(self) -> None:
        masks = self.masks.masks()
        if all(bool(mask.all()) for mask in masks.values()):
            return
        self.masks.set({name: torch.ones_like(mask) for name, mask in masks.items()})
        self.changed("open", self.masks.total())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "changes": self.changes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.changes = state["changes"]


class GMP(Prune):
    """Gradual magnitude pruning (Zhu & Gupta 2017, arXiv 1710.01878): the smallest weights of every layer go, each
    layer being as sparse as the others, along `schedule`.
    """

    def __init__(self, model: nn.Module, masks: Masks, schedule: Cubic, **more: Any) -> None:
        super().__init__(model, WeightSelector(masks, "magnitude", "uniform"), schedule, **more)
