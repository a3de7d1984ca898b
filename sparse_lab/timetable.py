"""When everything in a run happens: its recipe, its clock, the schedules of its masks and of DyReLU, all in steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from sparse_lab import stages
from sparse_lab.config import Config, RecipeConfig
from sparse_lab.sparsity.schedules import Constant, Cubic, Cyclic, DropFraction, Iterative, OneShot, Regrowth, Schedule
from sparse_lab.training.clock import Clock


def recipe_of(config: Config) -> RecipeConfig:
    """The recipe of the run's last part."""
    if config.method.goes_on:
        return config.training.regrow
    if not config.method.prunes or config.method.from_scratch:
        return config.training
    if config.method.prune.rewind_lr:
        return replace(config.training, epochs=config.training.finetune.epochs)
    return config.training.finetune


def clock_of(config: Config, steps_an_epoch: int) -> Clock:
    """How many rounds of how many epochs the run's last part has."""
    epochs = recipe_of(config).epochs
    if config.method.goes_on:
        return Clock(config.method.regrow.steps, epochs, steps_an_epoch)
    if config.method.prunes and config.schedule.name == "iterative":
        rounds = Iterative(config.sparsity.target, config.schedule.share, every=1).rounds()
        return Clock(rounds, config.schedule.round_epochs or max(1, epochs // rounds), steps_an_epoch)
    return Clock(1, epochs, steps_an_epoch)


def steps_of(length: float, unit: str, clock: Clock) -> int:
    """A length in shares of the training or in epochs as optimizer steps; what ends, ends before the last one."""
    steps = length * (clock.steps_a_round if unit == "share" else clock.steps_an_epoch)
    return min(round(steps), clock.steps_a_round - 1)


def cycles_of(config: Config, clock: Clock) -> Cyclic:
    """The cycles of the method, in steps."""
    chosen = config.method.cycles
    ends = [steps_of(length, chosen.unit, clock) for length in itertools.accumulate(chosen.lengths)]
    lengths = tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))
    return Cyclic(config.sparsity.target, lengths, chosen.multiplier, chosen.every, chosen.shape)


def rewiring_of(config: Config, clock: Clock) -> DropFraction:
    """When and how much the method drops and grows: after the cycles where there are any."""
    chosen = config.method.rewire
    begin = cycles_of(config, clock).end if config.method.cyclic else 0
    end = max(1, round(chosen.end * clock.steps_a_round))
    return DropFraction(chosen.every, begin, end, chosen.fraction, chosen.fraction_end, chosen.fraction_shape)


def schedule_of(config: Config, clock: Clock) -> Schedule:
    """When the masks of the run's last part change, and how sparse they are then."""
    target, chosen, steps = config.sparsity.target, config.schedule, clock.steps_a_round
    if config.method.cyclic:
        return cycles_of(config, clock)
    if config.method.goes_on:
        start, end = stages.regrowth_start(config), stages.final_sparsity(config)
        return Regrowth(start, end, config.method.regrow.steps, steps)
    if chosen.name == "iterative":
        return Iterative(target, chosen.share, every=steps)
    if chosen.name == "cubic":
        end = min(math.floor(chosen.end * steps), steps - 1)
        return Cubic(target, math.floor(chosen.begin * steps), end, chosen.every, chosen.initial)
    return Constant(target) if chosen.name == "constant" else OneShot(target)


def phasing_of(config: Config, clock: Clock) -> tuple[int, int]:
    """The steps at which DyReLU begins to fade, and at which it is ReLU."""
    chosen = config.method.phasing
    return steps_of(chosen.begin, chosen.unit, clock), steps_of(chosen.end, chosen.unit, clock)


def idle(config: Config, clock: Clock) -> list[str]:
    """What the method asks for and this training is too short for: one line each."""
    lines, steps = [], f"the training has {clock.steps_a_round:,} steps"
    rewiring = rewiring_of(config, clock)
    first = (rewiring.begin // rewiring.every + 1) * rewiring.every
    if config.method.rewires and first >= min(rewiring.end, clock.steps_a_round):
        lines.append(
            f"nothing is ever rewired: the first time would be step {first:,} and {steps}: "
            "train longer, or lower method.rewire.every"
        )
    cycles = cycles_of(config, clock)
    if config.method.cyclic and min(cycles.lengths) <= cycles.every:
        lines.append(
            f"density does not move in a cycle of {min(cycles.lengths):,} steps: "
            f"train longer, or lower method.cycles.every={cycles.every:,}"
        )
    return lines
