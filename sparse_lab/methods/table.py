"""The one table of the features that a method can be made of, and what they say together.

They stand in the order in which they change a network and are built.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparse_lab import config as schema
from sparse_lab.config import Config, MethodConfig, add_part, check_settings
from sparse_lab.errors import SparseLabError, UserError
from sparse_lab.methods import schedules
from sparse_lab.methods.base import Component, Site
from sparse_lab.methods.compactors import Compactors
from sparse_lab.methods.cycles import Cycles
from sparse_lab.methods.dct import DCT
from sparse_lab.methods.drop_and_grow import DropAndGrow
from sparse_lab.methods.dyrelu import DyReLU
from sparse_lab.methods.elastic_mutation import ElasticMutation
from sparse_lab.methods.filters import Filters
from sparse_lab.methods.hypersphere import Hypersphere
from sparse_lab.methods.prune import Prune
from sparse_lab.methods.regrow import Regrow
from sparse_lab.methods.schedules import kind_of
from sparse_lab.methods.sharing import Sharing
from sparse_lab.registering import check_name, enter
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import Schedule

if TYPE_CHECKING:
    from torch import nn

    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.methods.networks import Structure

COMPONENTS: dict[str, Component] = {
    one.part: one
    for one in (
        Sharing(),
        DyReLU(),
        DCT(),
        Compactors(),
        Hypersphere(),
        Prune(),
        Filters(),
        Cycles(),
        DropAndGrow(),
        ElasticMutation(),
        Regrow(),
    )
}


def register_algorithm(component: Component, settings: type) -> None:
    """Make a part of methods of your own known: `method.PART={}` adds it, with keys `method.PART.KEY`.

    component: an instance of a subclass of Component with a `part` of its own, which says what the part needs and
    builds (`sparse_lab.methods.drop_and_grow.DropAndGrow` is one to derive rules of dropping and growing from). It is
    built after all others. settings: a dataclass, each field made with `sparse_lab.config.key`; the first line of its
    docstring is its help.

    Raise SparseLabError for a part that is taken or no plain word, for another kind of thing, and for settings that a
    config cannot hold.
    """
    if not isinstance(component, Component):
        raise SparseLabError(f"an algorithm is an instance of a subclass of Component, not {component!r}")
    part = check_name("algorithm", getattr(component, "part", None), {*COMPONENTS, *dir(MethodConfig)})
    remove = add_part(MethodConfig, part, check_settings(f"method.{part}", settings))

    def forget() -> None:
        del COMPONENTS[part]
        remove()

    COMPONENTS[part] = component
    enter("algorithm", part, forget)


def present(method: MethodConfig) -> list[Component]:
    """Return the components of the parts that are there, in the order of the table."""
    there = schema.present(method)
    return [one for part, one in COMPONENTS.items() if part in there]


def starts(config: Config) -> dict[str, Config]:
    """Return the runs that this one starts from, by what their networks are for."""
    return {name: other for one in present(config.method) for name, other in one.starts(config).items()}


def ancestors(config: Config) -> Iterator[Config]:
    """Yield every run that this one starts from, directly or not, each before what it is needed for."""
    for other in starts(config).values():
        yield from ancestors(other)
        yield other


def sparsity(config: Config, clock: Clock) -> Schedule:
    """Return when the masks of the run's last phase change, and how sparse they are then."""
    found = [one.sparsity(config, clock) for one in present(config.method)]
    return next((one for one in found if one is not None), None) or kind_of(config.schedule).build(config, clock)


def begins(config: Config, clock: Clock) -> Schedule:
    """Return the schedule of the pruning alone: where another part changes the sparsity, only how the run starts."""
    found = [one.begins(config, clock) for one in present(config.method)]
    return next((one for one in found if one is not None), None) or sparsity(config, clock)


def settles(config: Config, clock: Clock) -> int:
    """Return the step of a round before which the network is not what it is to end as."""
    return max((one.settles(config, clock) for one in present(config.method)), default=0)


def idle(config: Config, clock: Clock) -> list[str]:
    """Return what the method asks for and this training is too short for: one line each."""
    return [line for line, _ in too_long(config, clock)]


def too_long(config: Config, clock: Clock) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a line for whatever this training is too short for, with the keys that say when it would come."""
    method = config.method
    for one in present(method):
        for line in one.idle(config, clock):
            yield line, tuple(f"method.{one.part}.{name}" for name in one.paced_by)
    if method.prune is not None and method.regrow is None:
        kind = kind_of(config.schedule)
        for line in kind.idle(config, clock):
            yield line, tuple(f"schedule.{config.schedule.name}.{name}" for name in kind.paced_by)


def alter(model: nn.Module, config: Config, structure: Structure) -> nn.Module:
    """Let every part change the plain network, in place. Raise UserError when the two do not go together."""
    for one in present(config.method):
        one.alter(model, config, structure)
    return model


def check_together(config: Config, structure: Structure) -> None:
    """Raise UserError where the parts of the method do not go together, or not with the schedule."""
    there = present(config.method)
    for one in there:
        _check_parts(one, config)
    if config.method.prune is not None:
        schedules.check(config, structure)
        _check_schedule(there, config)


def check(config: Config, structure: Structure) -> None:
    """Raise UserError for what a part of the method cannot do in this run."""
    for one in present(config.method):
        one.check(config, structure)


def _check_parts(one: Component, config: Config) -> None:
    """What a part says of the others, and of where the training starts."""
    there = schema.present(config.method)
    for needed in one.needs:
        if needed not in there:
            raise UserError(
                f"method.{one.part} needs method.{needed}, which is null: method.{needed}={{}} adds it, "
                f"method.{one.part}=null does without both"
            )
    for other in one.not_with:
        if other in there:
            raise UserError(f"method.{one.part} does not go with method.{other}: set one of them to null")
    if one.from_scratch and config.method.init_from is not None:
        raise UserError(
            f"method.{one.part} is for training from scratch: method.init_from={config.method.init_from}, not null"
        )


def _check_schedule(there: list[Component], config: Config) -> None:
    for one in there:
        if one.schedules and config.schedule.name not in one.schedules:
            raise UserError(
                f"method.{one.part} works with schedule={' or '.join(one.schedules)}, not {config.schedule.name}"
            )


def altered_meta_network(config: Config) -> nn.Module:
    """Return the network that the method trains, on the device "meta". Raise UserError where the two do not fit."""
    import torch

    from sparse_lab.methods.networks import structure_of

    structure = structure_of(config)
    with torch.device("meta"):
        return alter(copy.deepcopy(structure.hollow), config, structure)


def build(site: Site) -> list[Algorithm]:
    """Return everything that changes masks or network, in the order of the table."""
    there = present(site.config.method)
    displaced = {part for one in there for part in one.in_place_of}
    return [algorithm for one in there if one.part not in displaced for algorithm in one.build(site)]
