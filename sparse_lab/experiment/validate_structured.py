"""What can be wrong with a request to prune whole filters: one clear line each, before anything trains."""

from __future__ import annotations

import math
from functools import cache

import torch

from sparse_lab.config import Config
from sparse_lab.errors import UserError
from sparse_lab.experiment.networks import Spec, filter_groups, meta_network, spec_of
from sparse_lab.experiment.timeline import recipe_of
from sparse_lab.sparsity.flops import layer_costs
from sparse_lab.sparsity.masks import layers, num_kept
from sparse_lab.sparsity.structured import channels
from sparse_lab.sparsity.structured.filter_scores import find_filter_score


def check_filters(config: Config) -> None:
    """Can whole filters go as the method asks?"""
    method, schedule, chosen = config.method, config.schedule, config.method.filters
    for name, wanted in {
        "sharing": method.sharing, "dyrelu": method.dyrelu, "dct": method.dct, "hypersphere": method.hypersphere
    }.items():  # fmt: skip
        if wanted:
            raise UserError(f"method.{name}=true does not go with method.prune.unit=filters")
    if tuple(method.parts) != ("prune",):
        raise UserError(
            f"method.prune.unit=filters takes whole filters out: method.parts={method.parts} must be [prune]"
        )
    if method.prune.distribution not in ("uniform", "global"):
        raise UserError(
            f"method.prune.distribution={method.prune.distribution}: filters go by uniform (the same share of every "
            "layer) or global (one ranking)"
        )
    if method.prune.score == "compactor" and not method.compactors:
        raise UserError("method.prune.score=compactor needs method.compactors=true: use method=resrep")
    if method.prune.score != "compactor":
        if method.compactors:
            raise UserError(
                f"compactors score filters themselves: method.prune.score=compactor, not {method.prune.score}"
            )
        find_filter_score(method.prune.score)
    fitting = ("at_end",) if method.compactors else ("one_shot", "iterative", "cubic", "soft", "layerwise")
    if schedule.name not in fitting:
        raise UserError(f"method.prune.unit=filters works with schedule={' or '.join(fitting)}, not {schedule.name}")
    if schedule.name == "layerwise" and not chosen.rates:
        raise UserError("schedule=layerwise prunes by method.filters.rates=[...], one number a layer: give them")
    if chosen.rates and (schedule.name not in ("one_shot", "layerwise") or chosen.flops is not None):
        raise UserError(
            "method.filters.rates say all by themselves: schedule=one_shot or layerwise, and method.filters.flops=null"
        )
    if chosen.flops is not None and schedule.name in ("cubic", "iterative"):
        raise UserError(
            f"method.filters.flops would be reached at the first of the changes that schedule={schedule.name} makes: "
            "use schedule=one_shot"
        )
    if method.compactors and recipe_of(config).optimizer != "sgd":
        raise UserError(
            f"compactors shrink by SGD with a momentum of their own, not by {recipe_of(config).optimizer}: "
            "training.finetune.optimizer=sgd"
        )
    if method.compactors and chosen.coupled:
        raise UserError("compactors stand behind single layers: method.filters.coupled=false")
    if method.prune.rewind_weights is not None or method.prune.iterations > 1:
        raise UserError("method.prune.unit=filters goes with method.prune.rewind_weights=null and iterations=1")
    _check_channels(config)


def _check_channels(config: Config) -> None:
    """Would the rates, or what sparsity.target and method.filters.flops ask, take a layer's last filter?"""
    chosen = config.method.filters
    groups = filter_groups(config)
    costs = _costs(spec_of(config))
    shapes = {name: shape for name, (shape, _) in costs.items()}
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
            f"sparsity.target={config.sparsity.target:g} takes the last filter of a layer: by filters the highest "
            f"sparsity here is {highest:.6f}{more}"
        )
    macs = sum(cost for _, cost in costs.values())
    least = sum(cost * fewest[name] / shape.numel() for name, (shape, cost) in costs.items())
    if chosen.flops is not None and (1.0 - chosen.flops) * macs < least:
        raise UserError(
            f"method.filters.flops={chosen.flops:g} takes the last filter of a layer: at most "
            f"{math.floor(1e6 * (1 - least / macs)) / 1e6:.6f} of the multiply-adds can go here{more}"
        )


@cache
def _costs(spec: Spec) -> dict[str, tuple[torch.Size, int]]:
    """Shape and multiply-adds of every counted layer of a plain network."""
    model = meta_network(spec)
    found = layers(model)
    return {cost.name: (found[cost.name].weight.shape, cost.macs) for cost in layer_costs(model, spec[3])}
