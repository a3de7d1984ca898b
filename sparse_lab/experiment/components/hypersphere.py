"""Hyperspherical training with a penalty of our own, after Pruning On-the-fly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_lab.experiment.components.base import Component, Site
from sparse_lab.experiment.components.prune import weight_selector
from sparse_lab.sparsity.schedules import EpochEnds

if TYPE_CHECKING:
    from sparse_lab.algorithms.base import Algorithm


class Hypersphere(Component):
    part = "hypersphere"
    needs = ("prune",)
    not_with = ("filters", "sharing", "dct", "drop_and_grow", "elastic_mutation", "cycles")
    schedules = ("at_end",)
    from_scratch = True
    in_place_of = ("prune",)

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
