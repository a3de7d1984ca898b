"""When everything in a run happens: its recipe, its clock, the schedules of its masks and of DyReLU, all in steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from sparse_lab.config import Config, RecipeConfig
from sparse_lab.experiment import phases
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import (
    Alternating,
    Bounds,
    Constant,
    Cubic,
    Cyclic,
    DropFraction,
    EpochEnds,
    Iterative,
    OneShot,
    Regrowth,
    Schedule,
)


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
    if not config.method.prunes:
        stop = config.training.stop_after or epochs
        return Clock(1, stop, steps_an_epoch, epochs_after=epochs - stop)
    rounds = rounds_of(config)
    if rounds > 1 or config.schedule.name == "iterative":
        epochs = config.schedule.round_epochs or max(1, epochs // rounds)
    before = config.method.prune.rewind_weights or 0
    return Clock(rounds, epochs - before, steps_an_epoch, epochs_before=before)


def rounds_of(config: Config) -> int:
    """How many times the method prunes with a round of fine-tuning behind each."""
    if config.schedule.name == "iterative":
        return Iterative(config.sparsity.target, config.schedule.share, every=1).rounds()
    return max(1, len(config.method.filters.rates)) if config.schedule.name == "layerwise" else 1


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


def drop_fraction_of(config: Config, clock: Clock) -> DropFraction:
    """When and how much the method drops and grows: after the cycles where there are any."""
    chosen = config.method.drop_and_grow
    begin = cycles_of(config, clock).end if config.method.cyclic else 0
    end = max(1, round(chosen.end * clock.steps_a_round))
    every = _every(config, clock)
    return DropFraction(every, begin, end, chosen.drop_fraction, chosen.drop_fraction_end, chosen.drop_fraction_shape)


def bounds_of(config: Config, clock: Clock) -> Bounds:
    """Between which densities the method drops and grows, for method.drop_and_grow.low and .high."""
    chosen = config.method.drop_and_grow
    milestones = tuple(steps_of(share, "share", clock) for share in chosen.milestones)
    return Bounds(tuple(chosen.low), tuple(chosen.high), milestones, _every(config, clock))


def _every(config: Config, clock: Clock) -> int:
    chosen = config.method.drop_and_grow
    return chosen.update_every * (clock.steps_an_epoch if chosen.unit == "epochs" else 1)


def schedule_of(config: Config, clock: Clock) -> Schedule:
    """When the masks of the run's last part change, and how sparse they are then."""
    target, chosen, steps = config.sparsity.target, config.schedule, clock.steps_a_round
    if config.method.cyclic:
        return cycles_of(config, clock)
    if config.method.goes_on:
        start, end = phases.regrowth_start(config), phases.final_sparsity(config)
        return Regrowth(start, end, config.method.regrow.steps, steps)
    if chosen.name == "iterative":
        return Iterative(target, chosen.share, every=steps)
    if chosen.name == "layerwise":
        # every round prunes the next layer at its own rate; how sparse the network is then follows from the rates
        return Regrowth(target, target, rounds_of(config), steps)
    if chosen.name == "cubic":
        end = min(math.floor(chosen.end * steps), steps - 1)
        return Cubic(target, math.floor(chosen.begin * steps), end, chosen.every, chosen.initial)
    if chosen.name == "alternating":
        turns = [
            steps_of(share, "share", clock)
            for share in (chosen.begin, chosen.turn, chosen.end - chosen.last_dense, chosen.end)
        ]
        return Alternating(target, turns[0], max(1, turns[1]), turns[2], turns[3])
    if chosen.name in ("soft", "at_end"):
        return EpochEnds(target, clock.epochs_a_round, soft=chosen.name == "soft")
    return Constant(target) if chosen.name == "constant" else OneShot(target)


def phasing_of(config: Config, clock: Clock) -> tuple[int, int]:
    """The steps at which DyReLU begins to fade, and at which it is ReLU."""
    chosen = config.method.phasing
    return steps_of(chosen.begin, chosen.unit, clock), steps_of(chosen.end, chosen.unit, clock)


def idle(config: Config, clock: Clock) -> list[str]:
    """What the method asks for and this training is too short for: one line each."""
    method = config.method
    lines = _idle_drop_and_grow(config, clock) if method.drops_and_grows else []
    if method.prunes and not method.goes_on:
        lines += _idle_pruning(config, clock)
    cycles = cycles_of(config, clock)
    if method.cyclic and min(cycles.lengths) <= cycles.every:
        lines.append(
            f"density does not move in a cycle of {min(cycles.lengths):,} steps: "
            f"train longer, or lower method.cycles.every={cycles.every:,}"
        )
    return lines


def _idle_drop_and_grow(config: Config, clock: Clock) -> list[str]:
    steps, chosen = clock.steps_a_round, config.method.drop_and_grow
    if chosen.low:
        bounds = bounds_of(config, clock)
        if any(bounds.due(step) and bounds.densities(step) != (1.0, 1.0) for step in range(steps)):
            return []
        first = bounds.every
    else:
        updates = drop_fraction_of(config, clock)
        first = (updates.begin // updates.every + 1) * updates.every
        if first < min(updates.end, steps):
            return []
    return [
        f"nothing is ever dropped and grown: the first time would be step {first:,} and the training has {steps:,} "
        "steps: train longer, or lower method.drop_and_grow.update_every"
    ]


def _idle_pruning(config: Config, clock: Clock) -> list[str]:
    schedule, steps = schedule_of(config, clock), clock.steps_a_round
    if isinstance(schedule, Cubic) and not config.method.drops_and_grows:
        if sum(schedule.due(step) for step in range(steps)) <= 2:
            return [
                f"gradual pruning has no step between {schedule.begin:,} and {schedule.end:,}: "
                f"train longer, or lower schedule.every={schedule.every:,}"
            ]
    elif isinstance(schedule, Alternating):
        turns = sum(schedule.due(step) for step in range(steps))
        if turns < 3:
            return [
                f"dense and sparse hardly take turns: the mask changes {turns} times in {steps:,} steps: train longer"
            ]
    elif config.method.compactors:
        begin = steps_of(config.method.compacting.begin, config.method.compacting.unit, clock)
        if begin >= steps - 1:
            return [
                f"no row of a compactor is given up before the last of {steps:,} steps: train longer, or lower "
                f"method.compacting.begin={config.method.compacting.begin:g} ({config.method.compacting.unit})"
            ]
    return []
