"""Hyperspherical training with a penalty of our own, after Pruning On-the-fly."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sparse_lab.config import Config
from sparse_lab.methods.base import Component, Site, When, fitting
from sparse_lab.methods.prune import weight_selector
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import EpochEnds

if TYPE_CHECKING:
    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.methods.networks import Structure


class Hypersphere(Component):
    part = "hypersphere"
    needs = ("prune",)
    not_with = ("filters", "sharing", "dct", "drop_and_grow", "elastic_mutation", "cycles")
    schedules = ("at_end",)
    from_scratch = True
    in_place_of = ("prune",)
    paced_by = ("every",)
    read_when: ClassVar = {
        "every": When(
            lambda config: config.method.hypersphere is not None and config.method.hypersphere.penalty > 0,
            "a method.hypersphere.penalty above 0",
        )
    }

    def check(self, config: Config, structure: Structure) -> None:
        from sparse_lab.models import offsets

        assert config.method.hypersphere is not None
        with fitting(
            "method.hypersphere.recovery", structure, "use another model, or method.hypersphere.recovery=false"
        ):
            offsets.check_plain(structure.hollow, structure.weights if config.method.hypersphere.recovery else ())

    def idle(self, config: Config, clock: Clock) -> list[str]:
        settings = config.method.hypersphere
        assert settings is not None
        if settings.every < clock.steps_a_round:
            return []
        return [
            f"which positions would be kept is looked at once in {clock.steps_a_round:,} steps: train longer, or lower "
            f"method.hypersphere.every={settings.every:,}"
        ]

    def build(self, site: Site) -> list[Algorithm]:
        from sparse_lab.algorithms import hypersphere

        settings = site.config.method.hypersphere
        assert settings is not None and isinstance(site.schedule, EpochEnds)
        return [
            hypersphere.Hypersphere(
                site.model,
                weight_selector(site),
                site.schedule,
                steps_an_epoch=site.clock.steps_an_epoch,
                total_steps=site.total_steps,
                penalty=settings.penalty,
                every=settings.every,
                recovery=settings.recovery,
                seed=site.config.seed,
                changed=site.changed,
            )
        ]
