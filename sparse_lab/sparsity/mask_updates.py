"""One mask update: prune to a number of weights, grow to one, move to one, or drop and grow at one. Scores,
distribution and top-k put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.choose import own_shares
from sparse_lab.sparsity.distributions import distribute, share_out
from sparse_lab.sparsity.masks import Masks, count_kept
from sparse_lab.sparsity.topk import top_k, top_k_each


def prune_to(
    masks: Masks,
    kept: int,
    scores: Mapping[str, Tensor],
    distribution: str,
    first: Callable[[dict[str, int]], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """New masks with exactly `kept` of the weights that are alive now: the best by `scores`, split by `distribution`.

    `first` is told how many weights each layer keeps and answers with bool masks of positions that come before all
    others.

    Raises SparseLabError when fewer than `kept` are alive (pruning never revives a weight) or a layer would be emptied.
    """
    alive = masks.masks()
    if kept > masks.kept():
        raise SparseLabError(
            f"cannot prune to {kept} weights: only {masks.kept()} are alive; regrowth is what adds weights"
        )
    ranked = {name: _only(score, alive[name]) for name, score in scores.items()}
    counts = distribute(distribution, kept, masks.weights(), ranked, alive, _own(masks, kept))
    if first is not None:
        reserved = first(counts)
        ranked = {name: score.masked_fill(reserved[name] & alive[name], torch.inf) for name, score in ranked.items()}
    return top_k_each(ranked, counts)


def grow_to(masks: Masks, kept: int, scores: Mapping[str, Tensor], order: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """New masks with exactly `kept` weights: all that are alive and the best pruned ones by `scores`.

    A layer with a sparsity of its own grows to what that says. `order` names groups of layers: the rest of the growth
    is shared over the others of the first group in proportion to what each layer lost; only what a full group cannot
    take goes on to the next. Raises SparseLabError when all groups together cannot take it.
    """
    alive = masks.masks()
    lost = {name: alive[name].numel() - number for name, number in masks.kept_by_layer().items()}
    growth = kept - masks.kept()
    if growth < 0:
        raise SparseLabError(f"cannot regrow to {kept} weights: {masks.kept()} are alive already")
    own = _own_growth(masks, kept, growth)
    counts = dict.fromkeys(alive, 0) | own
    left = growth - sum(own.values())
    for group in order:
        names = [name for name in dict.fromkeys(group) if counts[name] == 0 and name not in own]
        room = [lost[name] for name in names]
        shares = share_out(min(left, sum(room)), room, [0] * len(room), room)
        counts.update(zip(names, shares, strict=True))
        left -= sum(shares)
    if left:
        raise SparseLabError(
            f"the layers chosen for regrowth can take {growth - left} weights, not {growth}: name more of them"
        )
    ranked = {name: _only(score, ~alive[name]) for name, score in scores.items()}
    grown = top_k_each(ranked, counts)
    return {name: alive[name] | grown[name] for name in alive}


def _own_growth(masks: Masks, kept: int, growth: int) -> dict[str, int]:
    """How many of `growth` weights come back in each layer that has a sparsity of its own."""
    there = masks.kept_by_layer()
    wanted = {name: max(0, round(share) - there[name]) for name, share in _own(masks, kept).items()}
    room = list(wanted.values())
    return dict(zip(wanted, share_out(min(growth, sum(room)), room, [0] * len(room), room), strict=True))


def move_to(
    masks: Masks,
    kept: int,
    drop: Mapping[str, Tensor],
    grow: Mapping[str, Tensor],
    distribution: str,
    chance: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """New masks with exactly `kept` weights, split anew by `distribution` ('uniform', 'er' or 'erk').

    A layer that is to hold more grows its best pruned weights by `grow`; one that is to hold fewer keeps its best by
    `drop`; no layer does both. `chance` draws among equal scores: where a mask cuts the network every gradient
    is zero, and the lowest indices of all layers would join up to a path that no method has found.
    """
    alive = masks.masks()
    counts = _counts_anew(masks, kept, drop, distribution)
    new, numbers = {}, count_kept(alive)
    for name, mask in alive.items():
        change = counts[name] - numbers[name]
        if change >= 0:
            new[name] = mask | top_k(_only(grow[name], ~mask), change, chance)
        else:
            new[name] = top_k(_only(drop[name], mask), counts[name], chance)
    return new


def drop_and_grow(
    alive: Mapping[str, Tensor],
    fraction: float,
    drop: Mapping[str, Tensor],
    grow: Mapping[str, Tensor],
    chance: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Masks with as many weights in each layer as `alive` has: its worst by `drop` go, the best of those pruned before
    by `grow` come.

    Each layer drops ceil(fraction * alive), as ITOP's authors do (a layer of three weights still explores), but no
    more than it has pruned positions to offer. What was dropped does not come back in the same change. `chance` as in
    `move_to`.
    """
    new, numbers = {}, count_kept(alive)
    for name, mask in alive.items():
        kept = numbers[name]
        # 0.1 * 30 is a hair above 3
        dropped = min(math.ceil(fraction * kept - 1e-9), mask.numel() - kept)
        stay = top_k(_only(drop[name], mask), kept - dropped, chance)
        new[name] = stay | top_k(_only(grow[name], ~mask), dropped, chance)
    return new


def drop_then_grow(
    masks: Masks,
    low: int,
    high: int,
    drop: Mapping[str, Tensor],
    grow: Mapping[str, Tensor],
    distribution: str,
    chance: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """New masks with exactly `high` weights, of which at most `low` were alive: the best by `drop` stay, the best of
    the positions that were pruned by `grow` come. Both numbers are split over layers by `distribution`.
    """
    alive = masks.masks()
    fewest, most = (_counts_anew(masks, kept, drop, distribution) for kept in (low, high))
    new, numbers = {}, count_kept(alive)
    for name, mask in alive.items():
        pruned = mask.numel() - numbers[name]
        # a layer without pruned positions enough for what it is to hold keeps more of its own
        stay = max(min(fewest[name], numbers[name]), most[name] - pruned)
        new[name] = top_k(_only(drop[name], mask), stay, chance) | top_k(
            _only(grow[name], ~mask), most[name] - stay, chance
        )
    return new


def _counts_anew(masks: Masks, kept: int, scores: Mapping[str, Tensor], distribution: str) -> dict[str, int]:
    """How many weights each layer is to keep, whatever is alive in it now."""
    everything = {name: torch.ones_like(mask) for name, mask in masks.masks().items()}
    return distribute(distribution, kept, masks.weights(), scores, everything, _own(masks, kept))


def _own(masks: Masks, kept: int) -> dict[str, float]:
    return own_shares(masks.layers, kept, masks.total())


def _only(score: Tensor, allowed: Tensor) -> Tensor:
    """-inf wherever a position must not be picked, and only there: a score of -inf becomes the lowest finite number."""
    return score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~allowed, -torch.inf)
