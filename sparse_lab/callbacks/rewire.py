"""Drop and grow at a constant number of weights: SET, RigL and their ITOP forms are configs of this."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.schedules import DropFraction
from sparse_lab.sparsity.scores import Scores
from sparse_lab.sparsity.updates import drop_and_grow


@dataclass(frozen=True)
class Rewire:
    """A rule of `AfterStep`: when `schedule` is due, every layer drops its worst weights and grows as many."""

    schedule: DropFraction
    name: str = "rewire"

    def due(self, steps_done: int) -> bool:
        return self.schedule.due(steps_done)

    def change(
        self, masks: Masks, steps_done: int, drop: Scores, grow: Scores, chance: torch.Generator
    ) -> tuple[int, Scores]:
        return masks.kept(), drop_and_grow(masks, self.schedule.fraction(steps_done), drop, grow, chance)
