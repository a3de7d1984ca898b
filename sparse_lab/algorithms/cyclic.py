"""Cyclic sparsity (EAST, arXiv 2411.13545): density rises and falls, and ends at exactly the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_lab.sparsity.mask_updates import move_to
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.schedules import Cyclic
from sparse_lab.sparsity.scores import Scores


@dataclass(frozen=True)
class CyclicSparsity:
    """A rule of `AfterStep`: when `schedule` is due, every layer moves to its share (by `distribution`) of the new
    number of weights: it grows its best pruned weights, or keeps the best that are alive.
    """

    schedule: Cyclic
    distribution: str
    name: str = "cycle"

    def due(self, steps_done: int) -> bool:
        return self.schedule.due(steps_done)

    def change(
        self, masks: Masks, steps_done: int, drop: Scores, grow: Scores, chance: torch.Generator
    ) -> tuple[int, list[Scores]]:
        kept = num_kept(self.schedule.sparsity(steps_done), masks.total())
        return kept, [move_to(masks, kept, drop, grow, self.distribution, chance)]
