from __future__ import annotations

import pytest
import torch

from sparse_lab.data.split import split
from sparse_lab.errors import UserError


@pytest.mark.parametrize(("share", "train", "validation"), [(0.1, 45_000, 5_000), (0.2, 40_000, 10_000)])
def test_sizes_are_exact_and_the_parts_cover_the_set_once(share: float, train: int, validation: int) -> None:
    parts = split(50_000, 10_000, share, seed=1)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (train, validation, 10_000)
    assert torch.cat([parts.train, parts.validation]).sort().values.tolist() == list(range(50_000))
    assert parts.test.tolist() == list(range(10_000))


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    first, again, other = split(1000, 10, 0.1, 1), split(1000, 10, 0.1, 1), split(1000, 10, 0.1, 2)
    assert torch.equal(first.train, again.train) and torch.equal(first.validation, again.validation)
    shared = set(first.validation.tolist()) & set(other.validation.tolist())
    assert len(shared) < 40, "two seeds hold out different images (10 in common are expected)"


def test_limits_come_after_the_split_and_nest() -> None:
    whole = split(1000, 200, 0.1, seed=3)
    small = split(1000, 200, 0.1, seed=3, train_limit=50, eval_limit=20)
    smaller = split(1000, 200, 0.1, seed=3, train_limit=30, eval_limit=10)
    assert (len(small.train), len(small.validation), len(small.test)) == (50, 20, 20)
    for name in ("train", "validation", "test"):
        larger = set(getattr(small, name).tolist())
        assert set(getattr(smaller, name).tolist()) < larger < set(getattr(whole, name).tolist())
    assert not torch.equal(small.test, split(1000, 200, 0.1, seed=4, eval_limit=20).test)


def test_limits_beyond_the_set_change_nothing() -> None:
    parts = split(100, 20, 0.1, seed=1, train_limit=10_000, eval_limit=10_000)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (90, 10, 20)


def test_each_side_keeps_an_image() -> None:
    tiny = split(2, 1, 0.001, seed=1)
    assert (len(tiny.train), len(tiny.validation)) == (1, 1)
    with pytest.raises(UserError, match="at least 2"):
        split(1, 1, 0.5, seed=1)
