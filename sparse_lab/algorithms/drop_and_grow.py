"""Drop and grow: SET, RigL, their ITOP forms, GraNet and MEST are configs of this."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_lab.sparsity.mask_updates import drop_and_grow, drop_then_grow, prune_to
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.schedules import Bounds, Cubic, DropFraction
from sparse_lab.sparsity.scores import Scores


@dataclass(frozen=True)
class DropAndGrow:
    """A rule of `AfterStep`: when `schedule` is due, every layer drops its worst weights and grows as many.

    pruning: how sparse the network becomes meanwhile, if it does; before each exchange the worst weights by `drop`,
    split by `distribution`, go first (GraNet, arXiv 2106.10404).
    """

    schedule: DropFraction
    pruning: Cubic | None = None
    distribution: str = "global"
    name: str = "drop_and_grow"

    def due(self, steps_done: int) -> bool:
        return self.schedule.due(steps_done) or (self.pruning is not None and steps_done == self.pruning.end)

    def change(
        self, masks: Masks, steps_done: int, drop: Scores, grow: Scores, chance: torch.Generator
    ) -> tuple[int, list[Scores]]:
        fraction = self.schedule.fraction(steps_done)
        if self.pruning is None:
            return masks.kept(), [drop_and_grow(masks.masks(), fraction, drop, grow, chance)]
        kept = min(masks.kept(), num_kept(self.pruning.sparsity(steps_done), masks.total()))
        pruned = prune_to(masks, kept, drop, self.distribution)
        # set by itself first: what is pruned may grow at once, and then it starts from zero
        return kept, [pruned, drop_and_grow(pruned, fraction, drop, grow, chance)]


@dataclass(frozen=True)
class ElasticMutation:
    """A rule of `AfterStep`: when `bounds` is due, the network drops to the lower bound and grows to the upper one
    (elastic mutation, and with an upper bound above the target its soft memory bound; MEST, arXiv 2110.14032).
    """

    bounds: Bounds
    target: float
    distribution: str
    name: str = "elastic_mutation"

    def due(self, steps_done: int) -> bool:
        return self.bounds.due(steps_done)

    def change(
        self, masks: Masks, steps_done: int, drop: Scores, grow: Scores, chance: torch.Generator
    ) -> tuple[int, list[Scores]]:
        low, high = (
            num_kept(1.0 - times * (1.0 - self.target), masks.total()) for times in self.bounds.densities(steps_done)
        )
        return high, [drop_then_grow(masks, low, high, drop, grow, self.distribution, chance)]
