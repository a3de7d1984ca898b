"""Dense and sparse by turns, epoch ends, bounds of elastic mutation, equal layers, rewound clocks: by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.distributions import distribute
from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.schedules import Alternating, Bounds, EpochEnds
from sparse_lab.sparsity.topk import kth_largest, top_k

D, S = 0.0, 0.95


def _letters(schedule: Alternating, steps: int) -> str:
    return "".join("S" if schedule.sparsity(step) else "d" for step in range(steps))


@pytest.mark.parametrize(
    ("begin", "turn", "dense_from", "end", "wanted"),
    [
        # the paper's 100 ImageNet epochs, one letter an epoch: 10 dense, 5 and 5 by turns, 75 to 85 dense, then sparse
        (10, 5, 75, 85, "d" * 10 + ("S" * 5 + "d" * 5) * 6 + "S" * 5 + "d" * 10 + "S" * 15),
        (2, 2, 8, 10, "ddSSddSSddSS"),
        # two steps before `dense_from` fill no turn of three: they make the sparse one before them longer
        (1, 3, 6, 7, "dSSSSSdSS"),
        # a sparse and a dense turn of three, and one step that fills none: the dense one goes on
        (1, 3, 8, 9, "dSSSdddddSSS"),
        # not even one turn fits: sparse at once all the same
        (2, 9, 4, 5, "ddSSdSSS"),
        (0, 1, 3, 4, "SdSdSS"),
        # all on the first step, as in a training of one step
        (0, 1, 0, 0, "SSS"),
        (1, 1, 1, 1, "dSSS"),
    ],
)
def test_turns_by_hand(begin: int, turn: int, dense_from: int, end: int, wanted: str) -> None:
    schedule = Alternating(S, begin, turn, dense_from, end)
    assert _letters(schedule, len(wanted)) == wanted
    assert {schedule.sparsity(step) for step in range(len(wanted))} <= {D, S}
    # a change is due exactly where the letter changes; before the first step a network is dense
    before = "d" + wanted[:-1]
    due = [step for step in range(len(wanted)) if schedule.due(step)]
    assert due == [step for step, (old, new) in enumerate(zip(before, wanted, strict=True)) if old != new]


@given(st.data())
def test_turns_whatever_the_numbers(data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, 20))
    turn = data.draw(st.integers(1, 9))
    dense_from = begin + data.draw(st.integers(0, 60))
    end = dense_from + data.draw(st.integers(0, 10))
    letters = _letters(Alternating(S, begin, turn, dense_from, end), end + 30)
    assert set(letters[:begin]) <= {"d"} and set(letters[dense_from:end]) <= {"d"} and set(letters[end:]) == {"S"}
    whole = (dense_from - begin) // turn
    for number in range(whole):
        part = letters[begin + number * turn : begin + (number + 1) * turn]
        assert part == ("S" if number % 2 == 0 else "d") * turn
    rest = letters[begin + whole * turn : dense_from]
    assert len(set(rest)) <= 1 and (not rest or rest[0] == (letters[begin + whole * turn - 1] if whole else "S"))


def test_epoch_ends() -> None:
    soft, hard = EpochEnds(S, 4, soft=True), EpochEnds(S, 4, soft=False)
    assert [soft.due_after(epoch) for epoch in range(4)] == [True] * 4
    assert [hard.due_after(epoch) for epoch in range(4)] == [False, False, False, True]
    for schedule in (soft, hard):
        assert [schedule.final(epoch) for epoch in range(4)] == [False, False, False, True]
        assert not any(schedule.due(step) for step in range(100))
        assert {schedule.sparsity(step) for step in (0, 1, 99)} == {S}
    assert EpochEnds(S, 1, soft=False).due_after(0)


def test_bounds_by_hand() -> None:
    """MEST's of 160 epochs, one step an epoch: every 5 until epoch 120, where the target is reached once and for
    all.
    """
    hard = Bounds((0.8, 0.9, 1.0), (1.0, 1.0, 1.0), (90, 120), 5)
    assert [step for step in range(160) if hard.due(step)] == [*range(5, 121, 5)]
    assert [hard.densities(step) for step in (5, 89, 90, 119, 120, 159)] == [
        (0.8, 1.0), (0.8, 1.0), (0.9, 1.0), (0.9, 1.0), (1.0, 1.0), (1.0, 1.0)
    ]  # fmt: skip
    soft = Bounds((1.0, 1.0, 1.0), (1.5, 1.25, 1.0), (7, 9), 4)
    assert [step for step in range(13) if soft.due(step)] == [4, 7, 8, 9]
    assert [soft.densities(step) for step in (4, 7, 8, 9)] == [(1.0, 1.5), (1.0, 1.25), (1.0, 1.25), (1.0, 1.0)]


def test_bounds_at_their_edges() -> None:
    one = Bounds((0.5,), (1.0,), (), 3)
    assert [step for step in range(-3, 10) if one.due(step)] == [3, 6, 9] and one.densities(10**9) == (0.5, 1.0)
    # stages that a short training has no step for are left out; the last one holds
    same = Bounds((0.8, 0.9, 1.0), (1.0, 1.0, 1.0), (1, 1), 5)
    assert [step for step in range(20) if same.due(step)] == [1] and same.densities(1) == (1.0, 1.0)
    assert not Bounds((0.8, 1.0), (1.0, 1.0), (0,), 5).due(0)
    # nothing but the target from the start: only the milestone
    still = Bounds((1.0, 1.0), (1.0, 1.0), (4,), 2)
    assert [step for step in range(20) if still.due(step)] == [4]


def _alive(sizes: list[tuple[int, ...]], dead: list[int]) -> tuple[dict, dict]:
    weights = {str(i): torch.zeros(size) for i, size in enumerate(sizes)}
    alive = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for name, number in zip(alive, dead, strict=True):
        alive[name].view(-1)[:number] = False
    return weights, alive


@pytest.mark.parametrize(
    ("kept", "dead", "counts"),
    [
        (12, [0, 0, 0, 0], [3, 3, 3, 3]),
        (14, [0, 0, 0, 0], [4, 4, 3, 3]),  # of equal remainders the first layers'
        (4, [0, 0, 0, 0], [1, 1, 1, 1]),
        (100, [0, 0, 0, 0], [6, 41, 40, 13]),
        (273, [0, 0, 0, 0], [6, 54, 200, 13]),
        (50, [3, 50, 0, 0], [3, 4, 30, 13]),  # only what is alive can be kept
    ],
)
def test_as_many_weights_in_every_layer(kept: int, dead: list[int], counts: list[int]) -> None:
    """Layers of 6, 54, 200 and 13 weights; all the same, but never more than a layer has."""
    weights, alive = _alive([(2, 3), (2, 3, 3, 3), (10, 20), (1, 13)], dead)
    have = [int(mask.sum()) for mask in alive.values()]
    found = list(distribute("equal", kept, weights, weights, alive).values())
    assert found == counts and sum(found) == kept
    # nobody below the level of the others has anything left to give
    assert all(now == full or now >= max(found) - 1 for now, full in zip(found, have, strict=True))


def test_equal_layers_refuse_what_cannot_be() -> None:
    weights, alive = _alive([(2, 3), (4, 5)], [0, 0])
    with pytest.raises(SparseLabError, match="would empty a layer"):
        distribute("equal", 1, weights, weights, alive)


def _clock(**parts: int) -> Clock:
    return Clock(rounds=2, epochs_a_round=4, steps_an_epoch=5, **parts)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (0, 3), (1, 6)])
def test_a_round_is_a_part_of_a_longer_schedule_of_the_learning_rate(before: int, after: int) -> None:
    clock = _clock(epochs_before=before, epochs_after=after)
    for _ in range(2):
        seen = []
        for _ in range(20):
            seen.append(clock.schedule_place)
            clock.tick()
        assert seen == [(5 * before + step, 5 * (before + 4 + after)) for step in range(20)]
        assert clock.schedule_place == seen[-1], "a step more than there are does not pass the end"
        clock.end_round()
    assert clock.finished and clock.total_epochs == 8 and clock.steps_a_round == 20
    assert "epochs_before" not in clock.state_dict(), "it follows from the config, not from the checkpoint"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smallest", [-torch.inf, -3.0, 0.0])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_the_kth_largest_where_most_values_are_the_smallest(share: float, smallest: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(997, generator=generator, dtype=torch.float64).abs().mul(4).round().to(dtype)
    flat[torch.randperm(997, generator=generator)[: round(share * 997)]] = smallest
    descending = np.sort(flat.double().numpy())[::-1]
    for k in (1, 2, 9, 10, 11, 498, 499, 500, 986, 987, 988, 996, 997):
        found = kth_largest(flat, k)
        assert found.dtype == dtype and found.dim() == 0 and float(found) == descending[k - 1], k
        picked = top_k(flat, k)
        order = np.argsort(-flat.double().numpy(), kind="stable")[:k]
        assert set(np.flatnonzero(picked.numpy())) == set(order), k


def test_the_kth_largest_of_one_and_of_equals() -> None:
    assert float(kth_largest(torch.tensor([4.0]), 1)) == 4.0
    assert all(float(kth_largest(torch.full((5,), -torch.inf), k)) == -torch.inf for k in range(1, 6))
    assert [float(kth_largest(torch.tensor([torch.inf, -torch.inf, torch.inf]), k)) for k in (1, 2, 3)] == [
        torch.inf, torch.inf, -torch.inf
    ]  # fmt: skip


def test_equal_counts_prune_a_network_exactly() -> None:
    from sparse_lab.sparsity.mask_updates import prune_to

    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 8, 3), nn.Conv2d(8, 2, 1), nn.Linear(2, 64))
    masks = Masks(net)  # 54, 144, 16 and 128 weights
    scores = {name: weight.detach().abs() for name, weight in masks.weights().items()}
    masks.set(prune_to(masks, 100, scores, "equal"))
    assert list(masks.kept_by_layer().values()) == [28, 28, 16, 28]
