"""A map read with its axes in another order, or merged: what `permute`, `flatten` and `view` make of it costs nothing.

A reading has a group of axes (N, C, H, W = 0, 1, 2, 3) for each dimension of the tensor that the network sees, the
slowest first. `((0,), (2, 3), (1,))` are the tokens of a map: (N, H * W, C). Axes of size 1 may be in no group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

Reading = tuple[tuple[int, ...], ...]
Sizes = tuple[int, int, int, int]

MAP: Reading = ((0,), (1,), (2,), (3,))
FLAT: Reading = ((0,), (1, 2, 3))


def shape_of(reading: Reading, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of the tensor that the network sees."""
    if reading == MAP:
        return sizes
    return tuple(math.prod(sizes[axis] for axis in group) for group in reading)


def same(one: Reading, other: Reading, sizes: Sizes) -> bool:
    """Return whether two readings are one: axes of size 1 may lie anywhere."""
    return one == other or bare(one, sizes) == bare(other, sizes)


def bare(reading: Reading, sizes: Sizes) -> Reading:
    """Return the reading without axes of size 1."""
    return tuple(tuple(axis for axis in group if sizes[axis] > 1) for group in reading)


def regrouped(reading: Reading, sizes: Sizes, target: Sequence[int]) -> Reading | None:
    """Return the reading of `target`'s shape, whose axes follow each other as before; None where it cuts through one.

    target: may hold one -1, as in torch.
    """
    wanted = _resolved(target, math.prod(shape_of(reading, sizes)))
    if wanted is None:
        return None
    ahead = [axis for group in reading for axis in group]
    found = []
    for size in wanted:
        group: list[int] = []
        while ahead and (math.prod(sizes[axis] for axis in group) < size or (size == 1 and not group)):
            if size == 1 and sizes[ahead[0]] > 1:
                break
            group.append(ahead.pop(0))
        if math.prod(sizes[axis] for axis in group) != size:
            return None
        found.append(tuple(group))
    return tuple(found)


def _resolved(target: Sequence[int], total: int) -> list[int] | None:
    known = math.prod(size for size in target if size != -1)
    if min(target, default=0) < -1 or list(target).count(-1) > 1 or known == 0:
        return None
    whole = [total // known if size == -1 else size for size in target]
    return whole if math.prod(whole) == total else None


def is_view(reading: Reading, home: Reading, sizes: Sizes) -> bool:
    """Return whether torch could read a contiguous tensor of `home` so without a copy."""
    order = [axis for group in home for axis in group if sizes[axis] > 1]
    after = dict(itertools.pairwise(order))
    pairs = [pair for group in bare(reading, sizes) for pair in itertools.pairwise(group)]
    return all(after.get(one) == other for one, other in pairs)


def reread(tensor: Tensor, home: Reading, reading: Reading, sizes: Sizes) -> Tensor:
    """Return what `reading` sees of a tensor that `home` sees, a view where torch has one."""
    order = _order(home)
    whole = tensor.reshape([sizes[axis] for axis in order])
    whole = whole.permute([order.index(axis) for axis in _order(reading)])
    return whole.reshape(shape_of(reading, sizes))


def _order(reading: Reading) -> list[int]:
    """Every axis once; what is in no group comes last."""
    found = [axis for group in reading for axis in group]
    return found + [axis for axis in range(4) if axis not in found]
