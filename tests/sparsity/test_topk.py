"""Exact, tie-stable selection, against a stable sort in plain Python and against torch.nn.utils.prune."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from sparse_lab.errors import SparseLabError
from sparse_lab.sparsity.topk import global_counts, kth_largest, top_k, top_k_each

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TYING = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -3.0, math.inf, -math.inf])
NUMBERS = st.one_of(TYING, st.floats(-1e4, 1e4, width=16))


def _best(scores: list[float], k: int) -> list[bool]:
    """sorted() is stable: among equal scores the lowest index comes first."""
    chosen = set(sorted(range(len(scores)), key=lambda i: -scores[i])[:k])
    return [i in chosen for i in range(len(scores))]


@given(st.lists(NUMBERS, min_size=1, max_size=40), st.sampled_from(DTYPES), st.data())
def test_top_k_is_a_stable_sort(scores: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    tensor = torch.tensor(scores, dtype=dtype)
    assert top_k(tensor, k).tolist() == _best(tensor.tolist(), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_counts_exactly_among_thousands_of_ties(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randn(50, 40).mul(4).round().div(4).to(dtype)
    assert scores.unique().numel() < 60
    for k in (0, 1, 7, 500, 1000, 1999, 2000):
        picked = top_k(scores, k)
        assert picked.shape == scores.shape
        assert picked.dtype == torch.bool
        assert picked.flatten().tolist() == _best(scores.flatten().tolist(), k)


@pytest.mark.parametrize("value", [0.0, -1.5, math.inf, -math.inf])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_constant_scores_pick_the_lowest_indices(value: float, k: int) -> None:
    assert top_k(torch.full((6,), value), k).tolist() == [i < k for i in range(6)]


def test_bf16_neighbours_that_float32_would_tell_apart_are_ties() -> None:
    scores = torch.tensor([1.0, 1.001, 1.002, 0.5]).bfloat16()
    assert len(set(scores.tolist())) == 2
    assert top_k(scores, 2).tolist() == [True, True, False, False]


def test_integers_beyond_float32_are_told_apart() -> None:
    big = 2**24
    assert top_k(torch.tensor([big, big + 3, big + 1]), 1).tolist() == [False, True, False]


def test_index_order_is_the_logical_one_whatever_the_memory_layout() -> None:
    scores = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert top_k(scores, 5).flatten().tolist() == [i < 5 for i in range(24)]


def test_scores_are_left_alone() -> None:
    scores = torch.randn(100, requires_grad=True)
    before = scores.detach().clone()
    top_k(scores, 30)
    assert torch.equal(scores.detach(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_nan_is_refused_at_every_count(dtype: torch.dtype, k: int) -> None:
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([1.0, math.nan, 2.0], dtype=dtype), k)


@pytest.mark.parametrize("k", [-1, 4])
def test_counts_out_of_bounds_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"cannot pick {k} of 3"):
        top_k(torch.ones(3), k)


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.sampled_from(DTYPES), st.data())
def test_kth_largest(scores: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    tensor = torch.tensor(scores, dtype=dtype)
    found = kth_largest(tensor, k)
    assert found.dtype == dtype
    assert float(found) == sorted(tensor.tolist(), reverse=True)[k - 1]


def test_each_layer_its_own_count() -> None:
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([[9.0, 8.0], [7.0, 7.0]])}
    masks = top_k_each(scores, {"a": 1, "b": 3})
    assert masks["a"].tolist() == [True, False, False]
    assert masks["b"].tolist() == [[True, True], [True, False]]


def _counts_by_greed(layers: list[list[float]], total: int, least: int) -> list[int]:
    """Every layer's best first, then the rest one by one: highest score, then first layer, then lowest index."""
    everything = [(-score, layer, i) for layer, scores in enumerate(layers) for i, score in enumerate(scores)]
    kept = {
        (layer, i)
        for layer, scores in enumerate(layers)
        for i in sorted(range(len(scores)), key=lambda j: -scores[j])[:least]
    }
    for _, layer, i in sorted(everything):
        if len(kept) < total:
            kept.add((layer, i))
    return [sum(1 for place in kept if place[0] == layer) for layer in range(len(layers))]


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=8), min_size=1, max_size=5), st.integers(1, 3), st.data())
def test_global_counts_equal_brute_force(layers: list[list[float]], least: int, data: st.DataObject) -> None:
    sizes = [len(scores) for scores in layers]
    floors = [min(least, size) for size in sizes]
    total = data.draw(st.integers(sum(floors), sum(sizes)))
    scores = {f"layer{i}": torch.tensor(values, dtype=torch.float64) for i, values in enumerate(layers)}
    counts = global_counts(scores, total, least)
    assert list(counts) == list(scores)
    assert sum(counts.values()) == total
    assert all(floor <= count <= size for floor, count, size in zip(floors, counts.values(), sizes, strict=True))
    assert list(counts.values()) == _counts_by_greed(layers, total, least)


def test_global_counts_are_exact_where_nearly_all_scores_are_minus_infinity() -> None:
    low = -math.inf
    scores = {"a": torch.tensor([1.0, low, low, low]), "b": torch.tensor([low, low])}
    assert global_counts(scores, 3) == {"a": 2, "b": 1}


def test_a_weak_layer_keeps_its_best_weight() -> None:
    scores = {"weak": torch.tensor([1e-9, 2e-9]), "strong": torch.arange(1.0, 9.0)}
    assert global_counts(scores, 5) == {"weak": 1, "strong": 4}
    assert global_counts(scores, 5, least=2) == {"weak": 2, "strong": 3}


def test_too_few_weights_for_the_layers_say_so() -> None:
    scores = {name: torch.ones(4) for name in "abc"}
    with pytest.raises(SparseLabError, match=r"2 weights cannot keep 3 layers alive.*lower sparsity"):
        global_counts(scores, 2)
    with pytest.raises(SparseLabError, match="at least 2 each"):
        global_counts(scores, 5, least=2)


@pytest.mark.parametrize("amount", [100, 700, 1200, 1500])
def test_global_ranking_agrees_with_torch_prune(amount: int) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(40, 12))
    parts = {name: module for name, module in net.named_children() if hasattr(module, "weight")}
    scores = {name: module.weight.detach().abs().clone() for name, module in parts.items()}
    total = sum(score.numel() for score in scores.values())
    assert torch.cat([score.flatten() for score in scores.values()]).unique().numel() == total, "no ties here"
    prune.global_unstructured(
        [(module, "weight") for module in parts.values()], pruning_method=prune.L1Unstructured, amount=amount
    )
    counts = global_counts(scores, total - amount)
    masks = top_k_each(scores, counts)
    for name, module in parts.items():
        assert torch.equal(masks[name], module.weight_mask.bool()), name
        assert counts[name] == int(module.weight_mask.sum())


def test_chance_draws_among_ties_and_only_there():
    """5 stand above the tie, 10 of 40 tied ones are drawn, each about as often."""
    scores = torch.cat([torch.zeros(20), torch.full((40,), 1.0), torch.arange(2.0, 7.0)])
    drawn = torch.zeros(65)
    for seed in range(400):
        picked = top_k(scores, 15, torch.Generator().manual_seed(seed))
        assert int(picked.sum()) == 15 and bool(picked[60:].all()) and not picked[:20].any()
        drawn += picked
    # binomial: 400 draws of probability 1/4 have mean 100 and standard deviation 8.7
    assert (drawn[20:60] - 100).abs().max() < 5 * 8.7
    same = [top_k(scores, 15, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*same)
