"""Which positions a count picks: one exact, tie-stable top-k for everyone.

Thresholds over-prune or under-prune where scores tie (bf16 scores tie a lot). Here the count is exact, and among equal
scores the lowest index wins.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sparse_lab.errors import SparseLabError


def top_k(scores: Tensor, k: int, chance: torch.Generator | None = None) -> Tensor:
    """Bool mask, shape of `scores`, with exactly `k` True at the largest scores; equal scores: lowest index first, or
    whichever `chance` draws.

    Raises ValueError for a `k` outside [0, numel] and for NaN scores.
    """
    flat = scores.detach().reshape(-1)
    if not 0 <= k <= flat.numel():
        raise ValueError(f"cannot pick {k} of {flat.numel()} positions")
    if k == 0 or k == flat.numel():
        if bool(torch.isnan(flat).any()):
            raise ValueError("scores hold NaN")
        return torch.full(scores.shape, k > 0, dtype=torch.bool, device=scores.device)
    threshold = kth_largest(flat, k)
    picked, tied = flat > threshold, flat == threshold
    # one question to the device instead of four: each waits for all that it still has to do
    above, ties, bad = torch.stack([picked.sum(), tied.sum(), torch.isnan(flat).sum()]).tolist()
    if bad:
        raise ValueError("scores hold NaN")
    if above + ties == k:
        return (picked | tied).reshape(scores.shape)
    places = torch.nonzero(tied).reshape(-1)
    if chance is not None:
        places = places[torch.randperm(ties, generator=chance).to(places.device)]
    picked[places[: k - above]] = True
    return picked.reshape(scores.shape)


def kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest of a 1-D tensor without NaN, as a 0-D tensor of its dtype.

    numpy's partition was the fastest on a CPU over 21 M float32 scores (`sparse-lab bench selection`): about 3 times
    faster than torch.topk and kthvalue, 20 times faster than a sort. On a GPU torch.topk is. Where most values are the
    smallest one (-inf for what is pruned already) it would be 10 times slower: those are left out first.
    """
    if flat.device.type != "cpu":
        return torch.topk(flat, k, sorted=False).values.min()
    smallest = flat.min()
    above = flat[flat > smallest]
    if len(above) < k:
        return smallest
    # bfloat16 is unknown to numpy; float32 holds it exactly
    array = (above.float() if above.dtype == torch.bfloat16 else above).numpy()
    place = len(array) - k
    return torch.as_tensor(np.partition(array, place)[place]).to(flat.dtype)


def top_k_each(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """In each layer its own top-k. `scores` and the masks returned have the weights' shapes."""
    return {name: top_k(scores[name], counts[name]) for name in scores}


def global_counts(scores: Mapping[str, Tensor], total: int, least: int = 1) -> dict[str, int]:
    """How many weights each layer keeps when the `total` largest scores of the whole network stay.

    Each layer's `least` best weights stay in any case, so that no layer is emptied; the total is exact all the same.
    Raises SparseLabError when `total` cannot leave `least` weights in each layer.
    """
    floors = {name: min(least, score.numel()) for name, score in scores.items()}
    if total < sum(floors.values()):
        raise SparseLabError(
            f"{total} weights cannot keep {len(scores)} layers alive (at least {least} each): choose a lower sparsity"
        )
    flat = torch.cat([score.detach().reshape(-1) for score in scores.values()])
    sizes = [score.numel() for score in scores.values()]
    picked = top_k(flat, total)
    counts = {name: int(part.sum()) for name, part in zip(scores, picked.split(sizes), strict=True)}
    if all(counts[name] >= floors[name] for name in counts):
        return counts
    return _with_floors(scores, flat, floors, total)


def _with_floors(scores: Mapping[str, Tensor], flat: Tensor, floors: Mapping[str, int], total: int) -> dict[str, int]:
    """Reserve every layer's floor first, then share the rest out globally."""
    picked = torch.cat([top_k(score, floors[name]).reshape(-1) for name, score in scores.items()])
    picked[~picked] = top_k(flat[~picked], total - sum(floors.values()))
    sizes = [score.numel() for score in scores.values()]
    return {name: int(part.sum()) for name, part in zip(scores, picked.split(sizes), strict=True)}
