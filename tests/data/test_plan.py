from __future__ import annotations

import dataclasses

import pytest
import torch

from sparse_lab.data.plan import Plan


def walked(plan: Plan, count: int, epoch: int = 0) -> list[list[int]]:
    order = plan.order(count, epoch)
    return [order[block].tolist() for block in plan.blocks(count)]


def test_evaluation_keeps_every_image_in_order() -> None:
    assert walked(Plan(batch_size=4), 10) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_training_drops_the_smaller_last_batch_but_never_the_only_one() -> None:
    plan = Plan(batch_size=4, shuffle=True, drop_last=True)
    assert [len(batch) for batch in walked(plan, 10)] == [4, 4]
    assert [len(batch) for batch in walked(plan, 4)] == [4]
    assert [len(batch) for batch in walked(plan, 3)] == [3]


def test_limit_cuts_batches() -> None:
    assert walked(Plan(batch_size=2, limit=2), 10) == [[0, 1], [2, 3]]
    assert len(walked(Plan(batch_size=2, limit=99), 10)) == 5


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    plan = Plan(batch_size=8, shuffle=True, seed=3)
    first = plan.order(100, 0)
    assert sorted(first.tolist()) == list(range(100))
    assert torch.equal(first, plan.order(100, 0))
    assert not torch.equal(first, plan.order(100, 1))
    assert not torch.equal(first, dataclasses.replace(plan, seed=4).order(100, 0))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [4, 12, 25, 48, 49, 50, 51])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_every_batch_of_the_single_process(world: int, count: int, train: bool) -> None:
    single = Plan(batch_size=12, shuffle=train, drop_last=train, seed=1)
    ranks = [walked(dataclasses.replace(single, rank=rank, world_size=world), count, epoch=2) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch for batches in ranks for batch in batches)
    seen = [image for batches in ranks for batch in batches for image in batch]
    assert len(seen) == len(set(seen))
    if train:
        assert len({tuple(map(len, batches)) for batches in ranks}) == 1
        assert len(seen) >= min(count // 12 * 12 or count - world + 1, count)
    else:
        assert set(seen) == set(range(count))
    for step, batch in enumerate(walked(single, count, epoch=2)[: count // 12 - 1]):
        assert set(batch) == {image for batches in ranks for image in batches[step]}


def test_fixed_batches_are_whole_and_know_only_the_seed() -> None:
    plan = Plan(batch_size=4, shuffle=True, drop_last=True, seed=5, limit=1)
    picks = plan.fixed(10, 5)
    assert [len(pick) for pick in picks] == [4] * 5
    assert len({*picks[0].tolist(), *picks[1].tolist()}) == 8, "one pass repeats no image"
    other_rank = dataclasses.replace(plan, rank=1, world_size=2)
    assert all(torch.equal(a, b) for a, b in zip(picks, other_rank.fixed(10, 5), strict=True))
    assert not torch.equal(picks[0], dataclasses.replace(plan, seed=6).fixed(10, 5)[0])
    assert not torch.equal(picks[0], picks[2]), "the second pass has another order"


def test_fixed_takes_all_images_of_a_set_smaller_than_a_batch() -> None:
    assert [sorted(pick.tolist()) for pick in Plan(batch_size=64).fixed(3, 2)] == [[0, 1, 2], [0, 1, 2]]
