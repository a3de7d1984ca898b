"""Pruning while training: when the schedule says so, to the number of weights that it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_lab.config import PruneConfig
from sparse_lab.sparsity.masks import Masks, kept_for
from sparse_lab.sparsity.schedules import Schedule
from sparse_lab.sparsity.scores import View, find
from sparse_lab.sparsity.updates import prune_to
from sparse_lab.training.clock import Clock

Reserve = Callable[[torch.Generator, Mapping[str, int]], Mapping[str, Tensor]]


class Prune(pl.Callback):
    """Before a batch on which `schedule` is due, keep the best weights by `config.score`, split by
    `config.allocation`. `reserve` may name positions that come first, given the layers' counts.
    """

    def __init__(
        self,
        config: PruneConfig,
        schedule: Schedule,
        masks: Masks,
        clock: Clock,
        batches: Callable[[int], Sequence[tuple[Tensor, Tensor]]],
        seed: int,
        changed: Callable[[str, int], None],
        reserve: Reserve | None = None,
    ) -> None:
        self.score = find(config.score)
        self.config = config
        self.schedule = schedule
        self.masks = masks
        self.clock = clock
        self.batches = batches
        self.seed = seed
        self.changed = changed
        self.reserve = reserve
        self._pruned_at: int | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = self.clock.step
        if self.schedule.due(step) and step != self._pruned_at:  # the same step comes again where the scaler skipped it
            self._pruned_at = step
            self.to(self.schedule.sparsity(step), pl_module.model, step, trainer.strategy.broadcast)  # type: ignore[arg-type]

    def to(self, sparsity: float, model: nn.Module, step: int, broadcast: Callable[[Any], Any] = lambda x: x) -> None:
        """Prune `model` to `sparsity` now; `step` seeds random scores, `broadcast` makes rank 0's masks everyone's."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        view = View(model, partial(self.batches, self.config.batches), generator)
        kept = kept_for(sparsity, self.masks.total())
        first = None if self.reserve is None else partial(self.reserve, generator)
        self.masks.set(broadcast(prune_to(self.masks, kept, self.score(view), self.config.allocation, first)))
        self.changed("prune", kept)
