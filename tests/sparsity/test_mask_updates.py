"""Pruning and growing to a number, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.mask_updates import grow_to, prune_to
from sparse_lab.sparsity.masks import Masks

SIZES = {"0": 24, "1": 12, "2": 6}


def _masks(alive: dict[str, int] | None = None) -> Masks:
    """Three layers of 24, 12 and 6 weights; `alive` says how many of each are (at random places)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    masks = Masks(net)
    if alive is not None:
        masks.set({name: _some(mask, alive[name]) for name, mask in masks.masks().items()})
    return masks


def _some(mask: Tensor, number: int) -> Tensor:
    flat = torch.zeros(mask.numel(), dtype=torch.bool)
    flat[torch.randperm(mask.numel())[:number]] = True
    return flat.reshape(mask.shape)


def _scores(masks: Masks, ties: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(7)
    scores = {name: torch.randn(weight.shape) for name, weight in masks.weights().items()}
    return {name: score.round() for name, score in scores.items()} if ties else scores


def _places(mask: Tensor) -> list[int]:
    return [i for i, value in enumerate(mask.flatten().tolist()) if value]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kept", [3, 5, 11, 20, 21])
def test_global_pruning_keeps_the_best_of_what_is_alive(kept: int, ties: bool) -> None:
    masks = _masks({"0": 10, "1": 8, "2": 3})
    scores = _scores(masks, ties)
    new = prune_to(masks, kept, scores, "global")
    alive = [
        (-float(scores[name].flatten()[i]), index, i) for index, name in enumerate(SIZES) for i in _places(masks[name])
    ]
    best = {min(place for place in alive if place[1] == index) for index in range(3)}
    for place in sorted(alive):
        if len(best) < kept:
            best.add(place)
    for index, name in enumerate(SIZES):
        assert _places(new[name]) == sorted(i for _, layer, i in best if layer == index)


@pytest.mark.parametrize("distribution", ["global", "lamp", "uniform", "er", "erk"])
def test_pruning_is_exact_in_each_layer_and_picks_its_best(distribution: str) -> None:
    masks = _masks({"0": 20, "1": 8, "2": 3})
    scores = _scores(masks, ties=True)
    for kept in range(3, 32):
        new = prune_to(masks, kept, scores, distribution)
        assert sum(int(mask.sum()) for mask in new.values()) == kept
        for name, mask in new.items():
            flat = scores[name].flatten().tolist()
            ranked = sorted(_places(masks[name]), key=lambda i: -flat[i])
            assert _places(mask) == sorted(ranked[: int(mask.sum())])
            assert mask.any()


def test_pruning_never_revives() -> None:
    masks = _masks({"0": 5, "1": 4, "2": 3})
    with pytest.raises(SparseLabError, match="cannot prune to 13 weights: only 12 are alive"):
        prune_to(masks, 13, _scores(masks), "global")


def test_pruning_does_not_empty_a_layer() -> None:
    masks = _masks()
    with pytest.raises(SparseLabError, match="would empty a layer"):
        prune_to(masks, 2, _scores(masks), "erk")


def test_an_update_changes_nothing_itself() -> None:
    masks = _masks({"0": 5, "1": 4, "2": 3})
    scores = _scores(masks)
    before = {name: mask.clone() for name, mask in masks.masks().items()}
    copies = {name: score.clone() for name, score in scores.items()}
    prune_to(masks, 6, scores, "lamp")
    grow_to(masks, 20, scores, [list(SIZES)])
    assert all(torch.equal(masks[name], before[name]) for name in SIZES)
    assert all(torch.equal(scores[name], copies[name]) for name in SIZES)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kept", [12, 13, 20, 41, 42])
def test_growth_is_exact_keeps_what_lives_and_takes_the_best_pruned(kept: int, ties: bool) -> None:
    masks = _masks({"0": 5, "1": 4, "2": 3})
    scores = _scores(masks, ties)
    new = grow_to(masks, kept, scores, [list(SIZES)])
    assert sum(int(mask.sum()) for mask in new.values()) == kept
    for name, mask in new.items():
        old = set(_places(masks[name]))
        assert old <= set(_places(mask))
        grown = int(mask.sum()) - len(old)
        flat = scores[name].flatten().tolist()
        pruned = [i for i in range(SIZES[name]) if i not in old]
        assert set(_places(mask)) - old == set(sorted(pruned, key=lambda i: -flat[i])[:grown])


def test_growth_is_shared_by_what_each_layer_lost() -> None:
    masks = _masks({"0": 4, "1": 2, "2": 1})  # lost 20, 10, 5
    new = grow_to(masks, 7 + 14, _scores(masks), [list(SIZES)])
    assert [int(new[name].sum() - masks[name].sum()) for name in SIZES] == [8, 4, 2]


@pytest.mark.parametrize(
    ("order", "growth", "expected"),
    [
        ([["2"], ["1"], ["0"]], 3, [0, 0, 3]),
        ([["2"], ["1"], ["0"]], 5, [0, 0, 5]),
        ([["2"], ["1"], ["0"]], 9, [0, 4, 5]),
        ([["2"], ["1"], ["0"]], 20, [5, 10, 5]),
        ([["1", "2"], ["0"]], 6, [0, 4, 2]),
        ([["1", "2"], ["0"]], 16, [1, 10, 5]),
        ([["1"], [], ["0", "2"]], 15, [4, 10, 1]),
        ([["0"]], 0, [0, 0, 0]),
    ],
)
def test_a_full_group_spills_over_to_the_next(order: list[list[str]], growth: int, expected: list[int]) -> None:
    masks = _masks({"0": 4, "1": 2, "2": 1})  # lost 20, 10, 5
    new = grow_to(masks, 7 + growth, _scores(masks), order)
    assert [int(new[name].sum() - masks[name].sum()) for name in SIZES] == expected


@pytest.mark.parametrize("order", [[["2"], ["1"], ["0"]], [["2"], ["0", "1"]], [["0", "2"], ["1"]]])
def test_a_group_that_lost_nothing_takes_nothing(order: list[list[str]]) -> None:
    masks = _masks({"0": 4, "1": 2, "2": 6})
    new = grow_to(masks, 12 + 5, _scores(masks), order)
    assert sum(int(mask.sum()) for mask in new.values()) == 17
    assert int(new["2"].sum()) == 6


@pytest.mark.parametrize("order", [[["0", "0", "1"]], [["0"], ["0", "1"]]])
def test_a_layer_named_twice_counts_once(order: list[list[str]]) -> None:
    masks = _masks({"0": 4, "1": 2, "2": 1})
    for kept in (8, 20, 37):
        assert sum(int(mask.sum()) for mask in grow_to(masks, kept, _scores(masks), order).values()) == kept


def test_growth_refuses_to_shrink() -> None:
    masks = _masks({"0": 5, "1": 4, "2": 3})
    with pytest.raises(SparseLabError, match="cannot regrow to 11 weights: 12 are alive already"):
        grow_to(masks, 11, _scores(masks), [list(SIZES)])


def test_growth_beyond_the_chosen_layers_says_what_they_can_take() -> None:
    masks = _masks({"0": 4, "1": 2, "2": 1})
    with pytest.raises(SparseLabError, match="can take 15 weights, not 16: name more"):
        grow_to(masks, 7 + 16, _scores(masks), [["2"], ["1"]])


@given(st.data())
def test_growth_after_pruning_is_exact_whatever_the_numbers(data: st.DataObject) -> None:
    masks = _masks({name: data.draw(st.integers(1, size)) for name, size in SIZES.items()})
    scores = _scores(masks, ties=data.draw(st.booleans()))
    fewer = data.draw(st.integers(3, masks.kept()))
    masks.set(prune_to(masks, fewer, scores, data.draw(st.sampled_from(["global", "lamp", "uniform", "erk"]))))
    assert masks.kept() == fewer
    more = data.draw(st.integers(fewer, 42))
    order = data.draw(st.permutations(list(SIZES)))
    cut = data.draw(st.integers(0, 3))
    masks.set(grow_to(masks, more, scores, [order[:cut], order[cut:]]))
    assert masks.kept() == more


@pytest.mark.parametrize("distribution", ["global", "uniform", "erk"])
def test_scores_of_minus_infinity_revive_nothing_and_lose_no_count(distribution: str) -> None:
    """A log-type score can be -inf where a weight is alive; what is pruned must still never tie with it."""
    masks = _masks({"0": 10, "1": 8, "2": 3})
    before = {name: mask.clone() for name, mask in masks.masks().items()}
    lowest = {name: torch.full(mask.shape, -torch.inf) for name, mask in before.items()}
    pruned = prune_to(masks, 15, lowest, distribution)
    assert sum(int(mask.sum()) for mask in pruned.values()) == 15
    assert all(not (pruned[name] & ~before[name]).any() for name in before)
    grown = grow_to(masks, 30, lowest, [list(before)])
    assert sum(int(mask.sum()) for mask in grown.values()) == 30
    assert all((grown[name] | ~before[name]).all() for name in before)
