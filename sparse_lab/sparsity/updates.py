"""One mask change: prune to a number of weights, or grow to one. Scores, allocation and selection put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_lab.config import UserError
from sparse_lab.sparsity.allocation import allocate, share_out
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.selection import top_k_each


def prune_to(masks: Masks, kept: int, scores: Mapping[str, Tensor], allocation: str) -> dict[str, Tensor]:
    """New masks with exactly `kept` of the weights that are alive now: the best by `scores`, split by `allocation`.

    Raises UserError when fewer than `kept` are alive (pruning never revives a weight) or a layer would be emptied.
    """
    alive = masks.masks()
    if kept > masks.kept():
        raise UserError(f"cannot prune to {kept} weights: only {masks.kept()} are alive; regrowth is what adds weights")
    ranked = {name: _only(score, alive[name]) for name, score in scores.items()}
    counts = allocate(allocation, kept, masks.weights(), ranked, alive)
    return top_k_each(ranked, counts)


def grow_to(masks: Masks, kept: int, scores: Mapping[str, Tensor], order: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """New masks with exactly `kept` weights: all that are alive and the best pruned ones by `scores`.

    `order` names groups of layers: the growth is shared over the first group in proportion to what each layer lost;
    only what a full group cannot take goes on to the next. Raises UserError when all the groups together cannot take
    it.
    """
    alive = masks.masks()
    lost = {name: int((~mask).sum()) for name, mask in alive.items()}
    growth = kept - masks.kept()
    if growth < 0:
        raise UserError(f"cannot regrow to {kept} weights: {masks.kept()} are alive already")
    counts = dict.fromkeys(alive, 0)
    left = growth
    for group in order:
        names = [name for name in dict.fromkeys(group) if counts[name] == 0]
        room = [lost[name] for name in names]
        shares = share_out(min(left, sum(room)), room, [0] * len(room), room)
        counts.update(zip(names, shares, strict=True))
        left -= sum(shares)
    if left:
        raise UserError(
            f"the layers chosen for regrowth can take {growth - left} weights, not {growth}: name more of them"
        )
    ranked = {name: _only(score, ~alive[name]) for name, score in scores.items()}
    grown = top_k_each(ranked, counts)
    return {name: alive[name] | grown[name] for name in alive}


def _only(score: Tensor, allowed: Tensor) -> Tensor:
    """-inf wherever a position must not be picked, and only there: a score of -inf becomes the lowest finite number."""
    return score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~allowed, -torch.inf)
