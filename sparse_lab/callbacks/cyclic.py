"""Cyclic sparsity (EAST, arXiv 2411.13545): density rises and falls, and ends at exactly the target."""

from __future__ import annotations

from typing import Any

import torch

from sparse_lab.callbacks.after_step import AfterStep
from sparse_lab.sparsity.masks import kept_for
from sparse_lab.sparsity.schedules import Cyclic
from sparse_lab.sparsity.scores import Scores
from sparse_lab.sparsity.updates import move_to


class CyclicSparsity(AfterStep):
    """When `schedule` is due, every layer moves to its share (by `allocation`) of the new number of weights: it grows
    its best pruned weights, or keeps the best that are alive.
    """

    name = "cycle"

    def __init__(self, schedule: Cyclic, allocation: str, *args: Any) -> None:
        super().__init__(*args)
        self.schedule = schedule
        self.allocation = allocation

    def due(self, steps_done: int) -> bool:
        return self.schedule.due(steps_done)

    def change(self, steps_done: int, drop: Scores, grow: Scores, chance: torch.Generator) -> tuple[int, Scores]:
        kept = kept_for(self.schedule.sparsity(steps_done), self.masks.total())
        return kept, move_to(self.masks, kept, drop, grow, self.allocation, chance)
