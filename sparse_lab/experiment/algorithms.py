"""From a config to the algorithms of a run: what changes its masks and its network, each ready to be attached."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_lab.algorithms.base import Algorithm
from sparse_lab.algorithms.cyclic import CyclicSparsity
from sparse_lab.algorithms.drop_and_grow import DropAndGrow, ElasticMutation
from sparse_lab.algorithms.dyrelu_phasing import DyReLUPhasing
from sparse_lab.algorithms.enforce import Changed, EnforceMasks
from sparse_lab.algorithms.hypersphere import Hypersphere
from sparse_lab.algorithms.prune import Prune
from sparse_lab.algorithms.regrow import Regrow
from sparse_lab.algorithms.selectors import Selector, WeightSelector
from sparse_lab.algorithms.structured.compaction import Compaction
from sparse_lab.algorithms.structured.selector import FilterSelector
from sparse_lab.config import Config
from sparse_lab.data import Data
from sparse_lab.experiment.networks import build_model, filter_groups
from sparse_lab.experiment.timeline import (
    bounds_of,
    cycles_of,
    drop_fraction_of,
    phasing_of,
    schedule_of,
    steps_of,
)
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.paths import connected_init
from sparse_lab.sparsity.schedules import Constant, Cubic, EpochEnds, Schedule
from sparse_lab.training.checkpoint_io import load_into, load_network

SHORT = 1e-2  # a row of this norm adds a hundredth of what it did; ResRep's paper cuts at 1e-5, after 180 epochs


def algorithms_of(
    config: Config,
    data: Data,
    model: nn.Module,
    masks: Masks | None,
    clock: Clock,
    starts: dict[str, Path],
    rewind: dict[str, Tensor] | None,
    changed: Changed,
    say: Callable[[str], None],
    removed: Callable[[], None],
) -> list[Algorithm]:
    """Everything that changes masks or network. changed: told of mask changes; removed: of parameters that are gone."""
    phasing = [_phasing(config, model, clock, say, removed)] if config.method.dyrelu else []
    if masks is None:
        return [*phasing]
    changes = _mask_changes(config, data, model, masks, clock, starts, rewind, changed, say)
    return [EnforceMasks(masks), *phasing, *changes]


def _mask_changes(
    config: Config,
    data: Data,
    model: nn.Module,
    masks: Masks,
    clock: Clock,
    starts: dict[str, Path],
    rewind: dict[str, Tensor] | None,
    changed: Changed,
    say: Callable[[str], None],
) -> list[Algorithm]:
    method, seed, steps = config.method, config.seed, clock.rounds * clock.steps_a_round
    if method.goes_on and (not method.regrows or method.regrow.score == "none"):
        return []
    if method.regrows:
        return [_regrowth(config, data, model, masks, clock, starts, changed)]
    selector = _selector(config, data, masks, model)
    if isinstance(selector, FilterSelector) and method.compactors:
        return [_compaction(config, model, selector, clock, changed, say)]
    start = _start(config, clock)
    if method.hypersphere:
        assert isinstance(start, EpochEnds)
        sphere = method.sphere
        return [
            Hypersphere(
                model,
                selector,
                start,
                steps_an_epoch=clock.steps_an_epoch,
                total_steps=steps,
                penalty=sphere.penalty,
                every=sphere.every,
                recovery=sphere.recovery,
                seed=seed,
                changed=changed,
            )
        ]
    changes: list[Algorithm] = [
        Prune(
            model,
            selector,
            start,
            total_steps=steps,
            iterations=method.prune.iterations,
            rewind=rewind,
            seed=seed,
            changed=changed,
        )
    ]
    if method.cyclic:
        changes.append(_cycles(config, model, masks, clock, changed))
    if method.drops_and_grows:
        changes.append(_drop_and_grow(config, model, masks, clock, changed))
    return changes


def _phasing(
    config: Config, model: nn.Module, clock: Clock, say: Callable[[str], None], removed: Callable[[], None]
) -> DyReLUPhasing:
    def gone(step: int, parameters: int) -> None:
        removed()
        say(f"step {step}: DyReLU has faded into ReLU, its {parameters:,} parameters are gone")

    return DyReLUPhasing(model, *phasing_of(config, clock), removed=gone)


def _selector(config: Config, data: Data, masks: Masks, model: nn.Module) -> Selector:
    """What stays when the method prunes."""
    chosen, image_size = config.method.prune, config.dataset.image_size
    per_class = chosen.per_class
    batches = (
        partial(data.train.fixed, chosen.batches) if per_class is None else partial(data.train.balanced, per_class)
    )
    if chosen.unit == "filters":
        filters = config.method.filters
        return FilterSelector(
            masks,
            filter_groups(config),
            {cost.name: cost.macs // cost.total for cost in layer_costs(model, image_size)},
            chosen.score,
            chosen.distribution,
            rates=filters.rates,
            layerwise=config.schedule.name == "layerwise",
            flops=filters.flops,
            batches=batches,
        )
    reserve = partial(connected_init, model, image_size) if config.sparsity.connected_init else None
    return WeightSelector(
        masks, chosen.score, chosen.distribution, batches=batches, image_size=image_size, reserve=reserve
    )


def _start(config: Config, clock: Clock) -> Schedule:
    """The schedule of pruning alone: where cycles or drop and grow change the sparsity, only how the run starts."""
    if config.method.cyclic:
        return Constant(config.sparsity.target)
    if config.method.drops_and_grows and config.schedule.name == "cubic":
        return Constant(config.schedule.initial)
    if config.method.drops_and_grows and config.method.drop_and_grow.high:
        return Constant(1.0 - config.method.drop_and_grow.high[0] * (1.0 - config.sparsity.target))
    return schedule_of(config, clock)


def _cycles(config: Config, model: nn.Module, masks: Masks, clock: Clock, changed: Changed) -> CyclicSparsity:
    return CyclicSparsity(
        model,
        masks,
        clock.steps_a_round,
        cycles_of(config, clock),
        distribution=config.method.prune.distribution,
        drop=config.method.cycles.drop,
        grow=config.method.cycles.grow,
        gradients=config.method.gradients,
        seed=config.seed,
        changed=changed,
    )


def _drop_and_grow(
    config: Config, model: nn.Module, masks: Masks, clock: Clock, changed: Changed
) -> DropAndGrow | ElasticMutation:
    chosen, steps = config.method.drop_and_grow, clock.steps_a_round
    how: dict[str, Any] = {
        "distribution": chosen.distribution,
        "drop": chosen.drop,
        "grow": chosen.grow,
        "gradients": config.method.gradients,
        "seed": config.seed,
        "changed": changed,
    }
    if chosen.low:
        return ElasticMutation(model, masks, steps, bounds_of(config, clock), target=config.sparsity.target, **how)
    schedule = schedule_of(config, clock)
    pruning = schedule if isinstance(schedule, Cubic) else None
    return DropAndGrow(model, masks, steps, drop_fraction_of(config, clock), pruning=pruning, **how)


def _compaction(
    config: Config,
    model: nn.Module,
    selector: FilterSelector,
    clock: Clock,
    changed: Changed,
    say: Callable[[str], None],
) -> Compaction:
    def fused(gone: int, longest: float) -> None:
        warning = "" if longest < SHORT else "WARNING: cut before they had shrunk to nothing: "
        say(f"{warning}{gone:,} filters are gone, the longest row of their compactors had norm {longest:.2g}")

    chosen = config.method.compacting
    return Compaction(
        model,
        selector,
        config.sparsity.target,
        epochs=clock.epochs_a_round,
        penalty=chosen.penalty,
        begin=steps_of(chosen.begin, chosen.unit, clock),
        every=chosen.every,
        channels=chosen.channels,
        fused=fused,
        changed=changed,
    )


def _regrowth(
    config: Config,
    data: Data,
    model: nn.Module,
    masks: Masks,
    clock: Clock,
    starts: dict[str, Path],
    changed: Changed,
) -> Regrow:
    regrow = config.method.regrow
    dense = build_model(config)
    load_into(dense, load_network(starts["dense"]), starts["dense"])
    reference = None
    if "reference" in starts:
        state = load_network(starts["reference"])
        reference = {name: state[f"{name}.weight"] for name in masks.layers}
    return Regrow(
        model,
        masks,
        schedule_of(config, clock),
        dense,
        score=regrow.score,
        score_on=regrow.score_on,
        distribution=regrow.given if regrow.distribution == "given" else regrow.distribution,
        ssim_layers=regrow.ssim_layers,
        value=regrow.value,
        reference=reference,
        batches=partial(data.train.fixed, regrow.batches),
        image_size=config.dataset.image_size,
        seed=config.seed,
        changed=changed,
    )
