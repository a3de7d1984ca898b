"""Pruning whole filters: which of them can go, and whether a layer would be left without any."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparse_lab.config import Config, MethodConfig
from sparse_lab.errors import UserError
from sparse_lab.methods.base import Component, Site
from sparse_lab.methods.prune import batches, plain_pruning

if TYPE_CHECKING:
    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.algorithms.structured.selector import FilterSelector
    from sparse_lab.methods.networks import Structure


class Filters(Component):
    part = "filters"
    needs = ("prune",)
    not_with = ("sharing", "dyrelu", "dct", "hypersphere", "cycles", "drop_and_grow", "elastic_mutation", "regrow")
    schedules = ("one_shot", "iterative", "cubic", "soft", "layerwise", "at_end")
    in_place_of = ("prune",)

    def check(self, config: Config, structure: Structure) -> None:
        _check_pruning(config)
        _check_rates(config)
        _check_channels(config, structure)

    def build(self, site: Site) -> list[Algorithm]:
        return [plain_pruning(site, filter_selector(site))]

    def describe(self, method: MethodConfig) -> str:
        return ""  # prune says it


def filter_selector(site: Site) -> FilterSelector:
    """Return what chooses the filters that stay."""
    from sparse_lab.algorithms.structured.selector import FilterSelector
    from sparse_lab.sparsity.flops import layer_costs

    prune, filters = site.config.method.prune, site.config.method.filters
    assert prune is not None and filters is not None and site.masks is not None
    costs = layer_costs(site.model, site.structure.shape)
    return FilterSelector(
        site.masks,
        site.structure.filter_groups(site.config),
        {cost.name: cost.macs // cost.total for cost in costs if cost.counted},
        prune.score,
        prune.distribution,
        rates=filters.rates,
        layerwise=site.config.schedule.layerwise is not None,
        flops=filters.flops,
        whole=sum(cost.macs for cost in costs if not cost.counted),
        batches=batches(site),
    )


def _check_pruning(config: Config) -> None:
    """Do score, distribution and rounds fit whole filters?"""
    from sparse_lab.sparsity.structured.filter_scores import find_filter_score

    method, prune = config.method, config.method.prune
    assert prune is not None
    if prune.distribution not in ("uniform", "global"):
        raise UserError(
            f"method.prune.distribution={prune.distribution}: filters go by uniform (the same share of every "
            "layer) or global (one ranking)"
        )
    if prune.score == "compactor" and method.compactors is None:
        raise UserError("method.prune.score=compactor needs method.compactors: use method=resrep")
    if prune.score != "compactor":
        find_filter_score(prune.score)
    if config.schedule.at_end is not None and method.compactors is None:
        raise UserError(
            "schedule=at_end prunes filters that compactors have emptied: use method=resrep, or schedule=one_shot"
        )
    if prune.rewind_weights is not None or prune.iterations > 1:
        raise UserError("method.filters goes with method.prune.rewind_weights=null and iterations=1")


def _check_rates(config: Config) -> None:
    """Do the rates, or the share of the multiply-adds, go with the schedule?"""
    schedule, filters = config.schedule.name, config.method.filters
    assert filters is not None
    if schedule == "layerwise" and not filters.rates:
        raise UserError("schedule=layerwise prunes by method.filters.rates=[...], one number a layer: give them")
    if config.sparsity.layers:
        raise UserError("sparsity.layers are sparsities of single weights: whole filters go by method.filters.rates")
    if filters.rates and (schedule not in ("one_shot", "layerwise") or filters.flops is not None):
        raise UserError(
            "method.filters.rates say all by themselves: schedule=one_shot or layerwise, and method.filters.flops=null"
        )
    if filters.flops is not None and schedule in ("cubic", "iterative"):
        raise UserError(
            f"method.filters.flops would be reached at the first of the changes that schedule={schedule} makes: "
            "use schedule=one_shot"
        )


def _check_channels(config: Config, structure: Structure) -> None:
    """Would the rates, or what sparsity.target and method.filters.flops ask, take a layer's last filter?"""
    import torch

    from sparse_lab.sparsity.masks import num_kept
    from sparse_lab.sparsity.structured import channels

    chosen = config.method.filters
    assert chosen is not None
    groups = structure.filter_groups(config)
    shapes, costs = structure.weights, structure.costs
    total = sum(shape.numel() for shape in shapes.values())
    if chosen.rates:
        nothing = {group.name: torch.zeros(group.channels) for group in groups}
        alive = channels.by_rates(groups, nothing, chosen.rates)
        left = channels.kept_weights(groups, {name: int(mask.sum()) for name, mask in alive.items()}, shapes)
        sparsity = 1.0 - left / total
        if abs(sparsity - config.sparsity.target) > 5e-5:
            raise UserError(
                f"method.filters.rates keep {left:,} of {total:,} weights: "
                f"say sparsity.target={sparsity:.4f} beside them"
            )
        return
    one = {group.name: torch.arange(group.channels) == 0 for group in groups}
    fewest = {name: int(mask.sum()) for name, mask in channels.masks_of(groups, one, shapes).items()}
    more = (
        ""
        if chosen.coupled or config.method.compactors
        else "; method.filters.coupled=true lets residual trunks go too"
    )
    if num_kept(config.sparsity.target, total) < sum(fewest.values()):
        highest = math.floor(1e6 * (1 - sum(fewest.values()) / total)) / 1e6
        raise UserError(
            f"sparsity.target={config.sparsity.target:.12g} takes the last filter of a layer: by filters the highest "
            f"sparsity here is {highest:.6f}{more}"
        )
    macs = sum(costs.values())
    least = sum(macs * fewest[name] / shapes[name].numel() if name in shapes else macs for name, macs in costs.items())
    if chosen.flops is not None and (1.0 - chosen.flops) * macs < least:
        raise UserError(
            f"method.filters.flops={chosen.flops:.12g} takes the last filter of a layer: at most "
            f"{math.floor(1e6 * (1 - least / macs)) / 1e6:.6f} of the multiply-adds can go here{more}"
        )
