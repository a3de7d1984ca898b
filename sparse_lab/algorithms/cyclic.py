"""Cyclic sparsity (EAST, arXiv 2411.13545): density rises and falls, and ends at exactly the target."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_lab.algorithms.after_step import MaskUpdate
from sparse_lab.sparsity.mask_updates import move_to
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.schedules import Cyclic
from sparse_lab.sparsity.scores import Scores


class CyclicSparsity(MaskUpdate):
    """When `schedule` is due, every layer moves to its share (by `distribution`) of the new number of weights: it grows
    its best pruned weights, or keeps the best that are alive.
    """

    name = "cycle"

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        total_steps: int,
        schedule: Cyclic,
        *,
        distribution: str = "erk",
        **more: Any,
    ) -> None:
        super().__init__(model, masks, total_steps, **more)
        self.schedule = schedule
        self.distribution = distribution

    def due(self, step: int) -> bool:
        return self.schedule.due(step)

    def update(self, step: int, drop: Scores, grow: Scores, generator: torch.Generator) -> tuple[int, list[Scores]]:
        kept = num_kept(self.schedule.sparsity(step), self.masks.total())
        return kept, [move_to(self.masks, kept, drop, grow, self.distribution, generator)]
