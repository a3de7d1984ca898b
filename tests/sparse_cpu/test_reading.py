"""Readings of a map against torch's own permute, reshape and view of the same numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparse_lab.sparse_cpu.reading import MAP, is_view, regrouped, reread, same, shape_of

SIZES = [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 4), (2, 6, 1, 1), (1, 1, 1, 1), (2, 2, 2, 2)]
TARGETS = [
    lambda n, c, h, w: (n, c, h * w), lambda n, c, h, w: (n, -1), lambda n, c, h, w: (n * c, h, w),
    lambda n, c, h, w: (n, c, h, w, 1), lambda n, c, h, w: (1, n, c, 1, h, w), lambda n, c, h, w: (-1,),
    lambda n, c, h, w: (n, h * w, c), lambda n, c, h, w: (n * h, w, c), lambda n, c, h, w: (n, c * h, w),
    lambda n, c, h, w: (n, c, w, h),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_reading_sees_what_torch_sees(sizes: tuple[int, int, int, int]) -> None:
    whole = torch.arange(torch.Size(sizes).numel()).view(sizes)
    for order, target in itertools.product(itertools.permutations(range(4)), TARGETS):
        permuted = whole.permute(order)
        reading = tuple(MAP[axis] for axis in order)
        assert shape_of(reading, sizes) == tuple(permuted.shape)
        found = regrouped(reading, sizes, target(*sizes))
        if found is None:
            continue
        wanted = permuted.reshape(target(*sizes))
        assert shape_of(found, sizes) == tuple(wanted.shape)
        assert torch.equal(reread(whole, MAP, found, sizes), wanted)
        shares = wanted.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert is_view(found, MAP, sizes) == shares
        back = reread(wanted.contiguous(), found, MAP, sizes)
        assert torch.equal(back.reshape(sizes), whole)


def test_axes_are_never_cut() -> None:
    assert regrouped(MAP, (2, 6, 4, 4), (2, 3, 2, 16)) is None
    assert regrouped(MAP, (2, 6, 4, 4), (2, 6, 15)) is None
    assert regrouped(MAP, (2, 6, 4, 4), (-1, -1)) is None


def test_axes_of_one_may_lie_anywhere() -> None:
    assert same(((0,), (3,), (1,), (2,)), MAP, (2, 1, 1, 1))
    assert same(((0,), (1,), (), ()), MAP, (2, 6, 1, 1))
    assert not same(((0,), (2,), (1,), (3,)), MAP, (2, 6, 4, 1))
