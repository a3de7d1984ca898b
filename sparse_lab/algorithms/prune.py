"""Pruning while training: when the schedule says so, to what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.algorithms.selectors import Selector
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.optimizer_state import reset_state
from sparse_lab.sparsity.schedules import Alternating, EpochEnds, Schedule


class Prune(pl.Callback):
    """Before a batch on which `schedule` is due, or after an epoch (`EpochEnds`), keep what `choice` says.

    In a dense turn (`Alternating`), and between epochs while the mask is soft, everything lives again: what comes back
    starts at zero.

    iterations: prune in so many steps of equal ratio, each by scores of what the one before has left.
    rewind: a state dict that the network goes back to at every mask change (weight rewinding, arXiv 1803.03635).
    """

    def __init__(
        self,
        choice: Selector,
        schedule: Schedule,
        masks: Masks,
        clock: Clock,
        seed: int,
        changed: Callable[[str, int], None],
        *,
        iterations: int = 1,
        rewind: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.choice = choice
        self.schedule = schedule
        self.masks = masks
        self.clock = clock
        self.seed = seed
        self.changed = changed
        self.iterations = iterations
        self.rewind = rewind
        self._changed_at: int | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = self.clock.step
        if isinstance(self.schedule, EpochEnds):
            if batch_idx == 0 and self.schedule.soft:
                self._open()
        elif self.schedule.due(step) and step != self._changed_at:  # the scaler may have skipped this step before
            self._changed_at = step
            sparsity = self.schedule.sparsity(step)
            if isinstance(self.schedule, Alternating) and sparsity == 0.0:
                self._open()
                for optimizer in trainer.optimizers:  # as AC/DC's authors do
                    reset_state(optimizer)
            else:
                self.to(sparsity, pl_module.get_submodule("model"), broadcast=trainer.strategy.broadcast)

    def scores_next(self) -> bool:
        """Is a pruning due before the next step that runs the network to score it?"""
        return self.choice.passes and not isinstance(self.schedule, EpochEnds) and self.schedule.due(self.clock.step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epoch = self.clock.epoch_in_round
        if trainer.is_last_batch and isinstance(self.schedule, EpochEnds) and self.schedule.due_after(epoch):
            sparsity = self.schedule.sparsity(self.clock.step)
            network, broadcast = pl_module.get_submodule("model"), trainer.strategy.broadcast
            self.to(sparsity, network, trainer.optimizers[0], whole=self.schedule.final(epoch), broadcast=broadcast)

    def to(
        self,
        sparsity: float,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        whole: bool = True,
        broadcast: Callable[[Any], Any] = lambda x: x,
    ) -> None:
        """Prune `model` to `sparsity` now; the clock's step seeds chance, `broadcast` makes rank 0's masks everyone's.

        whole=False: the mask is soft and will be lifted again.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.clock.step)
        now, asked = self.masks.kept() / self.masks.total(), self.masks.kept()
        for iteration in range(1, self.iterations + 1):
            last = iteration == self.iterations
            level = sparsity if last else 1.0 - now * ((1.0 - sparsity) / now) ** (iteration / self.iterations)
            asked, new = self.choice(level, model, generator, self.clock.round, whole)
            self.masks.set(broadcast(new), optimizer)
        if self.rewind is not None:
            model.load_state_dict(self.rewind, strict=False)  # it holds no masks
            self.masks.enforce(optimizer)
        self.changed("prune", asked)

    def _open(self) -> None:
        masks = self.masks.masks()
        if all(bool(mask.all()) for mask in masks.values()):
            return
        self.masks.set({name: torch.ones_like(mask) for name, mask in masks.items()})
        self.changed("open", self.masks.total())
