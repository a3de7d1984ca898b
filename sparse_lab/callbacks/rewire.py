"""Drop and grow at a constant number of weights: SET, RigL and their ITOP forms are configs of this."""

from __future__ import annotations

from typing import Any

import torch

from sparse_lab.callbacks.after_step import AfterStep
from sparse_lab.sparsity.schedules import DropFraction
from sparse_lab.sparsity.scores import Scores
from sparse_lab.sparsity.updates import drop_and_grow


class Rewire(AfterStep):
    """When `schedule` is due, every layer drops its worst weights and grows as many."""

    name = "rewire"

    def __init__(self, schedule: DropFraction, *args: Any) -> None:
        super().__init__(*args)
        self.schedule = schedule

    def due(self, steps_done: int) -> bool:
        return steps_done < self.clock.steps_a_round and self.schedule.due(steps_done)

    def change(self, steps_done: int, drop: Scores, grow: Scores, chance: torch.Generator) -> tuple[int, Scores]:
        return self.masks.kept(), drop_and_grow(self.masks, self.schedule.fraction(steps_done), drop, grow, chance)
