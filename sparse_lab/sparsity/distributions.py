"""How a number of kept weights is split over layers: exact integer counts that add up.

Each rule gives every layer a claim; `share_out` turns claims into counts. Where a layer saturates (it cannot keep more
than it has), the rest is shared out again among the others until the total is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_lab.errors import SparseLabError, nearest
from sparse_lab.registering import check_function, enter
from sparse_lab.sparsity import names
from sparse_lab.sparsity import scores as scoring
from sparse_lab.sparsity.masks import count_kept
from sparse_lab.sparsity.topk import global_counts


def share_out(total: int, claims: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Integers in proportion to `claims`, within [least, most], that add up to exactly `total`.

    Layers that would pass a bound are set to it and the rest is solved again until nothing passes; fractions are
    settled by the largest remainder, ties by index. Raises ValueError when the bounds leave no solution.
    """
    if not sum(least) <= total <= sum(most):
        raise ValueError(f"{total} does not fit between {sum(least)} and {sum(most)}")
    ideal = _fill(total, claims, least, most)
    counts = [min(max(int(value), low), high) for value, low, high in zip(ideal, least, most, strict=True)]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (counts[i] - ideal[i], i))
    short = total - sum(counts)
    while short:
        for i in by_remainder:
            if short and counts[i] < most[i]:
                counts[i] += 1
                short -= 1
    return counts


def _fill(total: int, claims: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[float]:
    """Real-valued shares: x_i = clamp(scale * claim_i, least_i, most_i) with the scale at which they add up."""
    fixed: dict[int, float] = {}
    while True:
        free = [i for i in range(len(claims)) if i not in fixed]
        rest = total - sum(fixed.values())
        # without any claim left the rest goes by size
        by = claims if any(claims[i] > 0 for i in free) else most
        wanted = sum(by[i] for i in free)
        share = {i: rest * by[i] / wanted if wanted else 0.0 for i in free}
        over = {i: float(most[i]) for i in free if share[i] > most[i]}
        under = {i: float(least[i]) for i in free if share[i] < least[i]}
        if not over and not under:
            return [fixed[i] if i in fixed else share[i] for i in range(len(claims))]
        # only the side that weighs more is final in this round: fixing it moves the scale towards the other one
        excess = sum(share[i] - most[i] for i in over) - sum(least[i] - share[i] for i in under)
        fixed.update(over if excess >= 0 else under)


def uniform(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The same density everywhere."""
    return {name: float(_size(shape)) for name, shape in shapes.items()}


def er(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Erdos-Renyi: density proportional to (in + out) / (in * out) (SET, Mocanu et al. 2018)."""
    return {name: _size(shape) * (shape[0] + shape[1]) / (shape[0] * shape[1]) for name, shape in shapes.items()}


def erk(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Erdos-Renyi-kernel: density proportional to (sum of dims) / (product of dims) (RigL, Evci et al. 2020)."""
    return {name: float(sum(shape)) for name, shape in shapes.items()}


def equal(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The same number of weights everywhere (equal per layer: Price & Tanner 2021, arXiv 2102.07655)."""
    return dict.fromkeys(shapes, 1.0)


Claims = Callable[[Mapping[str, Sequence[int]]], dict[str, float]]
DISTRIBUTIONS: dict[str, Claims] = {
    "uniform": uniform,
    "er": er,
    "erk": erk,
    "equal": equal,
}


def register_distribution(function: Claims) -> Claims:
    """Make a distribution of your own known under its function's name, as a decorator: `@register_distribution`.

    The function takes {layer: shape of its weight} and returns {layer: claim}: kept weights are split in proportion to
    the claims, floats of 0 or more, exactly and so that no layer is emptied. Then `method.prune.distribution=NAME` and
    every other key that takes a distribution take it.

    Raise SparseLabError for a name that is taken or no plain word, and for what is no function.
    """
    name = check_function("distribution", function, names.DISTRIBUTIONS)

    def forget() -> None:
        del DISTRIBUTIONS[name]
        names.DISTRIBUTIONS.remove(name)

    DISTRIBUTIONS[name] = function
    names.DISTRIBUTIONS.append(name)
    enter("distribution", name, forget)
    return function


def distribute(
    name: str,
    kept: int,
    weights: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    own: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Number of kept weights of each layer, adding up to exactly `kept`, none zero and none above what is alive.

    name: 'global' (one ranking of `scores` over all layers), 'lamp' (one ranking of LAMP scores, whatever `scores`
    say), 'uniform', 'er', 'erk' or 'equal'. All mappings hold tensors of the weights' shapes; `alive` is bool, and
    positions that are not alive score -inf. own: how many weights some layers are to keep (`choose.own_shares`);
    `name` splits the rest over the others. Raises SparseLabError when `kept` cannot leave a weight in every layer.
    """
    if kept < len(weights):
        raise SparseLabError(
            f"{kept} kept weights would empty a layer (the network has {len(weights)}): choose a lower sparsity"
        )
    if own:
        said = _own_counts(kept, own, count_kept(alive))
        others = [layer for layer in weights if layer not in own]
        left = kept - sum(said.values())
        rest = [{layer: one[layer] for layer in others} for one in (weights, scores, alive)]
        return said | (distribute(name, left, rest[0], rest[1], rest[2]) if others else {})
    if name == "global":
        return global_counts(scores, kept)
    if name == "lamp":
        lamp = {
            layer: scoring.lamp_of(weight).masked_fill(~alive[layer], -torch.inf) for layer, weight in weights.items()
        }
        return global_counts(lamp, kept)
    if name not in DISTRIBUTIONS:
        raise SparseLabError(f"unknown distribution {name!r}; {nearest(name, [*DISTRIBUTIONS, 'global', 'lamp'])}")
    claims = DISTRIBUTIONS[name]({layer: tuple(weight.shape) for layer, weight in weights.items()})
    most = count_kept(alive)
    counts = share_out(kept, list(claims.values()), [1] * len(claims), [most[layer] for layer in claims])
    return dict(zip(claims, counts, strict=True))


def _own_counts(kept: int, own: Mapping[str, float], alive: Mapping[str, int]) -> dict[str, int]:
    """What is said of layers with a sparsity of their own as whole numbers, as near to it as the others allow: each of
    them keeps one weight at least, and no more than is alive in it. alive: in each layer, these and the others.
    """
    counts = {layer: min(max(1, round(share)), alive[layer]) for layer, share in own.items()}
    others = [number for layer, number in alive.items() if layer not in own]
    total = min(max(sum(counts.values()), kept - sum(others)), kept - len(others))
    if total == sum(counts.values()):
        return counts
    try:
        fitting = share_out(total, list(own.values()), [1] * len(own), [alive[layer] for layer in own])
    except ValueError:
        raise SparseLabError(
            f"{kept} kept weights do not go with the layers that have a sparsity of their own: choose a lower sparsity"
        ) from None
    return dict(zip(own, fitting, strict=True))


def _size(shape: Sequence[int]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size
