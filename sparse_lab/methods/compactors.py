"""Compactors (ResRep): 1x1 convolutions behind the filters, folded into the network at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.methods.base import Component, Site, fitting
from sparse_lab.methods.filters import filter_selector
from sparse_lab.methods.recipes import recipe_of
from sparse_lab.sparsity.clock import Clock

if TYPE_CHECKING:
    from torch import nn

    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.methods.networks import Structure

SHORT = 1e-2  # a row of this norm adds a hundredth of what it did; ResRep's paper cuts at 1e-5, after 180 epochs


class Compactors(Component):
    part = "compactors"
    needs = ("prune", "filters")
    schedules = ("at_end",)
    in_place_of = ("prune", "filters")
    paced_by = ("begin", "unit", "every")

    def check(self, config: Config, structure: Structure) -> None:
        method, optimizer = config.method, recipe_of(config).optimizer
        assert method.prune is not None and method.filters is not None
        if method.prune.score != "compactor":
            raise UserError(
                f"compactors score filters themselves: method.prune.score=compactor, not {method.prune.score}"
            )
        if optimizer != "sgd":
            raise UserError(
                f"compactors shrink by SGD with a momentum of their own, not by {optimizer}: "
                "training.finetune.optimizer=sgd"
            )
        settings, epochs = method.compactors, recipe_of(config).epochs
        assert settings is not None
        if settings.unit == "share" and settings.begin >= 1.0:
            raise UserError(
                f"method.compactors.begin={settings.begin:.12g} (share): a share of the {epochs} epochs, below 1"
            )
        if method.filters.coupled:
            raise UserError("compactors stand behind single layers: method.filters.coupled=false")

    def alter(self, model: nn.Module, config: Config, structure: Structure) -> None:
        from sparse_lab.models import compactors

        with fitting("method.compactors", structure, "use another model or method"):
            compactors.install(model, [group.name for group in structure.filter_groups(config)])

    def build(self, site: Site) -> list[Algorithm]:
        from sparse_lab.algorithms.structured.compaction import Compaction

        def fused(gone: int, longest: float) -> None:
            warning = "" if longest < SHORT else "WARNING: cut before they had shrunk to nothing: "
            site.say(f"{warning}{gone:,} filters are gone, the longest row of their compactors had norm {longest:.2g}")

        settings = site.config.method.compactors
        assert settings is not None
        return [
            Compaction(
                site.model,
                filter_selector(site),
                site.config.sparsity.target,
                epochs=site.clock.epochs_a_round,
                penalty=settings.penalty,
                begin=site.clock.steps(settings.begin, settings.unit),
                every=settings.every,
                channels=settings.channels,
                fused=fused,
                changed=site.changed,
            )
        ]

    def idle(self, config: Config, clock: Clock) -> list[str]:
        settings, steps = config.method.compactors, clock.steps_a_round
        assert settings is not None
        begin = clock.steps(settings.begin, settings.unit)
        if begin < steps - 1 and settings.every >= steps - begin:
            return [
                f"rows of compactors are given up once, at step {begin:,} of {steps:,}: train longer, or lower "
                f"method.compactors.every={settings.every:,}"
            ]
        if begin < steps - 1:
            return []
        return [
            f"no row of a compactor is given up before the last of {steps:,} steps: train longer, or lower "
            f"method.compactors.begin={settings.begin:.12g} ({settings.unit})"
        ]
