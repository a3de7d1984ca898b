"""The one table of the features that a method can be made of, and what they say together.

They stand in the order in which they change a network and are built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sparse_lab import config as schema
from sparse_lab.config import Config, MethodConfig
from sparse_lab.experiment.components.base import Component, Site
from sparse_lab.experiment.components.compactors import Compactors
from sparse_lab.experiment.components.cycles import Cycles
from sparse_lab.experiment.components.dct import DCT
from sparse_lab.experiment.components.drop_and_grow import DropAndGrow
from sparse_lab.experiment.components.dyrelu import DyReLU
from sparse_lab.experiment.components.elastic_mutation import ElasticMutation
from sparse_lab.experiment.components.filters import Filters
from sparse_lab.experiment.components.hypersphere import Hypersphere
from sparse_lab.experiment.components.prune import Prune
from sparse_lab.experiment.components.regrow import Regrow
from sparse_lab.experiment.components.schedules import kind_of
from sparse_lab.experiment.components.settings import READ_WHEN
from sparse_lab.experiment.components.sharing import Sharing
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import Schedule

if TYPE_CHECKING:
    from torch import nn

    from sparse_lab.algorithms.base import Algorithm

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
READ_BY_PARTS = ("sparsity", "schedule", "training.finetune", "training.regrow")
# what our own files set for methods that do not read it: it stays in their runs' names
IN_NAMES = (
    "dataset.mirror",
    "training.augment.flip",
    "training.finetune",
    "schedule.cubic.every",
    "method.prune.distribution",
    "method.regrow",
)


def present(method: MethodConfig) -> list[Component]:
    """Return the components of the parts that are there, in the order of the table."""
    there = schema.present(method)
    return [one for part, one in COMPONENTS.items() if part in there]


def unread(config: Config) -> list[str]:
    """Return the groups and keys of the config that this run does not read, and that have no say in its name."""
    read = {group for one in present(config.method) for group in one.reads(config)}
    groups = [group for group in READ_BY_PARTS if group not in read]
    return groups + [key for key in without_effect(config) if not lies_in(key, (*groups, *IN_NAMES))]


def without_effect(config: Config) -> dict[str, str]:
    """Return the keys that this run, with those that it starts from, does not read, each with what it would take; but
    for those of parts that are not there.
    """
    of_parts = {
        f"method.{one.part}.{name}": when for one in present(config.method) for name, when in one.read_when.items()
    }
    return {
        key: f"reads it; it takes {when.words}"
        for key, when in (READ_WHEN | of_parts).items()
        if not when.reads(config)
    }


def lies_in(key: str, groups: Iterable[str]) -> bool:
    """Is a key one of these, or does it lie in one?"""
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


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


def alter(model: nn.Module, config: Config) -> nn.Module:
    """Let every part change the plain network, in place. Raise UserError when the two do not go together."""
    for one in present(config.method):
        one.alter(model, config)
    return model


def altered_meta_network(config: Config) -> nn.Module:
    """Return the network that the method trains, on the device "meta". Raise UserError where the two do not fit."""
    import torch

    from sparse_lab import models
    from sparse_lab.experiment.networks import spec_of

    with torch.device("meta"):
        return alter(models.build(*spec_of(config)), config)


def build(site: Site) -> list[Algorithm]:
    """Return everything that changes masks or network, in the order of the table."""
    there = present(site.config.method)
    displaced = {part for one in there for part in one.in_place_of}
    return [algorithm for one in there if one.part not in displaced for algorithm in one.build(site)]
