"""Drop and grow: SET, RigL, their ITOP forms; with schedule=cubic GraNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sparse_lab.config import Config, DropAndGrowConfig, MethodConfig
from sparse_lab.methods.base import (
    FROM_GRADIENTS,
    Component,
    Site,
    When,
    check_moves,
    check_scores,
    with_clipping,
)
from sparse_lab.methods.cycles import cycles_of
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import Constant, Cubic, DropFraction, Schedule

if TYPE_CHECKING:
    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.methods.networks import Structure


def _read_when(part: str) -> dict[str, When]:
    return {
        "drop_fraction_end": When(
            lambda config: getattr(config.method, part).drop_fraction_shape != "constant",
            f"a method.{part}.drop_fraction_shape that falls",
        ),
        "distribution": When(lambda config: config.schedule.cubic is not None, "schedule=cubic"),
        "gradients": with_clipping(part),
    }


class DropAndGrow(Component):
    """A rule of its own is a subclass with a part whose settings have these keys and more: it says what to `create`."""

    part = "drop_and_grow"
    needs = ("prune",)
    not_with: ClassVar[tuple[str, ...]] = ("filters", "hypersphere", "elastic_mutation", "regrow")
    schedules = ("constant", "cubic", "one_shot")
    from_scratch = True
    explores = True
    paced_by = ("update_every", "unit", "end")
    read_when: ClassVar = _read_when(part)

    def __init_subclass__(cls) -> None:
        cls.read_when = {**_read_when(cls.part), **cls.__dict__.get("read_when", {})}
        cls.not_with = (*cls.not_with, DropAndGrow.part)  # a network is dropped and grown by one rule

    def create(self, settings: Any, *network: Any, **how: Any) -> Algorithm:
        """Return the algorithm. network, how: what every drop and grow is told."""
        from sparse_lab.algorithms import drop_and_grow

        return drop_and_grow.DropAndGrow(*network, **how)

    def check(self, config: Config, structure: Structure) -> None:
        settings = getattr(config.method, self.part)
        check_scores(f"method.{self.part}", settings.drop, settings.grow)
        check_moves(
            f"method.{self.part}.drop_fraction={settings.drop_fraction:.12g}", config, structure, settings.drop_fraction
        )

    def begins(self, config: Config, clock: Clock) -> Schedule | None:
        cubic = config.schedule.cubic  # prunes before each update
        return None if cubic is None else Constant(cubic.initial)

    def build(self, site: Site) -> list[Algorithm]:
        settings = getattr(site.config.method, self.part)
        return [
            self.create(
                settings,
                site.model,
                site.masks,
                site.clock.steps_a_round,
                updates(settings, site.config, site.clock),
                pruning=site.schedule if isinstance(site.schedule, Cubic) else None,
                distribution=settings.distribution,
                **site.of_updates(settings),
            )
        ]

    def idle(self, config: Config, clock: Clock) -> list[str]:
        planned, steps = updates(getattr(config.method, self.part), config, clock), clock.steps_a_round
        step = (planned.begin // planned.every + 1) * planned.every
        return [] if step < min(planned.end, steps) else [too_short(self.part, step, steps)]

    def dense_gradients(self, method: MethodConfig, in_rounds: bool) -> str | None:
        return "always" if getattr(method, self.part).grow in FROM_GRADIENTS else None


def updates(settings: DropAndGrowConfig, config: Config, clock: Clock) -> DropFraction:
    """Return when and how much the method drops and grows: after the cycles where there are any."""
    begin = cycles_of(config, clock).end if config.method.cycles else 0
    end = max(1, round(settings.end * clock.steps_a_round))
    every = settings.update_every * (clock.steps_an_epoch if settings.unit == "epochs" else 1)
    shape = settings.drop_fraction_shape
    return DropFraction(every, begin, end, settings.drop_fraction, settings.drop_fraction_end, shape)


def too_short(part: str, step: int, steps: int) -> str:
    """Return the warning that no mask update comes."""
    return (
        f"nothing is ever dropped and grown: the first time would be step {step:,} and the training has {steps:,} "
        f"steps: train longer, or lower method.{part}.update_every"
    )
