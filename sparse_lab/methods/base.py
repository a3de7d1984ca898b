"""What the runner asks of every feature. A feature is a part of a method (or a schedule) that is there or not; its
component says all that a run must know of it, in one file.

Nothing here imports torch before a network is built or checked: the gallery, and a finished run, answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from sparse_lab.config import Config, MethodConfig
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.names import FROM_GRADIENTS as FROM_GRADIENTS
from sparse_lab.sparsity.names import WITHOUT_DATA as WITHOUT_DATA
from sparse_lab.sparsity.schedules import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.algorithms.enforce import Changed
    from sparse_lab.methods.networks import Structure
    from sparse_lab.sparsity.masks import Masks
    from sparse_lab.sparsity.scores import Batches, Probe


class When(NamedTuple):
    """When a setting is read: whether this run does, and in words what it takes."""

    reads: Callable[[Config], bool]
    words: str


class Images(Protocol):
    """Where scores get the batches that they look at."""

    def fixed(self, count: int) -> Batches:
        """Return so many batches, the same each time."""
        ...

    def balanced(self, per_class: int) -> Batches:
        """Return batches that hold so many images of each class together."""
        ...


@dataclass
class Site:
    """Where algorithms are built. `structure`: of the plain network; `model`: that network, changed by the parts;
    `masks`: None where nothing is pruned; `schedule`: how sparse the run is when; `begins`: the same of the pruning
    alone, where another part changes the sparsity afterwards; `network` gives a network of `Component.starts`, a copy
    of its own; `rewind`: the weights that each round goes back to; `changed` is told of mask changes, `removed` of
    parameters that are gone; `probe`: how scores run the network.
    """

    config: Config
    structure: Structure
    images: Images
    probe: Probe
    model: nn.Module
    masks: Masks | None
    clock: Clock
    schedule: Schedule
    begins: Schedule
    network: Callable[[str], nn.Module]
    rewind: dict[str, Tensor] | None
    changed: Changed
    say: Callable[[str], None]
    removed: Callable[[], None]

    @property
    def total_steps(self) -> int:
        return self.clock.rounds * self.clock.steps_a_round

    def of_updates(self, settings: Any) -> dict[str, Any]:
        """Return what every algorithm of mask updates is told: its scores, and what it shares with the run."""
        own = {key: getattr(settings, key) for key in ("drop", "grow", "gradients")}
        return {**own, "seed": self.config.seed, "changed": self.changed}


class Component:
    """One part of a method. What it does not override has no say: nothing to build, nothing to refuse.

    needs, not_with: other parts. schedules: those it works with; empty: all. from_scratch: does it train a network that
    no other run has trained? in_place_of: parts that build nothing beside this one. explores: do weights come alive
    that never were? removes_parameters: while it trains?
    """

    part: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    not_with: ClassVar[tuple[str, ...]] = ()
    schedules: ClassVar[tuple[str, ...]] = ()
    from_scratch: ClassVar[bool] = False
    in_place_of: ClassVar[tuple[str, ...]] = ()
    explores: ClassVar[bool] = False
    removes_parameters: ClassVar[bool] = False
    paced_by: ClassVar[tuple[str, ...]] = ()  # the part's settings of which a training may be too short for
    read_when: ClassVar[dict[str, When]] = {}  # of the part's settings those that not every run with the part reads

    def reads(self, config: Config) -> tuple[str, ...]:
        """Return the groups of the config that only runs with this part read, among experiment/settings_read.py's."""
        return ()

    def starts(self, config: Config) -> dict[str, Config]:
        """Return the runs that are needed first, by what their networks are for: parent, dense, reference, rewound."""
        return {}

    def check(self, config: Config, structure: Structure) -> None:
        """Raise UserError for what this part cannot do in this run, in one line that says what to do."""

    def hindrance(self, config: Config) -> str | None:
        """Return why compute=sparse cannot train this, and what else to ask for; None where it can."""
        return None

    def alter(self, model: nn.Module, config: Config, structure: Structure) -> None:
        """Change the plain network, in place. Raise UserError where that does not fit."""

    def sparsity(self, config: Config, clock: Clock) -> Schedule | None:
        """Return how sparse the run is when, where this part says so and not the schedule that was chosen."""
        return None

    def begins(self, config: Config, clock: Clock) -> Schedule | None:
        """Return how the pruning starts, where this part changes the sparsity afterwards."""
        return None

    def settles(self, config: Config, clock: Clock) -> int:
        """Return the step of a round before which the network is not what it is to end as."""
        return 0

    def build(self, site: Site) -> list[Algorithm]:
        """Return what changes masks or network."""
        return []

    def idle(self, config: Config, clock: Clock) -> list[str]:
        """Return a line for whatever the training is too short for."""
        return []

    def describe(self, method: MethodConfig) -> str:
        """Return the part in a word or two for the gallery, its scores in brackets."""
        settings = getattr(method, self.part)
        scores = ", ".join(getattr(settings, key) for key in ("score", "drop", "grow") if hasattr(settings, key))
        return f"{self.part} ({scores})" if scores else self.part

    def dense_gradients(self, method: MethodConfig, in_rounds: bool) -> str | None:
        """Return when gradients of pruned weights are needed, as in "once"; "always"; None: never."""
        return None


def with_clipping(part: str) -> When:
    """When a mask update's `gradients` makes a difference."""

    def reads(config: Config) -> bool:
        settings = getattr(config.method, part)
        return config.training.clip_norm is not None and not {settings.drop, settings.grow}.isdisjoint(FROM_GRADIENTS)

    return When(reads, f"training.clip_norm, and a method.{part}.drop or grow that looks at gradients")


@contextmanager
def fitting(part: str, structure: Structure, way: str) -> Iterator[None]:
    """Make of a ValueError that is raised within one line: `part` does not fit the network, why, and what else to do.

    Raise UserError.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{part} does not fit {structure.name}: {error}: {way}") from None


def often(times: int) -> str:
    """Return "once", or "N times"."""
    return "once" if times == 1 else f"{times} times"


def check_moves(said: str, config: Config, structure: Structure, share: float) -> None:
    """Raise UserError where this share of the weights that the target keeps is less than one weight."""
    from sparse_lab.sparsity.masks import num_kept

    kept = num_kept(config.sparsity.target, structure.size(config).total)
    if share * kept < 1.0:
        raise UserError(f"{said} of {kept:,} kept weights is less than one: nothing would ever move")


def check_score(key: str, name: str) -> None:
    """Raise UserError where `key` names no score."""
    from sparse_lab.sparsity.scores import find_score

    try:
        find_score(name)
    except SparseLabError as error:
        raise UserError(f"{key}: {error}") from None


def check_scores(part: str, drop: str, grow: str) -> None:
    """Raise UserError where a mask update of `part` could not use these scores."""
    from sparse_lab.sparsity.scores import OF_WEIGHTS, OWN_PASSES

    for key, name in (("drop", drop), ("grow", grow)):
        check_score(f"{part}.{key}", name)
        if name == "reference":
            raise UserError(f"{part} cannot look at a reference network: choose another score than reference")
        if name in OWN_PASSES:
            raise UserError(f"{part} sees the step's gradients alone, and {name} needs more: choose another score")
    if grow in OF_WEIGHTS:
        raise UserError(f"{part}.grow={grow} scores every pruned weight 0: use gradient or random")
