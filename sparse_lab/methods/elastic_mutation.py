"""Elastic mutation (MEST): drop to one density and grow to another, in stages of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparse_lab.config import Config, ElasticMutationConfig, MethodConfig
from sparse_lab.errors import UserError
from sparse_lab.methods.base import FROM_GRADIENTS, Component, Site, check_scores, with_clipping
from sparse_lab.methods.drop_and_grow import too_short
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import Bounds, Constant, Schedule

if TYPE_CHECKING:
    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.methods.networks import Structure


class ElasticMutation(Component):
    part = "elastic_mutation"
    needs = ("prune",)
    not_with = ("filters", "hypersphere", "cycles", "drop_and_grow", "regrow")
    schedules = ("constant",)
    from_scratch = True
    explores = True
    paced_by = ("update_every", "unit", "milestones")
    read_when: ClassVar = {"gradients": with_clipping(part)}

    def check(self, config: Config, structure: Structure) -> None:
        settings = _settings(config)
        check_scores("method.elastic_mutation", settings.drop, settings.grow)
        _check_stages(settings)
        _check_densities(config, structure, settings)

    def begins(self, config: Config, clock: Clock) -> Schedule | None:
        return Constant(1.0 - _settings(config).high[0] * (1.0 - config.sparsity.target))

    def build(self, site: Site) -> list[Algorithm]:
        from sparse_lab.algorithms import drop_and_grow

        settings = _settings(site.config)
        assert site.masks is not None
        return [
            drop_and_grow.ElasticMutation(
                site.model,
                site.masks,
                site.clock.steps_a_round,
                bounds_of(site.config, site.clock),
                target=site.config.sparsity.target,
                distribution=settings.distribution,
                **site.of_updates(settings),
            )
        ]

    def idle(self, config: Config, clock: Clock) -> list[str]:
        bounds, steps = bounds_of(config, clock), clock.steps_a_round
        if any(bounds.due(step) and bounds.densities(step) != (1.0, 1.0) for step in range(steps)):
            if bounds.every < steps:
                return []
            return [
                f"masks are updated where stages end alone, for the training has {steps:,} steps: train longer, or "
                f"lower method.{self.part}.update_every"
            ]
        return [too_short(self.part, bounds.every, steps)]

    def dense_gradients(self, method: MethodConfig, in_rounds: bool) -> str | None:
        assert method.elastic_mutation is not None
        return "always" if method.elastic_mutation.grow in FROM_GRADIENTS else None


def _settings(config: Config) -> ElasticMutationConfig:
    assert config.method.elastic_mutation is not None
    return config.method.elastic_mutation


def bounds_of(config: Config, clock: Clock) -> Bounds:
    """Return between which densities the method drops and grows, and when."""
    settings = _settings(config)
    milestones = tuple(clock.steps(share, "share") for share in settings.milestones)
    every = settings.update_every * (clock.steps_an_epoch if settings.unit == "epochs" else 1)
    return Bounds(tuple(settings.low), tuple(settings.high), milestones, every)


def _check_stages(settings: ElasticMutationConfig) -> None:
    from sparse_lab.sparsity.distributions import DISTRIBUTIONS

    part = "method.elastic_mutation"
    low, high, ends = list(settings.low), list(settings.high), list(settings.milestones)
    if not low or not len(low) == len(high) == len(ends) + 1:
        raise UserError(
            f"{part}.low={low} and {part}.high={high} need a number for each stage, {part}.milestones={ends} one fewer"
        )
    if any(below > above for below, above in zip(low, high, strict=True)) or min(low) <= 0:
        raise UserError(f"{part}.low={low} must lie above 0 and nowhere above .high={high}")
    if all(number == 1.0 for number in (*low, *high)):
        raise UserError(f"{part}.low={low} and .high={high}: nothing would ever be dropped and grown")
    if high[-1] != 1.0:
        raise UserError(f"{part}.high={high} must end with 1: the training ends at the target")
    if ends != sorted(ends) or (ends and not 0.0 < ends[0] <= ends[-1] < 1.0):
        raise UserError(f"{part}.milestones={ends}: shares of the training, above 0, below 1 and rising")
    if settings.distribution not in DISTRIBUTIONS:
        raise UserError(f"{part}.distribution={settings.distribution}: one of {', '.join(DISTRIBUTIONS)}")


def _check_densities(config: Config, structure: Structure, settings: ElasticMutationConfig) -> None:
    from sparse_lab.sparsity.masks import num_kept

    size, density = structure.size(config), 1.0 - config.sparsity.target
    for times, word in ((min(settings.low), "empties a layer"), (max(settings.high), "is more than there is")):
        kept = num_kept(1.0 - times * density, size.total)
        if not size.layers <= kept <= size.unique:
            raise UserError(
                f"method.elastic_mutation: {times:.12g} times the target's density, {kept:,} weights, {word}"
            )
