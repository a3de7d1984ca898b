"""DyReLU phasing (EAST): DyReLU at every ReLU, fading into ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.methods.base import Component, Site, fitting
from sparse_lab.methods.recipes import recipe_of
from sparse_lab.sparsity.clock import Clock

if TYPE_CHECKING:
    from torch import nn

    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.methods.networks import Structure


class DyReLU(Component):
    part = "dyrelu"
    not_with = ("filters",)
    schedules = ("constant", "cubic", "one_shot")
    from_scratch = True
    removes_parameters = True
    paced_by = ("begin", "end", "unit")

    def check(self, config: Config, structure: Structure) -> None:
        phasing, epochs = config.method.dyrelu, recipe_of(config).epochs
        assert phasing is not None
        if phasing.begin >= phasing.end:
            raise UserError(
                f"method.dyrelu.begin={phasing.begin:.12g} must lie before method.dyrelu.end={phasing.end:.12g}"
            )
        if phasing.end >= (1.0 if phasing.unit == "share" else epochs):
            raise UserError(
                f"method.dyrelu.end={phasing.end:.12g} ({phasing.unit}): DyReLU must be ReLU before the training ends "
                f"({epochs} epochs)"
            )

    def alter(self, model: nn.Module, config: Config, structure: Structure) -> None:
        from sparse_lab.models import dyrelu

        with fitting("method.dyrelu", structure, "use a network with ReLU, or method.dyrelu=null"):
            dyrelu.install(model, structure.shape)

    def idle(self, config: Config, clock: Clock) -> list[str]:
        if phasing_steps(config, clock)[1] > 0:
            return []
        return [f"DyReLU is ReLU from the first of {clock.steps_a_round:,} steps: raise method.dyrelu.end"]

    def build(self, site: Site) -> list[Algorithm]:
        from sparse_lab.algorithms.dyrelu_phasing import DyReLUPhasing

        def gone(step: int, parameters: int) -> None:
            site.removed()
            site.say(f"step {step}: DyReLU has faded into ReLU, its {parameters:,} parameters are gone")

        return [DyReLUPhasing(site.model, *phasing_steps(site.config, site.clock), removed=gone)]


def phasing_steps(config: Config, clock: Clock) -> tuple[int, int]:
    """Return the steps at which DyReLU begins to fade, and at which it is ReLU."""
    phasing = config.method.dyrelu
    assert phasing is not None
    return clock.steps(phasing.begin, phasing.unit), clock.steps(phasing.end, phasing.unit)
