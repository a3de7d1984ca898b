"""The schedules that conf/schedule offers: what each makes of a run's length, and what it cannot do."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, ClassVar

from sparse_lab.config import ROUNDS, Config, ScheduleConfig, add_part, as_written, check_settings, present
from sparse_lab.errors import SparseLabError, UserError, nearest
from sparse_lab.methods import phases
from sparse_lab.registering import check_name, enter
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import (
    Alternating,
    Constant,
    Cubic,
    EpochEnds,
    Iterative,
    OneShot,
    Regrowth,
    Schedule,
)

if TYPE_CHECKING:
    from sparse_lab.methods.networks import Structure


class Kind:
    """One schedule. in_rounds: does it prune in rounds, with fine-tuning behind each? dense_first: does a network that
    starts from scratch train dense at first? whole_filters: is it for those alone?
    """

    in_rounds: ClassVar[bool] = False
    dense_first: ClassVar[bool] = False
    whole_filters: ClassVar[bool] = False
    paced_by: ClassVar[tuple[str, ...]] = ()  # the schedule's settings of which a training may be too short for

    def build(self, config: Config, clock: Clock) -> Schedule:
        """Return when the masks of the run's last phase change, and how sparse they are then."""
        raise NotImplementedError

    def rounds(self, config: Config) -> int:
        """Return how many times it prunes with a round of fine-tuning behind each."""
        return 1

    def round_epochs(self, config: Config) -> int | None:
        """Return the epochs of a round where they are given."""
        return None

    def check(self, config: Config, structure: Structure) -> None:
        """Raise UserError for settings that do not go together."""

    def idle(self, config: Config, clock: Clock) -> list[str]:
        """Return a line for whatever the training is too short for."""
        return []


class KindOneShot(Kind):
    def build(self, config: Config, clock: Clock) -> Schedule:
        return OneShot(config.sparsity.target)


class KindConstant(Kind):
    def build(self, config: Config, clock: Clock) -> Schedule:
        return Constant(config.sparsity.target)


class KindIterative(Kind):
    in_rounds = True

    def build(self, config: Config, clock: Clock) -> Schedule:
        return self._schedule(config, clock.steps_a_round)

    def rounds(self, config: Config) -> int:
        return self._schedule(config, 1).rounds()

    def round_epochs(self, config: Config) -> int | None:
        assert config.schedule.iterative is not None
        return config.schedule.iterative.round_epochs

    def check(self, config: Config, structure: Structure) -> None:
        from sparse_lab.sparsity.masks import num_kept

        chosen, start = config.schedule.iterative, phases.regrowth_start(config)
        assert chosen is not None
        rounds = Iterative(start, chosen.share, every=1).rounds() if 0.0 < start < 1.0 else 1
        if rounds == 1 and chosen.share > start > 0.0:
            raise UserError(
                f"schedule.iterative.share={chosen.share:.12g} takes all of sparsity {start:.12g} in one round: "
                "lower it, or use schedule=one_shot"
            )
        total = structure.size(config).total
        most = min(ROUNDS, max(1, total - num_kept(min(start, 1.0), total)))
        if rounds > most:
            raise UserError(
                f"schedule.iterative.share={chosen.share:.12g} needs {rounds:,} rounds to sparsity {start:.12g}: raise "
                f"it, {most:,} are the most here"
            )

    def idle(self, config: Config, clock: Clock) -> list[str]:
        rounds, epochs = self.rounds(config), config.training.finetune.epochs
        if self.round_epochs(config) is not None or rounds <= epochs:
            return []
        return [
            f"{rounds:,} rounds share {epochs} epochs of fine-tuning: with one each it trains {rounds:,} of them; "
            "raise schedule.iterative.share, or set schedule.iterative.round_epochs"
        ]

    def _schedule(self, config: Config, every: int) -> Iterative:
        assert config.schedule.iterative is not None
        return Iterative(config.sparsity.target, config.schedule.iterative.share, every=every)


class KindLayerwise(Kind):
    in_rounds = True
    whole_filters = True

    def build(self, config: Config, clock: Clock) -> Schedule:
        # every round prunes the next layer at its own rate; how sparse the network is then follows from the rates
        target = config.sparsity.target
        return Regrowth(target, target, self.rounds(config), clock.steps_a_round)

    def rounds(self, config: Config) -> int:
        return max(1, len(config.method.filters.rates)) if config.method.filters else 1

    def round_epochs(self, config: Config) -> int | None:
        assert config.schedule.layerwise is not None
        return config.schedule.layerwise.round_epochs


class KindCubic(Kind):
    dense_first = True
    paced_by = ("begin", "end", "every")

    def build(self, config: Config, clock: Clock) -> Schedule:
        chosen, steps = config.schedule.cubic, clock.steps_a_round
        assert chosen is not None
        end = min(math.floor(chosen.end * steps), steps - 1)
        return Cubic(config.sparsity.target, math.floor(chosen.begin * steps), end, chosen.every, chosen.initial)

    def check(self, config: Config, structure: Structure) -> None:
        chosen = config.schedule.cubic
        assert chosen is not None
        if chosen.begin >= chosen.end:
            raise UserError(
                f"schedule.cubic.begin={chosen.begin:.12g} must lie before schedule.cubic.end={chosen.end:.12g}"
            )
        if chosen.initial > (end := phases.regrowth_start(config)):
            raise UserError(
                f"schedule.cubic.initial={chosen.initial:.12g} is where pruning starts, and it ends at sparsity "
                f"{end:.12g}: lower it, or raise sparsity.target"
            )

    def idle(self, config: Config, clock: Clock) -> list[str]:
        schedule = self.build(config, clock)
        assert isinstance(schedule, Cubic)
        if config.method.drop_and_grow or schedule.end - schedule.begin > schedule.every:
            return []
        return [
            f"gradual pruning has no step between {schedule.begin:,} and {schedule.end:,} of {clock.steps_a_round:,}: "
            f"train longer, or lower schedule.cubic.every={schedule.every:,}"
        ]


class KindAlternating(Kind):
    dense_first = True
    paced_by = ("begin", "turn", "last_dense", "end")

    def build(self, config: Config, clock: Clock) -> Schedule:
        chosen = config.schedule.alternating
        assert chosen is not None
        begin, turn, dense_from, end = (
            clock.steps(share, "share")
            for share in (chosen.begin, chosen.turn, chosen.end - chosen.last_dense, chosen.end)
        )
        return Alternating(config.sparsity.target, begin, max(1, turn), dense_from, end)

    def check(self, config: Config, structure: Structure) -> None:
        chosen = config.schedule.alternating
        assert chosen is not None
        if not chosen.begin < chosen.end - chosen.last_dense <= chosen.end < 1.0:
            raise UserError(
                f"schedule.alternating.begin={chosen.begin:.12g} must lie before "
                f"schedule.alternating.end={chosen.end:.12g} minus schedule.alternating.last_dense="
                f"{chosen.last_dense:.12g}, and the end before 1"
            )
        if chosen.turn > (span := as_written(chosen.end - chosen.last_dense - chosen.begin)):
            raise UserError(
                f"schedule.alternating.turn={chosen.turn:.12g} is longer than the {span:.12g} of the training in "
                "which dense and sparse take turns"
            )

    def idle(self, config: Config, clock: Clock) -> list[str]:
        schedule, steps = self.build(config, clock), clock.steps_a_round
        turns = len(list(itertools.islice((step for step in range(steps) if schedule.due(step)), 3)))
        shortest = as_written(config.schedule.alternating.turn * steps)  # type: ignore[union-attr]
        if turns >= 3 and shortest < 1.0:
            return [
                f"a turn of {shortest:.12g} steps is made one of a step: train longer, or raise "
                "schedule.alternating.turn"
            ]
        if turns >= 3:
            return []
        return [f"dense and sparse hardly take turns: the mask changes {turns} times in {steps:,} steps: train longer"]


class KindSoft(Kind):
    dense_first = True
    whole_filters = True

    def build(self, config: Config, clock: Clock) -> Schedule:
        return EpochEnds(config.sparsity.target, clock.epochs_a_round, soft=True)


class KindAtEnd(Kind):
    dense_first = True

    def build(self, config: Config, clock: Clock) -> Schedule:
        return EpochEnds(config.sparsity.target, clock.epochs_a_round, soft=False)


KINDS: dict[str, Kind] = {
    "one_shot": KindOneShot(),
    "iterative": KindIterative(),
    "layerwise": KindLayerwise(),
    "cubic": KindCubic(),
    "constant": KindConstant(),
    "alternating": KindAlternating(),
    "soft": KindSoft(),
    "at_end": KindAtEnd(),
}


def register_schedule(name: str, kind: Kind, settings: type) -> None:
    """Make a schedule of your own known: `schedule=NAME`, with keys `schedule.NAME.KEY`.

    kind: an instance of a subclass of Kind; its `build` reads `config.schedule.NAME`, a `settings`. settings: a
    dataclass, each field made with `sparse_lab.config.key`; the first line of its docstring is its help.
    `schedule=NAME` takes a file schedule/NAME.yaml that sets `NAME: {}` or some of its keys
    (`sparse_lab.register_choices`).

    Raise SparseLabError for a name that is taken or no plain word, for another kind of thing, and for settings that a
    config cannot hold.
    """
    check_name("schedule", name, {*KINDS, *dir(ScheduleConfig)})
    if not isinstance(kind, Kind):
        raise SparseLabError(f"schedule {name!r}: an instance of a subclass of Kind is wanted, not {kind!r}")
    remove = add_part(ScheduleConfig, name, check_settings(f"schedule.{name}", settings))

    def forget() -> None:
        del KINDS[name]
        remove()

    KINDS[name] = kind
    enter("schedule", name, forget)


def kind_of(schedule: ScheduleConfig) -> Kind:
    """Return the schedule that is there. Raise UserError where there is none, or more than one."""
    there = present(schedule)
    if len(there) != 1:
        listed = ", ".join(there) or "nothing"
        raise UserError(f"a run has one schedule, not {listed}: choose one with schedule=NAME; {nearest('', [*KINDS])}")
    return KINDS[there[0]]


def check(config: Config, structure: Structure) -> None:
    """Raise UserError where the schedule that is there cannot do what this run asks."""
    kind, name = kind_of(config.schedule), config.schedule.name
    kind.check(config, structure)
    if kind.whole_filters and config.method.filters is None:
        raise UserError(
            f"schedule={name} is for whole filters: use method=sfp or hrank, or method.filters={{}}, or another "
            "schedule"
        )
