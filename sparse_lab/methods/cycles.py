"""Cyclic sparsity (EAST): density rises and falls in cycles before it settles at the target."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, ClassVar

from sparse_lab.config import Config, MethodConfig
from sparse_lab.errors import UserError
from sparse_lab.methods.base import (
    FROM_GRADIENTS,
    Component,
    Site,
    check_moves,
    check_scores,
    with_clipping,
)
from sparse_lab.methods.recipes import recipe_of
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import Constant, Cyclic, Schedule

if TYPE_CHECKING:
    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.methods.networks import Structure


class Cycles(Component):
    part = "cycles"
    needs = ("prune",)
    not_with = ("hypersphere", "elastic_mutation")
    schedules = ("constant",)
    from_scratch = True
    explores = True
    paced_by = ("every", "lengths", "unit")
    read_when: ClassVar = {"gradients": with_clipping(part)}

    def check(self, config: Config, structure: Structure) -> None:
        from sparse_lab.sparsity.distributions import DISTRIBUTIONS
        from sparse_lab.sparsity.masks import num_kept

        cycles, prune, epochs = config.method.cycles, config.method.prune, recipe_of(config).epochs
        assert cycles is not None and prune is not None
        check_scores("method.cycles", cycles.drop, cycles.grow)
        listed = f"method.cycles.lengths={list(cycles.lengths)} ({cycles.unit})"
        if not cycles.lengths or min(cycles.lengths) <= 0:
            raise UserError(f"{listed}: give the length of each cycle, above 0")
        if sum(cycles.lengths) >= (1.0 if cycles.unit == "share" else epochs):
            raise UserError(
                f"{listed}: together as long as the training ({epochs} epochs) or longer, but its end must be at the "
                "target"
            )
        if prune.distribution not in DISTRIBUTIONS:
            raise UserError(
                "method.cycles split each density anew: "
                f"method.prune.distribution={prune.distribution} must be one of {', '.join(DISTRIBUTIONS)}"
            )
        check_moves(f"method.cycles.multiplier={cycles.multiplier:.12g}", config, structure, cycles.multiplier - 1.0)
        size, density = structure.size(config), 1.0 - config.sparsity.target
        most = num_kept(1.0 - cycles.multiplier * density, size.total)
        if most > size.unique:
            highest = math.floor(1000 * size.unique / (density * size.total)) / 1000
            raise UserError(
                f"method.cycles.multiplier={cycles.multiplier:.12g}: density would pass 1.0 ({most:,} weights of "
                f"{size.unique:,}): use at most {highest:.12g}, or a higher sparsity.target"
            )

    def sparsity(self, config: Config, clock: Clock) -> Schedule | None:
        return cycles_of(config, clock)

    def begins(self, config: Config, clock: Clock) -> Schedule | None:
        return Constant(config.sparsity.target)

    def settles(self, config: Config, clock: Clock) -> int:
        return cycles_of(config, clock).end

    def build(self, site: Site) -> list[Algorithm]:
        from sparse_lab.algorithms.cyclic import CyclicSparsity

        cycles, prune = site.config.method.cycles, site.config.method.prune
        assert cycles is not None and prune is not None and site.masks is not None
        return [
            CyclicSparsity(
                site.model,
                site.masks,
                site.clock.steps_a_round,
                cycles_of(site.config, site.clock),
                distribution=prune.distribution,
                **site.of_updates(cycles),
            )
        ]

    def idle(self, config: Config, clock: Clock) -> list[str]:
        found = cycles_of(config, clock)
        if min(found.lengths) > found.every:
            return []
        return [
            f"density does not move in a cycle of {min(found.lengths):,} steps: "
            f"train longer, or lower method.cycles.every={found.every:,}"
        ]

    def describe(self, method: MethodConfig) -> str:
        return self.part

    def dense_gradients(self, method: MethodConfig, in_rounds: bool) -> str | None:
        assert method.cycles is not None
        return "always" if method.cycles.grow in FROM_GRADIENTS else None


def cycles_of(config: Config, clock: Clock) -> Cyclic:
    """Return the cycles of the method, in steps."""
    cycles = config.method.cycles
    assert cycles is not None
    ends = [clock.steps(length, cycles.unit) for length in itertools.accumulate(cycles.lengths)]
    lengths = tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))
    return Cyclic(config.sparsity.target, lengths, cycles.multiplier, cycles.every, cycles.shape)
