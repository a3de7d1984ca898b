"""Drop and grow: SET, RigL, their ITOP forms, GraNet and MEST."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_lab.algorithms.after_step import MaskUpdate
from sparse_lab.sparsity.mask_updates import drop_and_grow, drop_then_grow, prune_to
from sparse_lab.sparsity.masks import Masks, num_kept
from sparse_lab.sparsity.schedules import Bounds, Cubic, DropFraction
from sparse_lab.sparsity.scores import Scores


class DropAndGrow(MaskUpdate):
    """When `schedule` is due, every layer drops its worst weights and grows as many.

    pruning: how sparse the network becomes meanwhile, if it does; before each update the worst weights by `drop`,
    split by `distribution`, go first (GraNet, arXiv 2106.10404).
    """

    name = "drop_and_grow"

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        total_steps: int,
        schedule: DropFraction,
        *,
        pruning: Cubic | None = None,
        distribution: str = "global",
        **more: Any,
    ) -> None:
        super().__init__(model, masks, total_steps, **more)
        self.schedule = schedule
        self.pruning = pruning
        self.distribution = distribution

    def due(self, step: int) -> bool:
        return self.schedule.due(step) or (self.pruning is not None and step == self.pruning.end)

    def update(self, step: int, drop: Scores, grow: Scores, generator: torch.Generator) -> tuple[int, list[Scores]]:
        fraction = self.schedule.fraction(step)
        if self.pruning is None:
            return self.masks.kept(), [drop_and_grow(self.masks.masks(), fraction, drop, grow, generator)]
        kept = min(self.masks.kept(), num_kept(self.pruning.sparsity(step), self.masks.total()))
        pruned = prune_to(self.masks, kept, drop, self.distribution)
        # set by itself first: what is pruned may grow at once, and then it starts from zero
        return kept, [pruned, drop_and_grow(pruned, fraction, drop, grow, generator)]


class SET(DropAndGrow):
    """Drop the smallest, grow at random (Mocanu et al. 2018, arXiv 1707.04780)."""

    def __init__(self, *rest: Any, **more: Any) -> None:
        super().__init__(*rest, **{"drop": "magnitude", "grow": "random", **more})


class RigL(DropAndGrow):
    """SET that grows where the gradient is largest (Evci et al. 2020, arXiv 1911.11134)."""

    def __init__(self, *rest: Any, **more: Any) -> None:
        super().__init__(*rest, **{"drop": "magnitude", "grow": "gradient", **more})


class GraNet(RigL):
    """RigL that becomes sparser meanwhile, along `pruning` (Liu et al. 2021, arXiv 2106.10404)."""

    def __init__(
        self, model: nn.Module, masks: Masks, total_steps: int, schedule: DropFraction, pruning: Cubic, **more: Any
    ) -> None:
        super().__init__(model, masks, total_steps, schedule, pruning=pruning, **more)


class ElasticMutation(MaskUpdate):
    """When `bounds` is due, the network drops to the lower bound and grows to the upper one (with an upper bound above
    the target its soft memory bound; MEST, arXiv 2110.14032). target: the sparsity that bounds are densities of.
    """

    name = "elastic_mutation"

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        total_steps: int,
        bounds: Bounds,
        *,
        target: float,
        distribution: str = "uniform",
        **more: Any,
    ) -> None:
        super().__init__(model, masks, total_steps, **more)
        self.bounds = bounds
        self.target = target
        self.distribution = distribution

    def due(self, step: int) -> bool:
        return self.bounds.due(step)

    def update(self, step: int, drop: Scores, grow: Scores, generator: torch.Generator) -> tuple[int, list[Scores]]:
        low, high = (
            num_kept(1.0 - times * (1.0 - self.target), self.masks.total()) for times in self.bounds.densities(step)
        )
        return high, [drop_then_grow(self.masks, low, high, drop, grow, self.distribution, generator)]


class MEST(ElasticMutation):
    """The worst by |w| + |g| go, random ones come (Yuan et al. 2021, arXiv 2110.14032)."""

    def __init__(self, *rest: Any, **more: Any) -> None:
        super().__init__(*rest, **{"drop": "mest", "grow": "random", **more})
